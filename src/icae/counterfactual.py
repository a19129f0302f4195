"""Questions whose answers cannot be known by heart: where its answer stands, a context is made to say something else.

    context, prompt, answer, what other prompts are answered with -> a context with another answer in it, that answer

An encoder that sees some thousand contexts again and again learns their answers instead of learning to read: measured in docs/log.md.
Another answer of the same form, to a question that begins alike, takes the right one's place wherever the context has it (entity
substitution: Longpre et al., EMNLP 2021, arXiv 2109.05052), so that only the context tells it. Pure: knows text, no tokens and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

FEWEST = 8
"""Different answers of a form that there must be: fewer could be learned by heart as well."""
SHORT = 3
"""Letters of a lower-case word up to which it belongs to an answer's form: "the", "of", "and"."""
_PEOPLE = ("who", "whom", "whose")
_ASKS = re.compile(r"\b(who|whom|whose|when|where|why|which|what|how (?:many|much|long|old|far|often)|how)\b")
_PIECE = re.compile(r"\d+|[^\W\d]+|\S")


class OtherAnswers:
    """What the prompts of a data set are answered with, by form."""

    def __init__(self, asked: Iterable[tuple[str, str, str]]):
        """Sort the answers of (context, prompt, answer); those that do not stand in their contexts are passed over."""
        found: dict[tuple[str, ...], dict[str, None]] = {}
        for context, prompt, answer in asked:
            if standing(answer, context):
                found.setdefault(form(prompt, answer), {})[answer] = None
        self.by_form = {key: list(answers) for key, answers in found.items() if len(answers) >= FEWEST}

    def swapped(self, context: str, prompt: str, answer: str, chance: np.random.Generator) -> tuple[str, str] | None:
        """Return the context with another answer in it, drawn by `chance`, and that answer; none where none fits."""
        shape = form(prompt, answer)
        others = self.by_form.get(shape, [])
        if not others or not standing(answer, context) or standing(answer, prompt):
            return None
        new = others[int(chance.integers(len(others)))]
        instead = {answer: new}
        if shape[0] in _PEOPLE and len(answer.split()) > 1:  # people are called by their last names, too
            last, other = answer.split()[-1], new.split()[-1]
            if last[:1].isupper() and other[:1].isupper() and not standing(last.lower(), prompt.lower()):
                instead[last] = other
        changed = _whole(*instead).sub(lambda found: instead[found.group()], context)
        if standing(new, context) or standing(new, prompt) or not standing(new, changed):
            return None
        return changed, new


def form(prompt: str, answer: str) -> tuple[str, ...]:
    """Return what a prompt asks by, and how its answer looks: ("when", "A", "00", ",", "0000") for "June 12, 1931"."""
    asks = _ASKS.search(prompt.lower())
    return asks.group() if asks else "", *map(_look, _PIECE.findall(answer))


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
