"""Of many questions as many of each kind, with answers as long, as people asked.

    python configs/matched.py data/questions.jsonl.xz ../shared/data/qa/qed-train.jsonl runs/questions.jsonl 13000

Whoever learns from short answers answers shortly. A question's kind is its first word (who, when, ...), an answer's length that in words;
all answers of more than eight words are one length, and a share of 0.18. People's own questions about the same contexts are written beside
them, so that one file has all that is asked of a context. `--seed` draws others; `--without FILE` leaves out what FILE asks already, for a
further round of learning.
"""

from __future__ import annotations

import bisect
import json
import random
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from icae.atomic import write_atomically
from icae.errors import ICAEError
from icae.triples import Triple, load_triples

KINDS = ("who", "when", "what", "where", "how", "which", "why")
LENGTHS = (1, 2, 3, 4, 6, 8)
LONG = 0.18
"""Share of answers longer than the last of these."""

Cell = tuple[str, int]


def cell(triple: Triple) -> Cell:
    """Return a question's kind, and which length its answer has."""
    word = triple.prompt.split()[0].lower().removesuffix("'s")
    word = {"whose": "who", "whats": "what"}.get(word, word)
    return word if word in KINDS else "other", bisect.bisect_left(LENGTHS, len(triple.response.split()))


def wanted(people: list[Triple]) -> dict[Cell, float]:
    """Return each cell's share among people's questions, long answers together `LONG`."""
    counts = Counter(map(cell, people))
    long = sum(n for (_, length), n in counts.items() if length == len(LENGTHS))
    short = len(people) - long
    return {c: n / long * LONG if c[1] == len(LENGTHS) else n / short * (1 - LONG) for c, n in counts.items()}


def matched(many: list[Triple], people: list[Triple], count: int, chance: random.Random) -> list[Triple]:
    """Draw about `count` of many questions so that cells have the shares that people's have, as far as there are enough."""
    there, shares = Counter(map(cell, many)), wanted(people)
    low, high = 0.0, float(len(many) * 50)
    for _ in range(60):  # how many to ask for, so that so many come
        middle = (low + high) / 2
        come = sum(min(n, middle * shares.get(c, 0.0)) for c, n in there.items())
        low, high = (middle, high) if come < count else (low, middle)
    return [t for t in many if chance.random() < high * shares.get(cell(t), 0.0) / there[cell(t)]]


def main(
    questions: str,
    people: str,
    out: Path,
    count: Annotated[int, typer.Argument(min=1)],
    seed: int = 11,
    without: Annotated[list[str], typer.Option(help="Triples that are not drawn again.")] = [],  # noqa: B006
) -> None:
    """Write about COUNT of QUESTIONS to OUT, and PEOPLE's own about the same contexts."""
    chance = random.Random(seed)
    own = load_triples(people)
    had = {(t.context, t.prompt) for name in without for t in load_triples(name)}
    drawn = matched([t for t in load_triples(questions) if (t.context, t.prompt) not in had], own, count, chance)
    if not drawn:
        raise ICAEError(f"nothing of {questions} is left to draw, of the kinds and lengths that {people} has")
    about = {t.context for t in drawn}
    rows = drawn + [t for t in own if t.context in about]
    chance.shuffle(rows)
    lines = [json.dumps({"input": t.context, "prompt": t.prompt, "answer": t.response}, ensure_ascii=False) + "\n" for t in rows]
    write_atomically(out, "".join(lines).encode())
    words = sorted(len(t.response.split()) for t in drawn)
    print(f"{len(drawn)} of them, and {len(rows) - len(drawn)} of people's, about {len(about)} contexts")
    print("words of an answer, by tenths:", *(words[len(words) * tenth // 10] for tenth in range(1, 10)))


if __name__ == "__main__":
    typer.run(main)
