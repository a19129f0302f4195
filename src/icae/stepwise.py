"""Work in steps: a generator that yields wherever other work may go between, and whose value is the result. Knows nothing of the work."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


def finished(steps: Generator[T, None, R], each: Callable[[T], Any] | None = None) -> R:
    """Do all the work at once and return its result; `each` is called with what is yielded on the way."""
    while True:
        try:
            on_the_way = next(steps)
        except StopIteration as end:
            return end.value
        if each is not None:
            each(on_the_way)


def saying(what: Callable[[T], S], steps: Generator[T, None, R]) -> Generator[S, None, R]:
    """Do the work step by step, but yield `what` makes of that which is yielded on the way."""
    while True:
        try:
            on_the_way = next(steps)
        except StopIteration as end:
            return end.value
        yield what(on_the_way)
