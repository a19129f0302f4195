"""Figure 5: reading back at several compression ratios; a fixed number of slots is a walk through the same cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icae.experiments.context import Context, hashes
from icae.experiments.reading import bleus, losses, matches, read_back
from icae.experiments.table import Cell, Column, Table, mean

NEEDS = ("main", "text")
QUICK = {"samples": 8, "lengths": (128, 256), "ratios": (4, 8)}
COLUMNS = [
    Column("ratio", "tokens a slot"),
    Column("length", "context, tokens"),
    Column("slots", "slots", 0),
    Column("samples", "samples"),
    Column("loss", "loss, nats a token"),
    Column("bleu", "BLEU", 1),
    Column("exact", "exact prefix, share"),
]


def run(context: Context, *, samples: int = 100, lengths: Sequence[int] = (128, 256, 512), ratios: Sequence[int] = (4, 8, 16)) -> Table:
    """Read windows back at every ratio, by the one adapter."""
    notes = context.text_note()
    lengths = context.within(lengths, context.longest, "no document is longer", notes)
    windows = context.windows(max(lengths), samples)
    rows: list[dict[str, Cell]] = []
    for ratio in ratios:
        read_back(context, context.main, windows, ratio)
        for length in lengths:
            texts = [w[:length] for w in windows]
            readings = read_back(context, context.main, texts, ratio)
            rows.append(
                {
                    "ratio": ratio,
                    "length": length,
                    "slots": float(np.mean([r.slots for r in readings])),
                    "samples": samples,
                    "loss": mean(losses(readings)),
                    "bleu": mean(bleus(context.main, readings, texts)),
                    "exact": mean(matches(readings, texts)),
                }
            )
    notes.append(f"All ratios are read by one adapter, whose own ratio is {context.main.config.ratio}.")
    notes.append("A fixed number of slots: the ratio doubles where the context does.")
    return Table("fig5", COLUMNS, rows, notes, hashes(windows))
