"""Answers keep to the words of their context: tokens that do not go on as it does are made less likely. Knows ids: no model, no slots.

    ids of the context -> its words -> for the ids of an answer so far: what is taken off the next token's logits

Slots lead the frozen decoder to the right place more often than to the right spelling: it says 1931 where the text has 1913, and half a
name (docs/log.md). Which words there are is known for certain, from the ids that were compressed or from the text as it is read back from
the slots; so the decoder decides what is said, and the context how it is spelled. This is a copy mechanism (pointer-generator networks,
arXiv 1704.04368) without a learned gate: nothing is forbidden, and an end costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIDWORD = 4.0
"""Nats off a token that goes on within a word otherwise than the context does."""
UNKNOWN = 2.0
"""Nats off a token that begins a word which the context does not have."""
ELSEWHERE = 1.0
"""Nats off a token that begins a word which the context has, but not here; and off punctuation that it does not have here."""
_SPACES = ("\u0120", "\u2581", "\u010a")
"""How tokenizers spell a space, or a line's end, before a word."""


@dataclass(frozen=True)
class Vocabulary:
    """What an answer's spelling depends on, of every token of a tokenizer."""

    inner: Tensor
    """(V,) bool: goes on within a word."""
    marks: Tensor
    """(V,) bool: has no letter and no digit."""
    ends: Sequence[int]
    """Tokens that end an answer."""

    @staticmethod
    def of(tokenizer: Any, size: int, ends: Sequence[int]) -> Vocabulary:
        """Look at the first `size` tokens of a tokenizer."""
        pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))]
        pieces += [""] * (size - len(pieces))
        inner = [piece[:1].isascii() and piece[:1].isalnum() for piece in pieces]  # other scripts are not cut into words by spaces
        marks = [not any(c.isalnum() for c in piece.lstrip("".join(_SPACES))) for piece in pieces]
        return Vocabulary(torch.tensor(inner), torch.tensor(marks), ends)


class Words:
    """The words of one context, each as it stands there and as it is spelled at the beginning of an answer."""

    def __init__(self, ids: Sequence[int], vocabulary: Vocabulary, spell: Callable[[list[int]], list[int]]):
        """Find the words; `spell` returns a word's ids without the space before it."""
        self.ids, self.vocabulary = list(ids), vocabulary
        inner = vocabulary.inner.tolist()
        starts = [at for at, i in enumerate(self.ids) if at == 0 or not inner[i]]
        spelled: dict[tuple[int, ...], list[int]] = {}
        self.bare: list[tuple[list[int], int]] = []
        for begin, end in zip(starts, [*starts[1:], len(self.ids)], strict=True):
            word = tuple(self.ids[begin:end])
            if word not in spelled:
                spelled[word] = spell(list(word))
            if spelled[word]:
                self.bare.append((spelled[word], end))
        self.where: dict[int, list[int]] = {}
        for at, i in enumerate(self.ids):
            self.where.setdefault(i, []).append(at + 1)
        known = torch.zeros_like(vocabulary.inner)
        known[self.ids] = True
        lost = torch.where(vocabulary.inner, MIDWORD, torch.where(known, ELSEWHERE, UNKNOWN))
        self.penalties = torch.where(vocabulary.marks, ELSEWHERE, lost)

    def guide(self, strength: float = 1.0) -> Guide:
        """Return a guide for one answer; its penalties are multiplied by `strength`."""
        return Guide(self, strength)


class Guide:
    """One answer on its way through the words of its context."""

    def __init__(self, words: Words, strength: float):
        self.words, self.strength, self.begun = words, strength, False
        self.spelling = [(word, 0) for word in range(len(words.bare))]
        """Words that the answer may be beginning with, and how many of their ids it has."""
        self.places: list[int] = []
        """Where the answer may stand in the context: the ids there would go on as it does."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return logits (..., V) less the penalties; an answer's first token is free, since "Yes" is seldom a word of the text."""
        if not self.begun:
            return logits
        words, penalties = self.words, self.words.penalties.clone()
        penalties[list(self._next())] = 0.0
        penalties[list(words.vocabulary.ends)] = 0.0
        return logits - self.strength * penalties.to(logits.device, logits.dtype)

    def advance(self, id: int) -> None:
        """Go on by the token that was chosen."""
        words, spelling, places = self.words, [], set()
        for word, done in self.spelling:
            ids, end = words.bare[word]
            if ids[done] == id and done + 1 < len(ids):
                spelling.append((word, done + 1))
            elif ids[done] == id:
                places.add(end)
        places |= {at + 1 for at in self.places if at < len(words.ids) and words.ids[at] == id}
        if not spelling and not places:  # it left the context, and may come back anywhere
            places = set(words.where.get(id, ()))
        self.spelling, self.places, self.begun = spelling, sorted(places), True

    def _next(self) -> Iterable[int]:
        """Return the ids that go on as the context does."""
        words = self.words
        return {words.bare[word][0][done] for word, done in self.spelling} | {words.ids[at] for at in self.places if at < len(words.ids)}
