"""How much of a prompt stands in each of several texts, letter by letter. Pure: knows no model, no slots and no tokens.

    prompt, texts -> grams of four characters -> for each text, how rare those are that it shares with the prompt

BM25 (Robertson and Zaragoza, 2009) over character grams instead of words: "governor" and "governors" share most of theirs, in any language,
without a stemmer, and scripts that put no spaces between words have grams as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

GRAM = 4
SATURATION = 1.2
"""BM25's k1: how soon further occurrences of a gram in one text stop counting."""
LENGTH = 0.75
"""BM25's b: how much a longer text has to offset."""


def overlaps(prompt: str, texts: Sequence[str]) -> list[float]:
    """Return BM25's score of each text for the prompt, in nats; 0 where they have nothing in common.

    A gram that all texts have says little.
    """
    counted = [Counter(grams(text)) for text in texts]
    mean = sum(map(Counter.total, counted)) / max(1, len(texts)) or 1.0
    common = Counter(gram for count in counted for gram in count)
    rare = {g: math.log(1 + (len(texts) - common[g] + 0.5) / (common[g] + 0.5)) for g in dict.fromkeys(grams(prompt)) if g in common}
    scores = []
    for count in counted:
        offset = SATURATION * (1 - LENGTH + LENGTH * count.total() / mean)
        scores.append(sum(weight * count[g] * (SATURATION + 1) / (count[g] + offset) for g, weight in rare.items()))
    return scores


def grams(text: str) -> list[str]:
    """Return the grams of each word, without case: "The lamp" -> " the", "the ", " lam", "lamp", "amp "."""
    words = [f" {word} " for word in re.findall(r"\w+", text.casefold())]
    return [word[at : at + GRAM] for word in words for at in range(max(1, len(word) - GRAM + 1))]
