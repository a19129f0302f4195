"""Which documents, and which segments of a long one, a prompt is about: it is answered from the slots of those alone.

    segments, prompt -> what the prompt's letters have in common with each (overlap.py), or, where that is next to nothing,
                     -> the prompt's likelihood after the slots of each
                     -> relevance -> the most relevant, best last

Slots answer the worse, the more segments there are that the prompt is not about (docs/log.md). A document of a few segments is read whole;
of several documents those are read that matter, and of what is still too long the segments that do. Most prompts name what they are about,
so that a text search over the token ids kept beside the slots finds it at once. Where a prompt shares next to no letters with the text, no
ids were kept, or there are few segments in all, the frozen decoder itself tells them apart, at the cost of a pass of the prompt, without
its template, over the slots of each: a question is likelier after the text that answers it (query likelihood, Ponte and Croft, SIGIR 1998,
here read from slots). There is no index, no further model and nothing to train, and a context may be longer than the base has positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from icae.objectives import Example, Marker
from icae.overlap import Texts
from icae.reader import Reader
from icae.slots import MemorySlots
from icae.stepwise import finished

SHARE = 0.7
"""What has less than this share of the best one's relevance is left out where not all can be read."""
MARGIN = 5.0
"""Nats of relevance behind the best one from which a document is left out where all could be read: most questions differ by more between
two documents, requests that are about no place in particular by less."""
FAINT = 4.0
"""Grams of the rarest kind: having less in common with the prompt, the best segment is not told apart from the others."""
COUNTED_AT_ONCE = 128
"""Segments whose letters are counted between two pieces of other work."""
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


def relevant(
    reader: Reader, slots: MemorySlots, prompt: list[int], most: int, texts: Texts | None = None
) -> Generator[None, None, list[int]]:
    """Return the numbers that `chosen` does, piece by piece, so that other work may go between; `texts` may be known from `counted`."""
    if len(slots.segments) > most and slots.ids is not None:
        texts = (yield from counted(reader, slots)) if texts is None else texts
        shared = texts.shared(reader.base.decode(prompt[-PROMPT:]))
        if max(shared) >= FAINT:
            return chosen(shared, slots.documents, most)
    numbers, read = range(len(slots.segments)), []
    for at in range(0, len(numbers), AT_ONCE):
        read.append(likelihoods(reader, [slots.segment(i) for i in numbers[at : at + AT_ONCE]], prompt))
        yield
    return chosen(gained(torch.cat(read)), slots.documents, most)


def counted(reader: Reader, slots: MemorySlots) -> Generator[None, None, Texts]:
    """Count the letters of each segment's text, piece by piece; of slots that came with token ids."""
    assert slots.ids is not None
    texts = Texts()
    for number, ids in enumerate(slots.ids.split([s.tokens for s in slots.segments]), 1):
        texts.add(reader.base.decode(ids))
        if number % COUNTED_AT_ONCE == 0:
            yield
    return texts


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
