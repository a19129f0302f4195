"""Responses to prompts about contexts, measured: what slots answer beside the full text, shortened text, and nothing.

Everything goes through the same `compress_ids` and `answers` that the command line and the server call. A figure is a mean over
questions; a difference between two sides is taken question by question, and its interval is a bootstrap over those differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from icae.baselines import cut_off, delete_by_surprise
from icae.chat import full_text
from icae.errors import ICAEError
from icae.grounding import Words
from icae.metrics import interval, rouge1, token_f1
from icae.model import ICAE
from icae.room import end_of_slots, roomy
from icae.segments import cut, slot_count
from icae.triples import Triple

Progress = Callable[[int, int], None]
Heard = Callable[[dict[str, Any]], None]
"""Called with a question's row as soon as every side has answered it."""
SIDES = ("text", "slots", "none", "cut", "deleted")
MORE_SIDES = ("slots_free", "slots_read", "slots_greedy", "text_grounded")


def qa(
    model: ICAE,
    triples: Sequence[Triple],
    *,
    sides: Sequence[str] = SIDES,
    ratio: int | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 16,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question from each side.

    Parameters
    ----------
    sides : sequence of str
        Among `text` (the base with the full text), `slots`, `none` (the question alone), and, with as many tokens as there are slots,
        `cut` (the text's beginning) and `deleted` (its tokens that surprise the base most). And for what grounding and several
        beginnings do (grounding.py, beginnings.py): `slots_free` without the one, `slots_greedy` without the other, `slots_read` grounded
        by the text as it is read back from the slots, `text_grounded` the full text with both.

    Returns
    -------
    dict
        `n`, `left_out` (questions that some side leaves no room for an answer to), `budget` (mean slots a context); for each
        side `f1_*` and `rouge1_*` (means, best over the answers) and `f1_*_interval`; for each other side `f1_slots_minus_*` and its
        interval, paired; intervals are bootstrap 95%.
    list of dict
        One row a question: `prompt`, `answers`, and each side's response.

    Raises
    ------
    ICAEError
        If a side is unknown.
    """
    base, asked_for = model.base, len(triples)
    triples = fitting(model, triples, sides, ratio, max_new_tokens)
    rows: list[dict[str, Any]] = [{"prompt": t.prompt, "answers": list(t.answers)} for t in triples]
    counts: list[int] = []
    for chosen in batches([len(t.context) for t in triples], batch_size):
        part = [triples[i] for i in chosen]
        contexts, prompts = [base.encode(t.context) for t in part], [t.prompt for t in part]
        slots = model.compress_ids(contexts, ratio=ratio) if set(sides) - {"text", "none", "text_grounded"} else []
        counts += [s.count for s in slots]
        for side in sides:
            texts: list[str] = []
            words: list[Words | None] | None = None
            read = slots if side.startswith("slots") else None
            if side == "slots_free":
                words = [None] * len(part)
            elif side == "slots_read":
                words = [model.words(torch.tensor(ids)) for ids in model.reconstruct_ids(slots, batch_size=batch_size)]
            elif side == "text_grounded":
                words = [model.words(torch.tensor(c)) for c in contexts]
            if side in ("text", "text_grounded"):
                texts = [t.context for t in part]
            elif side == "cut":
                texts = [base.decode(cut_off(c, s.count)) for c, s in zip(contexts, slots, strict=True)]
            elif side == "deleted":
                texts = [base.decode(delete_by_surprise(base, c, s.count)) for c, s in zip(contexts, slots, strict=True)]
            asked = [full_text(c, p) for c, p in zip(texts, prompts, strict=True)] if texts else prompts
            many = model.config.beginnings if side == "text_grounded" or (read and side != "slots_greedy") else 1
            made = model.answers(read, asked, max_new_tokens=max_new_tokens, words=words, beginnings=many, questions=prompts)
            for i, response in zip(chosen, made, strict=True):
                rows[i][side] = response
        tell([rows[i] for i in chosen], sum(sides[-1] in row for row in rows), len(rows), progress, heard)
    results: dict[str, Any] = {"n": len(rows), "left_out": asked_for - len(rows)} | ({"budget": float(np.mean(counts))} if counts else {})
    return results | figures(rows, sides), rows


def fitting(model: ICAE, triples: Sequence[Triple], sides: Sequence[str], ratio: int | None, max_new_tokens: int) -> list[Triple]:
    """Return the questions that every side leaves room for an answer to; errors as for `qa`, and if there are none."""
    if not sides or not set(sides) <= {*SIDES, *MORE_SIDES}:
        raise ICAEError(f"sides must be some of {', '.join([*SIDES, *MORE_SIDES])}, got {', '.join(sides)}")
    ends = [_end(model, t, sides, ratio or model.config.ratio) for t in triples]
    return [triples[i] for i in roomy(model, ends, max_new_tokens)]


def merged(
    parts: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], left_out: int, sides: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what `qa` would have found of all the questions whose parts it was asked."""
    rows = [row for _, found in parts for row in found]
    results: dict[str, Any] = {"n": len(rows), "left_out": left_out}
    if "budget" in parts[0][0]:
        results["budget"] = sum(about["budget"] * about["n"] for about, _ in parts) / results["n"]
    return results | figures(rows, sides), rows


def _end(model: ICAE, t: Triple, sides: Sequence[str], ratio: int) -> int:
    """Return the positions that the longest of some sides takes before its answer."""
    longest = 0
    if {"text", "text_grounded"} & set(sides):
        longest = len(model.base.prompted(full_text(t.context, t.prompt)))
    if any(side.startswith("slots") for side in sides):
        longest = max(longest, end_of_slots(model, len(model.base.encode(t.context)), t.prompt, ratio))
    if {"cut", "deleted", "none"} & set(sides):
        kept = 0
        if {"cut", "deleted"} & set(sides):
            kept = sum(slot_count(b - a, ratio) for a, b in cut(len(model.base.encode(t.context)), model.config.segment_length, ratio))
        longest = max(longest, kept + len(model.base.prompted(full_text("", t.prompt))))
    return longest


def drawn(triples: Sequence[Triple], samples: int | None, seed: int) -> list[Triple]:
    """Return `samples` of the triples, drawn by `seed`, in their order; none: all."""
    if samples is None or samples >= len(triples):
        return list(triples)
    chosen = np.random.default_rng([seed, 4]).choice(len(triples), samples, replace=False)
    return [triples[int(i)] for i in sorted(chosen)]


def figures(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
    """Return means, intervals and paired differences of each side's responses."""
    f1 = {side: [token_f1(row[side], row["answers"]) for row in rows] for side in sides}
    results: dict[str, Any] = {}
    for side in sides:
        shared = [max(rouge1(row[side], a) for a in row["answers"]) for row in rows]
        results[f"f1_{side}"], results[f"rouge1_{side}"] = float(np.mean(f1[side])), float(np.mean(shared))
        results[f"f1_{side}_interval"] = interval(f1[side])
    if "slots" in f1:
        for side in (s for s in sides if s != "slots"):
            differences = np.subtract(f1["slots"], f1[side]).tolist()
            results[f"f1_slots_minus_{side}"] = float(np.mean(differences))
            results[f"f1_slots_minus_{side}_interval"] = interval(differences)
    return results


def tell(new: list[dict[str, Any]], done: int, total: int, progress: Progress | None, heard: Heard | None) -> None:
    """Hand on the rows that were just answered, and how many are."""
    if heard is not None:
        for row in new:
            heard(row)
    if progress is not None:
        progress(done, total)


def batches(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return indices in batches, like sizes together: less padding."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
