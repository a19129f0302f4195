"""One answer under way: a row of the batch, or several that begin it in different ways until the best of them is known (beginnings.py).

Knows no batch, no other answer and no text.
"""

from __future__ import annotations

from icae.beginnings import LENGTH, Doubt, firsts
from icae.server.row import Row


def _sure(ids: list[int]) -> float:
    return 0.0


class Answer:
    """The rows of one answer."""

    def __init__(self, row: Row, beginnings: int = 1, doubt: Doubt = _sure):
        """Begin an answer.

        Parameters
        ----------
        row : Row
            Has read all, and chosen nothing yet.
        beginnings : int
            Likeliest first tokens that it is begun with; 1: it chooses its first token as all others.
        doubt : callable
            From a beginning's ids, what it loses.
        """
        self.doubt = doubt
        self.rows = [row]
        """Those that may be the answer; once it is decided, one."""
        if beginnings > 1:
            self.rows = [row.begun(*first) for first in firsts(row.logits, beginnings, row.ends)[0]]
            self.decide()
        else:
            row.choose(row.logits)

    @property
    def row(self) -> Row | None:
        """What the answer says; none while that is not known."""
        return self.rows[0] if len(self.rows) == 1 else None

    def decide(self) -> None:
        """Keep the best beginning alone, if all have come far enough to be compared."""
        if len(self.rows) > 1 and all(row.finished is not None or len(row.ids) >= LENGTH for row in self.rows):
            self.rows = [max(self.rows, key=self._worth)]

    def _worth(self, row: Row) -> float:
        """Return the mean log-likelihood of a beginning, less the doubt about it; what it says beyond `LENGTH` is no part of it."""
        assert row.likelihoods is not None
        shares = row.likelihoods[:LENGTH]
        return sum(shares) / len(shares) - self.doubt(row.ids[:LENGTH])
