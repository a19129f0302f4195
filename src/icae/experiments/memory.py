"""Which tokens are lost: a token's reconstruction loss against how much it surprises the base in plain text (section 3.2.1).

If the encoder leans on what the base knows of language, surprising tokens are lost more often: the rank correlation is then well above 0.
"""

from __future__ import annotations

import numpy as np

from icae.baselines import surprise
from icae.experiments.context import Context, hashes
from icae.experiments.reading import read_back
from icae.experiments.table import Cell, Column, Table

NEEDS = ("main", "text")
QUICK = {"samples": 8, "length": 256}
COLUMNS = [
    Column("group", "tokens, by surprise"),
    Column("tokens", "tokens"),
    Column("surprise", "surprise under the base, nats", 2),
    Column("loss", "reconstruction loss, nats"),
    Column("errors", "tokens not the likeliest, share"),
    Column("rank", "rank correlation (Spearman)"),
]


def run(context: Context, *, samples: int = 100, length: int = 512, groups: int = 10, points: int = 2000) -> Table:
    """Set both losses of every token side by side."""
    notes = context.text_note()
    (length,) = context.within([length], context.longest, "no document is longer", notes)
    windows = context.windows(length, samples)
    readings = read_back(context, context.main, windows)
    tick = context.progress("windows read by the base")
    expected = []
    for window in windows:
        expected.append(surprise(context.base, window))
        tick(len(expected), samples)
    here, lost = np.concatenate(expected), np.concatenate([r.nll for r in readings])
    edges = np.quantile(here, np.linspace(0, 1, groups + 1)[1:-1])
    group = [np.searchsorted(edges, e, side="right") for e in expected]
    values = {"surprise": expected, "loss": [r.nll for r in readings], "errors": [~r.hits for r in readings]}
    chance = np.random.default_rng(context.seed)
    picks = chance.integers(0, samples, (200, samples))
    rows: list[dict[str, Cell]] = []
    for number in range(groups + 1):
        inside = [g == number if number < groups else g >= 0 for g in group]
        row: dict[str, Cell] = {"group": f"{number + 1} of {groups}" if number < groups else "all", "rank": "-"}
        row["tokens"] = int(sum(i.sum() for i in inside))
        for name, rows_of in values.items():
            row[name] = _ratio([float(v[i].sum()) for v, i in zip(rows_of, inside, strict=True)], [int(i.sum()) for i in inside], picks)
        rows.append(row)
    draws = [spearman(np.concatenate([expected[i] for i in p]), np.concatenate([readings[i].nll for i in p])) for p in picks]
    low, high = np.percentile(draws, [2.5, 97.5])
    rows[-1]["rank"] = {"value": spearman(here, lost), "low": float(low), "high": float(high)}
    notes.append("Intervals are bootstraps over windows; a token's surprise is given the window before it.")
    shown = np.sort(chance.choice(len(here), min(points, len(here)), replace=False))
    series = {"surprise": np.round(here[shown].astype(float), 4).tolist(), "loss": np.round(lost[shown].astype(float), 6).tolist()}
    return Table("memory", COLUMNS, rows, notes, hashes(windows), series)


def _ratio(sums: list[float], counts: list[int], picks: np.ndarray) -> Cell:
    """Return sum over count over all windows, with its interval over resampled windows; None where no token is."""
    total, number = np.asarray(sums), np.asarray(counts)
    if not number.sum():
        return None
    drawn = total[picks].sum(1) / np.maximum(number[picks].sum(1), 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(total.sum() / number.sum()), "low": float(low), "high": float(high)}


def ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's rank from 0; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation, -1 to 1; 0 where one side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else 0.0
