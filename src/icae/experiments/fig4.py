"""Figure 4: loss, BLEU and exactly matching prefix of what is read back, by context length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icae.experiments.context import Context, hashes
from icae.experiments.reading import bleus, losses, matches, read_back
from icae.experiments.table import Cell, Column, Table, mean

NEEDS = ("main", "text")
QUICK = {"samples": 8, "lengths": (128, 256)}
COLUMNS = [
    Column("length", "context, tokens"),
    Column("samples", "samples"),
    Column("ratio", "tokens a slot", 2),
    Column("loss", "loss, nats a token"),
    Column("loss_quartiles", "quartiles"),
    Column("bleu", "BLEU", 1),
    Column("bleu_quartiles", "quartiles"),
    Column("exact", "exact prefix, share"),
    Column("exact_quartiles", "quartiles"),
]


def run(context: Context, *, samples: int = 100, lengths: Sequence[int] = (128, 256, 384, 512)) -> Table:
    """Read windows of the longest length back; shorter contexts are the windows' beginnings."""
    notes = context.text_note()
    lengths = context.within(lengths, context.longest, "no document is longer", notes)
    windows = context.windows(max(lengths), samples)
    read_back(context, context.main, windows)
    rows = []
    for length in lengths:
        texts = [w[:length] for w in windows]
        readings = read_back(context, context.main, texts)
        row: dict[str, Cell] = {"length": length, "samples": samples, "ratio": length / float(np.mean([r.slots for r in readings]))}
        scores = {"loss": losses(readings), "bleu": bleus(context.main, readings, texts), "exact": matches(readings, texts)}
        for name, values in scores.items():
            low, middle, high = np.percentile(values, [25, 50, 75])
            digits = 1 if name == "bleu" else 3
            row |= {name: mean(values), f"{name}_quartiles": f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f}"}
            row |= {f"{name}_q25": float(low), f"{name}_q50": float(middle), f"{name}_q75": float(high)}
        rows.append(row)
    return Table("fig4", COLUMNS, rows, notes, hashes(windows))
