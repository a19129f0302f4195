"""Slots and the texts that should follow them -> the loss of a batch. What counts and chooses rows stays on the CPU: no pass waits.

A taught sample is compared with a base that reads the full text in the slots' place: with what it says next, and, layer by layer, with what
it makes of the tokens that both read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icae.reader import Read, Reader
from icae.segments import alike
from icae.slot_batch import SlotBatch


def batch_loss(
    reader: Reader,
    slots: SlotBatch,
    markers: Tensor,
    text_ids: Tensor,
    real: Tensor,
    scored: Tensor,
    weights: Tensor,
    teacher: dict[str, Tensor] | None = None,
    tutor: Reader | None = None,
) -> Tensor:
    """Return the mean over samples of the weighted mean negative log-likelihood of their scored tokens, in nats.

    A share of a taught sample's loss compares distributions instead of tokens, and states may be compared too (see `_taught`).

    Parameters
    ----------
    reader : Reader
        The frozen decoder and the markers.
    slots : SlotBatch
        One row for each sample, with gradient.
    markers, text_ids, real, scored, weights, teacher
        As `objectives.collate` makes them, on the CPU: (B,) int64; (B, T) int64, bool, bool and float32; the taught samples' texts.
    tutor : Reader, optional
        Who teaches the samples that are for the fine-tuned base; none: the frozen decoder, as all others.
    """
    widths, device = real.sum(1).tolist(), reader.base.device
    taught = {} if teacher is None else {b: t for t, b in enumerate(teacher["rows"].tolist())}
    total = torch.zeros((), device=device)
    for rows in alike(widths, 0.75 if device.type == "cpu" else 0.4):  # texts of like lengths together: less padding
        text = slice(max(widths[b] for b in rows))
        ids, wanted, weight = (t[rows, text] for t in (text_ids, scored, weights))
        pupils = [(i, taught[b]) for i, b in enumerate(rows) if b in taught]
        read = reader.read(slots.select(rows), markers[rows], ids, real[rows, text], wanted, states=bool(pupils) and _compared(teacher))
        keep = read.keep
        row, place = wanted[:, keep].nonzero(as_tuple=True)  # of each scored token
        logits = read.logits[row.to(device, non_blocking=True), place.to(device, non_blocking=True)]
        share = weight / weight.sum(1, keepdim=True).clamp(min=1)
        if pupils:
            assert teacher is not None
            here, there = (torch.tensor(side) for side in zip(*pupils, strict=True))
            share[here] *= 1 - teacher["weights"][there][:, None]
            tutored = teacher["by_tutor"][there] & (tutor is not None)
            for who, theirs in ((reader, ~tutored), (tutor, tutored)):
                if who is not None and theirs.any():
                    lesson = {name: t[there[theirs]] for name, t in teacher.items()}
                    mine = read._replace(logits=logits)
                    total = total + _taught(who, mine, row, here[theirs], real[rows].sum(1)[here[theirs]], lesson)
        nll = nn.functional.cross_entropy(logits.float(), ids[:, keep][row, place].to(device, non_blocking=True), reduction="none")
        total = total + nll @ share[:, keep][row, place].to(device, non_blocking=True)
    return total / len(widths)


def _compared(teacher: dict[str, Tensor] | None) -> bool:
    """Return whether some sample's states are compared with its teacher's."""
    return teacher is not None and bool(teacher["aligned"].any())


def _taught(teacher: Reader, mine: Read, row: Tensor, taught: Tensor, widths: Tensor, lesson: dict[str, Tensor]) -> Tensor:
    """Return the sum over taught rows of what they are away from their teacher, which reads the full text: no gradient goes there.

    Knowledge distillation (arXiv 1503.02531) at temperature 1, as context distillation (arXiv 2112.00861) uses it: what the slots
    should do is what the text would have done. Each row has KL(teacher || pupil), the mean over its scored tokens, by its weight.

    Parameters
    ----------
    mine
        What the decoder made of all rows, its logits (N, V) those of each scored token.
    row
        (N,): the row that each of these is in.
    taught, widths
        (R,) int64: the rows that have this teacher, in order, and the tokens of their texts.
    lesson
        Those rows' texts and weights, as `objectives.collate` makes them.
    """
    device, theirs = teacher.base.device, lesson["scored"]
    place = torch.isin(row, taught).nonzero()[:, 0]
    with torch.no_grad():
        said = teacher.read_plain(lesson["ids"], lesson["real"], theirs, states=_compared(lesson))
        r, t = theirs[:, said.keep].nonzero(as_tuple=True)
        wanted = said.logits[r.to(device, non_blocking=True), t.to(device, non_blocking=True)].float().log_softmax(-1)
    logits = mine.logits[place.to(device, non_blocking=True)].float().log_softmax(-1)
    kl = nn.functional.kl_div(logits, wanted, reduction="none", log_target=True).sum(-1)
    total = kl @ (lesson["weights"] / theirs.sum(1).clamp(min=1))[r].to(device, non_blocking=True)
    return total + _apart(mine.states, said.states, taught, widths, lesson) if said.states else total


def _apart(mine: list[Tensor], theirs: list[Tensor], taught: Tensor, widths: Tensor, lesson: dict[str, Tensor]) -> Tensor:
    """Return the sum over taught rows of the distance of their hidden states from the teacher's, by its weight.

    Squared (hints: arXiv 1412.6550), relative to the teacher's own size, the mean over layers and over the tokens at the end that both
    read: of the prompt what stands in either text, and the target. Parameters as for `_taught`.
    """
    device = theirs[0].device
    ends = torch.stack([widths, lesson["real"].sum(1)]) - 1  # the last token is read by neither
    shared = lesson["shared"] - 1
    back = torch.cat([torch.arange(int(n)) for n in shared]) + 1
    whose = torch.repeat_interleave(torch.arange(len(taught)), shared)
    weight = (lesson["aligned"] / shared.clamp(min=1))[whose].to(device, non_blocking=True)
    here, there = (
        (rows[whose].to(device, non_blocking=True), (end[whose] - back).to(device, non_blocking=True))
        for rows, end in zip((taught, torch.arange(len(taught))), ends, strict=True)
    )
    pupil, wanted = (torch.stack([layer[at] for layer in layers]).float() for layers, at in ((mine, here), (theirs, there)))
    return ((pupil - wanted).pow(2).sum(-1) / wanted.pow(2).sum(-1)).mean(0) @ weight
