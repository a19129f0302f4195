"""Which documents, and which segments of a long one, a prompt is about: it is answered from the slots of those alone.

    segments, prompt -> what the prompt's letters have in common with each (overlap.py)
                     -> where that leaves doubt: the prompt's likelihood after the slots of the likeliest
                     -> relevance -> the most relevant, best last

Slots answer the worse, the more segments there are that the prompt is not about (docs/log.md). A document of a few segments is read whole;
of several documents those are read that matter, and of what is still too long the segments that do. Most questions name what they are
about, so that a text search over the token ids kept beside the slots finds it at no cost. For the others the frozen decoder itself tells
segments apart: a question is likelier after the text that answers it (query likelihood, Ponte and Croft, SIGIR 1998, here read from
slots). There is no index, no further model and nothing to train, and a context may be longer than the base has positions.

Where there is doubt, it costs a pass of the prompt, without its template, over the slots of a few segments; where the prompt has next to
nothing in common with any, or no token ids are kept, over those of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from icae.objectives import Example, Marker
from icae.overlap import overlaps
from icae.reader import Reader
from icae.slots import MemorySlots

SHARE = 0.7
"""What has less than this share of the best one's relevance is left out where not all can be read."""
MARGIN = 5.0
"""Nats of relevance behind the best one from which a document is left out where all could be read: most questions differ by more between
two documents, requests that are about no place in particular by less."""
CLEAR = 14.0
"""Nats that the best segment has in common with the prompt, at least, where the letters alone decide: requests about no place in
particular seldom reach them."""
RIVAL = 0.5
"""And this share of them no other document reaches (of one document: no other segment)."""
FAINT = 8.0
"""Nats below which what they have in common tells nothing: the prompt is read after all segments."""
SHORTLIST = 4
"""Segments, those that have most in common with the prompt, which it is read after otherwise."""
REFERENCES = 2
"""And of those that have least: how likely the prompt is after what it is not about."""
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
        Segments to keep, at most; one document of no more stays as it is.

    Returns
    -------
    MemorySlots
        What is kept, at positions as if it were the whole context, the most relevant last: next to the prompt.
    """
    if not prompt or (len(slots.segments) <= most and not any(slots.documents)):
        return slots
    steps = relevant(reader, slots, prompt, most)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return selected(slots, end.value)


def relevant(reader: Reader, slots: MemorySlots, prompt: list[int], most: int) -> Generator[None, None, list[int]]:
    """Return the numbers that `chosen` does; where a prompt is read, a few segments at a time, so that other work may go between."""
    shared = in_common(reader, slots, prompt) if len(slots.segments) > most else None
    if shared is not None and clear(shared, slots.documents):
        return chosen(shared, slots.documents, most)
    numbers, others = shortlisted(shared, len(slots.segments))
    read = []
    for at in range(0, len(numbers + others), AT_ONCE):
        read.append(likelihoods(reader, [slots.segment(i) for i in (numbers + others)[at : at + AT_ONCE]], prompt))
        yield
    after = torch.cat(read)
    gains = gained(after[: len(numbers)], after[len(numbers) :].mean(0) if others else after.median(0).values)
    return chosen(both(shared, dict(zip(numbers, gains, strict=True))) if shared and others else gains, slots.documents, most)


def selected(slots: MemorySlots, numbers: Sequence[int]) -> MemorySlots:
    """Return some segments' slots, in the order given, at positions as if they were all: one document, never narrowed again."""
    joined = MemorySlots.concatenate([slots.segment(i) for i in numbers], same=True)
    return dataclasses.replace(joined, segments=tuple(dataclasses.replace(s, opens=False) for s in joined.segments))


def asked(turns: Sequence[Mapping[str, str]]) -> str:
    """Return what the user's last turns of a chat ask."""
    return "\n".join([turn["content"] for turn in turns if turn["role"] == "user"][-TURNS:])


def likelihoods(reader: Reader, parts: Sequence[MemorySlots], prompt: list[int]) -> Tensor:
    """Return the log-likelihood of each of the prompt's tokens after each segment, (segments, tokens) float32, in nats."""
    target = Example([], Marker.LM, [], prompt[-PROMPT:])
    return -torch.stack([score.nll for score in reader.score(parts, [target] * len(parts))])


def in_common(reader: Reader, slots: MemorySlots, prompt: list[int]) -> list[float] | None:
    """Return what the prompt has in common with each segment's text, in nats; none where the slots came without token ids."""
    if slots.ids is None:
        return None
    texts = [reader.base.decode(ids) for ids in slots.ids.split([s.tokens for s in slots.segments])]
    return overlaps(reader.base.decode(prompt[-PROMPT:]), texts)


def clear(shared: Sequence[float], documents: Sequence[int]) -> bool:
    """Tell whether the letters alone decide: the best has much in common with the prompt, and its rivals far less."""
    best = max(range(len(shared)), key=shared.__getitem__)
    several = len(set(documents)) > 1
    rivals = [s for i, s in enumerate(shared) if (documents[i] != documents[best] if several else i != best)]
    return shared[best] >= CLEAR and max(rivals, default=0.0) < RIVAL * shared[best]


def shortlisted(shared: Sequence[float] | None, count: int) -> tuple[list[int], list[int]]:
    """Return the segments to read the prompt after, and others to compare them with; without the latter: with one another."""
    if shared is None or max(shared) < FAINT or count <= SHORTLIST + REFERENCES:
        return list(range(count)), []
    order = sorted(range(count), key=shared.__getitem__, reverse=True)
    return order[:SHORTLIST], order[-REFERENCES:]


def gained(likelihoods: Tensor, reference: Tensor) -> list[float]:
    """Return each segment's relevance: how much likelier than the reference (tokens,) it makes the prompt's tokens, where it does so.

    That others make a token likelier says nothing against a segment.
    """
    return (likelihoods - reference).clamp(min=0).sum(1).tolist()


def both(shared: Sequence[float], gains: Mapping[int, float]) -> list[float]:
    """Return each segment's relevance by both measures, each as a share of its best one; what was not read after has none."""
    most = max(*gains.values(), 1e-9)
    return [shared[i] / max(shared) + gains[i] / most if i in gains else 0.0 for i in range(len(shared))]


def chosen(relevance: Sequence[float], documents: Sequence[int], most: int) -> list[int]:
    """Return the numbers of the segments to read, at most so many, the most relevant last.

    A document is as relevant as its best segment.
    """
    best, least = max(relevance), SHARE * max(relevance)
    whole: dict[int, list[int]] = {}
    for i, document in enumerate(documents):
        whole.setdefault(document, []).append(i)
    enough = best - MARGIN if len(documents) <= most else least
    ranked = sorted((max(relevance[i] for i in rows), rows) for rows in whole.values())
    numbers = [i for score, rows in ranked if score >= enough for i in rows]
    if len(numbers) <= most:
        return numbers
    return [i for i in sorted(numbers, key=lambda i: relevance[i])[-most:] if relevance[i] >= least]
