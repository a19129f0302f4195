"""The objectives: token ids -> (context, marker, prompt, target). Pure functions on lists; collating makes the only tensors.

    autoencoding   slots [AE]                -> the context itself (+ EOS)            ICAE, arXiv 2307.06945, section 2.2
    continuation   slots [LM]                -> what follows the context
    recall         slots [LM] cue            -> what follows the cue inside the context (ours)
    instruction    slots [FT] chat prompt    -> the response + the template's end     section 2.3

The prompt and the response come from chat.py. What follows a context, and a response, may also be learned from what the base itself
would say next with the full text before it: then the sample carries that text as its `teacher`.

The loss of a sample is the (weighted) mean over its scored target tokens, and that of a batch the mean over its samples, so that a batch
cut over processes or accumulation steps has the same loss. lambda of the paper is the share of samples that autoencode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from icae.segments import cut


class Marker(IntEnum):
    """Row of the learned vector that tells the decoder what to do with the slots."""

    AE = 0
    LM = 1
    FT = 2


@dataclass(frozen=True)
class Example:
    """One sample."""

    segments: list[list[int]]
    """Context ids, cut."""
    marker: Marker
    prompt: list[int]
    """Ids between the marker and the target; no loss reads them."""
    target: list[int]
    unscored: int = 0
    """First tokens of the target that no loss reads."""
    ratio: int | None = None
    """Compression ratio, the same for all samples of a batch; none: the checkpoint's own."""
    teacher: list[int] = field(default_factory=list)
    """The prompt with the full text in it, for the teacher to read before the target; empty: nobody teaches."""
    by_tutor: bool = False
    """The teacher is the run's fine-tuned base, where it has one; false: the base as published."""
    distil: float = 0.0
    """What the teacher says counts so much of the loss, the target itself the rest."""
    align: float = 0.0
    """Weight of the distance between the decoder's hidden states and the teacher's."""
    first: float = 1.0
    """Weight of the first scored token among the others."""


def pieces(context: list[int], segment_length: int, ratio: int = 1) -> list[list[int]]:
    """Cut context ids into segments, between blocks of `ratio`."""
    return [context[a:b] for a, b in cut(len(context), segment_length, ratio)]


def autoencoding(context: list[int], segment_length: int, eos: int | None, ratio: int = 1) -> Example:
    """Give the text back; ends with `eos` where one is given."""
    return Example(pieces(context, segment_length, ratio), Marker.AE, [], context + ([] if eos is None else [eos]))


def continuation(context: list[int], following: list[int], segment_length: int, unscored: int = 0, ratio: int = 1) -> Example:
    """Continue the text with `following`, of which the first `unscored` tokens are read but not scored."""
    return Example(pieces(context, segment_length, ratio), Marker.LM, [], following, unscored)


def recall(context: list[int], begin: int, cue: int, length: int, segment_length: int, ratio: int = 1) -> Example:
    """Find `cue` tokens that stand at `begin` in the context, and go on from there for `length` tokens at most.

    Text that repeats itself goes on as before, and the base with the full text says so too (induction heads, arXiv 2209.11895): slots
    that are to be asked must be found by what they hold, not only by where they stand, which is all that autoencoding teaches.
    """
    end = begin + cue
    return Example(pieces(context, segment_length, ratio), Marker.LM, context[begin:end], context[end : end + length])


def instruction(context: list[int], prompt: list[int], response: list[int], segment_length: int, ratio: int = 1) -> Example:
    """Answer a prompt; `prompt` and `response` come from `chat_prompt` and `chat_response`."""
    return Example(pieces(context, segment_length, ratio), Marker.FT, prompt, response)


def collate(examples: list[Example]) -> dict[str, object]:
    """Put examples into one batch of tensors, as `ICAE.forward` takes it.

    A segment that several contexts share is encoded once.

    Returns
    -------
    dict
        segment_ids (S, L) int64 and lengths (S), all different segments; groups (B), the segments of each context; markers (B);
        text_ids (B, T) int64, prompt and target; real (B, T) and scored (B, T) bool, weights (B, T) float32, 0 where not scored; ratio.
        Where samples have a teacher, `teacher` holds their rows (R), their `distil` as weights (R), their `align` as aligned (R), whether
        they are for the fine-tuned base (R), how many tokens at the end both texts share (R) and, like the text, ids, real and scored,
        each (R, U).
    """
    numbers: dict[tuple[int, ...], int] = {}
    groups = [[numbers.setdefault(tuple(segment), len(numbers)) for segment in e.segments] for e in examples]
    text_ids, real, scored = _texts([(e.prompt, e.target, e.unscored) for e in examples])
    weights = scored.float()
    weights[torch.arange(len(examples)), scored.int().argmax(1)] *= torch.tensor([e.first for e in examples])
    batch: dict[str, object] = {
        "markers": torch.tensor([int(e.marker) for e in examples]),  # first: Trainer takes its length for the batch's
        "segment_ids": padded([list(segment) for segment in numbers]),
        "lengths": [len(segment) for segment in numbers],
        "groups": groups,
        "text_ids": text_ids,
        "real": real,
        "scored": scored,
        "weights": weights,
        "ratio": examples[0].ratio,
    }
    if rows := [b for b, e in enumerate(examples) if e.teacher and (e.distil or e.align)]:
        ids, real, scored = _texts([(examples[b].teacher, examples[b].target, examples[b].unscored) for b in rows])
        distil, align = (torch.tensor([share(examples[b]) for b in rows]) for share in (lambda e: e.distil, lambda e: e.align))
        shared = [len(examples[b].target) + _ending(examples[b].prompt, examples[b].teacher) for b in rows]
        tutored = torch.tensor([examples[b].by_tutor for b in rows])
        about = {"rows": torch.tensor(rows), "weights": distil, "aligned": align, "by_tutor": tutored, "shared": torch.tensor(shared)}
        batch["teacher"] = about | {"ids": ids, "real": real, "scored": scored}
    return batch


def _ending(one: list[int], other: list[int]) -> int:
    """Return how many ids at the end of both are the same."""
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return same


def _texts(rows: list[tuple[list[int], list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (prompt, target, unscored) rows as ids, which of them are real, and which are scored."""
    width = max(len(prompt) + len(target) for prompt, target, _ in rows)
    ids, real, scored = (torch.zeros(len(rows), width, dtype=t) for t in (torch.long, torch.bool, torch.bool))
    for b, (prompt, target, unscored) in enumerate(rows):
        end = len(prompt) + len(target)
        ids[b, :end] = torch.tensor(prompt + target)
        real[b, :end] = True
        scored[b, len(prompt) + unscored : end] = True
    return ids, real, scored


def padded(rows: list[list[int]]) -> Tensor:
    """Return rows of ids as one (rows, longest) int64 tensor, padded with 0 on the right."""
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
