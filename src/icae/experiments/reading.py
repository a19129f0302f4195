"""Contexts -> what is read back of them, segment by segment, each segment measured once however many experiments look at it.

Every segment is read back alone, from its own slots (`ICAE.reconstruct_ids`), so that a context's reading is its segments' readings
end to end, and contexts that begin alike share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from icae.experiments.context import Context
from icae.metrics import bleu, exact_match
from icae.model import ICAE
from icae.objectives import Example, Marker, pieces


@dataclass(frozen=True)
class Reading:
    """What is read back of one context."""

    nll: np.ndarray
    """(tokens,) float32: negative log-likelihood of each token under teacher forcing, in nats."""
    hits: np.ndarray
    """(tokens,) bool: the token was the likeliest, under teacher forcing."""
    made: list[int]
    """Ids generated from the slots."""
    slots: int
    """Memory slots that it took."""


def read_back(
    context: Context, model: ICAE, texts: Sequence[list[int]], ratio: int | None = None, *, batch_size: int = 64
) -> list[Reading]:
    """Compress texts given as ids, read them back, and score them; `ratio` as for `compress_ids`."""
    ratio = ratio or model.config.ratio
    adapter = model.origin.adapter
    cuts = [pieces(ids, model.config.segment_length, ratio) for ids in texts]
    wanted = {tuple(p): None for cut in cuts for p in cut if (adapter, ratio, tuple(p)) not in context.known}
    rows = sorted((list(p) for p in wanted), key=len)
    tick = context.progress(f"segments read back at {ratio}x")
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        slots = model.compress_segments(part, ratio=ratio)
        made = model.reconstruct_ids(slots, batch_size=batch_size)
        scores = [
            s
            for i in range(0, len(part), 8)
            for s in model.score(slots[i : i + 8], [Example([], Marker.AE, [], ids) for ids in part[i : i + 8]])
        ]
        for ids, s, m, score in zip(part, slots, made, scores, strict=True):
            context.known[adapter, ratio, tuple(ids)] = Reading(score.nll.numpy(), score.hits.numpy(), m, s.count)
        tick(at + len(part), len(rows))
    readings = []
    for cut in cuts:
        parts: list[Reading] = [context.known[adapter, ratio, tuple(p)] for p in cut]
        readings.append(
            Reading(
                np.concatenate([p.nll for p in parts]),
                np.concatenate([p.hits for p in parts]),
                [i for p in parts for i in p.made],
                sum(p.slots for p in parts),
            )
        )
    return readings


def bleus(model: ICAE, readings: Sequence[Reading], texts: Sequence[list[int]]) -> list[float]:
    """Return each reading's BLEU."""
    return [bleu(model.base.decode(r.made), model.base.decode(ids)) for r, ids in zip(readings, texts, strict=True)]


def matches(readings: Sequence[Reading], texts: Sequence[list[int]]) -> list[float]:
    """Return each reading's exactly matching prefix, as a share."""
    return [exact_match(r.made, ids) for r, ids in zip(readings, texts, strict=True)]


def losses(readings: Sequence[Reading]) -> list[float]:
    """Return each reading's mean negative log-likelihood, in nats a token."""
    return [float(r.nll.mean()) for r in readings]
