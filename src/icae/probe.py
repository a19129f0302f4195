"""What would a memory slot be, if its block of the context read otherwise? Asked many times, at a small part of a compression's cost.

    segment ids -> encoder's first layers -> slots, compared with given ones
    block, other tokens -> the same layers, for that block and its memory token alone -> slot, compared with the given one

The rest of the segment is taken from the segment's own key-value cache. What stands after the tokens asked about was computed from what
stood there before, so answers are estimates: near, and without any noise where the segment is otherwise right. Keys and values of the
first layers tell nearly all about a block, so that kv slots are compared in a few layers. Embedding slots need every layer, unless they are
read off the memory token, too: then a change of it tells most.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from icae.base import cached
from icae.encoder import Encoder
from icae.objectives import padded
from icae.segments import positions

ROWS = 128
"""Changes asked about at once."""


@dataclass(frozen=True)
class Change:
    """Other tokens from the start of a block on: one block of them, or more, as far as the segment goes."""

    block: int
    tokens: tuple[int, ...]


class Probe:
    """One segment as the encoder's first layers see it."""

    @torch.no_grad()
    def __init__(self, encoder: Encoder, ids: Sequence[int], wanted: Mapping[str, Tensor], ratio: int, depth: int | None = None):
        """Compute a segment's slots.

        Parameters
        ----------
        encoder : Encoder
            In evaluation mode.
        ids : sequence of int
            The segment's n tokens.
        wanted : mapping of str to Tensor
            The slots to compare with, by name, each (k, ...).
        ratio : int
            Context tokens a slot.
        depth : int, optional
            Layers that a change is passed through, and that are compared of kv slots; none: all. 0, for embedding slots that are read
            off the memory token, too: what the LLM adds to it is taken as it is without the change.
        """
        from transformers import DynamicCache

        self.encoder, self.ids, self.ratio, self.depth = encoder, list(ids), ratio, depth
        self.layout = positions(encoder.config.layout, len(self.ids), ratio)
        self.layers = _first_layers(encoder.peft.get_base_model().get_decoder(), depth if encoder.read_from == "layers" else None)
        self.wanted = {name: _by_layer(t, depth) for name, t in wanted.items()}
        self.embed = encoder.peft.get_input_embeddings()
        self.device = self.embed.weight.device
        count = len(self.layout.memory)
        context = self.embed(torch.tensor([self.ids], device=self.device))
        real = torch.ones(context.shape[:2], dtype=torch.bool, device=self.device)
        memory = encoder.memory_tokens(context, real, count, ratio)
        self.cache: Any = DynamicCache()
        places = torch.tensor([self.layout.context + self.layout.memory], device=self.device)
        output = self.layers(inputs_embeds=torch.cat([context, memory], 1), position_ids=places, **cached(self.layers, self.cache))
        self.hidden = output.last_hidden_state[0, len(self.ids) :]
        made = encoder.read(output, len(self.ids), self._moved(range(count))[None], memory)
        self.distances = self._compare({name: t[0] for name, t in made.items()}, range(count))
        """(k,) float32: each slot's squared distance from the one wanted, relative to its size; the mean over layers."""

    def ask(self, changes: Sequence[Change]) -> Tensor:
        """Return the distance, (len(changes),) float32, that the slot of each change's block would have."""
        order = sorted(range(len(changes)), key=lambda i: len(changes[i].tokens))
        answers = torch.zeros(len(changes))
        for at in range(0, len(order), ROWS):
            rows = order[at : at + ROWS]
            answers[rows] = self._ask([changes[i] for i in rows])
        return answers

    @torch.no_grad()
    def _ask(self, changes: Sequence[Change]) -> Tensor:
        """Compute [other tokens | memory token] for each change, after the cache of the segment."""
        from transformers import DynamicCache

        n, k, ratio, width = len(self.ids), len(self.layout.memory), self.ratio, max(len(c.tokens) for c in changes)
        chosen = [c.block for c in changes]
        moved = self._moved(chosen)[:, None]
        context = self.embed(padded([list(c.tokens) for c in changes]).to(self.device))
        blocks = torch.tensor(chosen, device=self.device)
        own = torch.tensor([min(ratio, len(c.tokens)) for c in changes], device=self.device)
        first = min(ratio, width)
        memory = self.encoder.memory_of(blocks, context[:, :first], torch.arange(first, device=self.device) < own[:, None], ratio)
        if self.depth == 0:
            unchanged = SimpleNamespace(last_hidden_state=self.hidden[blocks][:, None])
            made = self.encoder.read(unchanged, 0, moved, memory)
            return self._compare({name: t[:, 0] for name, t in made.items()}, chosen)
        places = torch.zeros(len(changes), width + 1, dtype=torch.long)
        seen = torch.zeros(len(changes), width + 1, n + k + width + 1, dtype=torch.bool)
        seen[:, :, n + k :] = torch.ones(width + 1, width + 1, dtype=torch.bool).tril()
        for row, change in enumerate(changes):
            begin, length = change.block * ratio, len(change.tokens)
            places[row, :length] = torch.tensor(self.layout.context[begin : begin + length])
            places[row, width] = self.layout.memory[change.block]
            seen[row, :width, :begin] = True
            seen[row, width, :n] = True
            seen[row, width, begin : begin + length] = False  # these stand anew
            seen[row, width, n : n + change.block] = True
            seen[row, width, n + k + length : n + k + width] = False
        places, seen = places.to(self.device), seen.to(self.device)
        cache: Any = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys.expand(len(changes), -1, -1, -1), layer.values.expand(len(changes), -1, -1, -1), i)
        mask = torch.zeros(seen.shape, dtype=context.dtype, device=self.device).masked_fill(~seen, torch.finfo(context.dtype).min)
        output = self.layers(
            inputs_embeds=torch.cat([context, memory], 1),
            position_ids=places,
            attention_mask=mask[:, None],
            **cached(self.layers, cache),
        )
        made = self.encoder.read(output, -1, moved, memory)
        return self._compare({name: t[:, 0] for name, t in made.items()}, chosen)

    def _moved(self, blocks: Sequence[int] | range) -> Tensor:
        """Return how far each slot moves from the encoder's position to the decoder's, (len(blocks),)."""
        return torch.tensor([self.layout.slots[b] - self.layout.memory[b] for b in blocks], device=self.device)

    def _compare(self, made: Mapping[str, Tensor], blocks: Sequence[int] | range) -> Tensor:
        """Return (rows,) float32: the relative squared distances of slots from the wanted ones, the mean over tensors and layers."""
        parts = []
        for name, tensor in made.items():
            want = self.wanted[name][list(blocks)].to(self.device)
            parts.append((_by_layer(tensor, self.depth) - want).pow(2).sum(-1) / want.pow(2).sum(-1).clamp(min=1e-12))
        return torch.stack(parts).mean((0, 2)).cpu()


def _by_layer(slots: Tensor, depth: int | None) -> Tensor:
    """Return slots as (rows, layers or 1, numbers), float32, the first `depth` layers where they are by layer."""
    return slots[:, :depth].flatten(2).float() if slots.dim() > 2 else slots[:, None].float()


def _first_layers(decoder: Any, depth: int | None) -> Any:
    """Return a view of a transformers decoder that ends after `depth` layers; weights and modules are shared."""
    if depth is None or depth >= len(decoder.layers):
        return decoder
    view = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    view.layers = nn.ModuleList(list(decoder.layers)[:depth])
    view.config = copy.copy(decoder.config)
    view.config.num_hidden_layers = depth
    return view
