"""Table 1: perplexity of what follows a context, which is given as text, as slots, or not at all; equally many slots at every ratio."""

from __future__ import annotations

from collections.abc import Sequence

from icae.experiments.context import Context, hashes
from icae.experiments.following import follow
from icae.experiments.table import Cell, Column, Table, mean, perplexity

NEEDS = ("main", "text")
QUICK = {"samples": 8, "ratios": (2, 4)}
COLUMNS = [
    Column("ratio", "tokens a slot"),
    Column("length", "context, tokens"),
    Column("target", "what follows, tokens"),
    Column("samples", "samples"),
    Column("text", "perplexity from text", 2),
    Column("slots", "from slots", 2),
    Column("none", "from nothing", 2),
    Column("over", "slots over text, nats a token"),
]


def run(context: Context, *, samples: int = 100, slots: int = 32, target: int = 64, ratios: Sequence[int] = (1, 2, 4, 8)) -> Table:
    """Measure contexts of slots x ratio tokens."""
    notes = context.text_note()
    fitting = context.within([slots * r for r in ratios], context.longest - target, "no document is longer, with what follows", notes)
    rows: list[dict[str, Cell]] = []
    windows: list[str] = []
    for ratio in (r for r in ratios if slots * r in fitting):
        length = slots * ratio
        nll = follow(context, context.main, length=length, target=target, samples=samples, ratio=ratio)
        windows += hashes(context.windows(length + target, samples))
        over = mean([s - t for s, t in zip(nll["slots"], nll["text"], strict=True)])
        rows.append(
            {
                "ratio": ratio,
                "length": length,
                "target": target,
                "samples": samples,
                **{side: perplexity(values) for side, values in nll.items()},
                "over": over,
            }
        )
    notes.append(f"All ratios are read by one adapter, whose own ratio is {context.main.config.ratio}.")
    return Table("table1", COLUMNS, rows, notes, windows)
