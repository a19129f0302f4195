"""Questions asked of several contexts' slots at once: of documents joined after retrieval, and of long ones by where the answer stands.

Asked and measured as in qa.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icae.chat import full_text
from icae.errors import ICAEError
from icae.metrics import token_f1
from icae.model import ICAE
from icae.qa import Heard, Progress, batches, figures, tell
from icae.room import end_of_slots, roomy
from icae.slots import MemorySlots
from icae.triples import Triple

PLACES = ("start", "middle", "end")
_FILLERS = 64
"""Different paragraphs that `places` puts around questions, so that their slots are made once."""


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
    read = [sum(lengths[text] for text in texts) for _, texts in mixed]
    ends = [end_of_slots(model, n, t.prompt, ratio) for t, n in zip(triples, read, strict=True)]
    asked_for, kept = len(triples), roomy(model, ends, max_new_tokens)
    triples, mixed = [triples[i] for i in kept], [mixed[i] for i in kept]
    rows: list[dict[str, Any]] = [
        {"prompt": t.prompt, "answers": list(t.answers), "place": at} for t, (at, _) in zip(triples, mixed, strict=True)
    ]
    for chosen in batches([sum(map(len, texts)) for _, texts in mixed], batch_size):
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
        tell([rows[i] for i in chosen], sum("several" in row for row in rows), len(rows), progress, heard)
    results = {"n": len(rows), "left_out": asked_for - len(rows), "documents": count} | figures(rows, ("one", "several"))
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
        read = len(joined(parts(i, "start"))) if whole else sum(map(len, parts(i, "start")))
        ends = [end_of_slots(model, read, triples[i].prompt, ratio)] if "slots" in sides else []
        return max(ends + ([len(base.prompted(told(i, place))) for place in PLACES] if "text" in sides else []))

    kept = roomy(model, [end(i) for i in range(len(triples))], max_new_tokens)
    triples, own, around = [triples[i] for i in kept], [own[i] for i in kept], [around[i] for i in kept]
    rows: list[dict[str, Any]] = [{"prompt": t.prompt, "answers": list(t.answers)} for t in triples]
    for chosen in batches([len(t.context) for t in triples], batch_size):
        prompts = [triples[i].prompt for i in chosen]
        for place in PLACES:
            for side in sides:
                if side == "slots":
                    made = model.answers([compressed(parts(i, place)) for i in chosen], prompts, max_new_tokens=max_new_tokens)
                else:
                    made = model.answers(None, [told(i, place) for i in chosen], max_new_tokens=max_new_tokens)
                for i, response in zip(chosen, made, strict=True):
                    rows[i][f"{side}_{place}"] = response
        tell([rows[i] for i in chosen], sum(names[-1] in row for row in rows), len(rows), progress, heard)
    results: dict[str, Any] = {"n": len(rows), "left_out": asked_for - len(rows), "length": length, "whole": whole}
    results |= figures(rows, names)
    for side in sides:
        found = [results[f"f1_{side}_{place}"] for place in PLACES]
        results[f"worst_over_best_{side}"] = min(found) / max(*found, 1e-9)
    return results, rows


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
