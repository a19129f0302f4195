"""Slots, a marker and a prompt -> logits, scores, ids or text: the decoder, with the markers that tell it what is asked of it.

[AE] give the text back          [LM] go on from it          [FT] answer the prompt          no marker: the base as it reads plain text
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icae.beginnings import Doubt
from icae.config import ICAEConfig
from icae.decoder import Decoder, Guide
from icae.errors import ICAEError
from icae.objectives import Example, Marker, collate, padded
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots


@dataclass(frozen=True)
class Sampling:
    """How generation chooses tokens."""

    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Of the likeliest tokens, so many that their probabilities reach this are drawn from."""
    seed: int | None = None
    """Of what is drawn; none: another each time."""


GREEDY = Sampling()


class Read(NamedTuple):
    """What a decoder made of a batch of texts."""

    logits: Tensor
    """(B, kept, V)."""
    keep: Tensor
    """(kept,) int64: the places of the text that these predict."""
    states: list[Tensor]
    """(B, T, D) a layer, of the text without its last token; empty where not asked for."""


@dataclass(frozen=True)
class Score:
    """How well a target was predicted, token by token."""

    nll: Tensor
    """(tokens,) float32: negative log-likelihood, in nats."""
    hits: Tensor
    """(tokens,) bool: the token was the likeliest."""


