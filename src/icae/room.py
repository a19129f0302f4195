"""Which questions leave room for an answer, among the positions that a base has."""

from __future__ import annotations

from collections.abc import Sequence

from icae.errors import ICAEError
from icae.model import ICAE
from icae.segments import positions


def end_of_slots(model: ICAE, read: int, prompt: str, ratio: int | None = None) -> int:
    """Return the positions that the slots of `read` tokens and a prompt take before the answer; `ratio` none: the checkpoint's own."""
    if model.config.focus:
        read = min(read, model.config.focus * model.config.segment_length)
    span = positions(model.config.layout, read, model.config.ratio if ratio is None else ratio).span
    return span + model.config.marker_length + len(model.base.prompted(prompt, alone=False))


def roomy(model: ICAE, ends: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the indices of those ends behind which an answer of so many tokens fits.

    Raises
    ------
    ICAEError
        If there are none.
    """
    kept = [i for i, end in enumerate(ends) if end + max_new_tokens <= model.base.max_positions]
    if not kept:
        places = f"the {model.base.max_positions} positions of {model.base.name}"
        raise ICAEError(f"no context leaves room for an answer of {max_new_tokens} tokens among {places}")
    return kept
