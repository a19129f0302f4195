"""Tables -> pictures (PNG and SVG). Touches no model: whatever is drawn stands in the table's JSON."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from icae.experiments.table import Cell, Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Cell]]


def draw(table: Table) -> dict[str, bytes]:
    """Draw a table.

    Returns
    -------
    dict
        `png` and `svg`, each a file's bytes; empty for a table that has no picture, or nothing measured to draw.
    """
    painter = PAINTERS.get(table.name)
    if painter is None:
        return {}
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "icae"  # equal tables give equal files
    figure = painter(table)
    if figure is None:
        return {}
    files = {}
    for kind, about in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, metadata=about)
        files[kind] = buffer.getvalue()
    return files


def _panels(count: int, width: float = 4.2, height: float = 3.4) -> tuple[Figure, list[Any]]:
    """Return an empty figure with panels side by side (no pyplot: nothing global is kept)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _measured(rows: Rows, *keys: str) -> Rows:
    return [r for r in rows if all(number(r.get(k)) is not None for k in keys)]


def _line(axis: Axes, rows: Rows, x: str, y: str, label: str) -> None:
    """Draw a line with its intervals."""
    rows = sorted(_measured(rows, x, y), key=lambda r: number(r[x]) or 0)
    if rows:
        axis.errorbar([number(r[x]) for r in rows], [number(r[y]) for r in rows], yerr=_spread(rows, y), marker="o", capsize=3, label=label)  # type: ignore[arg-type]


def _spread(rows: Rows, key: str) -> list[list[float]]:
    """Return how far the interval reaches below and above each value."""
    cells = [c if isinstance(c, dict) else {"value": number(c) or 0.0} for c in (r[key] for r in rows)]
    return [
        [max(0.0, c["value"] - c.get("low", c["value"])) for c in cells],
        [max(0.0, c.get("high", c["value"]) - c["value"]) for c in cells],
    ]


def _fig4(table: Table) -> Figure:
    figure, axes = _panels(3)
    for axis, (key, label) in zip(
        axes, (("bleu", "BLEU"), ("exact", "exactly matching prefix (share)"), ("loss", "loss (nats a token)")), strict=True
    ):
        x = [number(r["length"]) for r in table.rows]
        low, middle, high = ([number(r[f"{key}_{q}"]) for r in table.rows] for q in ("q25", "q50", "q75"))
        axis.fill_between(x, low, high, alpha=0.25, label="quartiles")
        axis.plot(x, middle, marker="o", label="median")
        axis.set(xlabel="context (tokens)", ylabel=label, xticks=x)
    axes[0].legend()
    return figure