class Reader:
    """A decoder and the markers (Marker, marker length, hidden), which belong to the model and are trained with it."""

    def __init__(self, decoder: Decoder, config: ICAEConfig, markers: nn.Parameter):
        self.decoder, self.base, self.layout, self.markers = decoder, decoder.base, config.layout, markers

    def read(
        self, slots: SlotBatch | None, markers: Tensor, text_ids: Tensor, real: Tensor, scored: Tensor, *, states: bool = False
    ) -> Read:
        """Read [marker, text without its last token] after the slots; logits are for those places of the text that some row scores."""
        device, lead = self.base.device, self.markers.shape[1] - 1
        keep = scored.any(0).nonzero()[:, 0]
        places = self.places(slots, markers.tolist(), lead + text_ids.shape[1])
        real = torch.cat([real.new_ones(len(real), lead), real], 1)
        text_ids, real, markers = (t.to(device, non_blocking=True) for t in (text_ids, real, markers))
        inputs = torch.cat([self.markers[markers].to(self.base.dtype), self.base.embed(text_ids[:, :-1])], 1)
        logits, made = self.decoder.read(slots, inputs, places, real, (keep + lead).to(device, non_blocking=True), states=states)
        return Read(logits, keep, [layer[:, lead + 1 :] for layer in made])

    def read_plain(self, text_ids: Tensor, real: Tensor, scored: Tensor, *, states: bool = False) -> Read:
        """Read text without its last token as the base does, with no slots and no marker."""
        device = self.base.device
        keep = scored.any(0).nonzero()[:, 0]
        places = torch.arange(text_ids.shape[1] - 1, device=device).expand(len(text_ids), -1)
        text_ids, real = (t[:, :-1].to(device, non_blocking=True) for t in (text_ids, real))
        inputs, at = self.base.embed(text_ids), (keep - 1).to(device, non_blocking=True)
        logits, made = self.decoder.read(None, inputs, places, real, at, states=states)
        return Read(logits, keep, made)

    def places(self, slots: SlotBatch | None, markers: list[int], width: int) -> Tensor:
        """Return position ids (B, width) of marker and text: [LM] and [FT] stand after the slots, [AE] where the layout puts it.

        In the `spread` layout the text's own positions begin at 1, so that all vectors of [AE] share position 0. Padding may reach beyond
        the base's positions; it gets the last one.
        """
        starts = torch.tensor(self._starts(slots, markers))
        places = (starts[:, None] + torch.arange(width)).clamp(0, self.base.max_positions - 1)
        return places.to(self.base.device, non_blocking=True)

    def _starts(self, slots: SlotBatch | None, markers: list[int]) -> list[int]:
        """Return the position of each row's marker, not yet kept to those that there are."""
        spans = [0] * len(markers) if slots is None else slots.spans
        early = 1 - self.markers.shape[1]
        return [early if m == Marker.AE and self.layout == "spread" else span for m, span in zip(markers, spans, strict=True)]

    # ---- scores ----

    @torch.no_grad()
    def score(self, slots: Sequence[MemorySlots] | None, examples: Sequence[Example], *, marked: bool = True) -> list[Score]:
        """Score each example's target, read from its slots (or from its own prompt alone, where `slots` is none).

        Parameters
        ----------
        slots : sequence of MemorySlots, optional
            One for each example; the examples' own segments are not looked at.
        examples : sequence of Example
            Marker, prompt and target.
        marked : bool
            Begin with the marker; false: with the prompt, as the base reads text.

        Raises
        ------
        ICAEError
            If the base has no positions for it all, or an unmarked target follows no prompt.
        """
        data: Any = collate(list(examples))
        markers, text, real, scored = (data[name].to(self.base.device) for name in ("markers", "text_ids", "real", "scored"))
        if not marked and bool(scored[:, 0].any()):
            raise ICAEError("without a marker the first token of a target follows nothing; give a prompt")
        batch, read = self._batch(slots), (real.sum(1) - 1).tolist()  # the last token is not read
        if marked:
            read = [start + self.markers.shape[1] + n for start, n in zip(self._starts(batch, markers.tolist()), read, strict=True)]
        if max(read) > self.base.max_positions:
            raise ICAEError(f"what is scored ends at position {max(read)}, but {self.base.name} has {self.base.max_positions}; shorten it")
        if marked:
            logits, keep, _ = self.read(batch, markers, text, real, scored)
        else:
            logits, keep, _ = self.read_plain(text, real, scored)
        labels, wanted = text[:, keep], scored[:, keep]
        nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
        hits = logits.argmax(-1) == labels
        return [Score(n[w].cpu(), h[w].cpu()) for n, h, w in zip(nll, hits, wanted, strict=True)]

    @torch.no_grad()
    def choices(self, slots: MemorySlots, ids: list[int], count: int) -> list[list[int]]:
        """Return, for each place of a segment, the `count` tokens that the decoder finds likeliest there after the ones before."""
        data: Any = collate([Example([], Marker.AE, [], ids)])
        names = ("markers", "text_ids", "real", "scored")
        read = self.read(SlotBatch.pad([slots]), *(data[name].to(self.base.device) for name in names))
        return read.logits[0, : len(ids)].topk(min(count, read.logits.shape[-1])).indices.tolist()

    # ---- generation ----

    def generate(
        self,
        slots: Sequence[MemorySlots] | None,
        prompts: list[list[int]],
        marker: Marker | None,
        limits: list[int],
        sampling: Sampling = GREEDY,
        least: int = 0,
        guides: Sequence[Guide | None] | None = None,
        beginnings: int = 1,
        doubts: Sequence[Doubt] | None = None,
    ) -> Iterator[list[int | None]]:
        """Read slots, marker and prompts, then generate, a step at a time; without a marker, the prompts alone, as the base reads them.

        Parameters
        ----------
        slots : sequence of MemorySlots, optional
            One for each prompt.
        prompts : list of list of int
            Token ids; may be empty after a marker.
        marker : Marker, optional
            What is asked.
        limits : list of int
            Tokens to generate, at most, for each row.
        sampling : Sampling
            How tokens are chosen.
        least : int
            No row ends before it has as many.
        guides : sequence of (Guide or None), optional
            What has a say in each row's tokens.
        beginnings : int
            Likeliest first tokens that each row is begun with (beginnings.py); where tokens are drawn, one.
        doubts : sequence of callable, optional
            For each row, what its beginnings lose.

        Returns
        -------
        iterator of list of (int or None)
            The next id of each row; None for a row that has ended.

        Raises
        ------
        ICAEError
            If the base has no positions for it all, or there is nothing to read: neither marker nor prompt.
        """
        if marker is None and not all(prompts):
            raise ICAEError("there is nothing to go on from: give slots, or a prompt")
        batch = self._batch(slots)
        lead = 0 if marker is None else self.markers.shape[1]
        lengths = [len(p) + lead for p in prompts]
        text = padded([p or [0] for p in prompts])[:, : max(map(len, prompts))].to(self.base.device)
        inputs = self.base.embed(text)
        places = torch.arange(max(lengths), device=self.base.device).expand(len(prompts), -1)
        real = places < torch.tensor(lengths, device=self.base.device)[:, None]
        if marker is not None:
            inputs = torch.cat([self.markers[int(marker)].to(inputs.dtype).expand(len(prompts), -1, -1), inputs], 1)
            places = self.places(batch, [int(marker)] * len(prompts), inputs.shape[1])
            lengths = [n + start for n, start in zip(lengths, self._starts(batch, [int(marker)] * len(prompts)), strict=True)]
        self._fits(lengths, limits)
        return self.decoder.generate(
            batch,
            inputs.detach(),
            places,
            real,
            limits,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            min_new_tokens=least,
            guides=guides,
            beginnings=1 if sampling.temperature else beginnings,
            doubts=doubts,
        )

    def collect(
        self,
        slots: Sequence[MemorySlots] | None,
        prompts: list[list[int]],
        marker: Marker | None,
        limits: list[int],
        sampling: Sampling = GREEDY,
        guides: Sequence[Guide | None] | None = None,
        beginnings: int = 1,
        doubts: Sequence[Doubt] | None = None,
    ) -> list[list[int]]:
        """Return all that each row generates; parameters as for `generate`."""
        made: list[list[int]] = [[] for _ in prompts]
        for step in self.generate(slots, prompts, marker, limits, sampling, guides=guides, beginnings=beginnings, doubts=doubts):
            for row, new in zip(made, step, strict=True):
                if new is not None:
                    row.append(new)
        return made

    def ids(
        self,
        slots: MemorySlots | None,
        prompt: list[int],
        marker: Marker | None,
        limit: int,
        sampling: Sampling = GREEDY,
        least: int = 0,
        guide: Guide | None = None,
        beginnings: int = 1,
        doubts: Sequence[Doubt] | None = None,
    ) -> Iterator[int]:
        """Return what is generated for one row, id by id; parameters and errors as for `generate`, raised at once."""
        rows = None if slots is None else [slots]
        steps = self.generate(rows, [prompt], marker, [limit], sampling, least, [guide], beginnings, doubts)
        return (new for (new,) in takewhile(lambda step: step[0] is not None, steps) if new is not None)

    def text(self, stream: Iterable[int]) -> Iterator[str]:
        """Turn ids into text as soon as its characters are whole; what was said last is decoded again, for the spaces' sake."""
        said: list[int] = []
        new: list[int] = []
        for i in stream:
            new.append(i)
            piece = self.base.decode(said + new)[len(self.base.decode(said)) :]
            if not piece.endswith("\ufffd"):
                yield piece
                said, new = new, []
        if new:
            yield self.base.decode(said + new)[len(self.base.decode(said)) :]

    def _batch(self, slots: Sequence[MemorySlots] | None) -> SlotBatch | None:
        return None if slots is None else SlotBatch.pad([s.to(self.base.device) for s in slots])

    def _fits(self, read: list[int], limits: list[int]) -> None:
        """Refuse what the base has no positions for, by the row that would take most."""
        used, wanted = max(zip(read, limits, strict=True), key=sum)
        if used + wanted > self.base.max_positions:
            raise ICAEError(
                f"slots and prompt take {used} positions and the response {wanted} more, but {self.base.name} has "
                f"{self.base.max_positions}; shorten the prompt, the context or max_new_tokens"
            )
