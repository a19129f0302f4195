"""Rows that generate together, one token a step; rows join and leave between steps. Knows no request, no text and no network.

Every row's keys and values end at the same column of one buffer a layer, whatever their number, so that a step writes one column
for all rows and reads one rectangle of the buffer; what lies left of a row's own columns is masked:

    row 0   . . . s s s p p a a        s  slots     p  prompt     a  answer so far     .  masked
    row 1   s s s s p p p p a a
    row 2   . . . . . . s s p a
            low               end

Position ids are each row's own. Shape legend: R rows, H key-value heads, C columns, S head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from icae.decoder import choose
from icae.errors import ICAEError
from icae.model import ICAE, Sampling
from icae.objectives import Marker
from icae.slots import MemorySlots, SlotBatch

PREFILL = 128
"""Prompt tokens read at once, between two steps of the others."""

FOLLOWED = 512
"""Tokens of the prompt read last that are kept with a context, at most."""

GUESSED_FROM = (3, 2)
"""Last tokens that must have come before for what came after them to be guessed again, tried in this order."""


@dataclass
class Row:
    """One generation under way."""

    cache: Any
    """What it has read, until it joins a batch."""
    position: int
    """Position id of its next token."""
    limit: int
    """Tokens it may generate."""
    ends: frozenset[int]
    sampling: Sampling
    logits: Tensor
    """(1, V): what follows what it has read."""
    prompt: Sequence[int] = ()
    """Ids that it has read, as far as they are known: what it says next is guessed from them, too."""
    ids: list[int] = field(default_factory=list)
    """Generated so far, without the one that ends it."""
    finished: str | None = None
    """`stop` when an end came, `length` at the limit."""

    def __post_init__(self) -> None:
        """Give the row a source of chance of its own: what it draws does not depend on its neighbours."""
        seed = self.sampling.seed
        self.chance = torch.Generator(self.logits.device)
        self.chance.manual_seed(seed) if seed is not None else self.chance.seed()

    def choose(self, logits: Tensor) -> None:
        """Take the next token from logits (1, V)."""
        new = int(choose(logits, self.sampling.temperature, self.sampling.top_p, self.chance))
        if new in self.ends:
            self.finished = "stop"
            return
        self.ids.append(new)
        if len(self.ids) >= self.limit:
            self.finished = "length"

    def guess(self, most: int) -> list[int]:
        """Guess the next ids, `most` at most: what came next when the last ones came before, in the prompt or in what was generated.

        After arXiv 2304.04487 (LLMA), whose reference text is here the prompt; in transformers it is called prompt lookup decoding.
        """
        most, said = min(most, self.limit - len(self.ids) - 1), [*self.prompt, *self.ids]
        for n in GUESSED_FROM:
            for at in range(len(said) - n - 1, -1, -1) if most > 0 else ():
                if said[at : at + n] == said[-n:]:
                    return said[at + n : at + n + most]
        return []


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a context, ready to be asked, and of the prompt that was read after it last.

    What a prompt has in common with that one, such as the template's system turn or a chat's earlier turns, is not read again.
    """

    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of each layer, (1, H, k + marker + prompt, S)."""
    span: int
    """Position id of what comes after the context."""
    tokens: int
    """Context tokens it stands for."""
    slots: int
    marker: Marker | None = None
    """Stood before the prompt that was read last; none: no prompt was."""
    read: tuple[int, ...] = ()
    """Ids of that prompt."""
    reader: str = ""
    """Namespace that it came from: another must not see in its times what was asked."""

    @property
    def bytes(self) -> int:
        """Memory it takes."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def towards(self, reader: str) -> Prefix:
        """Return it as a namespace may use it."""
        return self if reader == self.reader else replace(self, read=(), reader=reader)

    def common(self, marker: Marker | None, lead: int, ids: Sequence[int]) -> int:
        """Count the columns behind the slots that a prompt's ids, after a marker of `lead` vectors, have in common with the last one's."""
        if marker is None or marker is not self.marker:
            return 0
        return lead + next((i for i, (a, b) in enumerate(zip(self.read, ids, strict=False)) if a != b), min(len(self.read), len(ids)))


