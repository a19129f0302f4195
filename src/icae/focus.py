"""Which documents, and which segments of a long one, a prompt is about: it is answered from the slots of those alone.

    segments, prompt -> what the prompt's letters have in common with each (overlap.py), or, where that is next to nothing,
                     -> the prompt's likelihood after the slots of each
                     -> relevance -> the most relevant, best last

Slots answer the worse, the more segments there are that the prompt is not about (docs/log.md). A document of a few segments is read whole;
of several documents those are read that matter, and of what is still too long the segments that do. Most prompts name what they are about,
so that a text search over the token ids kept beside the slots finds it at once. Where a prompt shares next to no letters with the text, or
no ids were kept, the frozen decoder itself tells segments apart, at the cost of a pass of the prompt, without its template, over the slots
of each: a question is likelier after the text that answers it (query likelihood, Ponte and Croft, SIGIR 1998, here read from slots). There
is no index, no further model and nothing to train, and a context may be longer than the base has positions.
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
from icae.stepwise import finished

SHARE = 0.7
"""What has less than this share of the best one's relevance is left out where not all can be read."""
MARGIN = 5.0
"""Nats of relevance behind the best one from which a document is left out where all could be read: most questions differ by more between
two documents, requests that are about no place in particular by less."""
FAINT = 8.0
"""Nats below which what the best segment has in common with the prompt tells nothing."""
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
    return selected(slots, finished(relevant(reader, slots, prompt, most)))


def relevant(reader: Reader, slots: MemorySlots, prompt: list[int], most: int) -> Generator[None, None, list[int]]:
    """Return the numbers that `chosen` does; where a prompt is read, a few segments at a time, so that other work may go between."""
    shared = in_common(reader, slots, prompt) if len(slots.segments) > most else []
    if max(shared, default=0.0) >= FAINT:
        return chosen(shared, slots.documents, most)
    numbers, read = range(len(slots.segments)), []
    for at in range(0, len(numbers), AT_ONCE):
        read.append(likelihoods(reader, [slots.segment(i) for i in numbers[at : at + AT_ONCE]], prompt))
        yield
    return chosen(gained(torch.cat(read)), slots.documents, most)


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


def in_common(reader: Reader, slots: MemorySlots, prompt: list[int]) -> list[float]:
    """Return what the prompt has in common with each segment's text, in nats; nothing where the slots came without token ids."""
    if slots.ids is None:
        return []
    texts = [reader.base.decode(ids) for ids in slots.ids.split([s.tokens for s in slots.segments])]
    return overlaps(reader.base.decode(prompt[-PROMPT:]), texts)


def gained(likelihoods: Tensor) -> list[float]:
    """Return each segment's relevance: how much likelier than the middle one it makes the prompt's tokens, where it does so, in nats.

    That others make a token likelier says nothing against a segment. `likelihoods` are (segments, tokens).
    """
    return (likelihoods - likelihoods.median(0).values).clamp(min=0).sum(1).tolist()


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
