"""A corpus -> passages to ask about. Pure functions on text: no model, no network."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator

_LEAST_LETTERS = 0.7
"""Share of letters, marks written onto them, and spaces below which a passage is taken for a table of contents, a list or markup."""


def passages(documents: Iterable[str], *, least: int, most: int) -> Iterator[str]:
    """Join neighbouring paragraphs to passages of `least` to `most` characters; longer paragraphs are passed over."""
    for document in documents:
        held: list[str] = []
        for paragraph in (" ".join(p.split()) for p in document.replace("\r\n", "\n").split("\n\n")):
            if not paragraph:
                continue
            if len("\n".join([*held, paragraph])) > most:
                held = []
            if len(paragraph) > most:
                continue
            held.append(paragraph)
            whole = "\n".join(held)
            if len(whole) >= least:
                held = []
                if sum(c == " " or unicodedata.category(c)[0] in "LM" for c in whole) >= _LEAST_LETTERS * len(whole):
                    yield whole


def chosen(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Return `count` different texts in an order that depends on each text and the seed alone: more of them begin with the same ones."""
    return sorted(dict.fromkeys(texts), key=lambda text: digest(f"{seed} {text}"))[:count]


def digest(text: str) -> str:
    """Return a text's name."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def is_test(text: str, share: float) -> bool:
    """Tell whether a text is among the `share` kept for testing: all triples of a text fall on one side, whatever else is built."""
    return int(digest(f"split {text}")[:12], 16) < share * 16**12
