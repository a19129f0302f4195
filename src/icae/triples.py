"""(Context, prompt, response) triples: read in every form, and made into fine-tuning samples, by index.

    .jsonl with input, prompt, answer      ->   (either also compressed: .jsonl.xz)
    .json of SQuAD's form                  -> list[Triple] -> Triples, one Example an index
    Hub name (sggetao/PwC, or name:split)  ->

Bad rows are named, counted and left out. Sample i is a function of settings, seed and i, as in data.py.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from icae.base import Base
from icae.chat import chat_prompt, chat_response, full_text
from icae.config import ICAEConfig, TrainConfig
from icae.data import Windows, check_whole, drawn_ratio, takes
from icae.errors import ICAEError
from icae.objectives import Example, instruction, pieces

_MOST_BAD = 0.01
"""Share of bad rows above which a source is refused."""
_TEMPLATE = 256
"""Tokens that a chat template writes around a prompt, at most; a text of so many bytes less than the base has positions leaves room."""


@dataclass(frozen=True)
class Triple:
    """A context, a prompt and its response; `answers` are all that count as right."""

    context: str
    prompt: str
    response: str
    answers: tuple[str, ...]
    teacher: str = ""
    """Who wrote the response, where `icae data build` did."""


def load_triples(source: str, base: Base | None = None, *, least: int = 2, most: int | None = None) -> list[Triple]:
    """Read triples.

    Parameters
    ----------
    source : str
        A .jsonl with PwC's fields `input`, `prompt`, `answer` (and `answers`, where several are right) or SQuAD's `context`,
        `question`, `answers`; a .json of SQuAD's form; or a Hub data set with such rows, `name` (split `train`) or `name:split`.
        SQuAD's questions without an answer are passed over.
    base : Base, optional
        Counts a context's tokens; none: lengths are not looked at.
    least, most : int
        Fewest tokens of a context (a slot's block, and never under two); shorter ones are bad. Longer ones than `most` are left out.

    Raises
    ------
    ICAEError
        If the source cannot be read, more than one row in a hundred is bad, or none is good.
    """
    found = read_triples(source, base, least=least, most=most)
    if not found.usable:
        if found.bad and (found.good or not found.long):
            lines = f"{len(found.bad)} of {found.rows} lines of {source}"
            raise ICAEError(f"{lines} are no triples of input, prompt, answer; first: {found.bad[0]}")
        if found.long:
            all_good = f"all {found.long} contexts of {source}" + (f" but {len(found.bad)} bad ones" if found.bad else "")
            raise ICAEError(f"{all_good} have more than {most} tokens; raise context_length, or cut them")
        raise ICAEError(f"{source} holds no triples; give lines with input, prompt and answer")
    for note in found.bad:
        print(f"skipped {note}", file=sys.stderr)
    if found.bad or found.long:
        long = f", {found.long} with more than {most} tokens left out" if found.long else ""
        counts = f"{len(found.good)} triples, {len(found.bad)} bad ones skipped{long}"
        print(f"{source}: {counts}", file=sys.stderr)
    return found.good


def digest(triples: Sequence[Triple]) -> str:
    """Return a short hash of triples: a file of the same name may hold others elsewhere."""
    return hashlib.sha256("\n".join(map(repr, triples)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Found:
    """What a source holds."""

    good: list[Triple]
    bad: list[str]
    """Place and reason of every bad row."""
    long: int
    """Rows whose context is too long."""

    @property
    def rows(self) -> int:
        """All rows."""
        return len(self.good) + len(self.bad) + self.long

    @property
    def usable(self) -> bool:
        """Whether there is something good, and not more than one bad row in a hundred."""
        return bool(self.good) and len(self.bad) <= _MOST_BAD * self.rows


def read_triples(source: str, base: Base | None = None, *, least: int = 2, most: int | None = None) -> Found:
    """Read triples and say which rows are none; parameters as for `load_triples`, errors where the source cannot be read at all."""
    good: list[Triple] = []
    bad: list[str] = []
    lengths: dict[str, int] = {}
    long = 0
    for place, read in _rows(source):
        try:
            row = read()
            if _unanswerable(row):
                continue
            found = _triple(row)
            if base is not None:
                tokens = lengths.get(found.context) or lengths.setdefault(found.context, len(base.encode(found.context)))
                if tokens < max(2, least):
                    raise ValueError(f"a context of {tokens} tokens, a slot stands for {max(2, least)}")
                if most is not None and tokens > most:
                    long += 1
                    continue
            good.append(found)
        except (ValueError, KeyError, TypeError) as error:
            bad.append(f"{place}: {f'no field {error}' if isinstance(error, KeyError) else error}")
    return Found(good, bad, long)


def load_pools(source: str | Sequence[str] | Mapping[str, float], base: Base | None = None, **limits: Any) -> list[Pool]:
    """Read one source, several as one (a list), or several with a share each (a mapping); `limits` as for `load_triples`."""
    if isinstance(source, Mapping):
        return [Pool(load_triples(name, base, **limits), float(share)) for name, share in source.items()]
    names = [source] if isinstance(source, str) else source
    return [Pool([t for name in names for t in load_triples(name, base, **limits)])]


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


def _rows(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each row's place in words, and what reads it; reading may raise ValueError, KeyError or TypeError."""
    if not source:
        raise ICAEError("the source is empty; name a .jsonl of triples, SQuAD's .json, or a Hub name")
    path = Path(source)
    if path.suffix not in (".json", ".jsonl", ".xz") and not path.exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        yield from _hub(source)
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ICAEError(f"could not read {source}: {error.strerror}; give a .jsonl of triples, SQuAD's .json, or a Hub name") from error
    if path.suffix == ".xz":
        try:
            data, path = lzma.decompress(data), path.with_suffix("")
        except (lzma.LZMAError, EOFError) as error:
            raise ICAEError(f"{source} is no .xz, or is not all of one ({error})") from error
    if path.suffix == ".json":
        yield from _squad(source, data)
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            yield f"{source}, line {number}", lambda line=line: json.loads(line.decode("utf-8-sig"))  # type: ignore[misc]


def _squad(source: str, data: bytes) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the rows of a file of SQuAD's form; questions marked as impossible have no answer and are passed over."""
    try:
        articles = json.loads(data.decode("utf-8-sig"))["data"]
        asked = [(p["context"], q) for a in articles for p in a["paragraphs"] for q in p["qas"] if not q.get("is_impossible")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ICAEError(f"{source} is no JSON of SQuAD's form, data / paragraphs / qas ({type(error).__name__}: {error})") from error
    for number, (context, q) in enumerate(asked, 1):
        yield f"{source}, question {q.get('id', number)}", lambda context=context, q=q: {**q, "context": context}  # type: ignore[misc]


def _hub(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:  # the Hub's client raises many kinds: all mean that there is no such data within reach
        reason = " ".join(str(error).split())
        raise ICAEError(f"no file {source!r}, and the Hub gave no data set of that name ({reason})") from error
    for number, row in enumerate(data, 1):
        yield f"{source}, row {number}", lambda row=row: row  # type: ignore[misc]


def _unanswerable(row: Any) -> bool:
    """Tell whether a row is a question of SQuAD's that its text has no answer to."""
    found = row.get("answers") if isinstance(row, dict) and "context" in row and "input" not in row else None
    return isinstance(found, dict) and found.get("text") == []


def _triple(row: Any) -> Triple:
    """Return a row as a triple."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    if "input" not in row and "context" in row:
        found = row["answers"]
        texts = found["text"] if isinstance(found, dict) else [a["text"] for a in found]
        row = {"input": row["context"], "prompt": row["question"], "answer": (texts or [""])[0], "answers": texts}
    context, prompt, answer = fields = [row[name] for name in ("input", "prompt", "answer")]
    if not all(isinstance(f, str) and f.strip() for f in fields):
        raise ValueError("an empty field, or one that is no text")
    answers = row.get("answers") or [answer]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError("answers is no list of texts")
    for text in (*fields, *answers):
        check_whole(text)
    return Triple(context, prompt, answer, tuple(a for a in answers if a.strip()) or (answer,), str(row.get("teacher", "")))


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
