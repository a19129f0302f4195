"""A reconstruction is compressed again, and put right where its slots differ from those it was read from (analysis by synthesis).

    slots, ids as the decoder read them -> where do their own slots differ?   (probe.py; mostly nowhere)
                                        -> other tokens for those blocks      from the decoder's next choices and from near by
                                        -> the ones whose slots come nearest, until nothing differs or nothing helps

The encoder is a fixed function, so the text that was compressed has exactly the given slots, and a reconstruction whose slots are the
given ones is almost surely that text. A block's slot is near the wanted one already when the block's tokens are right in another order,
in the first two layers all the more; so tokens are sought there, and their order a few layers further on (`Plan`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icae.config import POLISH_RATES
from icae.encoder import Encoder
from icae.polish import BLOCK
from icae.probe import Change, Probe
from icae.slots import MemorySlots

TOLERANCE = 1e-3
"""A slot's relative squared distance from the wanted one, below which it counts as the same: rounding to int8 makes 2e-5 of it."""
POLISHED, MOST = 1.4, 0.03
"""In squared rates, what a step of polishing at 4x may add to that, and the most that is allowed in all: a wrong block is at 0.1."""
SHARE = 0.1
"""Of the worst slot's distance: blocks below it may only stand beside wrong ones, and wait."""
ROUNDS = 12
"""At most, of each search."""

Choices = Callable[[list[int], int], list[list[int]]]
"""Segment ids, a number -> for each place so many of the likeliest tokens after the ones before it, read from the slots."""


@dataclass(frozen=True)
class Search:
    """One way to look for better tokens."""

    depth: int | None
    """Layers compared, of kv slots; none: all, as of embedding slots always."""
    reach: int
    """Blocks after the changed one that are computed anew with it."""
    order: bool
    """Only the order of a block's tokens is changed."""


@dataclass(frozen=True)
class Plan:
    """How a kind of slots is put right."""

    choices: tuple[int, ...]
    """Of the decoder's likeliest tokens at each place: so many at first, so many where that left slots that differ."""
    searches: tuple[Search, ...]
    """One after the other, for each number of choices; the last one looks at all layers."""


@dataclass(frozen=True)
class Refined:
    """A reconstruction that was compressed again."""

    ids: list[int]
    mismatches: list[float]
    """Of each segment, how far its slots are from those it was read from: the worst slot's relative squared distance."""
    tolerances: list[float]
    """Of each, up to which they count as the same."""

    @property
    def doubtful(self) -> int:
        """Segments whose slots differ still."""
        return sum(not m <= most for m, most in zip(self.mismatches, self.tolerances, strict=True))

    @property
    def verified(self) -> bool:
        """Whether its slots are the given ones, so that it is almost surely the text that was compressed."""
        return not self.doubtful


def tolerance(slots: MemorySlots) -> float:
    """Return the distance up to which slots count as the given ones."""
    moved = sum(POLISH_RATES[name] ** 2 for name in slots.tensors) / len(slots.tensors)
    return min(TOLERANCE + POLISHED * moved * slots.origin.polish * slots.origin.ratio / BLOCK, MOST)


PLANS = {
    "layers": Plan((4, 16), (Search(2, 0, False), Search(8, 1, True), Search(None, 1, True))),
    "memory": Plan((16, 64), (Search(0, 0, False), Search(0, 0, True))),
    "output": Plan((4,), (Search(None, 0, False), Search(None, 0, True))),
}
"""By where the encoder reads slots from (`Encoder.read_from`). Some orders show in the last layers only, for which few blocks are left by
then; changes of a memory token cost next to nothing; those of the output are slow."""


@torch.no_grad()
def refine(encoder: Encoder, slots: MemorySlots, ids: Sequence[int], choices: Choices, by: Plan | None = None) -> tuple[list[int], float]:
    """Put one segment's reconstruction right as far as its slots tell.

    Parameters
    ----------
    encoder : Encoder
        That made the slots, in evaluation mode.
    slots : MemorySlots
        Of one segment.
    ids : sequence of int
        The reconstruction; cut, or filled up with its last token, to the segment's length.
    choices : callable
        What the decoder would say at each place.
    by : Plan, optional
        How; none: as `PLANS` has it for the encoder.

    Returns
    -------
    list of int
        The segment's ids.
    float
        How far their slots are from the given ones: the worst slot's relative squared distance, over all layers. Up to `tolerance` the
        text is almost surely the one that was compressed.
    """
    length, by = slots.tokens, by or PLANS[encoder.read_from]
    found = [*ids, *[ids[-1] if ids else 0] * length][:length]
    mismatch = float("inf")
    for width in by.choices:
        for search in by.searches:
            probe = _search(search, encoder, slots, found, lambda ids, width=width: choices(ids, width))  # type: ignore[misc]
            found, mismatch = probe.ids, float(probe.distances.max())
        if mismatch <= tolerance(slots):
            break
    return found, mismatch


