"""Slots and the texts that should follow them -> the loss of a batch. What counts and chooses rows stays on the CPU: no pass waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icae.reader import Reader
from icae.segments import alike
from icae.slots import SlotBatch


def batch_loss(
    reader: Reader,
    slots: SlotBatch,
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
    slots : SlotBatch
        One row for each sample, with gradient.
    markers, text_ids, real, scored, weights, teacher
        As `objectives.collate` makes them, on the CPU: (B,) int64; (B, T) int64, bool, bool and float32; the taught samples' texts.
    """
    widths, device = real.sum(1).tolist(), reader.base.device
    taught = {} if teacher is None else {b: t for t, b in enumerate(teacher["rows"].tolist())}
    total = torch.zeros((), device=device)
    for rows in alike(widths, 0.75 if device.type == "cpu" else 0.4):  # texts of like lengths together: less padding
        text = slice(max(widths[b] for b in rows))
        ids, wanted, weight = (t[rows, text] for t in (text_ids, scored, weights))
        logits, keep = reader.logits(slots.select(rows), markers[rows], ids, real[rows, text], wanted)
        row, place = wanted[:, keep].nonzero(as_tuple=True)  # of each scored token
        logits = logits[row.to(device, non_blocking=True), place.to(device, non_blocking=True)]
        share = weight / weight.sum(1, keepdim=True).clamp(min=1)
        if taught:
            pupils = [(i, taught[b]) for i, b in enumerate(rows) if b in taught]
            if pupils:
                assert teacher is not None
                here, there = (torch.tensor(side) for side in zip(*pupils, strict=True))
                total = total + _divergence(reader, logits, row, here, {name: t[there] for name, t in teacher.items()})
                share[here] *= 1 - teacher["weights"][there][:, None]
        nll = nn.functional.cross_entropy(logits.float(), ids[:, keep][row, place].to(device, non_blocking=True), reduction="none")
        total = total + nll @ share[:, keep][row, place].to(device, non_blocking=True)
    return total / len(widths)


def _divergence(reader: Reader, logits: Tensor, row: Tensor, taught: Tensor, teacher: dict[str, Tensor]) -> Tensor:
    """Return the sum over taught rows of KL(base with the full text || base with the slots), each the weighted mean over its scored tokens.

    Knowledge distillation (arXiv 1503.02531) at temperature 1, as context distillation (arXiv 2112.00861) uses it: what the slots
    should do is what the text would have done. The teacher is the frozen base, so no gradient goes there.

    Parameters
    ----------
    logits, row
        (N, V) and (N,): of each scored token, and the row it is in.
    taught
        (R,) int64: the rows that have a teacher, in order.
    teacher
        Those rows' texts and weights.
    """
    device, theirs = reader.base.device, teacher["scored"]
    place = torch.isin(row, taught).nonzero()[:, 0]
    with torch.no_grad():
        said, keep = reader.plain_logits(teacher["ids"], teacher["real"], theirs)
        r, t = theirs[:, keep].nonzero(as_tuple=True)
        said = said[r.to(device, non_blocking=True), t.to(device, non_blocking=True)].float().log_softmax(-1)
    mine = logits[place.to(device, non_blocking=True)].float().log_softmax(-1)
    kl = nn.functional.kl_div(mine, said, reduction="none", log_target=True).sum(-1)
    return kl @ (teacher["weights"] / theirs.sum(1).clamp(min=1))[r].to(device, non_blocking=True)
