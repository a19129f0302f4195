"""Values that were asked for lately, bounded in bytes. Knows nothing of what they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Lately(Generic[Kept]):
    """Values by key; the one asked for longest ago goes first where they are too many.

    Parameters
    ----------
    max_bytes : int
        Of all values together; one that is larger alone is not kept.
    size : callable
        Returns a value's bytes.
    """

    def __init__(self, max_bytes: int, size: Callable[[Kept], int]):
        self.max_bytes, self.size, self.bytes = max_bytes, size, 0
        self.kept: OrderedDict[str, Kept] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        """Tell whether a key is kept; that counts as no use."""
        return key in self.kept

    def get(self, key: str) -> Kept | None:
        """Return a value, or none; it counts as used."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def keep(self, key: str, value: Kept) -> None:
        """Keep a value if it fits, and let those go that were asked for longest ago."""
        if self.size(value) <= self.max_bytes:
            self.drop(key)
            self.kept[key] = value
            self.bytes += self.size(value)
            while self.bytes > self.max_bytes:
                self.bytes -= self.size(self.kept.popitem(last=False)[1])

    def drop(self, key: str) -> None:
        """Forget a value."""
        if key in self.kept:
            self.bytes -= self.size(self.kept.pop(key))
