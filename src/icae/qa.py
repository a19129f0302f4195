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
from icae.segments import cut, slot_count
from icae.slots import MemorySlots
from icae.triples import Triple

Progress = Callable[[int, int], None]
Heard = Callable[[dict[str, Any]], None]
"""Called with a question's row as soon as every side has answered it."""
SIDES = ("text", "slots", "none", "cut", "deleted")
MORE_SIDES = ("slots_free", "slots_read", "slots_greedy", "text_grounded")
PLACES = ("start", "middle", "end")
_FILLERS = 64
"""Different paragraphs that `places` puts around questions, so that their slots are made once."""


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
    for chosen in _batches([len(t.context) for t in triples], batch_size):
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
        _tell([rows[i] for i in chosen], sum(sides[-1] in row for row in rows), len(rows), progress, heard)
    results: dict[str, Any] = {"n": len(rows), "left_out": asked_for - len(rows)} | ({"budget": float(np.mean(counts))} if counts else {})
    return results | _figures(rows, sides), rows


def fitting(model: ICAE, triples: Sequence[Triple], sides: Sequence[str], ratio: int | None, max_new_tokens: int) -> list[Triple]:
    """Return the questions that every side leaves room for an answer to; errors as for `qa`, and if there are none."""
    if not sides or not set(sides) <= {*SIDES, *MORE_SIDES}:
        raise ICAEError(f"sides must be some of {', '.join([*SIDES, *MORE_SIDES])}, got {', '.join(sides)}")
    base = model.base
    kept = [t for t in triples if _positions(model, t, sides, ratio or model.config.ratio) + max_new_tokens <= base.max_positions]
    if not kept:
        raise _full(model, max_new_tokens)
    return kept


def _full(model: ICAE, max_new_tokens: int) -> ICAEError:
    places = f"the {model.base.max_positions} positions of {model.base.name}"
    return ICAEError(f"no context leaves room for an answer of {max_new_tokens} tokens among {places}")


def merged(
    parts: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]], left_out: int, sides: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what `qa` would have found of all the questions whose parts it was asked."""
    rows = [row for _, found in parts for row in found]
    results: dict[str, Any] = {"n": len(rows), "left_out": left_out}
    if "budget" in parts[0][0]:
        results["budget"] = sum(about["budget"] * about["n"] for about, _ in parts) / results["n"]
    return results | _figures(rows, sides), rows


def documents(
    model: ICAE,
    triples: Sequence[Triple],
    *,
    count: int = 2,
    ratio: int | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question from its own document's slots, and from several documents' slots, made alone and then joined.

    Returns
    -------
    dict
        `n`, `left_out` (questions whose documents leave no room for an answer), `documents`; `f1_one`, `f1_several` (and `rouge1_*`,
        `*_interval`); `several_over_one`, the share that is left; and by where the asked document stood among the others, `f1_first` and
        `f1_last`.
    list of dict
        One row a question.

    Raises
    ------
    ICAEError
        If the triples have fewer different contexts than documents are asked for, these are none, or they never leave room.
    """
    if count < 1:
        raise ICAEError(f"documents must be at least 1, got {count}; 2 asks one of two")
    chance = np.random.default_rng([seed, 5])
    mixed = []
    for t in triples:
        texts = _others(triples, t, chance, count - 1)
        at = int(chance.integers(count))
        mixed.append((at, [*texts[:at], t.context, *texts[at:]]))
    lengths = {t.context: len(model.base.encode(t.context)) for t in triples}
    ends = [_end(model, sum(lengths[text] for text in texts), t.prompt) for t, (_, texts) in zip(triples, mixed, strict=True)]
    asked_for, kept = len(triples), [i for i, end in enumerate(ends) if end + max_new_tokens <= model.base.max_positions]
    if not kept:
        raise _full(model, max_new_tokens)
    triples, mixed = [triples[i] for i in kept], [mixed[i] for i in kept]
    rows: list[dict[str, Any]] = [
        {"prompt": t.prompt, "answers": list(t.answers), "place": at} for t, (at, _) in zip(triples, mixed, strict=True)
    ]
    for chosen in _batches([sum(map(len, texts)) for _, texts in mixed], batch_size):
        parts = model.compress([text for i in chosen for text in mixed[i][1]], ratio=ratio)
        grouped = [parts[n * count : (n + 1) * count] for n in range(len(chosen))]
        sides = {
            "one": [group[mixed[i][0]] for i, group in zip(chosen, grouped, strict=True)],
            "several": [MemorySlots.concatenate(group) for group in grouped],
        }
        for side, slots in sides.items():
            made = model.answers(slots, [triples[i].prompt for i in chosen], max_new_tokens=max_new_tokens)
            for i, response in zip(chosen, made, strict=True):
                rows[i][side] = response
        _tell([rows[i] for i in chosen], sum("several" in row for row in rows), len(rows), progress, heard)
    results = {"n": len(rows), "left_out": asked_for - len(rows), "documents": count} | _figures(rows, ("one", "several"))
    results["several_over_one"] = results["f1_several"] / max(results["f1_one"], 1e-9)
    for name, place in (("first", 0), ("last", count - 1)):
        here = [token_f1(row["several"], row["answers"]) for row in rows if row["place"] == place]
        results[f"f1_{name}"] = float(np.mean(here)) if here else None
    return results, rows


