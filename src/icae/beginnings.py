"""An answer is begun with each of a few likeliest first tokens, and goes on from the beginning that is likeliest a token.

    logits of the first token -> `count` first tokens a row -> each goes on greedily -> the one with the highest mean log-likelihood

The first token decides what an answer says, and where several answers begin alike its likelihood is theirs together: the likeliest
token may begin none that is likely as a whole. So the decoder looks ahead: branches at the first token (arXiv 2402.10200), compared by
likelihood normalised by length (arXiv 1609.08144). What only says the question's words again answers nothing, and counts less. Knows no
slots.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

LENGTH = 24
"""Tokens after which beginnings are compared; shorter answers are compared whole, with what ends them."""
ECHO = 1.0
"""Nats a token off a beginning that has no word but the prompt's own. Of a choice, "this or that?", it may still be the likeliest."""
_WORD = re.compile(r"\w+")

Doubt = Callable[[list[int]], float]
"""From a beginning's ids, what is taken off its mean log-likelihood."""


class Guide(Protocol):
    """What has a say in which tokens one row generates."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return logits (V,) changed."""

    def advance(self, id: int) -> None:
        """Take note of the token that was chosen."""


class Rows(Protocol):
    """What generates: several rows, each with a token that it has not read yet."""

    def read(self, ids: Tensor) -> Tensor:
        """Read a token a row, (rows,), and return logits (rows, V)."""

    def keep(self, places: Tensor) -> None:
        """Go on with these rows, (n,) int64, in this order; one may be there several times."""


class Beginning:
    """One of a row's beginnings."""

    def __init__(self, first: int, likelihood: float, guide: Guide | None, limit: int):
        self.ids, self.likelihoods, self.guide, self.limit, self.ended = [first], [likelihood], copy.copy(guide), limit, False
        if self.guide is not None:
            self.guide.advance(first)

    @property
    def over(self) -> bool:
        """Whether nothing comes after it."""
        return self.ended or len(self.ids) >= self.limit

    @property
    def likelihood(self) -> float:
        """Mean log-likelihood of its tokens, and of what ended it, as the base says them unguided."""
        return sum(self.likelihoods) / len(self.likelihoods)

    def go_on(self, id: int, likelihood: float, ends: bool) -> None:
        """Take the next token."""
        self.likelihoods.append(likelihood)
        self.ended = ends
        if not ends:
            self.ids.append(id)
            if self.guide is not None:
                self.guide.advance(id)


def begin(
    rows: Rows,
    logits: Tensor,
    count: int,
    limits: Sequence[int],
    ends: set[int],
    guides: Sequence[Guide | None],
    choose: Callable[[list[Guide | None], Tensor], Tensor],
    doubts: Sequence[Doubt] | None = None,
    least: int = 0,
) -> list[Beginning]:
    """Begin every row with its `count` likeliest tokens, and return the best beginning of each; `rows` then stand one for each.

    Parameters
    ----------
    rows : Rows
        Which have read all but the first token.
    logits : Tensor
        (B, V) of the first token; an answer has one at least, so that it does not end here.
    limits : sequence of int
        Tokens of each row, at most.
    ends : set of int
        Ids that end a row.
    guides : sequence of (Guide or None)
        One for each row; left as they are.
    choose : callable
        From guides and logits (rows, V), the next ids (rows,).
    doubts : sequence of callable, optional
        One for each row.
    least : int
        No beginning ends before it has as many tokens.
    """
    first = firsts(logits, count, ends)
    count = len(first[0])
    made = [
        Beginning(i, likelihood, guide, min(limit, LENGTH))
        for row, guide, limit in zip(first, guides, limits, strict=True)
        for i, likelihood in row
    ]
    rows.keep(torch.arange(len(limits), device=logits.device).repeat_interleave(count))
    ids = torch.tensor([i for row in first for i, _ in row], device=logits.device)
    while not all(one.over for one in made):
        logits = rows.read(ids)
        if max(len(one.ids) for one in made) < least:  # none has ended yet: all have as many
            logits[:, list(ends)] = -torch.inf
        ids = choose([one.guide for one in made], logits)
        shares = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
        for one, i, share in zip(made, ids.tolist(), shares, strict=True):
            if not one.over:
                one.go_on(i, share, i in ends)
    worth = [one.likelihood - (doubts[n // count](one.ids) if doubts else 0.0) for n, one in enumerate(made)]
    best = [max(range(at, at + count), key=worth.__getitem__) for at in range(0, len(made), count)]
    rows.keep(torch.tensor(best, device=ids.device))
    return [made[n] for n in best]


def firsts(logits: Tensor, count: int, ends: Iterable[int]) -> list[list[tuple[int, float]]]:
    """Return the `count` likeliest first tokens of each row of logits (B, V), with their log-likelihoods; none of them ends the row."""
    said = logits.float().log_softmax(-1)
    said[:, list(ends)] = -torch.inf
    likelihoods, ids = said.topk(min(count, said.shape[-1]))
    return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), likelihoods.tolist(), strict=True)]


def echo(prompt: str, decode: Callable[[list[int]], str]) -> Doubt:
    """Return the doubt about beginnings that say nothing but a prompt's own words; `decode` turns ids into text."""
    asked = set(_WORD.findall(prompt.lower()))
    return lambda ids: ECHO if asked.issuperset(_WORD.findall(decode(ids).lower())) else 0.0
