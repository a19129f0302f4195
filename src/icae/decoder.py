"""Memory slots and prompt embeddings -> logits, or generated ids. Knows no context, no adapter, no training.

The decoder is the base as published. `kv` slots become its prefix cache, `embedding` slots the first of its input embeddings; either
way each row may have another number of slots and of prompt tokens, and padding is masked. In the sequence the slots come first, so
that everything after them may attend to them; position ids are given outright.

Shape legend: B rows, K slots of the longest, T prompt tokens of the longest, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from icae.base import Base, cached
from icae.beginnings import Doubt, Guide, begin
from icae.slot_batch import SlotBatch


class Decoder:
    """The frozen base, reading slots."""

    def __init__(self, base: Base):
        self.base = base

    def read(
        self,
        slots: SlotBatch | None,
        inputs_BTD: Tensor,
        positions_BT: Tensor,
        real_BT: Tensor,
        keep: Tensor | int = 0,
        *,
        states: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Read slots and inputs once.

        Parameters
        ----------
        slots : SlotBatch, optional
            What stands before the inputs; none: nothing.
        inputs_BTD : Tensor
            (B, T, D) input embeddings.
        positions_BT : Tensor
            (B, T) int64 position ids.
        real_BT : Tensor
            (B, T) bool, false where padded.
        keep : Tensor or int
            Places among T, as a 1-d index, to compute logits at; 0: all.
        states : bool
            Return what every layer made of the inputs, too.

        Returns
        -------
        Tensor
            (B, kept, V).
        list of Tensor
            The hidden states behind each layer, (B, T, D); empty where not asked for.
        """
        output = self._read(slots, inputs_BTD, positions_BT, real_BT, keep, states)[0]
        made = output.hidden_states[1:] if states else ()
        return output.logits, [layer[:, -inputs_BTD.shape[1] :] for layer in made]

    @torch.no_grad()
    def generate(
        self,
        slots: SlotBatch | None,
        inputs_BTD: Tensor,
        positions_BT: Tensor,
        real_BT: Tensor,
        max_new_tokens: list[int],
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: list[int] | None = None,
        min_new_tokens: int = 0,
        guides: Sequence[Guide | None] | None = None,
        beginnings: int = 1,
        doubts: Sequence[Doubt] | None = None,
    ) -> Iterator[list[int | None]]:
        """Generate row by row together, a token at a time.

        Parameters
        ----------
        slots, inputs_BTD, positions_BT, real_BT
            As for `read`; the inputs are padded on the right.
        max_new_tokens : list of int
            For each row.
        temperature, top_p, seed
            0: the likeliest token; else sampled among the likeliest that together reach `top_p`.
        stop : list of int, optional
            Ids that end a row (they are not yielded); none: the base's own.
        min_new_tokens : int
            No row ends before it has as many.
        guides : sequence of (Guide or None), optional
            One for each row.
        beginnings : int
            Likeliest first tokens that each row is begun with (beginnings.py); 1: no looking ahead. Not where tokens are drawn.
        doubts : sequence of callable, optional
            For each row, what its beginnings lose (beginnings.py).

        Yields
        ------
        list of (int or None)
            The next id of each row; None for a row that has ended.
        """
        if not any(max_new_tokens):
            return
        ends = set(self.base.eos_ids if stop is None else stop)
        chance = None if seed is None else torch.Generator(inputs_BTD.device).manual_seed(seed)
        every = torch.arange(inputs_BTD.shape[0], device=inputs_BTD.device)
        last = real_BT.sum(1) - 1
        lasts, which = last.unique(return_inverse=True)
        output, cache, real = self._read(slots, inputs_BTD, positions_BT, real_BT, lasts)
        rows, logits = _Rows(self.base, cache, real, positions_BT[every, last]), output.logits[every, which]
        guides = [None] * len(max_new_tokens) if guides is None else list(guides)
        order = list(range(len(max_new_tokens)))  # the row that stands at each place
        alive, made, ids = [n > 0 for n in max_new_tokens], 0, None

        def follow(guides: Sequence[Guide | None], logits: Tensor) -> Tensor:
            return choose(guided(guides, logits), temperature, top_p, chance)

        if beginnings > 1:
            begun = begin(rows, logits, beginnings, max_new_tokens, ends, guides, follow, doubts, min_new_tokens)
            made = max(len(one.ids) for one in begun)
            for n in range(made):
                yield [one.ids[n] if n < min(len(one.ids), most) else None for one, most in zip(begun, max_new_tokens, strict=True)]
            alive = [not one.ended and most > made for one, most in zip(begun, max_new_tokens, strict=True)]
            guides, ids = [one.guide for one in begun], torch.tensor([one.ids[-1] for one in begun], device=every.device)
        while True:
            if ids is not None:
                staying = [place for place, row in enumerate(order) if alive[row]]
                if not staying:
                    return
                if 2 * len(staying) <= len(order):  # ended rows are computed with the others until there are as many of them
                    order, places = [order[place] for place in staying], torch.tensor(staying, device=ids.device)
                    rows.keep(places)
                    ids = ids[places]
                logits = rows.read(ids)
            if made < min_new_tokens:
                logits[:, list(ends)] = -torch.inf
            ids = follow([guides[row] for row in order], logits)
            made += 1
            step: list[int | None] = [None] * len(alive)
            for row, i in zip(order, ids.tolist(), strict=True):
                alive[row] = alive[row] and i not in ends
                step[row] = i if alive[row] else None
                if alive[row] and (guide := guides[row]) is not None:
                    guide.advance(i)
            yield step
            alive = [a and made < n for a, n in zip(alive, max_new_tokens, strict=True)]

    def prefix(self, slots: SlotBatch) -> Any:
        """Return the key-value cache (transformers' `DynamicCache`) that holds the slots alone, ready to be followed by inputs."""
        from transformers import DynamicCache

        cache = DynamicCache()
        if "embeddings" in slots.tensors:
            self.base.model(
                inputs_embeds=slots.tensors["embeddings"].to(self.base.dtype),
                position_ids=slots.positions,
                attention_mask=slots.mask.long(),
                **cached(self.base.model, cache),
                logits_to_keep=1,
            )
        else:
            self._fill(cache, slots)
        return cache

    def _fill(self, cache: Any, slots: SlotBatch) -> None:
        """Put kv slots into an empty cache."""
        keys, values = (slots.tensors[name].to(self.base.dtype).permute(2, 0, 3, 1, 4) for name in ("keys", "values"))
        for layer in range(keys.shape[0]):
            cache.update(keys[layer], values[layer], layer)

    def _read(
        self, slots: SlotBatch | None, inputs: Tensor, positions: Tensor, real: Tensor, keep: Tensor | int, states: bool = False
    ) -> tuple[Any, Any, Tensor]:
        """Return the base's output, with logits at `keep`, the cache, and the mask over everything read so far."""
        from transformers import DynamicCache

        cache, inputs = DynamicCache(), inputs.to(self.base.dtype)
        if slots is not None:
            real = torch.cat([slots.mask, real], 1)
            if "embeddings" in slots.tensors:
                prefix = slots.tensors["embeddings"].to(inputs.dtype)
                inputs = torch.cat([prefix, inputs], 1)
                positions = torch.cat([slots.positions, positions], 1)
                keep = keep + prefix.shape[1] if isinstance(keep, Tensor) else inputs.shape[1] - prefix.shape[1]
            else:
                self._fill(cache, slots)
        output = self.base.model(
            inputs_embeds=inputs,
            position_ids=positions,
            attention_mask=real.long(),
            **cached(self.base.model, cache),
            logits_to_keep=keep,
            output_hidden_states=states,
        )
        return output, cache, real


