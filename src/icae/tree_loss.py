"""What `loss.batch_loss` computes, of texts that are read as trees (trees.py)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from icae.lean import LeanLlama, Loras
from icae.reader import Reader
from icae.slot_batch import SlotBatch
from icae.trees import Spots, forest, read, read_plain, spots


def tree_loss(
    llama: LeanLlama,
    reader: Reader,
    slots: SlotBatch,
    groups: Sequence[Sequence[int]],
    markers: Tensor,
    text_ids: Tensor,
    real: Tensor,
    scored: Tensor,
    weights: Tensor,
    teacher: dict[str, Tensor] | None = None,
    tutor: LeanLlama | None = None,
) -> Tensor:
    """Return what `loss.batch_loss` does; arguments as there, and the segments of each context."""
    share = weights / weights.sum(1, keepdim=True).clamp(min=1)
    lesson = None if teacher is None else Lesson(llama, tutor, groups, teacher, real)
    if lesson is not None:
        share = share * (1 - lesson.distil)[:, None]
    kinds = [(marker, *group) for marker, group in zip(markers.tolist(), groups, strict=True)]
    total, wanted = torch.zeros(()), _places(scored)
    for trees in forest(kinds, text_ids, real, reader.markers.shape[1]):
        states: list[Tensor] | None = None if lesson is None else lesson.layers()
        first = [t.samples[0] for t in trees]
        hidden = read(llama, reader, slots.select(first), markers[first], trees, states)
        at = spots(trees, wanted, predict=True)
        logits = llama.logits(hidden[at.row, at.node]).float()
        total = total + _nll(logits, text_ids, at) @ share[at.sample, at.place]
        if lesson is not None:
            total = total + lesson.unlike(logits, at)
            if states:
                total = total + lesson.apart(states, spots(trees, lesson.shared))
    return total / len(markers)


def plain_loss(
    llama: LeanLlama,
    kinds: Sequence[Hashable],
    text_ids: Tensor,
    real: Tensor,
    scored: Tensor,
    loras: Loras | None = None,
) -> Tensor:
    """Return the mean over texts of the mean negative log-likelihood of their scored tokens, read with no slots and no marker.

    Parameters
    ----------
    llama, loras
        Who reads, and what it learns by (`LeanLlama.loras`).
    kinds : sequence
        One for each text: those of a kind are read as one tree.
    text_ids, real, scored : Tensor
        (B, T) int64, bool, bool.
    """
    total, wanted = torch.zeros(()), _places(scored)
    for trees in forest(kinds, text_ids, real):
        at = spots(trees, wanted, predict=True)
        logits = llama.logits(read_plain(llama, trees, loras=loras)[at.row, at.node]).float()
        total = total + _nll(logits, text_ids, at) @ (1 / scored.sum(1))[at.sample]
    return total / len(kinds)


def _places(scored: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in scored]


def _nll(logits: Tensor, text_ids: Tensor, at: Spots) -> Tensor:
    return nn.functional.cross_entropy(logits, text_ids[at.sample, at.place], reduction="none")


class Lesson:
    """What those who teach a batch make of the full text: the frozen base and, where there is one, the tuned base."""

    distil: Tensor
    """(B,): the weight of what the teacher says; 0: nobody teaches."""
    shared: list[list[int]]
    """For each sample, the places in its text of tokens that its teacher reads, too."""

    @torch.no_grad()
    def __init__(
        self, llama: LeanLlama, tutor: LeanLlama | None, groups: Sequence[Sequence[int]], teacher: dict[str, Tensor], real: Tensor
    ):
        rows, tutored = teacher["rows"], teacher["by_tutor"] & (tutor is not None)
        self.distil, self._unlike, self._apart = (torch.zeros(len(real)) for _ in range(3))
        self.distil[rows] = teacher["weights"]
        self._unlike[rows] = teacher["weights"] / teacher["scored"].sum(1).clamp(min=1)
        self._apart[rows] = teacher["aligned"] / (teacher["shared"] - 1).clamp(min=1)
        self._compared = bool(teacher["aligned"].any())
        self.shared = [[] for _ in real]
        self._said, self._states = _Noted(), _Noted()
        moved = (real.sum(1)[rows] - teacher["real"].sum(1)).tolist()  # from a place in the teacher's text to the one in the sample's
        for who, theirs in ((llama, ~tutored), (tutor, tutored)):
            own = theirs.nonzero()[:, 0].tolist()
            if who is not None and own:
                self._hear(
                    who, [tuple(groups[b]) for b in rows[own].tolist()], {n: t[own] for n, t in teacher.items()}, [moved[r] for r in own]
                )

    def _hear(self, who: LeanLlama, kinds: list[tuple[int, ...]], texts: dict[str, Tensor], moved: list[int]) -> None:
        """Note what one teacher makes of its texts."""
        rows, wanted = texts["rows"].tolist(), _places(texts["scored"])
        ends = texts["real"].sum(1).tolist()
        both = [list(range(end - n, end - 1)) for end, n in zip(ends, texts["shared"].tolist(), strict=True)]  # neither reads the last
        for b, places, by in zip(rows, both, moved, strict=True):
            self.shared[b] = [p + by for p in places]
        for trees in forest(kinds, texts["ids"], texts["real"]):
            states = self.layers()
            hidden = read_plain(who, trees, states)
            at = spots(trees, wanted, predict=True)
            said = who.logits(hidden[at.row, at.node]).float().log_softmax(-1)
            self._said.add(said.to(who.dtype), [(rows[t], p + moved[t]) for t, p in _keys(at)])
            if states:
                at = spots(trees, both)
                self._states.add(_stacked(states, at), [(rows[t], p + moved[t]) for t, p in _keys(at)])

    def layers(self) -> list[Tensor] | None:
        """Return what takes up a pass's hidden states; none where no states are compared."""
        return [] if self._compared else None

    def unlike(self, logits: Tensor, at: Spots) -> Tensor:
        """Return the sum of KL(teacher || pupil) over scored tokens, logits (n, V), by weight (`loss._taught`)."""
        heard, mine = self._said.find(_keys(at))
        kl = nn.functional.kl_div(logits[mine].log_softmax(-1), heard.float(), reduction="none", log_target=True).sum(-1)
        return kl @ self._unlike[at.sample[mine]]

    def apart(self, states: list[Tensor], at: Spots) -> Tensor:
        """Return the sum of the hidden states' squared distances, relative to the teacher's size, by weight (`loss._apart`)."""
        heard, mine = self._states.find(_keys(at))
        pupil, wanted = _stacked(states, at)[mine].float(), heard.float()
        return ((pupil - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean(1) @ self._apart[at.sample[mine]]


class _Noted:
    """Rows of tensors, found again by their keys."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._at: dict[tuple[int, int], int] = {}

    def add(self, rows: Tensor, keys: list[tuple[int, int]]) -> None:
        """Note some rows."""
        begin = len(self._at)
        self._rows.append(rows)
        self._at |= {key: begin + n for n, key in enumerate(keys)}

    def find(self, keys: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
        """Return the rows that were noted for keys, and which of the keys those are."""
        known = [n for n, key in enumerate(keys) if key in self._at]
        self._rows = [torch.cat(self._rows)]
        return self._rows[0][[self._at[keys[n]] for n in known]], known


def _keys(at: Spots) -> list[tuple[int, int]]:
    return list(zip(at.sample.tolist(), at.place.tolist(), strict=True))


def _stacked(states: list[Tensor], at: Spots) -> Tensor:
    """Return the states (n, layers, D) of some inputs."""
    return torch.stack([layer[at.row, at.node] for layer in states], 1)
