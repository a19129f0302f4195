"""Which segments of a long context a prompt is about: it is answered from the slots of those alone.

    slots of each segment, prompt -> the prompt's likelihood after each -> relevance -> the most relevant segments, best last

Slots answer the worse, the more segments there are that the prompt is not about (docs/log.md). The frozen decoder itself tells them apart:
a question is likelier after the text that answers it (query likelihood, Ponte and Croft, SIGIR 1998, here read from slots). There is no
index, no further model and nothing to train, and a context may be longer than the base has positions.

It costs a pass of the prompt, without its template, over the slots of each segment.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from icae.objectives import Example, Marker
from icae.reader import Reader
from icae.slots import MemorySlots

SHARE = 0.7
"""Segments of less than this share of the best one's relevance are left out."""
AT_ONCE = 8
"""Segments that are read together."""
PROMPT = 64
"""Tokens of the prompt that are looked at: its last."""
TURNS = 2
"""Turns of the user's that make up the prompt: a question may lean on the one before."""


def focus(reader: Reader, slots: MemorySlots, prompt: list[int], most: int) -> MemorySlots:
    """Narrow a context to the segments that a prompt is about.

    Parameters
    ----------
    reader : Reader
        What reads the slots.
    slots : MemorySlots
        Of any number of segments.
    prompt : list of int
        Token ids of the prompt itself, without a template.
    most : int
        Segments to keep, at most; a context of no more stays as it is.

    Returns
    -------
    MemorySlots
        The segments kept, at positions as if they were the whole context, the most relevant one last: next to the prompt.
    """
    if len(slots.segments) <= most or not prompt:
        return slots
    parts = slots.split()
    steps = relevant(reader, parts, prompt, most)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return MemorySlots.concatenate([parts[i] for i in end.value])


def relevant(reader: Reader, parts: Sequence[MemorySlots], prompt: list[int], most: int) -> Generator[None, None, list[int]]:
    """Read a prompt after each segment, a few at a time, so that other work may go between; return the numbers that `chosen` does."""
    read = []
    for at in range(0, len(parts), AT_ONCE):
        read.append(likelihoods(reader, parts[at : at + AT_ONCE], prompt))
        yield
    return chosen(torch.cat(read), most)


def asked(turns: Sequence[Mapping[str, str]]) -> str:
    """Return what the user's last turns of a chat ask."""
    return "\n".join([turn["content"] for turn in turns if turn["role"] == "user"][-TURNS:])


def likelihoods(reader: Reader, parts: Sequence[MemorySlots], prompt: list[int]) -> Tensor:
    """Return the log-likelihood of each of the prompt's tokens after each segment, (segments, tokens) float32, in nats."""
    target = Example([], Marker.LM, [], prompt[-PROMPT:])
    return -torch.stack([score.nll for score in reader.score(parts, [target] * len(parts))])


def chosen(likelihoods: Tensor, most: int) -> list[int]:
    """Return the numbers of the relevant segments, the most relevant last.

    A segment's relevance is how much likelier than the middle one of them it makes the prompt's tokens, over those where it does: that
    others make a token likelier says nothing against it.
    """
    relevance = (likelihoods - likelihoods.median(0).values).clamp(min=0).sum(1)
    best = relevance.topk(min(most, len(relevance)))
    return [i for i, r in zip(best.indices.tolist(), best.values.tolist(), strict=True) if r >= SHARE * best.values[0]][::-1]
