"""Contexts and what follows them -> how well that is predicted from text, from slots, from nothing; each side computed once.

All three are scored on the same tokens: what follows but its first token, which from nothing could only be guessed. Slots stay unpolished:
polishing makes them truer to their text, which what follows it gains nothing from (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from icae.experiments.context import Context
from icae.model import ICAE
from icae.objectives import Example, Marker
from icae.slots import MemorySlots


def from_slots(model: ICAE, slots: Sequence[MemorySlots], follows: Sequence[list[int]]) -> list[float]:
    """Return each sample's mean negative log-likelihood after its slots, in nats a token."""
    return [float(s.nll.mean()) for s in model.score(slots, [Example([], Marker.LM, [], f, 1) for f in follows])]


def from_text(model: ICAE, contexts: Sequence[list[int]], follows: Sequence[list[int]]) -> list[float]:
    """Return each sample's mean negative log-likelihood after its context (or after nothing, where that is empty), in nats a token."""
    lead = model.base.lead
    examples = [Example([], Marker.LM, lead + c, f, 1) for c, f in zip(contexts, follows, strict=True)]
    return [float(s.nll.mean()) for s in model.score(None, examples, marked=False)]


def follow(
    context: Context, model: ICAE, *, length: int, target: int, samples: int, ratio: int | None = None, batch_size: int = 4
) -> dict[str, list[float]]:
    """Measure all three sides on the context's windows of length + target.

    Returns
    -------
    dict
        `text`, `slots`, `none`: for each sample, mean negative log-likelihood in nats a token.
    """
    ratio = ratio or model.config.ratio
    windows = context.windows(length + target, samples)
    base, adapter = model.config.base_fingerprint, model.origin.adapter
    keys = {
        "text": ("follow", base, length, target, samples),
        "none": ("follow", base, 0, length, target, samples),
        "slots": ("follow", adapter, ratio, length, target, samples),
    }
    todo = [side for side, key in keys.items() if key not in context.known]
    found: dict[str, list[float]] = {side: [] for side in todo}
    tick = context.progress(f"continuations of {length} tokens at {ratio}x")
    for at in range(0, samples if todo else 0, batch_size):
        contexts = [w[:length] for w in windows[at : at + batch_size]]
        follows = [w[length:] for w in windows[at : at + batch_size]]
        for side in todo:
            if side == "slots":
                found[side] += from_slots(model, model.compress_ids(contexts, ratio=ratio, polish=0), follows)
            else:
                found[side] += from_text(model, contexts if side == "text" else [[]] * len(follows), follows)
        tick(at + len(follows), samples)
    for side in todo:
        context.known[keys[side]] = found[side]
    return {side: context.known[key] for side, key in keys.items()}
