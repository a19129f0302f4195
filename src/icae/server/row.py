"""One generation under way: what it has said, how it chooses its next token, and what it guesses to come after that.

Knows no other row, no request and no text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from icae.decoder import Guide, choose, guided
from icae.reader import Sampling
from icae.server.attention import Layers

GUESSED_FROM = (3, 2)
"""Last tokens that must have come before for what came after them to be guessed again, tried in this order."""


@dataclass(eq=False)
class Row:
    """One generation under way."""

    cache: Any
    """What it has read of its own, until it joins a batch; rows that have read the same may have one together."""
    position: int
    """Position id of its next token."""
    limit: int
    """Tokens it may generate."""
    ends: frozenset[int]
    sampling: Sampling
    logits: Tensor
    """(1, V): what follows what it has read."""
    prompt: Sequence[int] = ()
    """Ids that it has read, as far as they are known: what it says next is guessed from them, too."""
    context: Layers | None = None
    """What it reads before its own columns and shares with all rows that have this very object; none: nothing."""
    guide: Guide | None = None
    """Has a say in which tokens it takes."""
    ids: list[int] = field(default_factory=list)
    """Generated so far, without the one that ends it."""
    finished: str | None = None
    """`stop` when an end came, `length` at the limit."""
    likelihoods: list[float] | None = None
    """Log-likelihood of each of its tokens, and of its end, as the base says them unguided; none: nobody asks for them."""

    def __post_init__(self) -> None:
        """Give the row a source of chance of its own: what it draws does not depend on its neighbours."""
        seed = self.sampling.seed
        self.chance = torch.Generator(self.logits.device)
        self.chance.manual_seed(seed) if seed is not None else self.chance.seed()

    def choose(self, logits: Tensor) -> None:
        """Take the next token from logits (1, V)."""
        new = int(choose(guided([self.guide], logits), self.sampling.temperature, self.sampling.top_p, self.chance))
        if self.likelihoods is not None:
            self.likelihoods.append(float(logits[0].float().log_softmax(-1)[new]))
        self.take(new)

    def take(self, new: int) -> None:
        """Go on by this token."""
        if new in self.ends:
            self.finished = "stop"
            return
        self.ids.append(new)
        if self.guide is not None:
            self.guide.advance(new)
        if len(self.ids) >= self.limit:
            self.finished = "length"

    def begun(self, first: int, likelihood: float) -> Row:
        """Return a row that has read the same, and begins with this token."""
        row = replace(self, ids=[], likelihoods=[likelihood], guide=copy.copy(self.guide))
        row.take(first)
        return row

    def guess(self, most: int) -> list[int]:
        """Guess the next ids, `most` at most: what came next when the last ones came before, in the prompt or in what was generated.

        After arXiv 2304.04487 (LLMA), whose reference text is here the prompt; in transformers it is called prompt lookup decoding.
        """
        most, said = min(most, self.limit - len(self.ids) - 1), [*self.prompt, *self.ids]
        for n in GUESSED_FROM:
            for at in range(len(said) - n - 1, -1, -1) if most > 0 else ():
                if said[at : at + n] == said[-n:]:
                    return said[at + n : at + n + most]
        return []