def _search(search: Search, encoder: Encoder, slots: MemorySlots, ids: list[int], choices: Callable[[list[int]], list[list[int]]]) -> Probe:
    """Change blocks whose slots differ, together or one by one, as long as the slots come nearer."""
    ratio, enough = slots.origin.ratio, tolerance(slots)

    def look(ids: list[int]) -> Probe:
        return Probe(encoder, ids, slots.tensors, ratio, search.depth)

    probe, share = look(ids), SHARE
    for _ in range(ROUNDS):
        blocks = (probe.distances > max(enough, share * float(probe.distances.max()))).nonzero()[:, 0].tolist()
        if not blocks:
            break
        if search.order:
            orders = _orders(probe, blocks, search.reach)
            gains = _best(probe, orders, probe.ask(orders))
        else:
            gains = _tokens(probe, blocks, choices(probe.ids))
        better = _apply(probe, sorted(gains, key=lambda gain: gain[0]), look)
        if better is None and share == 0:
            break
        probe, share = (probe, 0) if better is None else (better, SHARE)
    return probe


def _apply(probe: Probe, gains: list[tuple[float, Change]], look: Callable[[list[int]], Probe]) -> Probe | None:
    """Return what all changes together lead to, or what the first alone does, whichever is better; none: neither helps."""
    trials = [probe]
    for count in {len(gains), 1} if gains else ():
        ids = list(probe.ids)
        for _, change in gains[:count]:
            begin = change.block * probe.ratio
            ids[begin : begin + probe.ratio] = change.tokens[: probe.ratio]
        trials.append(look(ids))
    best = min(trials, key=lambda trial: float(trial.distances.sum()))
    return None if best is probe else best


def _tokens(probe: Probe, blocks: list[int], choices: list[list[int]]) -> list[tuple[float, Change]]:
    """Return the best change of one token or of two, and what it gains, for each block that gains by one."""
    ratio, ids = probe.ratio, probe.ids
    singles: list[tuple[Change, int]] = []
    for block in blocks:
        here = slice(block * ratio, (block + 1) * ratio)
        own, near = tuple(ids[here]), ids[max(0, here.start - ratio) : here.stop + ratio]
        others = {*near, *itertools.chain(*choices[here])}
        singles += [(Change(block, (*own[:i], t, *own[i + 1 :])), i) for i in range(len(own)) for t in sorted(others - {own[i]})]
    distances = probe.ask([change for change, _ in singles])
    best: dict[int, list[tuple[float, Change, int]]] = {block: [] for block in blocks}
    for (change, i), distance in zip(singles, distances.tolist(), strict=True):
        best[change.block].append((distance, change, i))
    more = []
    for block, found in best.items():
        found.sort(key=lambda f: f[0])
        for (_, one, i), (_, other, j) in itertools.combinations(found[:8], 2):
            if i != j:
                more.append(Change(block, (*one.tokens[:j], other.tokens[j], *one.tokens[j + 1 :])))
    return _best(probe, [*(change for change, _ in singles), *more], torch.cat([distances, probe.ask(more)]))


def _orders(probe: Probe, blocks: list[int], reach: int) -> list[Change]:
    """Return other orders of each block's tokens, with the tokens of `reach` blocks after it."""
    ratio, ids, changes = probe.ratio, probe.ids, []
    for block in blocks:
        own = tuple(ids[block * ratio : (block + 1) * ratio])
        after = tuple(ids[(block + 1) * ratio : (block + 1 + reach) * ratio])
        changes += [Change(block, order + after) for order in sorted(_reordered(own) - {own})]
    return changes


def _reordered(tokens: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the orders of up to four tokens; of more, those that one token taken out and put in elsewhere, or one exchange, leads to."""
    if len(tokens) <= 4:
        return set(itertools.permutations(tokens))
    moved = set()
    for i, j in itertools.permutations(range(len(tokens)), 2):
        rest = tokens[:i] + tokens[i + 1 :]
        moved.add(rest[:j] + (tokens[i],) + rest[j:])
        swapped = list(tokens)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        moved.add(tuple(swapped))
    return moved


def _best(probe: Probe, changes: list[Change], distances: Tensor) -> list[tuple[float, Change]]:
    """Return (distance saved, negative; change) for the best change of each block, if it saves a twentieth or more."""
    best: dict[int, tuple[float, Change]] = {}
    for change, distance in zip(changes, distances.tolist(), strict=True):
        now = float(probe.distances[change.block])
        if distance < 0.95 * now and distance - now < best.get(change.block, (0.0, change))[0]:
            best[change.block] = (distance - now, change)
    return list(best.values())