def places(
    model: ICAE,
    triples: Sequence[Triple],
    *,
    length: int = 2048,
    whole: bool = False,
    sides: Sequence[str] = ("slots",),
    ratio: int | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question from many paragraphs, with the one that answers it at the start, in the middle, and at the end.

    Parameters
    ----------
    length : int
        Tokens of all paragraphs together; the last of the others is cut short to fit.
    whole : bool
        Compress the paragraphs joined to one text, as `icae compress` would; false: each alone, their slots joined, as after retrieval.

    Returns
    -------
    dict
        `n`, `left_out` (questions whose own paragraph is longer, or that leave no room for an answer), `length`, `whole`; for each side
        (`slots`, `text`) and place `f1_SIDE_PLACE` (and `rouge1_*`, `*_interval`), and `worst_over_best_SIDE`.
    list of dict
        One row a question.

    Raises
    ------
    ICAEError
        If a side is unknown, the paragraphs do not fill the length, or they never leave room for an answer.
    """
    if not sides or not set(sides) <= {"slots", "text"}:
        raise ICAEError(f"sides must be slots, text or both, got {', '.join(sides)}")
    base, gap = model.base, model.base.encode("\n\n")
    asked_for, triples = len(triples), [t for t in triples if len(base.encode(t.context)) <= length]
    if not triples:
        raise ICAEError(f"no question's own paragraph fits into {length} tokens; give a longer --length")
    contexts = list(dict.fromkeys(t.context for t in triples))
    chance = np.random.default_rng([seed, 6])
    pool = [base.encode(contexts[int(i)]) for i in chance.permutation(len(contexts))[:_FILLERS]]
    own = [base.encode(t.context) for t in triples]
    around = [_filler(pool, mine, np.random.default_rng([seed, 7, i]), length) for i, mine in enumerate(own)]
    made_once: dict[tuple[int, ...], MemorySlots] = {}
    names = [f"{side}_{place}" for side in sides for place in PLACES]

    def parts(i: int, place: str) -> list[list[int]]:
        at = {"start": 0, "middle": len(around[i]) // 2, "end": len(around[i])}[place]
        return [*around[i][:at], own[i], *around[i][at:]]

    def joined(parts: list[list[int]]) -> list[int]:
        return [i for n, part in enumerate(parts) for i in ((gap if n else []) + part)]

    def told(i: int, place: str) -> str:
        return full_text(base.decode(joined(parts(i, place))), triples[i].prompt)

    def compressed(parts: list[list[int]]) -> MemorySlots:
        if whole:
            return model.compress_ids([joined(parts)], ratio=ratio)[0]
        new = [p for p in parts if tuple(p) not in made_once]
        fresh = dict(zip(map(tuple, new), model.compress_ids(new, ratio=ratio), strict=True)) if new else {}
        made_once.update({key: s for key, s in fresh.items() if list(key) in pool})
        return MemorySlots.concatenate([fresh[tuple(p)] if tuple(p) in fresh else made_once[tuple(p)] for p in parts])

    def end(i: int) -> int:
        read = parts(i, "start")
        ends = [_end(model, len(joined(read)) if whole else sum(map(len, read)), triples[i].prompt)] if "slots" in sides else []
        return max(ends + ([len(base.prompted(told(i, place))) for place in PLACES] if "text" in sides else []))

    kept = [i for i in range(len(triples)) if end(i) + max_new_tokens <= base.max_positions]
    if not kept:
        raise _full(model, max_new_tokens)
    triples, own, around = [triples[i] for i in kept], [own[i] for i in kept], [around[i] for i in kept]
    rows: list[dict[str, Any]] = [{"prompt": t.prompt, "answers": list(t.answers)} for t in triples]
    for chosen in _batches([len(t.context) for t in triples], batch_size):
        prompts = [triples[i].prompt for i in chosen]
        for place in PLACES:
            for side in sides:
                if side == "slots":
                    made = model.answers([compressed(parts(i, place)) for i in chosen], prompts, max_new_tokens=max_new_tokens)
                else:
                    made = model.answers(None, [told(i, place) for i in chosen], max_new_tokens=max_new_tokens)
                for i, response in zip(chosen, made, strict=True):
                    rows[i][f"{side}_{place}"] = response
        _tell([rows[i] for i in chosen], sum(names[-1] in row for row in rows), len(rows), progress, heard)
    results: dict[str, Any] = {"n": len(rows), "left_out": asked_for - len(rows), "length": length, "whole": whole}
    results |= _figures(rows, names)
    for side in sides:
        found = [results[f"f1_{side}_{place}"] for place in PLACES]
        results[f"worst_over_best_{side}"] = min(found) / max(*found, 1e-9)
    return results, rows


def _positions(model: ICAE, t: Triple, sides: Sequence[str], ratio: int) -> int:
    """Return the positions that the longest of some sides takes before its answer."""
    longest = 0
    if {"text", "text_grounded"} & set(sides):
        longest = len(model.base.prompted(full_text(t.context, t.prompt)))
    if any(side.startswith("slots") for side in sides):
        longest = max(longest, _end(model, len(model.base.encode(t.context)), t.prompt))
    if {"cut", "deleted", "none"} & set(sides):
        kept = 0
        if {"cut", "deleted"} & set(sides):
            kept = sum(slot_count(b - a, ratio) for a, b in cut(len(model.base.encode(t.context)), model.config.segment_length, ratio))
        longest = max(longest, kept + len(model.base.prompted(full_text("", t.prompt))))
    return longest


def _end(model: ICAE, read: int, prompt: str) -> int:
    """Return the positions that the slots of `read` tokens and a prompt take before the answer."""
    if model.config.focus:
        read = min(read, model.config.focus * model.config.segment_length)
    return read + model.config.marker_length + len(model.base.prompted(prompt, alone=False))


def drawn(triples: Sequence[Triple], samples: int | None, seed: int) -> list[Triple]:
    """Return `samples` of the triples, drawn by `seed`, in their order; none: all."""
    if samples is None or samples >= len(triples):
        return list(triples)
    chosen = np.random.default_rng([seed, 4]).choice(len(triples), samples, replace=False)
    return [triples[int(i)] for i in sorted(chosen)]


def _figures(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, Any]:
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


def _tell(new: list[dict[str, Any]], done: int, total: int, progress: Progress | None, heard: Heard | None) -> None:
    """Hand on the rows that were just answered, and how many are."""
    if heard is not None:
        for row in new:
            heard(row)
    if progress is not None:
        progress(done, total)


def _batches(sizes: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return indices in batches, like sizes together: less padding."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def _others(triples: Sequence[Triple], own: Triple, chance: np.random.Generator, count: int) -> list[str]:
    """Draw the contexts of `count` triples, all different and none of them the triple's own."""
    found: dict[str, None] = {}
    for i in chance.permutation(len(triples)):
        if len(found) == count:
            break
        if triples[int(i)].context != own.context:
            found[triples[int(i)].context] = None
    if len(found) < count:
        raise ICAEError(f"the data has too few different contexts for {count + 1} documents; give more triples")
    return list(found)


def _filler(pool: Sequence[list[int]], own: list[int], chance: np.random.Generator, length: int) -> list[list[int]]:
    """Draw other paragraphs that with the question's own one make up `length` tokens, the last of them cut short."""
    missing = length - len(own)
    found: list[list[int]] = []
    for i in chance.permutation(len(pool)):
        if missing < 2:
            return found
        if pool[int(i)] != own:
            found.append(pool[int(i)][:missing])
            missing -= len(found[-1])
    if missing >= 2:
        raise ICAEError(f"the data's paragraphs leave {missing} of {length} tokens empty; give a shorter --length, or more triples")
    return found
