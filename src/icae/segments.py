"""Token counts -> segments and position ids. Pure functions on whole numbers: no torch, no tokenizer, no model.

A context of n tokens is cut into segments of nearly equal length, between blocks of `ratio` tokens; a segment of L tokens gets
k = ceil(L / ratio) memory slots, slot i standing for the tokens of block i. Only the last block of a context may be shorter.

Two layouts give position ids. With L = 8, ratio = 4:

    spread      context    1 2 3 4 5 6 7 8          slot i stands at 1 + (ratio - 1) // 2 + i * ratio, inside its own block,
    (EPL,       memory       .2.     .6.            for the encoder and for the decoder alike
     arXiv      decoder    [AE]=0, targets 1..8     a target stands beside the slot that holds it
     2409.14364)           [LM], [FT] from 8 on     as if the text itself had been read

    appended    context    0 1 2 3 4 5 6 7
    (the paper) memory                     8 9      after the context
                decoder    slots 0 1, [AE], [LM], [FT] from 2 on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from icae.errors import ICAEError


def cut(length: int, segment_length: int, ratio: int = 1) -> list[tuple[int, int]]:
    """Cut `length` tokens into the fewest segments of at most `segment_length`, as even as whole blocks of `ratio` tokens allow.

    So that the slots of all segments together are no more than ceil(length / ratio). The last segments, one of which ends with the block
    that may be shorter, are the longer ones. Where a segment is shorter than a block, it is the block.

    Returns
    -------
    list of (start, end)
        Half-open token ranges, in order, without gaps. 10 tokens at most 4 long give (0, 3), (3, 6), (6, 10); in blocks of two
        (0, 2), (2, 6), (6, 10).
    """
    if length < 1:
        raise ICAEError("the context is empty; give a text of at least one token")
    block = min(ratio, segment_length)
    blocks = -(-length // block)
    count = -(-blocks // (segment_length // block))
    short, longer = divmod(blocks, count)
    bounds = [0]
    for i in range(count):
        bounds.append(min(length, bounds[-1] + block * (short + (1 if i >= count - longer else 0))))
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def check_ratio(ratio: int | None) -> None:
    """Raise `ICAEError` for a compression ratio below 1; none is the checkpoint's own."""
    if ratio is not None and ratio < 1:
        raise ICAEError(f"ratio must be at least 1, got {ratio}; 4 is what the shipped adapters were trained for")


def slot_count(length: int, ratio: int) -> int:
    """Return k = ceil(length / ratio), the memory slots of a segment of `length` tokens."""
    check_ratio(ratio)
    return -(-length // ratio)


@dataclass(frozen=True)
class Positions:
    """Position ids of one segment, local to it (a segment that follows others is shifted by their spans)."""

    context: list[int]
    """Of the context tokens, in the encoder."""
    memory: list[int]
    """Of the memory tokens, in the encoder."""
    slots: list[int]
    """Of the memory slots, in the decoder."""
    span: int
    """Of the [LM] or [FT] token, in the decoder; also how far the next segment's positions are shifted."""


def spread(length: int, ratio: int) -> Positions:
    """Lay memory tokens out inside their own blocks of the context (EPL / UPL, arXiv 2409.14364)."""
    slots = [min(1 + (ratio - 1) // 2 + i * ratio, length) for i in range(slot_count(length, ratio))]
    return Positions(list(range(1, length + 1)), slots, slots, length)


def appended(length: int, ratio: int) -> Positions:
    """Lay memory tokens out after the context (ICAE, arXiv 2307.06945)."""
    k = slot_count(length, ratio)
    return Positions(list(range(length)), list(range(length, length + k)), list(range(k)), k)


_LAYOUTS = {"spread": spread, "appended": appended}


def positions(layout: str, length: int, ratio: int) -> Positions:
    """Return the position ids of one segment of `length` tokens under the layout of that name."""
    return _LAYOUTS[layout](length, ratio)


def alike(lengths: Sequence[int], share: float = 0.75) -> list[list[int]]:
    """Group rows by length, longest first: each group's shortest row has at least `share` of its longest one's length.

    Padding then never takes more than 1 - `share` of a group.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= share * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
