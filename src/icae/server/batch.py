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

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from icae.model import ICAE
from icae.server.row import Row


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
