"""How much of a prompt stands in each of several texts, letter by letter. Pure: knows no model, no slots and no tokens.

    texts -> grams of four characters, counted -> prompt -> for each text, how many rare grams it shares with the prompt

BM25 (Robertson and Zaragoza, 2009) over character grams instead of words: "governor" and "governors" share most of theirs, in any language,
without a stemmer, and scripts that put no spaces between words have grams as well.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter

GRAM = 4
SATURATION = 1.2
"""BM25's k1: how soon further occurrences of a gram in one text stop counting."""
LENGTH = 0.75
"""BM25's b: how much a longer text has to offset."""
_BETWEEN = re.compile(r"[\s!-/:-@\[-`{-~\u00a0-\u00bf\u2000-\u206f\u3000-\u303f\uff00-\uff0f]+")
"""What stands between words: spaces and punctuation; what is written onto letters (as in Devanagari) is none of it."""
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters."""


class Texts:
    """Several texts, their grams counted once, for any number of prompts."""

    def __init__(self) -> None:
        self.counts: list[Counter[str]] = []
        self.common: Counter[str] = Counter()
        """In how many texts a gram stands."""

    def add(self, text: str) -> None:
        """Count another text."""
        self.counts.append(Counter(grams(text)))
        self.common.update(self.counts[-1].keys())

    @property
    def nbytes(self) -> int:
        """About as many bytes as the counts take."""
        return 150 * sum(map(len, self.counts))

    def shared(self, prompt: str) -> list[float]:
        """Return BM25's score of each text for the prompt, in grams that no other text has; 0 where they have nothing in common.

        A gram counts the less, the more texts have it; so the scores mean much the same for a few texts and for many.
        """
        total = len(self.counts)
        mean = sum(count.total() for count in self.counts) / max(1, total) or 1.0
        known = [gram for gram in dict.fromkeys(grams(prompt)) if gram in self.common]
        rare = {gram: _rarity(self.common[gram], total) / _rarity(1, total) for gram in known}
        scores = []
        for count in self.counts:
            offset = SATURATION * (1 - LENGTH + LENGTH * count.total() / mean)
            scores.append(sum(weight * count[g] * (SATURATION + 1) / (count[g] + offset) for g, weight in rare.items()))
        return scores


def words(text: str) -> list[str]:
    """Return what stands between spaces and punctuation, marks that are written onto letters included."""
    return [word for word in _BETWEEN.split(text) if word]


def letter_by_letter(word: str) -> bool:
    """Tell whether what stands between two spaces may be many words: its script puts none between them."""
    return _UNSPACED.search(word) is not None


def grams(text: str) -> list[str]:
    """Return the grams of each word, without case: "The lamp" -> " the", "the ", " lam", "lamp", "amp "."""
    spaced = [f" {word} " for word in words(unicodedata.normalize("NFKC", text).casefold())]
    return [word[at : at + GRAM] for word in spaced for at in range(max(1, len(word) - GRAM + 1))]


def _rarity(having: int, total: int) -> float:
    return math.log(1 + (total - having + 0.5) / (having + 0.5))
