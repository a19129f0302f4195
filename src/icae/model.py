"""ICAE: the base, its encoder and its decoder behind a few verbs. Training, evaluation, command line and server all go through here.

compress   text(s) -> MemorySlots         reconstruct     slots -> the text, checked against the slots
                                          continue_text   slots -> what follows
                                          answer          slots, prompt -> response
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from icae.base import Base
from icae.beginnings import Doubt, echo
from icae.chat import full_text
from icae.config import ICAEConfig
from icae.decoder import Decoder
from icae.encoder import Encoder
from icae.errors import ICAEError
from icae.focus import asked, focus
from icae.grounding import Guide, Words
from icae.lean import LeanLlama
from icae.loss import batch_loss
from icae.objectives import Example, Marker, padded
from icae.polish import default_steps, polishing
from icae.reader import GREEDY, Reader, Sampling, Score
from icae.refine import Refined, refine, tolerance
from icae.segments import alike, check_ratio, cut
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots, Origin
from icae.stepwise import finished, saying
from icae.tree_loss import tree_loss

Slots = MemorySlots | Sequence[MemorySlots]


class ICAE(nn.Module):
    """An in-context autoencoder (arXiv 2307.06945): a LoRA encoder that writes memory slots, and the frozen base that reads them.

    Trainable are exactly the LoRA matrices, the memory token, the markers (the AE, LM and FT vectors) and, where the config asks for them,
    the encoder's maps `mix` and `connector`.
    """

    def __init__(self, base: Base, config: ICAEConfig):
        super().__init__()
        self.base = base
        self.config = config.replace(base=base.name, base_fingerprint=base.fingerprint)
        self.encoder = Encoder(base, self.config)
        self.decoder = Decoder(base)
        bos = base.tokenizer.bos_token_id
        sink = base.embed(torch.tensor([base.eos_ids[0] if bos is None else bos], device=base.device)).detach().float()
        asks = base.embeddings().mean(0, keepdim=True)
        self.markers = nn.Parameter(torch.cat([sink, asks.repeat(config.marker_length - 1, 1)]).repeat(len(Marker), 1, 1))
        self.reader = Reader(self.decoder, self.config, self.markers)
        self.encoder.memory.data = self.encoder.memory.data.float()
        self.tutor: Reader | None = None  # who teaches samples that are `by_tutor`; none: the frozen decoder
        self.lean_tutor: LeanLlama | None = None  # the same, where training is lean
        self._adapter_hash: str | None = None

    # ---- files ----

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, base: Base | str | None = None, device: str = "cpu", **kwargs: Any) -> ICAE:
        """Load a checkpoint.

        Parameters
        ----------
        path : str or Path, optional
            A checkpoint folder, the name of an adapter that ships, or a Hub id; none: the default adapter.
        base : Base or str, optional
            The base to put it on; none: the one its config names.
        device, **kwargs
            As for `load_base`, where `base` is a name or none; one that is loaded stays where it is, and as it is.

        Raises
        ------
        ICAEError
            If a file is missing or damaged, or the base is not the one the adapter was trained on.
        """
        from icae.checkpoint import load_checkpoint

        return load_checkpoint(cls, path, base=base, device=device, **kwargs)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None, card: str | None = None) -> None:
        """Write the adapter to a folder (checkpoint.py tells its files); the base is not copied.

        Parameters
        ----------
        path : str or Path
            Made where it is missing; what it holds of an adapter is replaced.
        dtype : torch.dtype, optional
            What the tensors are written in; none: as they are. A smaller one makes another adapter of them, which does not read this one's
            slots.
        card : str, optional
            README.md; none: the one that stands there, else a plain one.

        Raises
        ------
        ICAEError
            If it cannot be written; what stood there is as it was then.
        """
        from icae.checkpoint import save_checkpoint

        save_checkpoint(self, Path(path), dtype=dtype, card=card)

    def push_to_hub(self, repository: str, **kwargs: Any) -> str:
        """Upload the adapter to the Hugging Face Hub and return its address; keyword arguments go to `HfApi.upload_folder`.

        Raises
        ------
        ICAEError
            If the Hub does not take it.
        """
        from icae.checkpoint import push_checkpoint

        return push_checkpoint(self, repository, **kwargs)

    @property
    def origin(self) -> Origin:
        """What goes into slots to say who made them."""
        c = self.config
        if self._adapter_hash is None or self.training:
            sha = hashlib.sha256()
            for name, tensor in sorted(self.adapter_tensors().items()):
                sha.update(f"{name} {tuple(tensor.shape)}".encode())
                sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
            self._adapter_hash = sha.hexdigest()
        return Origin(c.kind, c.ratio, c.layout, c.base, c.base_fingerprint, self._adapter_hash, self._steps(c.ratio))

    def origin_at(self, ratio: int | None = None, polish: int | None = None) -> Origin:
        """Return the origin of slots with this ratio and so many steps of polishing; none: the checkpoint's own."""
        ratio = self.config.ratio if ratio is None else ratio
        return dataclasses.replace(self.origin, ratio=ratio, polish=self._steps(ratio) if polish is None else polish)

    def _steps(self, ratio: int) -> int:
        return default_steps(ratio) if self.config.polish is None else self.config.polish

    def train(self, mode: bool = True) -> ICAE:
        """Switch between training and use (`torch.nn.Module.train`); what is trained gets a new hash."""
        if mode:
            self.forget_hash()
        return super().train(mode)

    def forget_hash(self) -> None:
        """Have the adapter's hash computed anew, after its tensors changed."""
        self._adapter_hash = None

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return all that is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # ---- training ----

    def forward(
        self,
        segment_ids: Tensor,
        lengths: list[int],
        groups: list[list[int]],
        markers: Tensor,
        text_ids: Tensor,
        real: Tensor,
        scored: Tensor,
        weights: Tensor,
        ratio: int | None = None,
        teacher: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of one batch from `objectives.collate`, a scalar under the name `loss` (see `batch_loss`)."""
        slots = self._encode(segment_ids, lengths, groups, ratio)
        texts = (markers, text_ids, real, scored, weights)
        if self.encoder.lean is not None and self.training:
            return {"loss": tree_loss(self.encoder.lean, self.reader, slots, groups, *texts, teacher, self.lean_tutor)}
        return {"loss": batch_loss(self.reader, slots, *texts, teacher, self.tutor)}

    def _encode(self, segment_ids: Tensor, lengths: list[int], groups: list[list[int]], ratio: int | None) -> SlotBatch:
        """Return the contexts' slots, with gradient; segments of like lengths are encoded together, but on accelerators all at once."""
        device = self.base.device
        together = alike(lengths, 0.75 if device.type == "cpu" else 0.0)
        order = [i for rows in together for i in rows]
        batches, loras = [], self.encoder.joined()
        for rows in together:
            taken = [lengths[i] for i in rows]
            batches.append(self.encoder(segment_ids[rows, : max(taken)].to(device, non_blocking=True), taken, ratio, loras))
        place = {row: at for at, row in enumerate(order)}
        return SlotBatch.stack(batches).joined([[place[i] for i in group] for group in groups])

    # ---- writing slots ----

    @overload
    def compress(self, texts: str, **kwargs: Any) -> MemorySlots: ...
    @overload
    def compress(self, texts: Sequence[str], **kwargs: Any) -> list[MemorySlots]: ...
    def compress(self, texts: str | Sequence[str], **kwargs: Any) -> MemorySlots | list[MemorySlots]:
        """Compress a text, or several, into memory slots; keyword arguments and errors as for `compress_ids`."""
        if isinstance(texts, str):
            return self.compress_ids([self.base.encode(texts)], **kwargs)[0]
        return self.compress_ids([self.base.encode(t) for t in texts], **kwargs)

    @torch.no_grad()
    def compress_ids(
        self,
        contexts: Sequence[list[int]],
        *,
        ratio: int | None = None,
        polish: int | None = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[MemorySlots]:
        """Compress contexts given as token ids.

        Parameters
        ----------
        contexts : sequence of list of int
            Each of at least two tokens; long ones are cut into segments.
        ratio : int, optional
            Context tokens a slot; none: the checkpoint's own.
        polish : int, optional
            Gradient steps on each segment's slots after they were written (polish.py); none: the checkpoint's own.
        batch_size : int
            Segments encoded at once.
        progress : callable, optional
            Called with (segments done, segments in all).

        Raises
        ------
        ICAEError
            If a context has fewer than two tokens, the ratio is below 1, or `polish` below 0.
        """
        check_ratio(ratio)
        ratio = self.config.ratio if ratio is None else ratio
        for ids in contexts:
            if len(ids) < 2:
                raise ICAEError(f"a context needs at least two tokens, this one has {len(ids)}; give a longer text")
        bounds = [cut(len(ids), self.config.segment_length, ratio) for ids in contexts]
        rows = [ids[a:b] for ids, cuts in zip(contexts, bounds, strict=True) for a, b in cuts]
        made = iter(self.compress_segments(rows, ratio=ratio, polish=polish, batch_size=batch_size, progress=progress))
        return [MemorySlots.concatenate([next(made) for _ in cuts], same=True) for cuts in bounds]

    @torch.no_grad()
    def compress_segments(
        self,
        rows: Sequence[list[int]],
        *,
        ratio: int | None = None,
        polish: int | None = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[MemorySlots]:
        """Compress segments given as token ids, each of one token or more, as they are; parameters as for `compress_ids`."""
        steps = self.compressing(rows, ratio=ratio, polish=polish, batch_size=batch_size)
        return finished(steps, None if progress is None else lambda done: progress(done, len(rows)))

    @torch.no_grad()
    def compressing(
        self, rows: Sequence[list[int]], *, ratio: int | None = None, polish: int | None = None, batch_size: int = 8
    ) -> Generator[int, None, list[MemorySlots]]:
        """Compress segments step by step: a pass of the encoder, or a gradient step; parameters as for `compress_ids`.

        Yields
        ------
        int
            Segments done.

        Returns
        -------
        list of MemorySlots
            As the generator's value.
        """
        self.eval()
        check_ratio(ratio)
        if batch_size < 1:
            raise ICAEError(f"batch_size must be at least 1, got {batch_size}")
        if polish is not None and polish < 0:
            raise ICAEError(f"polish must be at least 0, got {polish}; 1 is a good deal better than none, each costs a pass forth and back")
        origin = self.origin_at(ratio, polish)
        made: list[MemorySlots] = []
        unpolished = dataclasses.replace(origin, polish=0)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths together: less padding
        for at in range(0, len(rows), batch_size):
            batch = [rows[i] for i in order[at : at + batch_size]]
            written = self.encoder(padded(batch).to(self.base.device), [len(r) for r in batch], origin.ratio).rows(unpolished)
            made.extend((yield from saying(lambda _: len(made), polishing(self.reader, written, batch, origin.polish))))
            yield len(made)
        back = dict(zip(order, made, strict=True))
        return [dataclasses.replace(back[i], ids=torch.tensor(rows[i], dtype=torch.int32)) for i in range(len(rows))]

    # ---- reading slots ----

    def reconstruct(self, slots: Slots, *, refine: bool | None = None, batch_size: int = 16) -> Any:
        """Give the text back: a string, or a list of strings for several slots.

        It is what the decoder reads from the slots (greedy), put right where its own slots differ from the given ones (`refine_ids`) if
        `refine` is true; none: where that is quick (`refines`). Errors as for `refine_ids`.
        """
        many = [slots] if isinstance(slots, MemorySlots) else list(slots)
        read = self.read_segments(many, batch_size=batch_size)
        made = [r.ids for r in self.refine_ids(many, read)] if self.refines(refine) else [joined(rows) for rows in read]
        texts = [self.base.decode(ids) for ids in made]
        return texts[0] if isinstance(slots, MemorySlots) else texts

    def reconstruct_ids(self, slots: Sequence[MemorySlots], *, batch_size: int = 16) -> list[list[int]]:
        """Give token ids back as the decoder reads them from the slots, greedily."""
        return [joined(rows) for rows in self.read_segments(slots, batch_size=batch_size)]

    def read_segments(self, slots: Sequence[MemorySlots], *, batch_size: int = 16) -> list[list[list[int]]]:
        """Give the ids of each context's segments back as the decoder reads them, greedily.

        Every segment is read back alone, from its own slots, many at a time; each at most as long as it was.
        """
        for s in slots:
            self.check(s)
        parts = [part for s in slots for part in s.split()]
        made: list[list[int]] = []
        for at in range(0, len(parts), batch_size):
            rows = parts[at : at + batch_size]
            made += self.reader.collect(rows, [[]] * len(rows), Marker.AE, [p.tokens for p in rows])
        numbers = iter(made)
        return [[next(numbers) for _ in s.segments] for s in slots]

    def refines(self, wanted: bool | None = None) -> bool:
        """Return `wanted`; where it is none, whether refining is quick enough to be done unasked."""
        return self.encoder.read_from != "output" if wanted is None else wanted

    def refine_ids(
        self, slots: Sequence[MemorySlots], read: Sequence[Sequence[list[int]]], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Refined]:
        """Compress reconstructions again, and put them right where their slots differ from the given ones (refine.py).

        With kv slots a segment takes about as long as reading it alone does, with embedding slots several times that, and much longer where
        these are read off the last layer alone.

        Parameters
        ----------
        slots : sequence of MemorySlots
            What the texts were read from.
        read : sequence of sequences of list of int
            What `read_segments` gave back.
        progress : callable, optional
            Called with (segments done, segments in all).

        Raises
        ------
        ICAEError
            For slots that this model cannot read.
        """
        for s in slots:
            self.check(s)
        self.eval()
        refined, done, total = [], 0, sum(len(s.segments) for s in slots)
        for s, rows in zip(slots, read, strict=True):
            segments = []
            for part, row in zip(s.to(self.base.device).split(), rows, strict=True):
                segments.append((*refine(self.encoder, part, row, partial(self.reader.choices, part)), tolerance(part)))
                done += 1
                if progress is not None:
                    progress(done, total)
            ids, mismatches, tolerances = zip(*segments, strict=True)
            refined.append(Refined(joined(ids), list(mismatches), list(tolerances)))
        return refined

    def continue_text(self, slots: MemorySlots, *, max_new_tokens: int = 128, sampling: Sampling = GREEDY) -> str:
        """Continue the text that the slots stand for, by `max_new_tokens`; errors as for `stream_answer`."""
        return "".join(self.stream_continuation(slots, max_new_tokens=max_new_tokens, sampling=sampling))

    def answer(self, slots: MemorySlots | None, prompt: str, *, max_new_tokens: int = 256, sampling: Sampling = GREEDY) -> str:
        """Respond to a prompt about the text that the slots stand for; without slots, as the base alone would.

        Errors as for `stream_answer`.
        """
        return "".join(self.stream_answer(slots, prompt, max_new_tokens=max_new_tokens, sampling=sampling)).strip()

    def answer_text(self, text: str, prompt: str, *, max_new_tokens: int = 256, sampling: Sampling = GREEDY) -> str:
        """Respond to a prompt about a full text, uncompressed, as the base alone does; for comparison. Errors as for `stream_answer`."""
        return self.answer(None, full_text(text, prompt), max_new_tokens=max_new_tokens, sampling=sampling)

    def answers(
        self,
        slots: Sequence[MemorySlots] | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        words: Sequence[Words | None] | None = None,
        beginnings: int | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[str]:
        """Respond to several prompts in one batch, each with its own slots; without slots, as the base alone would.

        `words` are what each response is spelled by (`ICAE.words`); none: the slots' own context, and without slots nothing. `beginnings`
        are how many ways each is begun (beginnings.py); none: the checkpoint's own, and without slots one. `questions` are what the prompts
        ask, where these hold more. Errors as for `stream_answer`, of the batch as a whole.
        """
        if not prompts:
            return []
        beginnings = (1 if slots is None else self.config.beginnings) if beginnings is None else beginnings
        slots = slots and [self.focused(s, p) for s, p in zip(slots, prompts, strict=True)]
        ids = [self.base.prompted(p, alone=slots is None) for p in prompts]
        words = [self.words(s.ids) for s in slots] if words is None and slots is not None else words
        guides = None if words is None else [self.guide(w) for w in words]
        marker, limits = None if slots is None else Marker.FT, [max_new_tokens] * len(ids)
        doubts = [echo(q, self.base.decode) for q in questions or prompts]
        made = self.reader.collect(slots, ids, marker, limits, sampling, guides, beginnings, doubts)
        return [self.base.decode(row).strip() for row in made]

    def focused(self, slots: MemorySlots, prompt: str, *, history: list[dict[str, str]] | None = None) -> MemorySlots:
        """Return the slots that a prompt is answered from: those of the segments that it is about, at most `config.focus`.

        `answer`, `answers` and `stream_answer` begin with this. Raises `ICAEError` for slots that this model cannot read.
        """
        self.check(slots)
        if not self.config.focus:
            return slots
        ids = self.base.encode(asked([*(history or []), {"role": "user", "content": prompt}]))
        return focus(self.reader, slots, ids, self.config.focus)

    def words(self, ids: Tensor | None) -> Words | None:
        """Return the words of a context's token ids, which answers are spelled by (grounding.py); none where these were not kept."""
        return None if ids is None or not len(ids) or not self.config.grounding else self.base.words(ids.tolist())

    def guide(self, words: Words | None) -> Guide | None:
        """Return what keeps one answer to the words of its context; none without words."""
        return None if words is None else words.guide(self.config.grounding)

    def stream_reconstruction(self, slots: MemorySlots) -> Iterator[str]:
        """Return the text as the decoder reads it back (not refined), piece by piece, one segment after the other."""
        self.check(slots)
        return self.reader.text(i for part in slots.split() for i in self.reader.ids(part, [], Marker.AE, part.tokens))

    def stream_continuation(
        self,
        slots: MemorySlots | None,
        *,
        begun: Sequence[int] = (),
        max_new_tokens: int = 128,
        may_end: bool = False,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """Return a continuation piece by piece; what is wrong is raised at once.

        `begun` are ids that already follow the slots' text; without slots they are all that the base reads. Unless it `may_end`, the
        text goes on for `max_new_tokens`, as in training: a chat model would take many a text for finished.
        """
        least = 0 if may_end else max_new_tokens
        return self._stream(slots, list(begun), None if slots is None else Marker.LM, max_new_tokens, sampling, least)

    def stream_answer(
        self,
        slots: MemorySlots | None,
        prompt: str,
        *,
        history: list[dict[str, str]] | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """Return a response piece by piece; `history` holds earlier turns as chat messages.

        Raises
        ------
        ICAEError
            At once: for slots that this model cannot read, messages that the base's chat template refuses, or where the base has no
            positions for slots, prompt and `max_new_tokens` together.
        """
        marker = None if slots is None else Marker.FT
        slots = slots and self.focused(slots, prompt, history=history)
        guide, beginnings = (None, 1) if slots is None else (self.guide(self.words(slots.ids)), self.config.beginnings)
        ids = self.base.prompted(prompt, history, alone=slots is None)
        doubts = [echo(prompt, self.base.decode)]
        return self._stream(slots, ids, marker, max_new_tokens, sampling, guide=guide, beginnings=beginnings, doubts=doubts)

    def _stream(
        self,
        slots: MemorySlots | None,
        prompt: list[int],
        marker: Marker | None,
        limit: int,
        sampling: Sampling,
        least: int = 0,
        guide: Guide | None = None,
        beginnings: int = 1,
        doubts: Sequence[Doubt] | None = None,
    ) -> Iterator[str]:
        """Check now, and return what is generated for one row, as text."""
        if slots is not None:
            self.check(slots)
        return self.reader.text(self.reader.ids(slots, prompt, marker, limit, sampling, least, guide, beginnings, doubts))

    def score(self, slots: Sequence[MemorySlots] | None, examples: Sequence[Example], *, marked: bool = True) -> list[Score]:
        """Score each example's target, read from its slots or from its own prompt alone; parameters and errors as for `Reader.score`."""
        self.eval()
        return self.reader.score(slots, examples, marked=marked)

    def check(self, slots: MemorySlots) -> None:
        """Raise `ICAEError` for slots that this model cannot read: of another base, adapter, kind or layout."""
        self.origin.check(slots.origin)


def joined(segments: Iterable[list[int]]) -> list[int]:
    """Return the ids of all segments in one list."""
    return [i for segment in segments for i in segment]
