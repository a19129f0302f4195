"""Questions whose answers cannot be known by heart: where its answer stands, a context is made to say something else.

    triple, what other questions are answered with -> the same question, a context with another answer in it, that answer

An encoder that sees some thousand contexts again and again learns their answers instead of learning to read: measured in docs/log.md.
Another answer of the same form, to a question that begins alike, takes the right one's place wherever the context has it (entity
substitution: Longpre et al., EMNLP 2021, arXiv 2109.05052), so that only the context tells it. Pure: knows text, no tokens and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from icae.triples import Triple

FEWEST = 8
"""Different answers of a form that there must be: fewer could be learned by heart as well."""
SHORT = 3
"""Letters of a lower-case word up to which it belongs to an answer's form: "the", "of", "and"."""
_PEOPLE = ("who", "whom", "whose")
_ASKS = re.compile(r"\b(who|whom|whose|when|where|why|which|what|how (?:many|much|long|old|far|often)|how)\b")
_PIECE = re.compile(r"\d+|[^\W\d]+|\S")


class OtherAnswers:
    """What the questions of a data set are answered with, by form."""

    def __init__(self, triples: Iterable[Triple]):
        found: dict[tuple[str, ...], dict[str, None]] = {}
        for t in triples:
            if standing(t.response, t.context):
                found.setdefault(form(t), {})[t.response] = None
        self.by_form = {key: list(answers) for key, answers in found.items() if len(answers) >= FEWEST}

    def swapped(self, triple: Triple, chance: np.random.Generator) -> Triple:
        """Return the question with another answer, drawn by `chance`, in its context; the triple as it is where none fits."""
        old, others = triple.response, self.by_form.get(form(triple), [])
        if not others or not standing(old, triple.context) or standing(old, triple.prompt):
            return triple
        new = others[int(chance.integers(len(others)))]
        instead = {old: new}
        if form(triple)[0] in _PEOPLE and len(old.split()) > 1:  # people are called by their last names, too
            last, other = old.split()[-1], new.split()[-1]
            if last[:1].isupper() and other[:1].isupper() and not standing(last.lower(), triple.prompt.lower()):
                instead[last] = other
        context = _whole(*instead).sub(lambda found: instead[found.group()], triple.context)
        if standing(new, triple.context) or standing(new, triple.prompt) or not standing(new, context):
            return triple
        return replace(triple, context=context, response=new, answers=(new,))


def form(triple: Triple) -> tuple[str, ...]:
    """Return what a question asks by, and how its answer looks: ("when", "A", "00", ",", "0000") for "June 12, 1931"."""
    asks = _ASKS.search(triple.prompt.lower())
    return asks.group() if asks else "", *map(_look, _PIECE.findall(triple.response))


def standing(answer: str, text: str) -> bool:
    """Tell whether an answer stands in a text, in whole words."""
    return _whole(answer).search(text) is not None


def _look(piece: str) -> str:
    if piece.isdigit():
        return "0" * len(piece)
    if piece.isupper() or piece[:1].isupper():
        return "A"
    return piece if len(piece) <= SHORT else "a"


def _whole(*words: str) -> re.Pattern[str]:
    """Return what finds any of some words, or of some rows of words, whole; where several begin alike, the first of them."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)")
