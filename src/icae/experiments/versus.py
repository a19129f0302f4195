"""Two sides' responses to the same questions -> win, lose, tie: by a judge where one is set, else by the reference."""

from __future__ import annotations

from collections.abc import Sequence

from icae.experiments.asking import Side
from icae.experiments.context import Context
from icae.experiments.table import Cell, Column, mean
from icae.triples import Triple

COLUMNS = [
    Column("pair", "first against second"),
    Column("samples", "questions"),
    Column("by", "decided by"),
    Column("win", "win"),
    Column("lose", "lose"),
    Column("tie", "tie"),
    Column("par", "on par (win or tie)"),
    Column("f1_first", "token F1, first"),
    Column("f1_second", "second"),
    Column("rouge1_first", "ROUGE-1, first"),
    Column("rouge1_second", "second"),
    Column("likelihood_first", "log-likelihood of the reference, nats a token, first"),
    Column("likelihood_second", "second"),
]
TOLD = (
    "Without a judge, a question is won by the response with the higher token F1 against the reference; equal ones are a tie. "
    "Set --judge MODEL for verdicts of a model."
)


def missing(pair: str) -> dict[str, Cell]:
    """Return the row of a pair that could not be measured."""
    return {"pair": pair}


def versus(
    context: Context, table: str, pair: str, triples: Sequence[Triple], first: Side, second: Side, notes: list[str]
) -> dict[str, Cell]:
    """Compare two sides; `table` names the judge's record."""
    if context.judge is not None:
        from icae.judge import Item

        items = [Item(t.context, t.prompt, a, b) for t, a, b in zip(triples, first.responses, second.responses, strict=True)]
        verdicts, unread = context.judge.compare(f"{table}: {pair}", items, context.progress(f"{pair}: judged"))
        by = context.judge.model
        if unread:
            notes.append(f"{pair}: {unread} of {2 * len(items)} of the judge's replies held no verdict; such a question counts as a tie.")
    else:
        verdicts = [(a > b) - (a < b) for a, b in zip(first.f1, second.f1, strict=True)]
        by = "token F1"
    row: dict[str, Cell] = {
        "pair": pair,
        "samples": len(triples),
        "by": by,
        "win": mean([float(v > 0) for v in verdicts]),
        "lose": mean([float(v < 0) for v in verdicts]),
        "tie": mean([float(v == 0) for v in verdicts]),
        "par": mean([float(v >= 0) for v in verdicts]),
    }
    for name, side in (("first", first), ("second", second)):
        row |= {f"f1_{name}": mean(side.f1), f"rouge1_{name}": mean(side.rouge1)}
        row[f"likelihood_{name}"] = None if side.likelihood is None else mean(side.likelihood)
    return row
