"""Contexts that were asked lately, as keys and values, and the reading of a prompt after one. Knows no request, no text and no network.

slots -> Prefix -> kept by its id -> prompt read after it -> a Row, from which an answer begins
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from icae.base import cached
from icae.decoder import Guide
from icae.errors import ICAEError
from icae.grounding import Words
from icae.model import ICAE
from icae.objectives import Marker
from icae.reader import Sampling
from icae.server.attention import Layers, alone, shareable, sharing
from icae.server.lately import Lately
from icae.server.row import Row
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots

PREFILL = 128
"""Prompt tokens read at once, between two steps of the others."""

FOLLOWED = 512
"""Tokens of the prompt read last that are kept with a context, at most."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a context, ready to be asked, and of the prompt that was read after it last.

    What a prompt has in common with that one, such as the template's system turn or a chat's earlier turns, is not read again.
    """

    layers: Layers
    """Keys and values of the slots, (1, H, k, S) in each layer."""
    span: int
    """Position id of what comes after the context."""
    tokens: int
    """Context tokens it stands for."""
    slots: int
    marker: Marker | None = None
    """Stood before the prompt that was read last; none: no prompt was."""
    read: tuple[int, ...] = ()
    """Ids of that prompt."""
    followed: Layers = ()
    """Keys and values of marker and prompt, (1, H, marker + prompt, S) in each layer."""
    words: Words | None = None
    """What answers are spelled by."""
    reader: str = ""
    """Namespace that it came from: another must not see in its times what was asked."""

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(t.numel() * t.element_size() for pair in (*self.layers, *self.followed) for t in pair)

    def towards(self, reader: str) -> Prefix:
        """Return it as a namespace may use it."""
        return self if reader == self.reader else replace(self, read=(), reader=reader)

    def common(self, marker: Marker | None, lead: int, ids: Sequence[int]) -> int:
        """Count the columns behind the slots that a prompt's ids, after a marker of `lead` vectors, have in common with the last one's."""
        if marker is None or marker is not self.marker:
            return 0
        return lead + next((i for i, (a, b) in enumerate(zip(self.read, ids, strict=False)) if a != b), min(len(self.read), len(ids)))


class Prefixes(Lately[Prefix]):
    """Contexts asked lately."""

    def __init__(self, model: ICAE, max_bytes: int):
        super().__init__(max_bytes, lambda prefix: prefix.bytes)
        self.model = model
        self.hits = self.misses = 0

    def get(self, key: str) -> Prefix | None:
        """Return a context, or none, and count that."""
        found = super().get(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: str, slots: MemorySlots, tokens: int | None = None) -> Prefix:
        """Read slots, chosen from those of a context of so many tokens, into keys and values; keep them if they fit."""
        with torch.no_grad():
            cache = self.model.decoder.prefix(SlotBatch.pad([slots.to(self.model.base.device)]))
        layers = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]
        made = Prefix(layers, slots.span, slots.tokens if tokens is None else tokens, slots.count, words=self.model.words(slots.ids))
        self.keep(key, made)
        return made

    def follow(self, key: str, prefix: Prefix, marker: Marker, ids: Sequence[int], row: Row) -> None:
        """Keep a context with the prompt, all of it `ids`, that a row has just read after it, instead of the one before."""
        if key not in self:
            return
        begin = 0 if row.context is not None else prefix.slots
        here = slice(begin, row.cache.get_seq_length() - max(0, len(ids) - FOLLOWED))
        followed = [(layer.keys[:, :, here].contiguous(), layer.values[:, :, here].contiguous()) for layer in row.cache.layers]
        self.keep(key, replace(prefix, followed=followed, marker=marker, read=tuple(ids[:FOLLOWED])))


def prefill(
    model: ICAE,
    prefix: Prefix | None,
    marker: Marker | None,
    prompt: Tensor,
    limit: int,
    sampling: Sampling,
    ids: Sequence[int] = (),
    guide: Guide | None = None,
) -> Generator[None, None, Row]:
    """Read a prompt after a prefix, at most `PREFILL` tokens at a time.

    Parameters
    ----------
    model : ICAE
        Its base reads.
    prefix : Prefix, optional
        What stands before the prompt; it is not written to.
    marker : Marker, optional
        Comes before the prompt.
    prompt : Tensor
        (T, hidden) input embeddings.
    limit : int
        Tokens to generate, at most.
    sampling : Sampling
        How.
    ids : sequence of int
        Those that the prompt begins with: as far as the prefix knows them already, they are not read again.
    guide : Guide, optional
        What has a say in the tokens generated.

    Yields
    ------
    None
        After each piece.

    Returns
    -------
    Row
        Which has chosen nothing yet, as the generator's value.

    Raises
    ------
    ICAEError
        If there is nothing to read, or the base has no positions for it all.
    """
    base, span, slots, known, lead = model.base, 0, 0, 0, 0
    if marker is not None:
        begin = model.markers[int(marker)].detach().to(prompt.dtype)
        prompt, lead = torch.cat([begin, prompt]), len(begin)
    count = len(prompt)
    if not count:
        raise ICAEError("the prompt is empty; give at least one token")
    cache: Cache = DynamicCache()
    context = prefix.layers if prefix is not None and shareable(base.model) else None
    if prefix is not None:
        span = prefix.span
        known = min(prefix.common(marker, lead, ids), count - 1)  # one is read at least: it says what follows
        before = [(keys[:, :, :known], values[:, :, :known]) for keys, values in prefix.followed]
        if context is None:
            slots = prefix.slots
            before = _joined(prefix.layers, before) if known else list(prefix.layers)
        if before:
            cache = Cache(layers=[_after(keys, values) for keys, values in before])
    check_positions(model, span + count, limit)
    output: Any = None
    for at in range(known, count, PREFILL):
        if at > known:
            yield
        piece = prompt[None, at : at + PREFILL]
        places = torch.arange(span + at, span + at + piece.shape[1], device=prompt.device)[None]
        read = slots + at + piece.shape[1]
        with torch.no_grad(), sharing(base.model, None if context is None else alone(context)):
            output = base.model(
                inputs_embeds=piece,
                position_ids=places,
                attention_mask=torch.ones(1, read, dtype=torch.long, device=prompt.device),
                **cached(base.model, cache),
                logits_to_keep=1,
            )
    return Row(cache, span + count, limit, frozenset(base.eos_ids), sampling, output.logits[:, -1], ids, context, guide)


def check_positions(model: ICAE, read: int, limit: int) -> None:
    """Raise `ICAEError` if the base has no positions for `read` of slots and prompt and `limit` of a response."""
    if read + limit > model.base.max_positions:
        raise ICAEError(
            f"slots and prompt take {read} positions and the response {limit} more, but {model.config.base} has "
            f"{model.base.max_positions}; shorten the prompt, the context or max_tokens"
        )


def _joined(first: Layers, then: Layers) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values with the columns of both."""
    return [(torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)) for (k, v), (more_k, more_v) in zip(first, then, strict=True)]


def _after(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return one layer of a cache that goes on from a prefix, whose tensors it reads but never writes to."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
