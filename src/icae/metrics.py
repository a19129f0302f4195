"""Metrics: pure functions on texts, ids and numbers. No model, no file, no randomness but a seeded bootstrap."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

from icae.overlap import letter_by_letter
from icae.overlap import words as words_of_any_script


def bleu(text: str, reference: str) -> float:
    """Return sacrebleu's sentence BLEU, 0 to 100: shared word n-grams up to four, with its own tokenizer and smoothing.

    The figure of the paper's autoencoding results; unlike the loss, it is taken on text that was really generated.
    """
    import sacrebleu

    return sacrebleu.sentence_bleu(text, [reference]).score


def exact_match(ids: Sequence[int], reference: Sequence[int]) -> float:
    """Return the length of the exactly matching prefix over the reference's length, 0 to 1 (the paper's EM, section 3.2.1).

    It is harsh on purpose: one wrong token near the start spoils all that follows.
    """
    if not reference:
        return 1.0
    same = 0
    for mine, theirs in zip(ids, reference, strict=False):
        if mine != theirs:
            break
        same += 1
    return same / len(reference)


def perplexity(nll: Sequence[float]) -> float:
    """Return exp of the mean negative log-likelihood (nats a token): how many tokens the model wavers between."""
    return math.exp(float(np.mean(nll)))


def rouge1(text: str, reference: str) -> float:
    """Return ROUGE-1 F1, 0 to 1: shared stemmed words, whatever their order (used for PwC without GPT-4).

    rouge_score knows a to z and digits alone. A reference that has letters, but none of these, is compared by its own script's words,
    unstemmed, and letter by letter where the script puts no spaces between words.
    """
    if any(c.isalpha() for c in reference) and not re.search("[a-zA-Z]", reference):
        return _f1(_pieces(text), _pieces(reference))
    return _rouge().score(reference, text)["rouge1"].fmeasure


def _pieces(text: str) -> list[str]:
    return [piece for word in words_of_any_script(text.lower()) for piece in (word if letter_by_letter(word) else [word])]


@cache
def _rouge():  # noqa: ANN202 - rouge_score ships no types
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], use_stemmer=True)


def token_f1(text: str, references: Sequence[str]) -> float:
    """Return SQuAD's token F1, 0 to 1, best over the references: shared words without case, punctuation and articles."""
    return max(_f1(_words(text), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(mine: list[str], theirs: list[str]) -> float:
    shared = sum((Counter(mine) & Counter(theirs)).values())
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * shared / (len(mine) + len(theirs))


def interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap 95% interval of the mean (percentile method; Efron 1979)."""
    data = np.asarray(values, dtype=float)
    chance = np.random.default_rng(seed)
    means = data[chance.integers(0, len(data), (draws, len(data)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