class _Rows:
    """Rows that generate: the cache, which of it each reads, and the position of what each read last."""

    def __init__(self, base: Base, cache: Any, real: Tensor, position: Tensor):
        self.base, self.cache, self.real, self.position = base, cache, real, position

    def read(self, ids: Tensor) -> Tensor:
        """Read a token a row, (rows,), and return logits (rows, V)."""
        self.position = (self.position + 1).clamp(max=self.base.max_positions - 1)  # rows that have ended are read on with the others
        self.real = torch.cat([self.real, torch.ones_like(self.real[:, :1])], 1)
        output = self.base.model(
            input_ids=ids[:, None],
            position_ids=self.position[:, None],
            attention_mask=self.real.long(),
            **cached(self.base.model, self.cache),
        )
        return output.logits[:, -1]

    def keep(self, places: Tensor) -> None:
        """Go on with these rows, (n,) int64, in this order; one may be there several times."""
        self.cache.batch_select_indices(places)
        self.real, self.position = self.real[places], self.position[places]


def guided(guides: Sequence[Guide | None], logits: Tensor) -> Tensor:
    """Return logits (rows, V) as each row's guide changes them; none: as they are."""
    if not any(guide is not None for guide in guides):
        return logits
    return torch.stack([scores if guide is None else guide.scores(scores) for guide, scores in zip(guides, logits, strict=True)])


def choose(logits: Tensor, temperature: float, top_p: float, chance: torch.Generator | None) -> Tensor:
    """Return the next id of each row, (B,): the likeliest, or one drawn from the nucleus (arXiv 1904.09751)."""
    if temperature < 1e-5:  # smaller ones leave nothing of float32 to divide by
        return logits.argmax(-1)
    share, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    beyond = share.cumsum(-1) - share >= top_p
    beyond[..., 0] = False  # the likeliest always stays, however small top_p
    share = share.masked_fill(beyond, 0)
    return order.gather(1, torch.multinomial(share, 1, generator=chance))[:, 0]
