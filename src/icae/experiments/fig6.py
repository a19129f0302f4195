"""Figure 6: several segments' slots joined, against text: perplexity of the same tokens, by how many tokens or slots are read before them.

Contexts end where the target begins; a shorter context is the end of a longer one. `one segment` encodes `at_once` tokens at once, however
much longer that is than what the adapter was trained on. Slots are unpolished, as in table1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from icae.errors import ICAEError
from icae.experiments.context import Context, hashes
from icae.experiments.following import from_slots, from_text
from icae.experiments.table import Cell, Column, Table, perplexity
from icae.model import ICAE
from icae.objectives import pieces
from icae.segments import slot_count
from icae.slots import MemorySlots

NEEDS = ("main", "text")
QUICK = {"samples": 8, "lengths": (128, 256), "text_lengths": (0, 32, 128)}
COLUMNS = [
    Column("side", "context as"),
    Column("read", "tokens or slots read"),
    Column("length", "context, tokens"),
    Column("segments", "segments"),
    Column("samples", "samples"),
    Column("perplexity", "perplexity of what follows", 2),
]


def run(
    context: Context,
    *,
    samples: int = 100,
    target: int = 64,
    lengths: Sequence[int] = (128, 256, 512),
    text_lengths: Sequence[int] = (0, 32, 128, 512),
    at_once: int = 256,
    batch_size: int = 4,
) -> Table:
    """Score the same targets after contexts of every length."""
    notes = context.text_note()
    model = context.main
    room = context.longest - target
    lengths = context.within(lengths, room, "no document is longer, with what follows", notes)
    longest = max(lengths)
    text_lengths = context.within(text_lengths, longest, "no context is longer", notes)
    at_once = min(at_once, longest)
    windows = context.windows(longest + target, samples)
    sides: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], tuple[int, int]] = {}

    def add(side: str, length: int, values: list[float], read: int, segments: int) -> None:
        sides.setdefault((side, length), []).extend(values)
        counts[side, length] = read, segments

    tick = context.progress("targets scored")
    for at in range(0, samples, batch_size):
        part = windows[at : at + batch_size]
        follows = [w[longest:] for w in part]
        for n in text_lengths:
            add("text", n, from_text(model, [w[longest - n : longest] for w in part], follows), n, 0)
        cuts = {n: [pieces(w[longest - n : longest], model.config.segment_length, model.config.ratio) for w in part] for n in lengths}
        once = list(dict.fromkeys(tuple(p) for cut in cuts.values() for row in cut for p in row))  # the shorter contexts' are the longer's
        made = dict(zip(once, model.compress_segments([list(p) for p in once], polish=0), strict=True))
        for n in lengths:
            slots = [MemorySlots.concatenate([made[tuple(p)] for p in cut], same=True) for cut in cuts[n]]
            add("slots", n, from_slots(model, slots, follows), slots[0].count, len(slots[0].segments))
        try:
            whole = one_segment(model, [w[longest - at_once : longest] for w in part])
            add("slots, one segment", at_once, from_slots(model, whole, follows), whole[0].count, 1)
        except ICAEError as error:
            if at == 0:
                notes.append(f"One segment of {at_once} tokens: not measured; {error}.")
        tick(at + len(part), samples)
    rows: list[dict[str, Cell]] = [
        {
            "side": side,
            "read": counts[side, n][0],
            "length": n,
            "segments": counts[side, n][1] or None,
            "samples": samples,
            "perplexity": perplexity(nll),
        }
        for (side, n), nll in sides.items()
    ]
    for row in rows:
        if row["side"] == "text":
            row["segments"] = "-"
    notes.append(f"The adapter's segments are at most {model.config.segment_length} tokens long.")
    return Table("fig6", COLUMNS, sorted(rows, key=lambda r: (str(r["side"]) != "text", str(r["side"]), r["read"])), notes, hashes(windows))


@torch.no_grad()
def one_segment(model: ICAE, texts: Sequence[list[int]]) -> list[MemorySlots]:
    """Encode texts of equal length each as one segment, whatever their length.

    Raises
    ------
    ICAEError
        If the adapter has not as many memory tokens, or the base not as many positions.
    """
    length, ratio = len(texts[0]), model.config.ratio
    if length + slot_count(length, ratio) > model.base.max_positions:
        raise ICAEError(f"{length} tokens and their slots are more than the base's {model.base.max_positions} positions")
    ids = torch.tensor(texts, device=model.base.device)
    return model.encoder(ids, [length] * len(texts), ratio).rows(dataclasses.replace(model.origin, ratio=ratio))
