"""Table 4: answers from slots against answers from the full text, of the same base and of other models behind an endpoint."""

from __future__ import annotations

from icae.experiments.asking import ask_slots, ask_text, judged_side
from icae.experiments.context import Context, hashes
from icae.experiments.table import Cell, Table
from icae.experiments.versus import COLUMNS, TOLD, missing, versus

NEEDS = ("main", "answers", "qa", "judge")
QUICK = {"samples": 8}


def run(context: Context, *, samples: int = 100, context_tokens: int = 384, max_new_tokens: int = 24) -> Table:
    """Ask the same questions of every side."""
    notes: list[str] = []
    model = context.adapter("answers") or context.main
    triples = context.triples(samples, context_tokens, notes)
    ratio = model.config.ratio
    pairs = [f"slots at {ratio}x against the base with the full text", "slots against nothing"]
    rows: list[dict[str, Cell]] = [missing(p) for p in pairs]
    if triples:
        slots = ask_slots(context, model, triples, max_new_tokens=max_new_tokens)
        others = [ask_text(context, model, triples, texts, max_new_tokens=max_new_tokens) for texts in ([t.context for t in triples], None)]
        rows = [versus(context, "table4", p, triples, slots, other, notes) for p, other in zip(pairs, others, strict=True)]
        for rival in context.rivals if context.judge is not None else []:
            asked = [(t.context, t.prompt) for t in triples]
            responses = context.judge.ask(rival, asked, max_new_tokens, context.progress(f"{rival} asked"))  # type: ignore[union-attr]
            side = judged_side(responses, triples, None)
            rows.append(versus(context, "table4", f"slots against {rival} with the full text", triples, slots, side, notes))
    notes += answer_notes(context) + ([] if context.judge is not None else [TOLD])
    return Table("table4", COLUMNS, rows, notes, hashes([f"{t.context}\n{t.prompt}" for t in triples]))


def answer_notes(context: Context) -> list[str]:
    """Return what a reader of answers from slots must know."""
    if (model := context.adapter("answers")) is not None:
        strength, ways = model.config.grounding, model.config.beginnings
        notes = [f"keep to their context's words (grounding {strength:g})"] if strength else []
        notes += [f"are begun in {ways} ways"] if ways > 1 else []
        return [f"Answers from slots {' and '.join(notes)}; all others are greedy and free."] if notes else []
    return ["The adapter was not fine-tuned to answer: no such adapter ships for this base, and none was given (--answers FOLDER)."]
