"""Slots and the texts that should follow them -> the loss of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icae.reader import Reader
from icae.segments import alike
from icae.slots import MemorySlots, SlotBatch


def batch_loss(
    reader: Reader,
    slots: Sequence[MemorySlots],
    markers: Tensor,
    text_ids: Tensor,
    real: Tensor,
    scored: Tensor,
    weights: Tensor,
    teacher: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over samples of the weighted mean negative log-likelihood of their scored tokens, in nats.

    A share of a taught sample's loss compares distributions instead of tokens (see `_divergence`).

    Parameters
    ----------
    reader : Reader
        The frozen decoder and the markers.
    slots : sequence of MemorySlots
        One for each sample, with gradient.
    markers, text_ids, real, scored, weights, teacher
        As `objectives.collate` makes them: (B,) int64; (B, T) int64, bool, bool and float32; the taught samples' texts.
    """
    widths = real.sum(1).tolist()
    total = torch.zeros((), device=text_ids.device)
    for rows in alike(widths):  # texts of like lengths together: less padding
        text = slice(max(widths[b] for b in rows))
        batch = SlotBatch.pad([slots[b] for b in rows])
        ids, wanted = text_ids[rows, text], scored[rows, text]
        logits, keep = reader.logits(batch, markers[rows], ids, real[rows, text], wanted)
        wanted, weight = wanted[:, keep], weights[rows, text][:, keep]
        nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, keep].flatten(), reduction="none")
        losses = _means(nll.view(wanted.shape) * weight, weight)
        if teacher is not None:
            pairs = [(rows.index(b), t) for t, b in enumerate(teacher["rows"].tolist()) if b in rows]
            if pairs:
                here, there = (torch.tensor(side, device=ids.device) for side in zip(*pairs, strict=True))
                taught = _divergence(reader, logits[here], wanted[here], {name: t[there] for name, t in teacher.items()})
                losses = losses.index_copy(0, here, torch.lerp(losses[here], taught, teacher["weights"][there]))
        total = total + losses.sum()
    return total / len(widths)


def _divergence(reader: Reader, logits: Tensor, wanted: Tensor, teacher: dict[str, Tensor]) -> Tensor:
    """Return KL(base with the full text || base with the slots) in nats a token, a row: the mean over its scored tokens.

    Knowledge distillation (arXiv 1503.02531) at temperature 1, as context distillation (arXiv 2112.00861) uses it: what the slots
    should do is what the text would have done. The teacher is the frozen base, so no gradient goes there.
    """
    theirs = teacher["scored"]
    with torch.no_grad():
        said, keep = reader.plain_logits(teacher["ids"], teacher["real"], theirs)
        said = said[theirs[:, keep]]
    mine = logits[wanted]
    kl = nn.functional.kl_div(mine.float().log_softmax(-1), said.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return _means(torch.zeros(wanted.shape, device=kl.device).masked_scatter(wanted, kl), wanted)


def _means(values: Tensor, weights: Tensor) -> Tensor:
    """Return each row's mean: of values times their weights (bool or float), 0 where a row has none."""
    return values.sum(1) / weights.sum(1).clamp(min=1)
