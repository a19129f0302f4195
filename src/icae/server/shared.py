"""The contexts that a batch's rows read, side by side in one buffer a layer, each once, however many rows read it.

A context alone is read where it stands; of several, each is copied when its first row joins, and goes with its last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icae.server.attention import Layers, Shared


class Contexts:
    """Contexts under way; two are the same where they are the same object."""

    def __init__(self) -> None:
        self.held: list[Layers] = []
        self.readers: list[int] = []
        """Rows that read each."""
        self.layers: Layers = []
        """(P or more, H, K or more, S), where there are several."""

    @property
    def bytes(self) -> int:
        """Memory that the buffer takes."""
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def join(self, context: Layers | None) -> None:
        """Count another row that reads a context; none: it reads none."""
        if context is None:
            return
        place = self._place(context)
        if place is None:
            self.held.append(context)
            self.readers.append(0)
            if len(self.held) > 1:
                self._copy()
        self.readers[-1 if place is None else place] += 1

    def leave(self, context: Layers | None) -> None:
        """Count a row less; a context that no row reads any more goes, and the last one takes its place."""
        if context is None:
            return
        place = self._place(context)
        assert place is not None
        self.readers[place] -= 1
        if self.readers[place]:
            return
        last, readers = self.held.pop(), self.readers.pop()
        if len(self.held) < 2:
            self.layers = []
        if place < len(self.held):
            self.held[place], self.readers[place] = last, readers
            for pair in self.layers:
                for mine in pair:
                    mine[place] = mine[len(self.held)]

    def shared(self, rows: Sequence[Layers | None]) -> Shared | None:
        """Return the contexts as these rows read them; none where no row reads one."""
        if not self.held:
            return None
        readers: list[list[int]] = [[] for _ in self.held]
        places = []
        most = max(self.readers)
        for row, context in enumerate(rows):
            place = None if context is None else self._place(context)
            places.append(0 if place is None else place * most + len(readers[place]))
            if place is not None:
                readers[place].append(row)
        device, slots = self.held[0][0][0].device, torch.tensor([_slots(c) for c in self.held])
        columns = int(slots.max())
        beyond = None
        if bool((slots < columns).any()):
            past = torch.arange(columns) >= slots[:, None]
            beyond = torch.zeros(past.shape).masked_fill(past, -torch.inf)[:, None, None].to(device, self.held[0][0][0].dtype)
        none = [c is None for c in rows]
        without = torch.tensor(none, device=device)[:, None, None] if any(none) else None
        count = len(self.held)
        layers = self.held[0] if count == 1 else [(k[:count, :, :columns], v[:count, :, :columns]) for k, v in self.layers]
        filled = torch.tensor([r + [0] * (most - len(r)) for r in readers], device=device)
        return Shared(layers, filled, torch.tensor(places, device=device), beyond, without)

    def _place(self, context: Layers) -> int | None:
        return next((i for i, held in enumerate(self.held) if held is context), None)

    def _copy(self) -> None:
        """Copy the last context into the buffer; all of them where that is to be made, or too small."""
        count, columns = len(self.held), max(map(_slots, self.held))
        first = count - 1
        if not self.layers or self.layers[0][0].shape[0] < count or self.layers[0][0].shape[2] < columns:
            first = 0
            room = 1 << (count - 1).bit_length()
            self.layers = [
                tuple(t.new_zeros(room, t.shape[1], columns, t.shape[3]) for t in pair)  # type: ignore[misc]
                for pair in self.held[0]
            ]
        for place in range(first, count):
            for mine, theirs in zip(self.layers, self.held[place], strict=True):
                for to, t in zip(mine, theirs, strict=True):
                    to[place, :, : t.shape[2]] = t[0]


def _slots(context: Layers) -> int:
    return context[0][0].shape[2]