def _fig5(table: Table) -> Figure:
    figure, axes = _panels(2)
    for axis, (key, label) in zip(axes, (("bleu", "BLEU"), ("loss", "loss (nats a token)")), strict=True):
        for ratio in dict.fromkeys(number(r["ratio"]) for r in table.rows):
            _line(axis, [r for r in table.rows if number(r["ratio"]) == ratio], "length", key, f"{ratio:g} tokens a slot")
        counts = [number(r["slots"]) for r in table.rows]
        for k in sorted({c for c in counts if counts.count(c) > 1 and c is not None}):
            rows = sorted((r for r in table.rows if number(r["slots"]) == k), key=lambda r: number(r["length"]) or 0)
            axis.plot([number(r["length"]) for r in rows], [number(r[key]) for r in rows], ":", color="grey")  # type: ignore[arg-type]
            end = number(rows[-1]["length"]), number(rows[-1][key])
            axis.annotate(f"{k:g} slots", end, (6, 6), textcoords="offset points", fontsize=8)  # type: ignore[arg-type]
        axis.set(xlabel="context (tokens)", ylabel=label)
        axis.margins(x=0.15, y=0.1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def _table1(table: Table) -> Figure:
    figure, (axis,) = _panels(1, 5)
    for side, label in (("text", "from text"), ("slots", "from slots"), ("none", "from nothing")):
        _line(axis, table.rows, "ratio", side, label)
    axis.set(xlabel="tokens a slot (as many slots at each)", ylabel="perplexity of what follows")
    axis.legend()
    return figure


def _table3(table: Table) -> Figure | None:
    return _bars(table, "bleu", "BLEU", lambda r: f"{r['kind']}\n{r['content']}")


def _qa(table: Table) -> Figure | None:
    return _bars(table, "f1", "token F1", lambda r: str(r["side"]).replace(" ", "\n"))


def _table6(table: Table) -> Figure | None:
    return _bars(table, "bleu", "BLEU", lambda r: str(r["base"]))


def _bars(table: Table, key: str, label: str, name: Callable[[dict[str, Cell]], str]) -> Figure | None:
    rows = _measured(table.rows, key)
    if not rows:
        return None
    figure, (axis,) = _panels(1, 1.2 * len(rows) + 2)
    axis.bar(range(len(rows)), [number(r[key]) for r in rows], yerr=_spread(rows, key), capsize=4)
    axis.set_xticks(range(len(rows)), [name(r) for r in rows])
    axis.set(ylabel=label)
    return figure


def _verdicts(table: Table) -> Figure | None:
    rows = _measured(table.rows, "win", "tie", "lose")[::-1]
    if not rows:
        return None
    figure, (axis,) = _panels(1, 8, 0.6 * len(rows) + 1.4)
    left = [0.0] * len(rows)
    for key, colour in (("win", "tab:green"), ("tie", "lightgrey"), ("lose", "tab:red")):
        shares = [100 * (number(r[key]) or 0) for r in rows]
        axis.barh(range(len(rows)), shares, left=left, color=colour, label=key)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axis.set_yticks(range(len(rows)), [str(r["pair"]) for r in rows], fontsize=8)
    axis.set(xlabel=f"questions (%), decided by {rows[0]['by']}", xlim=(0, 100))
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def _table7(table: Table) -> Figure | None:
    rows = _measured(table.rows, "text", "total")
    if not rows:
        return None
    figure, axes = _panels(2, 1.0 * len(rows) + 2.5)
    places = list(range(len(rows)))
    bars = (("text", "text"), ("total", "slots: compress and decode"), ("decode", "slots, kept: decode"))
    for place, (key, label) in enumerate(bars):
        axes[0].bar([p + 0.27 * (place - 1) for p in places], [number(r[key]) for r in rows], 0.27, label=label)
    axes[0].set(ylabel="time (s)", yscale="log")
    axes[1].bar([p - 0.2 for p in places], [number(r["kv_text"]) for r in rows], 0.4, label="text")
    axes[1].bar([p + 0.2 for p in places], [number(r["kv_slots"]) for r in rows], 0.4, label="slots")
    axes[1].set(ylabel="KV cache of the context (MB)", yscale="log")
    for axis in axes:
        axis.set_xticks(places, [f"{r['batch']} x {r['length']}" for r in rows], rotation=30)
        axis.set_xlabel("batch x context (tokens)")
        axis.legend(fontsize=8)
    return figure


def _fig6(table: Table) -> Figure:
    figure, (axis,) = _panels(1, 6)
    for side in dict.fromkeys(r["side"] for r in table.rows):
        _line(axis, [r for r in table.rows if r["side"] == side], "read", "perplexity", str(side))
    axis.set_xscale("symlog", base=2, linthresh=16)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(xlabel="tokens or slots that the LLM reads", ylabel="perplexity of what follows")
    axis.legend()
    return figure


def _memory(table: Table) -> Figure:
    figure, axes = _panels(2)
    axes[0].scatter(table.series["surprise"], [max(x, 1e-6) for x in table.series["loss"]], s=4, alpha=0.3)
    axes[0].set(xlabel="surprise under the base (nats)", ylabel="reconstruction loss (nats)", yscale="log")
    rows = [r for r in table.rows if r["group"] != "all"]
    _line(axes[1], rows, "surprise", "errors", "tenths of all tokens")
    axes[1].set(xlabel="surprise under the base, mean of a group (nats)", ylabel="tokens not the likeliest (share)")
    return figure


PAINTERS: dict[str, Callable[[Table], Figure | None]] = {
    "fig4": _fig4,
    "fig5": _fig5,
    "table1": _table1,
    "table3": _table3,
    "table4": _verdicts,
    "table5": _verdicts,
    "table6": _table6,
    "table7": _table7,
    "fig6": _fig6,
    "qa": _qa,
    "memory": _memory,
}
"""How each table is drawn; table2 is a text and has no picture."""
