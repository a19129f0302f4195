"""Token ids -> chapters: pieces that a store keeps on their own, so that an edit in one of them costs that one alone.

Cuts are defined by content (as in LBFS, Muthitacharoen et al. 2001), not by counting from the start: a span that is too long is cut
at the strongest of its breaks, of equals the one whose neighbouring ids hash lowest, of these the one nearest the middle; each half
is then looked at anew. An edit leaves every cut but its neighbours' where it was:

    before   [ intro | harbour | ferries | lamps ]
    after    [ intro | HARBOUR | ferries | lamps ]        one chapter is new, three are found in the store

Inside a chapter the segments are cut as everywhere else (segments.py); a text of one chapter is compressed just as without a store.
Knows no model and no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from icae.errors import ICAEError

SEGMENTS = 16
"""Segments a chapter holds, at most."""
_WINDOW = 4
"""Ids on either side of a cut that its hash is taken over."""


def chapters(ids: list[int], segment_length: int, newlines: Mapping[int, int] | None = None) -> list[tuple[int, int]]:
    """Cut token ids where their content says.

    Parameters
    ----------
    ids : list of int
        The whole text.
    segment_length : int
        Tokens of a segment, at most; a chapter holds at most `SEGMENTS` times as many, and at least a quarter of that.
    newlines : mapping of int to int, optional
        Newlines in the text of a token id. Cuts fall behind two or more of them where they can, else behind one.

    Returns
    -------
    list of (start, end)
        Half-open ranges, in order, without gaps.

    Raises
    ------
    ICAEError
        If the text has fewer than two tokens, or segments are too short to be told apart.
    """
    if len(ids) < 2:
        raise ICAEError(f"a context needs at least two tokens, this one has {len(ids)}; give a longer text")
    if segment_length < 4:
        raise ICAEError(f"a store needs segments of at least 4 tokens, this checkpoint's have {segment_length}")
    limit = SEGMENTS * segment_length
    if len(ids) <= limit:
        return [(0, len(ids))]
    ranks, made, open_ = _ranks(ids, newlines or {}), [], [(0, len(ids))]
    while open_:
        start, end = open_.pop()
        if end - start <= limit:
            made.append((start, end))
            continue
        at = min(range(start + limit // 4, end - limit // 4 + 1), key=lambda i: (ranks[i], abs(2 * i - start - end)))
        open_ += [(at, end), (start, at)]
    return made


def _ranks(ids: list[int], newlines: Mapping[int, int]) -> list[int]:
    """Return for each place between ids how little it invites a cut: first by the newlines right before it, then by a hash."""
    data, made, run = b"".join(i.to_bytes(4, "little") for i in ids), [], 0
    for at in range(len(ids) + 1):
        around = data[4 * max(at - _WINDOW, 0) : 4 * (at + _WINDOW)]
        made.append((2 - run << 64) + int.from_bytes(hashlib.blake2b(around, digest_size=8).digest(), "little"))
        run = min(run + newlines[ids[at]], 2) if at < len(ids) and newlines.get(ids[at]) else 0
    return made
