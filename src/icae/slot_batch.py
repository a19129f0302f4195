"""The slots of several contexts side by side, padded: what encoder and decoder handle. Two kinds, as in slots.py, and no test for the kind.

Shape legend: B contexts in a batch, K slots of the longest of them, k slots of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from icae.slots import MemorySlots, Origin, Segment, rotated


@dataclass(frozen=True)
class SlotBatch:
    """The slots of several contexts, padded on the right. Gradients flow through it while training."""

    tensors: Mapping[str, Tensor]
    """Slots by name, each (B, K, ...)."""
    mask: Tensor
    """(B, K) bool: true where a slot is real."""
    positions: Tensor
    """(B, K) int64: position ids in the decoder, 0 where padded."""
    segments: list[tuple[Segment, ...]] = field(default_factory=list)
    rotations: Tensor | None = None

    @property
    def spans(self) -> list[int]:
        """Position id of whatever comes after each context's slots."""
        return [sum(s.span for s in row) for row in self.segments]

    def rows(self, origin: Origin) -> list[MemorySlots]:
        """Return each context's own slots, without padding."""
        return [
            MemorySlots(
                {name: t[b, : int(real)] for name, t in self.tensors.items()},
                self.positions[b, : int(real)],
                self.segments[b],
                origin,
                self.rotations,
            )
            for b, real in enumerate(self.mask.sum(1))
        ]

    @staticmethod
    def stack(batches: Sequence[SlotBatch]) -> SlotBatch:
        """Put batches under one another, padded alike."""
        width = max(b.mask.shape[1] for b in batches)

        def grown(t: Tensor) -> Tensor:
            return torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, width - t.shape[1]))

        return dataclasses.replace(
            batches[0],
            tensors={name: torch.cat([grown(b.tensors[name]) for b in batches]) for name in batches[0].tensors},
            mask=torch.cat([grown(b.mask) for b in batches]),
            positions=torch.cat([grown(b.positions) for b in batches]),
            segments=[row for b in batches for row in b.segments],
        )

    def select(self, rows: Sequence[int]) -> SlotBatch:
        """Return some of the contexts, padded no more than they need."""
        index = torch.tensor(rows).to(self.mask.device, non_blocking=True)
        here = slice(max(sum(s.slots for s in self.segments[b]) for b in rows))
        return dataclasses.replace(
            self,
            tensors={name: t[index, here] for name, t in self.tensors.items()},
            mask=self.mask[index, here],
            positions=self.positions[index, here],
            segments=[self.segments[b] for b in rows],
        )

    def joined(self, groups: Sequence[Sequence[int]]) -> SlotBatch:
        """Join contexts, each group in order, to one; later ones are shifted, as by `MemorySlots.concatenate`, but all groups at once."""
        width = self.mask.shape[1]
        places, shifts = [], []
        for group in groups:
            place: list[int] = []
            shift: list[int] = []
            offset = 0
            for b in group:
                count = sum(s.slots for s in self.segments[b])
                place += range(b * width, b * width + count)
                shift += [offset] * count
                offset += sum(s.span for s in self.segments[b])
            places.append(torch.tensor(place))
            shifts.append(torch.tensor(shift))
        index, by = (pad_sequence(rows, batch_first=True).to(self.mask.device, non_blocking=True) for rows in (places, shifts))
        tensors = {name: t.flatten(0, 1)[index] for name, t in self.tensors.items()}
        if self.rotations is not None and any(len(group) > 1 for group in groups):
            tensors["keys"] = rotated(tensors["keys"], self.rotations, by)
        return dataclasses.replace(
            self,
            tensors=tensors,
            mask=filled([len(p) for p in places]).to(self.mask.device, non_blocking=True),
            positions=self.positions.flatten()[index] + by,
            segments=[tuple(s for b in group for s in self.segments[b]) for group in groups],
        )

    @staticmethod
    def pad(rows: Sequence[MemorySlots]) -> SlotBatch:
        """Put the slots of several contexts into one batch."""
        return SlotBatch(
            {name: pad_sequence([r.tensors[name] for r in rows], batch_first=True) for name in rows[0].tensors},
            filled([r.count for r in rows]).to(rows[0].positions.device),
            pad_sequence([r.positions for r in rows], batch_first=True),
            [r.segments for r in rows],
            rows[0].rotations,
        )


def filled(counts: Sequence[int], width: int | None = None) -> Tensor:
    """Return a (rows, width) mask, true in the first `counts[row]` places of each row; no width: the largest count."""
    return torch.arange(max(counts) if width is None else width)[None] < torch.tensor(counts)[:, None]
