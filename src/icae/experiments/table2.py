"""Table 2: one text beside what was read back of it, every error marked and classed.

    dropped       words with nothing in their place         swapped        the same words in another order, or other words
    added         words that the text does not have         paraphrased    other words that mean alike

Marks and case do not count. Two pieces mean alike where the base's mean input embeddings of both, each less the vocabulary's mean, have a
cosine of at least `alike`; a word that is dropped here and added a few words away was swapped.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter

import numpy as np
import torch

from icae.base import Base
from icae.experiments.context import Context, hashes
from icae.experiments.reading import bleus, read_back
from icae.experiments.table import Cell, Column, Table

NEEDS = ("main", "text")
QUICK = {"samples": 8, "length": 256}
COLUMNS = [Column("original", "original"), Column("again", "read back"), Column("errors", "errors")]


def run(context: Context, *, samples: int = 100, length: int = 512, alike: float = 0.5, words_a_row: int = 16) -> Table:
    """Show the window whose BLEU is the median of all, and count the classes over all."""
    notes = context.text_note()
    (length,) = context.within([length], context.longest, "no document is longer", notes)
    windows = context.windows(length, samples)
    model, decode = context.main, context.base.decode
    readings = read_back(context, model, windows)
    scores = bleus(model, readings, windows)
    middle = int(np.argsort(scores, kind="stable")[len(scores) // 2])
    found = [differences(context.base, decode(w), decode(r.made), alike) for w, r in zip(windows, readings, strict=True)]
    counts = sum(map(counted, found), Counter[str]())
    rows = _rows(found[middle], words_a_row)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("dropped", "added", "swapped", "paraphrased"))
    notes.append(f"The window shown has the median BLEU of {samples}, {scores[middle]:.1f}.")
    whole = sum(not any(kind for *_, kind in pieces) for pieces in found)
    notes.append(f"Over all {samples} windows of {length} tokens, in pieces of words: {told}; {whole} windows without an error.")
    return Table("table2", COLUMNS, rows, notes, hashes(windows))


def differences(base: Base, original: str, again: str, alike: float) -> list[tuple[list[str], list[str], str]]:
    """Return pieces of both texts in order, as (words, words read back, class); the class of equal pieces is empty."""
    mine, theirs = re.findall(r"\S+", original), re.findall(r"\S+", again)
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        here, there = mine[a:b], theirs[c:d]
        left, right = _bare(here), _bare(there)
        if tag == "equal" or left == right:
            kind = ""
        elif not left or not right:
            kind = "dropped" if left else "added"
        elif sorted(left) == sorted(right):
            kind = "swapped"
        else:
            kind = "paraphrased" if _closeness(base, " ".join(left), " ".join(right)) >= alike else "swapped"
        found.append((here, there, kind))
    for i, (here, there, kind) in enumerate(found):
        for j in range(max(0, i - 2), min(len(found), i + 3)):
            if {kind, found[j][2]} == {"dropped", "added"} and _bare(here + there) == _bare(found[j][0] + found[j][1]):
                found[i], found[j] = (here, there, "swapped"), (*found[j][:2], "swapped")
                break
    return found


def counted(pieces: list[tuple[list[str], list[str], str]]) -> Counter[str]:
    """Count the classes; a word that moved is two pieces, and counts where it was dropped."""
    return Counter(kind for here, _, kind in pieces if kind and (kind != "swapped" or _bare(here)))


def _bare(words: list[str]) -> list[str]:
    """Return words without marks and case; what has no letter or digit is left out."""
    bare = (re.sub(r"\W", "", word).casefold() for word in words)
    return [word for word in bare if word]


@torch.no_grad()
def _closeness(base: Base, left: str, right: str) -> float:
    """Return the cosine of two pieces' mean input embeddings, from the vocabulary's own mean."""
    middle = base.model.get_input_embeddings().weight.float().mean(0)
    a, b = (base.embed(torch.tensor(base.encode(" " + x), device=base.device)).float().mean(0) - middle for x in (left, right))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _rows(pieces: list[tuple[list[str], list[str], str]], words_a_row: int) -> list[dict[str, Cell]]:
    """Lay pieces out in rows of about `words_a_row` words; errors are bold."""
    rows: list[dict[str, Cell]] = []
    left: list[str] = []
    right: list[str] = []
    kinds: list[str] = []

    def close() -> None:
        if left or right:
            rows.append({"original": " ".join(left), "again": " ".join(right), "errors": ", ".join(kinds)})
        for column in (left, right, kinds):
            column.clear()

    for here, there, kind in pieces:
        if kind or here != there:
            left.extend(_bold(here) if kind else here)
            right.extend(_bold(there) if kind else there)
            kinds.extend([kind] if kind else [])
            continue
        for word in here:
            left.append(word)
            right.append(word)
            if len(left) >= words_a_row:
                close()
    close()
    return rows


def _bold(words: list[str]) -> list[str]:
    return [f"**{' '.join(words)}**"] if words else []
