"""Which answers are worth learning from: pure functions on words.

An answer is refused when it is empty, was cut short, repeats itself, only gives the prompt back, or says what the text does not support.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from icae.overlap import letter_by_letter
from icae.overlap import words as split

_FREE = {"continue"}
"""Kinds whose answers go beyond the text by their nature."""
_LEAST_SUPPORT = 0.5
_LOOSE = {"rephrase": 0.3, "title": 0.3, "summary": 0.4, "tone": 0.2, "topic": 0.4}
"""Least share of an answer's longer words that stem from the text or the prompt, by kind; for all others the number above."""
_STOP = frozenset(
    """about above after also because been before being between both cannot could does each from have having here into itself like more
    most much only other over passage said same should some such text than that their them then there these they this those through
    under very were what when where which while will with within without would your author describes described mentions
    mentioned""".split()  # noqa: SIM905 - words are easier to read than a list of them
)


def refusal(text: str, kind: str, prompt: str, answer: str, ended: bool) -> str | None:
    """Return why an answer is refused, in one word, or none.

    Parameters
    ----------
    kind : str
        The prompt's kind (prompts.py); `specific` for an endpoint's own.
    ended : bool
        The teacher came to an end by itself.
    """
    words = split(answer.lower())
    if not words or not prompt.strip():
        return "empty"
    if not ended:
        return "truncated"
    if repeats(words) or split(prompt.lower()) == words:
        return "repeated"
    if kind not in _FREE and support(text, prompt, words) < _LOOSE.get(kind, _LEAST_SUPPORT):
        return "unsupported"
    return None


def repeats(words: list[str]) -> bool:
    """Tell whether words go round in circles: some four in a row three times, or less than a third of many different."""
    fours = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return max(fours.values(), default=0) >= 3 or (len(words) >= 30 and len(set(words)) < len(words) / 3)


def support(text: str, prompt: str, words: list[str]) -> float:
    """Return the share of an answer's longer words and numbers whose stem is in the text or the prompt; 1 where it has none.

    Stems are words' first five letters: crude, and the same in every language with suffixes. Of scripts that put no spaces between words,
    every two neighbouring letters are looked for.
    """
    known = {stem for word in split(f"{text} {prompt}".lower()) for stem in _stems(word)}
    telling = [stem for word in words if _tells(word) for stem in _stems(word)]
    return sum(stem in known for stem in telling) / len(telling) if telling else 1.0


def _tells(word: str) -> bool:
    return letter_by_letter(word) or (len(word) > 3 and word not in _STOP) or word.isdigit()


def _stems(word: str) -> list[str]:
    return [a + b for a, b in pairwise(word)] if letter_by_letter(word) else [word[:5]]
