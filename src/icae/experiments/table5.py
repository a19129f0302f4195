"""Table 5: ratios against each other; pretraining against none, against each objective alone, and against a summary of the same length.

Ablations come from one folder, by name: `full`, `ae-only`, `lm-only` and `not-pretrained` (configs/ablations), all trained on one small
budget.
`NAME-answers` is the same after fine-tuning, as the paper compares them; where any of these is missing, those without it are compared.
Not pretrained and not fine-tuned is LoRA at its start, which needs no folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from icae.chat import full_text
from icae.experiments.asking import Side, ask_slots, ask_text
from icae.experiments.context import Context, hashes
from icae.experiments.table import Cell, Table
from icae.experiments.table4 import answer_notes
from icae.experiments.versus import COLUMNS, TOLD, missing, versus
from icae.model import ICAE
from icae.triples import Triple

NEEDS = ("main", "answers", "ablations", "qa", "judge")
QUICK = {"samples": 8}
RATIOS = (8, 16)
OTHERS = {"not-pretrained": "not pretrained", "ae-only": "autoencoding only", "lm-only": "continuation only"}
SUMMARY = "Summarise the text in at most {words} words. Give the summary alone."


def run(context: Context, *, samples: int = 100, context_tokens: int = 384, max_new_tokens: int = 24) -> Table:
    """Ask the same questions of every side."""
    notes: list[str] = []
    model = context.adapter("answers") or context.main
    triples = context.triples(samples, context_tokens, notes)
    own = model.config.ratio
    rows: list[dict[str, Cell]] = []

    def ask(of: ICAE, ratio: int | None = None) -> Side:
        return ask_slots(context, of, triples, max_new_tokens=max_new_tokens, ratio=ratio)

    for ratio in (r for r in RATIOS if r != own):
        pair = f"{own}x against {ratio}x"
        rows.append(versus(context, "table5", pair, triples, ask(model), ask(model, ratio), notes) if triples else missing(pair))
    rows += _ablated(context, triples, ask, notes)
    pair = "slots against a summary by the base, as many tokens"
    if triples:
        texts = summaries(context, model, triples)
        summary = ask_text(context, model, triples, texts, max_new_tokens=max_new_tokens)
        rows.append(versus(context, "table5", pair, triples, ask(model), summary, notes))
    else:
        rows.append(missing(pair))
    notes += answer_notes(context) + ([] if context.judge is not None else [TOLD])
    return Table("table5", COLUMNS, rows, notes, hashes([f"{t.context}\n{t.prompt}" for t in triples]))


def _ablated(context: Context, triples: Sequence[Triple], ask, notes: list[str]) -> list[dict[str, Cell]]:  # noqa: ANN001 - a closure above
    rows: list[dict[str, Cell]] = []
    for name, told in OTHERS.items():
        pair = f"pretrained against {told}"
        full, other, stage = context.ablation("full-answers"), context.ablation(f"{name}-answers"), "fine-tuned"
        if full is None or other is None:
            full, stage = context.ablation("full"), "not fine-tuned"
            other = context.ablation(name)
            if other is None and full is not None and name == "not-pretrained":
                other = ICAE(context.base, full.config).eval()
        if full is None or other is None:
            absent = ", ".join(n for n, x in (("full", full), (name, other)) if x is None)
            notes.append(f"{pair}: not measured, no adapter {absent}; train it by configs/ablations and give --adapters runs/ablations.")
            rows.append(missing(pair))
        elif not triples:
            rows.append(missing(pair))
        else:
            notes.append(f"{pair}: both on the ablations' small budget, {stage}.")
            rows.append(versus(context, "table5", pair, triples, ask(full), ask(other), notes))
    return rows


def summaries(context: Context, model: ICAE, triples: Sequence[Triple], batch_size: int = 16) -> list[str]:
    """Have the base summarise each context, reading it in full, and cut the summary to as many tokens as the context has slots."""
    key = ("summaries", model.config.base_fingerprint, model.config.ratio, tuple(t.context for t in triples))
    if key not in context.known:
        made: list[str] = []
        tick = context.progress("contexts summarised")
        for at in range(0, len(triples), batch_size):
            part = triples[at : at + batch_size]
            budgets = [-(-len(context.base.encode(t.context)) // model.config.ratio) for t in part]
            prompts = [full_text(t.context, SUMMARY.format(words=max(1, b * 3 // 4))) for t, b in zip(part, budgets, strict=True)]
            texts = model.answers(None, prompts, max_new_tokens=max(budgets))
            made += [context.base.decode(context.base.encode(text)[:b]) for text, b in zip(texts, budgets, strict=True)]
            tick(len(made), len(triples))
        context.known[key] = made
    return context.known[key]
