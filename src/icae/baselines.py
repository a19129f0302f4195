"""What slots must beat with the same budget: text that was cut off, and text whose predictable tokens were deleted.

    ids, budget -> at most `budget` of the ids, in their order

Both leave plain token ids that the base reads as text. Knows no slots and no adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from icae.base import Base
from icae.errors import ICAEError
from icae.segments import cut


def cut_off(ids: Sequence[int], budget: int) -> list[int]:
    """Keep the first `budget` tokens.

    Raises
    ------
    ICAEError
        If the budget is below 1.
    """
    return list(ids[: _checked(budget)])


def delete_by_surprise(base: Base, ids: Sequence[int], budget: int) -> list[int]:
    """Keep the `budget` tokens that surprise the base most, in their order (as Selective Context and LLMLingua do).

    The idea of arXiv 2310.06201 and 2310.05736 at the level of tokens, without LLMLingua's small-model tuning, instruction and
    iteration; unlike either it honours the budget to the token. Of equally surprising tokens the earlier ones stay.

    Raises
    ------
    ICAEError
        If the budget is below 1.
    """
    if len(ids) <= _checked(budget):
        return list(ids)
    kept = np.sort(np.argsort(-surprise(base, ids), kind="stable")[:budget])
    return [ids[i] for i in kept]


@torch.no_grad()
def surprise(base: Base, ids: Sequence[int]) -> np.ndarray:
    """Measure how little the base expects each token of a text.

    Returns
    -------
    ndarray
        (tokens,) float32: negative log-likelihood in nats, given all tokens before it. The first is read after what the tokenizer
        puts before a text (BOS), or after an EOS where it puts nothing. A text longer than the base's positions is read in pieces.
    """
    if not len(ids):
        return np.zeros(0, dtype=np.float32)
    lead = base.lead or base.eos_ids[:1]
    if not lead:
        raise ICAEError(f"{base.name} has neither a BOS nor an EOS id, so that nothing can stand before a text's first token")
    found = []
    for begin, end in cut(len(ids), max(1, base.max_positions - len(lead))):
        piece = list(ids[begin:end])
        read = torch.tensor([lead + piece], device=base.device)
        logits = base.model(input_ids=read[:, :-1], logits_to_keep=len(piece)).logits[0]
        rows = zip(logits.split(256), torch.tensor(piece, device=base.device).split(256), strict=True)
        found += [nn.functional.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in rows]
    return torch.cat(found).numpy()


def _checked(budget: int) -> int:
    if budget < 1:
        raise ICAEError(f"the budget must be at least 1 token, got {budget}; it is the number of slots that the text is compared with")
    return budget
