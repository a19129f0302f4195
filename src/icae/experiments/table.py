"""What an experiment gives: a table in one form for all, as JSON and as Markdown. Knows no model and no torch.

A cell is a text, a number, a number with its interval (`{"value", "low", "high"}`), or None where nothing was measured; why it was not is
then told in the notes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icae.errors import ICAEError
from icae.experiments import EXPERIMENTS
from icae.metrics import interval

Cell = str | int | float | dict[str, float] | None


@dataclass(frozen=True)
class Column:
    """One column."""

    key: str
    """Under which its cells stand in the rows."""
    title: str
    """With the unit."""
    digits: int = 3
    """Digits after the point in Markdown; JSON keeps all."""


@dataclass(frozen=True)
class Table:
    """One experiment's outcome. The runner adds `settings` and `provenance`."""

    name: str
    columns: list[Column]
    rows: list[dict[str, Cell]]
    notes: list[str] = field(default_factory=list)
    """What is missing and why, and whatever else a reader must know; one sentence each."""
    windows: list[str] = field(default_factory=list)
    """Hashes of the sampled texts: equal lists mean that two runs compare the same texts."""
    series: dict[str, list[float]] = field(default_factory=dict)
    """Points of a scatter, by axis."""
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The experiment's title."""
        return EXPERIMENTS[self.name]

    def to_json(self) -> str:
        """Return the table as JSON text."""
        values = {"name": self.name, "title": self.title, **dataclasses.asdict(self)}
        return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def load(path: str | Path) -> Table:
        """Read a table back.

        Raises
        ------
        ICAEError
            If the file is missing or holds no table.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            values.pop("title")
            columns = [Column(**c) for c in values.pop("columns")]
            return Table(columns=columns, **values)
        except FileNotFoundError as error:
            raise ICAEError(f"no table at {path}; make it with `icae reproduce`") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ICAEError(f"{path} holds no table of `icae reproduce` ({error}); delete it and run again") from error

    def grid(self) -> str:
        """Return the rows alone, as a Markdown table."""
        lines = ["| " + " | ".join(c.title for c in self.columns) + " |", "|---" * len(self.columns) + "|"]
        for row in self.rows:
            lines.append("| " + " | ".join(shown(row.get(c.key), c.digits) for c in self.columns) + " |")
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the table with its notes, settings and provenance."""
        lines = [f"# {self.name}: {self.title}", "", self.grid(), ""]
        lines += [*(f"- {note}" for note in self.notes), ""] if self.notes else []
        told = [("Settings", self.settings), ("Provenance", self.provenance)]
        lines += [f"{what}: {', '.join(f'{k} {_plain(v)}' for k, v in values.items())}.\n" for what, values in told if values]
        return "\n".join(lines)


def shown(cell: Cell, digits: int = 3) -> str:
    """Return a cell as people read it."""
    if cell is None:
        return "not measured"
    if isinstance(cell, dict):
        return f"{cell['value']:.{digits}f} ({cell['low']:.{digits}f} to {cell['high']:.{digits}f})"
    if isinstance(cell, float):
        return f"{cell:.{digits}f}"
    return str(cell).replace("|", "\\|").replace("\n", " ")


def number(cell: Cell) -> float | None:
    """Return a cell's number; None where there is none."""
    if isinstance(cell, dict):
        return cell["value"]
    return float(cell) if isinstance(cell, (int, float)) else None


def mean(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of one value a sample, with its bootstrap 95% interval, as a cell."""
    low, high = interval(values)
    return {"value": float(sum(values) / len(values)), "low": low, "high": high}


def perplexity(nll: Sequence[float]) -> dict[str, float]:
    """Return exp of the mean of one negative log-likelihood a sample (nats a token, equally many tokens each), as a cell."""
    return {name: math.exp(x) for name, x in mean(nll).items()}


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)
