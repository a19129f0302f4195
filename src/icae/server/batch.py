"""Rows that generate together, a step at a time; rows join and leave between steps. Knows no request, no text and no network.

A row reads its last token and what it guesses to come next, and keeps what the guess was right about. All rows write to the same
columns of one buffer a layer, whatever their number, so that a step writes and reads one rectangle of the buffer; what a row does not
read is masked: what lies left of its own columns, and what it had guessed wrongly.

    row 0   . . . s s s p p a . a a        s  slots     p  prompt     a  answer so far     .  masked
    row 1   s s s s p p p p a a a .
    row 2   . . . . . . s s p . a .
            low                     end

A context's slots stand apart, once for all rows that read it (shared.py, attention.py), where the base allows that; where not, they are
among the row's columns. Position ids are each row's own. Shape legend: R rows, H key-value heads, C columns, S head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from icae.base import cached
from icae.model import ICAE
from icae.server.attention import has_windows, sharing
from icae.server.row import Row
from icae.server.shared import Contexts

GUESSED_TOGETHER = 32
"""Tokens that all rows of a step guess, at most: some more cost a step little, as long as reading the weights is most of it."""


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
        """Make an empty batch, whose rows each guess so many tokens ahead at a step, at most."""
        self.base, self.guesses = model.base, guesses
        self.clear()

    def clear(self) -> None:
        """Drop all rows and the buffer."""
        self.rows: list[Row] = []
        self.starts: list[int] = []
        """First column of each row."""
        self.counts: list[int] = []
        """Columns that each row reads."""
        self.read = torch.zeros(0, 0, dtype=torch.bool, device=self.base.device)
        """(R, C): which those are."""
        self.end = 0
        self.layers: list[_Layer] = []
        self.contexts = Contexts()

    @property
    def low(self) -> int:
        """First column that any row uses."""
        return min(self.starts, default=self.end)

    def join(self, row: Row) -> None:
        """Take a row in, with what it has read."""
        length = row.cache.get_seq_length()
        self._make_room(row, length)
        n, begin = len(self.rows), self.end - length
        for mine, read in zip(self.layers, row.cache.layers, strict=True):
            mine.keys[n, :, begin : self.end] = read.keys[0]
            mine.values[n, :, begin : self.end] = read.values[0]
        self.read[n] = False
        self.read[n, begin : self.end] = True
        row.cache = None
        self.contexts.join(row.context)
        self.rows.append(row)
        self.starts.append(begin)
        self.counts.append(length)

    def leave(self, row: Row) -> None:
        """Let a row go; the last one takes its place."""
        i = self.rows.index(row)
        last, start, count = self.rows.pop(), self.starts.pop(), self.counts.pop()
        if last is not row:
            for layer in self.layers:
                layer.keys[i, :, start : self.end] = layer.keys[len(self.rows), :, start : self.end]
                layer.values[i, :, start : self.end] = layer.values[len(self.rows), :, start : self.end]
            self.read[i] = self.read[len(self.rows)]
            self.rows[i], self.starts[i], self.counts[i] = last, start, count
        self.contexts.leave(row.context)
        if not self.rows:
            self.clear()

    def step(self) -> None:
        """Read every row's last token and those that it guesses to follow; choose its next ones as long as the guess was right.

        Every token is chosen from what the base says after the ones before it, so that a guess changes the time it takes and no answer.
        """
        guesses = [row.guess(self._ahead()) for row in self.rows]
        width = 1 + max(map(len, guesses))
        self._make_room(more=width)
        rows, end = len(self.rows), self.end
        self.read[:rows, end : end + width] = True  # among these, a token reads those before it in any case
        taken = []
        for i, (row, guess, logits) in enumerate(zip(self.rows, guesses, self._forward(guesses, width), strict=True)):
            taken.append(_accept(row, guess, logits))
            self.read[i, end + taken[-1] : end + width] = False
            self.counts[i] += taken[-1]
        self.end += max(taken)

    def _ahead(self) -> int:
        """Tokens that a row may guess at this step."""
        rows = len(self.rows)
        if rows > 1 and has_windows(self.base.model):  # they count columns, those between that are masked as well
            return 0
        return min(self.guesses, GUESSED_TOGETHER // rows)

    def _forward(self, guesses: list[list[int]], width: int) -> Tensor:
        """Return logits (R, width, V): what follows each row's last token and each of its guesses; rows of fewer are filled up."""
        device, rows = self.base.device, len(self.rows)
        ids = [[row.ids[-1], *guess, *[row.ids[-1]] * (width - 1 - len(guess))] for row, guess in zip(self.rows, guesses, strict=True)]
        places = torch.tensor([[row.position] for row in self.rows], device=device) + torch.arange(width, device=device)
        with torch.no_grad(), sharing(self.base.model, self.contexts.shared([row.context for row in self.rows])):
            return self.base.model(
                input_ids=torch.tensor(ids, device=device),
                position_ids=places.clamp(max=self.base.max_positions - 1),
                attention_mask=self.read[:rows, self.low : self.end + width].long(),
                **cached(self.base.model, Cache(layers=list(self.layers))),
            ).logits

    def _make_room(self, new: Row | None = None, length: int = 0, more: int = 1) -> None:
        """Have place for one more row of `length` columns, if one is given, and for `more` columns; close rows' gaps if they have grown."""
        all_rows = self.rows if new is None else [*self.rows, new]
        if new is not None and not self.layers:
            self.layers = [_Layer(self, read.keys[:0, :, :0], read.values[:0, :, :0]) for read in new.cache.layers]
        rows, width = len(all_rows), max([*self.counts, length])
        have_rows, have_columns = self.read.shape
        fits = rows <= have_rows and length <= self.end and self.end + more <= have_columns
        if fits and self.end - self.low <= width * 5 // 4 + 64:
            return
        want_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        to_come = max(r.limit - len(r.ids) for r in all_rows)  # more is seldom needed, less would mean copying often
        want_columns = have_columns if width + more < have_columns * 3 // 4 else width + max(more, min(to_come, max(width // 2, 64)))
        own = [self.read[i, : self.end].nonzero()[:, 0] for i in range(len(self.rows))]
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                grown = old.new_zeros(want_rows, old.shape[1], want_columns, old.shape[3])
                for i, columns in enumerate(own):
                    grown[i, :, width - len(columns) : width] = old[i].index_select(1, columns)
                setattr(layer, name, grown)
        self.starts = [width - count for count in self.counts]
        self.read = self.read.new_zeros(want_rows, want_columns)
        for i, start in enumerate(self.starts):
            self.read[i, start:width] = True
        self.end = width


def _accept(row: Row, guess: list[int], logits: Tensor) -> int:
    """Choose a row's next tokens from logits (n, V), as long as they were guessed; return how many of the columns it keeps."""
    taken = 0
    for after, guessed in zip(logits.split(1), [*guess, None], strict=False):
        taken, row.position = taken + 1, row.position + 1
        row.choose(after)
        if row.finished is not None or row.ids[-1] != guessed:
            break
    return taken