class Prefixes:
    """Contexts asked lately, bounded in bytes; the one asked longest ago goes first."""

    def __init__(self, model: ICAE, max_bytes: int):
        self.model, self.max_bytes, self.bytes = model, max_bytes, 0
        self.kept: OrderedDict[str, Prefix] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: str) -> Prefix | None:
        """Return a context, or none; it counts as used."""
        found = self.kept.get(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        if found is not None:
            self.kept.move_to_end(key)
        return found

    def put(self, key: str, slots: MemorySlots) -> Prefix:
        """Read slots into keys and values, and keep them if they fit."""
        with torch.no_grad():
            cache = self.model.decoder.prefix(SlotBatch.pad([slots.to(self.model.base.device)]))
        layers = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in cache.layers]
        made = Prefix(layers, slots.span, slots.tokens, slots.count)
        self._keep(key, made)
        return made

    def follow(self, key: str, prefix: Prefix, marker: Marker, ids: Sequence[int], row: Row) -> None:
        """Keep a context with the prompt, all of it `ids`, that a row has just read after it, instead of the one before."""
        if key not in self.kept:
            return
        columns = row.cache.get_seq_length() - max(0, len(ids) - FOLLOWED)
        layers = [(layer.keys[:, :, :columns].contiguous(), layer.values[:, :, :columns].contiguous()) for layer in row.cache.layers]
        self._keep(key, replace(prefix, layers=layers, marker=marker, read=tuple(ids[:FOLLOWED])))

    def _keep(self, key: str, made: Prefix) -> None:
        """Keep a context if it fits, and let those go that were asked longest ago."""
        if made.bytes <= self.max_bytes:
            self.drop(key)
            self.kept[key] = made
            self.bytes += made.bytes
            while self.bytes > self.max_bytes:
                self.bytes -= self.kept.popitem(last=False)[1].bytes

    def drop(self, key: str) -> None:
        """Forget a context."""
        if key in self.kept:
            self.bytes -= self.kept.pop(key).bytes


