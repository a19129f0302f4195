"""Questions on paragraphs: token F1 and ROUGE-1 from the full text, from slots, from nothing, and from text of the slots' own budget."""

from __future__ import annotations

from icae.baselines import cut_off, delete_by_surprise
from icae.experiments.asking import Side, ask_slots, ask_text
from icae.experiments.context import Context, hashes
from icae.experiments.table import Cell, Column, Table, mean
from icae.experiments.table4 import answer_notes

NEEDS = ("main", "answers", "qa")
QUICK = {"samples": 8}
COLUMNS = [
    Column("side", "context as"),
    Column("tokens", "tokens or slots read, mean", 1),
    Column("samples", "questions"),
    Column("f1", "token F1"),
    Column("rouge1", "ROUGE-1"),
    Column("likelihood", "log-likelihood of the reference, nats a token"),
]


def run(context: Context, *, samples: int = 100, context_tokens: int = 384, max_new_tokens: int = 24) -> Table:
    """Ask every side the same questions."""
    notes: list[str] = []
    model = context.adapter("answers") or context.main
    base = context.base
    triples = context.triples(samples, context_tokens, notes)
    names = ["full text", f"slots, {model.config.ratio}x", "cut-off text", "most surprising tokens", "nothing"]
    if not triples:
        return Table("qa", COLUMNS, [{"side": name} for name in names], notes)
    contexts = [base.encode(t.context) for t in triples]
    slots = [s.count for s in model.compress_ids(contexts)]
    tick = context.progress("texts cut to the slots' budget")
    cut = [cut_off(ids, k) for ids, k in zip(contexts, slots, strict=True)]
    deleted = []
    for ids, k in zip(contexts, slots, strict=True):
        deleted.append(delete_by_surprise(base, ids, k))
        tick(len(deleted), len(contexts))

    def read(rows: list[list[int]] | None) -> Side:
        texts = None if rows is None else [base.decode(ids) for ids in rows]
        return ask_text(context, model, triples, texts, max_new_tokens=max_new_tokens)

    sides = [
        (ask_text(context, model, triples, [t.context for t in triples], max_new_tokens=max_new_tokens), [len(c) for c in contexts]),
        (ask_slots(context, model, triples, max_new_tokens=max_new_tokens), slots),
        (read(cut), [len(c) for c in cut]),
        (read(deleted), [len(c) for c in deleted]),
        (read(None), [0] * len(triples)),
    ]
    rows: list[dict[str, Cell]] = []
    for name, (side, read_tokens) in zip(names, sides, strict=True):
        rows.append(
            {
                "side": name,
                "tokens": sum(read_tokens) / len(read_tokens),
                "samples": len(triples),
                "f1": mean(side.f1),
                "rouge1": mean(side.rouge1),
                "likelihood": None if side.likelihood is None else mean(side.likelihood),
            }
        )
    notes.append("All but the slots are read by the unmodified base, as text in its chat template.")
    notes += answer_notes(context)
    return Table("qa", COLUMNS, rows, notes, hashes([f"{t.context}\n{t.prompt}" for t in triples]))
