"""Triples -> fine-tuning samples, by index: list[Triple] -> Pool, with a share -> Triples, one Example an index.

Sample i is a function of settings, seed and i, as in data.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from icae.base import Base
from icae.chat import chat_prompt, chat_response, full_text
from icae.config import ICAEConfig, TrainConfig
from icae.data import Windows, drawn_ratio, takes
from icae.errors import ICAEError
from icae.objectives import Example, instruction, pieces
from icae.triples import Triple, load_triples

_TEMPLATE = 256
"""Tokens that a chat template writes around a prompt, at most; a text of so many bytes less than the base has positions leaves room."""


@dataclass(frozen=True)
class Pool:
    """Triples that are drawn from together, and their share among the pools."""

    triples: list[Triple]
    share: float = 1.0

    @cached_property
    def contexts(self) -> list[list[Triple]]:
        """The triples of each context, in the data's order."""
        groups: dict[str, list[Triple]] = {}
        for triple in self.triples:
            groups.setdefault(triple.context, []).append(triple)
        return list(groups.values())

    @cached_property
    def _counts(self) -> dict[int, int]:
        """The triples of an epoch, by the prompts a context."""
        return {}

    @cached_property
    def _orders(self) -> dict[int, list[Triple]]:
        """The triples of the latest epochs, in their order."""
        return {}

    def triple(self, turn: int, prompts: int, chance: Callable[[int], np.random.Generator]) -> Triple:
        """Return the triple whose turn it is: up to `prompts` of a context in a row, each epoch's contexts in an order of its own.

        A context's first triple is among them in every epoch, its others in turn.
        """
        if prompts not in self._counts:
            self._counts[prompts] = sum(min(prompts, len(c)) for c in self.contexts) if prompts > 1 else len(self.triples)
        epoch, place = divmod(turn, self._counts[prompts])
        if epoch not in self._orders:
            while len(self._orders) > 1:  # a batch may lie in two epochs
                del self._orders[min(self._orders)]
            contexts, made = self.contexts if prompts > 1 else [[t] for t in self.triples], []
            for drawn in chance(epoch).permutation(len(contexts)):
                first, *others = contexts[drawn]
                begin, count = epoch * (prompts - 1), min(prompts - 1, len(others))
                made += [first, *(others[(begin + n) % len(others)] for n in range(count))]
            self._orders[epoch] = made
        return self._orders[epoch][place]


def load_pools(source: str | Sequence[str] | Mapping[str, float], base: Base | None = None, **limits: Any) -> list[Pool]:
    """Read one source, several as one (a list), or several with a share each (a mapping); `limits` as for `load_triples`."""
    if isinstance(source, Mapping):
        return [Pool(load_triples(name, base, **limits), float(share)) for name, share in source.items()]
    names = [source] if isinstance(source, str) else source
    return [Pool([t for name in names for t in load_triples(name, base, **limits)])]


class Triples(Dataset):
    """Fine-tuning samples, in a new order each epoch; a share may replay pretraining, against forgetting.

    With `distractors`, a share of the contexts stands among other documents, each cut on its own, as slots are joined after
    retrieval: mostly other contexts of the same batch, whose slots are made anyway.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        base: Base,
        config: ICAEConfig,
        train: TrainConfig,
        replay: Windows | None = None,
        *,
        processes: int = 1,
    ):
        self.pools, self.base, self.config, self.train, self.replay = pools, base, config, train, replay
        self.samples_a_step = train.batch_size * train.accumulation * processes
        for triple in (t for pool in pools for t in pool.triples):  # what would fail in the middle of a run is refused at its start
            if len(triple.context.encode()) + len(triple.prompt.encode()) + _TEMPLATE > base.max_positions and self._room(triple) < 1:
                raise ICAEError(f"a context and its prompt leave no position for a response: {triple.prompt[:60]!r}; lower context_length")

    def __len__(self) -> int:
        """Return the samples of the whole run."""
        return self.train.steps * self.samples_a_step

    def _room(self, triple: Triple) -> int:
        """Return the positions that a context and its prompt leave."""
        read = len(self.base.encode(triple.context)) + len(chat_prompt(self.base.tokenizer, triple.prompt))
        return self.base.max_positions - read - self.config.marker_length

    def __getitem__(self, index: int) -> Example:
        """Return sample `index`."""
        triple = self._triple(index)
        if triple is None:
            assert self.replay is not None
            return self.replay.sample(index, turn=math.floor(index * self.train.pretrain_share))
        t, encode, tokenizer = self.train, self.base.encode, self.base.tokenizer
        prompt = chat_prompt(tokenizer, triple.prompt)
        response = chat_response(tokenizer, triple.response)[: t.response_length]
        drawn = drawn_ratio(t, index // self.samples_a_step)
        ratio = drawn or self.config.ratio
        example = instruction(encode(triple.context), prompt, response, self.config.segment_length, ratio)
        room = self.base.max_positions - len(prompt) - sum(map(len, example.segments)) - self.config.marker_length
        response, room = response[:room], room - len(response)
        example = replace(example, target=response)
        teacher: list[int] = []
        if t.distil or t.align:
            teacher = self.base.prompted(full_text(triple.context, triple.prompt))
            if len(teacher) + len(response) > self.base.max_positions:
                teacher = []
        segments = self._among_others(index, triple, example.segments, room, ratio)
        by_tutor = not triple.teacher.startswith(self.base.byline)  # how its own response goes on, the base itself knows best
        return replace(example, segments=segments, teacher=teacher, by_tutor=by_tutor, distil=t.distil, align=t.align, ratio=drawn)

    def _triple(self, index: int) -> Triple | None:
        """Return the triple of sample `index`; none where that one replays pretraining. Each epoch of a pool has its own order."""
        if self.replay is not None:
            if takes(index, self.train.pretrain_share):
                return None
            index -= math.floor(index * self.train.pretrain_share)
        left = sum(pool.share for pool in self.pools)
        for number, pool in enumerate(self.pools):
            share, left = pool.share / left, left - pool.share
            if takes(index, share) or number == len(self.pools) - 1:
                return pool.triple(
                    math.floor(index * share),
                    self.train.prompts,
                    lambda epoch, number=number: np.random.default_rng([self.train.seed, 2, number, epoch]),  # type: ignore[misc]
                )
            index -= math.floor(index * share)
        raise AssertionError("the last pool takes every index")

    def _among_others(self, index: int, triple: Triple, own: list[list[int]], room: int, ratio: int) -> list[list[int]]:
        """Return a context's segments, for a share of the samples with those of other documents around it, `room` tokens at most."""
        t = self.train
        chance = np.random.default_rng([t.seed, 3, index])
        if not t.distractors or chance.random() >= t.distractor_share:
            return own
        batch = range(index - index % t.batch_size, index - index % t.batch_size + t.batch_size)
        beside = [other for i in batch if i != index and (other := self._triple(i)) is not None]
        others = [beside[i].context for i in chance.permutation(len(beside))]
        pool = self.pools[int(chance.integers(len(self.pools)))].triples
        others += [pool[int(i)].context for i in chance.integers(len(pool), size=t.distractors)]
        wanted = int(chance.integers(1, t.distractors + 1))
        documents: list[list[list[int]]] = []
        for context in dict.fromkeys(c for c in others if c != triple.context):
            document = self.base.encode(context)
            if len(documents) < wanted and len(document) <= room:
                documents.append(pieces(document, self.config.segment_length, ratio))
                room -= len(document)
        documents.insert(int(chance.integers(len(documents) + 1)), own)
        return [segment for document in documents for segment in document]