def prefill(
    model: ICAE,
    prefix: Prefix | None,
    marker: Marker | None,
    prompt: Tensor,
    limit: int,
    sampling: Sampling,
    ids: Sequence[int] = (),
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

    Yields
    ------
    None
        After each piece.

    Returns
    -------
    Row
        With its first token chosen, as the generator's value.

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
    if prefix is not None:
        span, slots = prefix.span, prefix.slots
        known = min(prefix.common(marker, lead, ids), count - 1)  # one is read at least: it says what follows
        cache = Cache(layers=[_after(keys[:, :, : slots + known], values[:, :, : slots + known]) for keys, values in prefix.layers])
    check_positions(model, span + count, limit)
    output: Any = None
    for at in range(known, count, PREFILL):
        if at > known:
            yield
        piece = prompt[None, at : at + PREFILL]
        places = torch.arange(span + at, span + at + piece.shape[1], device=prompt.device)[None]
        read = slots + at + piece.shape[1]
        with torch.no_grad():
            output = base.model(
                inputs_embeds=piece,
                position_ids=places,
                attention_mask=torch.ones(1, read, dtype=torch.long, device=prompt.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    row = Row(cache, span + count, limit, frozenset(base.eos_ids), sampling, output.logits[:, -1], ids)
    row.choose(row.logits)
    return row


def check_positions(model: ICAE, read: int, limit: int) -> None:
    """Raise `ICAEError` if the base has no positions for `read` of slots and prompt and `limit` of a response."""
    if read + limit > model.base.max_positions:
        raise ICAEError(
            f"slots and prompt take {read} positions and the response {limit} more, but {model.config.base} has "
            f"{model.base.max_positions}; shorten the prompt, the context or max_tokens"
        )


def _after(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return one layer of a cache that goes on from a prefix, whose tensors it reads but never writes to."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


class _Layer(DynamicLayer):
    """One layer of the buffer, as the model sees it during a step."""

    keys: Any
    """(R, H, C, S), as `values`."""
    values: Any

    def __init__(self, batch: Batch, keys: Tensor, values: Tensor):
        super().__init__()
        self.batch = batch
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the step's columns (R, H, n, S) and return the rectangle with them."""
        rows, low, begin = len(self.batch.rows), self.batch.low, self.batch.end
        end = begin + key_states.shape[2]
        self.keys[:rows, :, begin:end] = key_states
        self.values[:rows, :, begin:end] = value_states
        return self.keys[:rows, :, low:end], self.values[:rows, :, low:end]

    def get_seq_length(self) -> int:
        """Return the columns read before this step."""
        return self.batch.end - self.batch.low


class Batch:
    """The rows that generate now."""

    def __init__(self, model: ICAE, guesses: int = 0):
        """Make an empty batch; a row that is alone in it guesses so many tokens ahead at each step, at most."""
        self.base, self.guesses = model.base, guesses
        self.clear()

    def clear(self) -> None:
        """Drop all rows and the buffer."""
        self.rows: list[Row] = []
        self.starts: list[int] = []
        self.end = 0
        self.layers: list[_Layer] = []

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.end)

    def join(self, row: Row) -> None:
        """Take a row in, with what it has read."""
        length = row.cache.get_seq_length()
        self._make_room(row, length)
        n = len(self.rows)
        for mine, read in zip(self.layers, row.cache.layers, strict=True):
            mine.keys[n, :, self.end - length : self.end] = read.keys[0]
            mine.values[n, :, self.end - length : self.end] = read.values[0]
        row.cache = None
        self.rows.append(row)
        self.starts.append(self.end - length)

    def leave(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        i = next(i for i, r in enumerate(self.rows) if r is row)
        last, start = self.rows.pop(), self.starts.pop()
        if last is not row:
            for layer in self.layers:
                layer.keys[i, :, start : self.end] = layer.keys[len(self.rows), :, start : self.end]
                layer.values[i, :, start : self.end] = layer.values[len(self.rows), :, start : self.end]
            self.rows[i], self.starts[i] = last, start
        if not self.rows:
            self.clear()

    def step(self) -> None:
        """Read every row's last token and choose its next; a row that is alone may get several."""
        if len(self.rows) == 1 and (guessed := self.rows[0].guess(self.guesses)):
            self._leap(self.rows[0], guessed)
            return
        self._make_room()
        device = self.base.device
        columns = torch.arange(self.low, self.end + 1, device=device)
        with torch.no_grad():
            output = self.base.model(
                input_ids=torch.tensor([[r.ids[-1]] for r in self.rows], device=device),
                position_ids=torch.tensor([[r.position] for r in self.rows], device=device),
                attention_mask=(columns[None] >= torch.tensor(self.starts, device=device)[:, None]).long(),
                past_key_values=Cache(layers=list(self.layers)),
                use_cache=True,
            )
        self.end += 1
        for row, logits in zip(self.rows, output.logits[:, -1].split(1), strict=True):
            row.position += 1
            row.choose(logits)

    def _leap(self, row: Row, guessed: list[int]) -> None:
        """Read the only row's last token and those that are guessed to follow; choose its next as long as the guess was right.

        Every token is chosen from what the base says after the ones before it, so that a guess changes the time it takes and no answer.
        """
        self._make_room(more=1 + len(guessed))
        read = torch.tensor([[row.ids[-1], *guessed]], device=self.base.device)
        with torch.no_grad():
            output = self.base.model(
                input_ids=read,
                position_ids=row.position + torch.arange(read.shape[1], device=read.device)[None],
                attention_mask=torch.ones(1, self.end - self.low + read.shape[1], dtype=torch.long, device=read.device),
                past_key_values=Cache(layers=list(self.layers)),
                use_cache=True,
            )
        for logits, guess in zip(output.logits[0].split(1), [*guessed, None], strict=True):
            self.end, row.position = self.end + 1, row.position + 1
            row.choose(logits)
            if row.finished is not None or row.ids[-1] != guess:
                return

    def _make_room(self, new: Row | None = None, length: int = 0, more: int = 1) -> None:
        """Have place for one more row of `length` columns, if one is given, and for `more` columns."""
        all_rows = self.rows if new is None else [*self.rows, new]
        rows = len(all_rows)
        if new is not None and not self.layers:
            self.layers = [_Layer(self, read.keys[:0, :, :0], read.values[:0, :, :0]) for read in new.cache.layers]
        have_rows, have_columns = self.layers[0].keys.shape[0], self.layers[0].keys.shape[2]
        if rows <= have_rows and length <= self.end and self.end + more <= have_columns:
            return
        low, used = self.low, self.end - self.low
        width = max(used, length)
        want_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        to_come = max(r.limit - len(r.ids) for r in all_rows)  # more is not needed, less would mean copying often
        want_columns = have_columns if width + more < have_columns * 3 // 4 else width + max(more, min(to_come, max(width // 2, 64)))
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                grown = old.new_zeros(want_rows, old.shape[1], want_columns, old.shape[3])
                grown[: len(self.rows), :, width - used : width] = old[: len(self.rows), :, low : self.end]
                setattr(layer, name, grown)
        self.starts = [s - low + width - used for s in self.starts]
        self.end = width
