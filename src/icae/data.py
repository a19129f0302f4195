"""Corpora -> examples, by index (triples.py does the same for triples).

A data set is a function of (settings, seed, index): example i is the same whenever and wherever it is asked for, which is what makes
a resumed run equal to an uninterrupted one, and a run on two processes equal to a run on one.

    .txt, folder of .txt, .jsonl, Hub name -> documents -> token ids, kept in the cache folder -> Windows
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from icae.base import Base, cache_folder
from icae.config import ICAEConfig, TrainConfig
from icae.errors import ICAEError
from icae.objectives import Example, autoencoding, continuation, recall


def read_text(path: str | Path) -> str:
    """Read a text file.

    Raises
    ------
    ICAEError
        If it is missing, is a folder, or is not text in UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ICAEError(f"no file at {path}") from error
    except OSError as error:
        raise ICAEError(f"could not read {path}: {error.strerror}") from error
    return decoded(data, str(path))


def decoded(data: bytes, source: str) -> str:
    """Return bytes as text, without the mark that some editors put first; raises `ICAEError`, with `source`, if they are none in UTF-8."""
    try:
        if b"\0" in data:
            raise ValueError("it has zero bytes")
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise ICAEError(f"{source} is not a text in UTF-8 ({error}); convert it to plain text first") from error


def check_whole(text: str) -> None:
    """Refuse, by ValueError, a text with half characters in it, as JSON can spell them: no tokenizer and no file takes these."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} of a text is half of one") from None


def documents(source: str, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of a folder of .txt, a .txt or .jsonl file, or a Hub data set (streamed, split `train`).

    Raises
    ------
    ICAEError
        If there is nothing there, or a line of a .jsonl is no object with a text.
    """
    if not source:
        raise ICAEError("the source is empty; name a folder of .txt, a .txt or .jsonl file, or a Hub data set")
    path = Path(source)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise ICAEError(f"folder {source} holds no .txt file")
        for file in files:
            yield read_text(file)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), 1):  # a line may hold other separators
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row[text_field] if text_field in row else row["input"]
                if not isinstance(text, str):
                    raise TypeError("no text")
            except (ValueError, KeyError, TypeError) as error:
                raise ICAEError(f"{source}, line {number}: no JSON object with a field {text_field!r}") from error
            try:
                check_whole(text)
            except ValueError as error:
                raise ICAEError(f"{source}, line {number}: {error}") from error
            yield text
    elif path.suffix == ".json" and path.is_file():
        raise ICAEError(f"{source} is JSON, not text: give a .jsonl, a JSON object with a field {text_field!r} on every line, or .txt")
    elif path.is_file():
        yield read_text(path)
    elif path.suffix or source.startswith((".", "/")) or source.count("/") > 1:
        raise ICAEError(f"no text at {source}; give a folder of .txt, a .txt or .jsonl file, or a Hub data set name")
    else:
        from datasets import load_dataset

        try:
            rows = load_dataset(source, split="train", streaming=True)
        except Exception as error:  # the Hub's client raises many kinds: all mean that there is no such data within reach
            raise ICAEError(f"no file {source!r}, and the Hub gave no data set of that name ({error})") from error
        for row in rows:
            if text_field not in row:
                raise ICAEError(f"data set {source!r} has no field {text_field!r}; it has {', '.join(row)}")
            yield row[text_field]


@dataclass(frozen=True)
class Corpus:
    """Tokenised documents, end to end."""

    ids: np.ndarray
    """(tokens,) uint32."""
    starts: np.ndarray
    """(documents + 1,) int64: where each document begins; the last entry is the number of tokens."""

    def window(self, chance: np.random.Generator, length: int) -> list[int]:
        """Draw `length` tokens in a row from one document, every such place alike likely.

        Raises
        ------
        ICAEError
            If no document is that long.
        """
        room = self.check(length)
        at = int(chance.integers(int(room.sum())))
        document = int(np.searchsorted(np.cumsum(room), at, side="right"))
        begin = int(self.starts[document]) + at - int(room[:document].sum())
        return self.ids[begin : begin + length].tolist()

    def check(self, length: int) -> np.ndarray:
        """Return how many windows of `length` tokens each document has, (documents,) int64; errors as for `window`."""
        room = np.maximum(np.diff(self.starts) - length + 1, 0)
        if not room.any():
            raise ICAEError(f"no document has {length} tokens; use shorter windows or longer texts")
        return room


@dataclass(frozen=True)
class Mixture:
    """Several corpora, each with its share of the windows."""

    corpora: tuple[Corpus, ...]
    shares: tuple[float, ...]
    """As many numbers above 0; only their proportions count."""

    def window(self, chance: np.random.Generator, length: int) -> list[int]:
        """Draw a corpus, and `length` tokens in a row from it; errors as for `Corpus.window`, of any of them."""
        for corpus in self.corpora:
            corpus.check(length)
        shares = np.array(self.shares)
        return self.corpora[int(chance.choice(len(shares), p=shares / shares.sum()))].window(chance, length)


def load_texts(source: str | list[str] | dict[str, float], base: Base, max_tokens: int | None = None) -> Corpus | Mixture:
    """Return one source's corpus, or several sources' mixture: a list by their sizes, a mapping by its shares."""
    if isinstance(source, str):
        return load_corpus(source, base, max_tokens)
    corpora = tuple(load_corpus(name, base, max_tokens) for name in source)
    sizes = [float(len(c.ids)) for c in corpora]
    return Mixture(corpora, tuple(map(float, source.values())) if isinstance(source, dict) else tuple(sizes))


def load_corpus(source: str, base: Base, max_tokens: int | None = None) -> Corpus:
    """Tokenise a source once, and keep its ids in the cache folder, memory-mapped at later loads."""
    key = hashlib.sha256(json.dumps([3, _state(source), base.vocabulary_hash, max_tokens]).encode()).hexdigest()[:32]
    folder = cache_folder() / "corpora" / key
    if not (folder / "starts.npy").exists():
        if max_tokens is None and not Path(source).exists():
            raise ICAEError(f"{source!r} is no file here; to read it from the Hub, say how much of it: max_tokens=50000000")
        folder.mkdir(parents=True, exist_ok=True)
        pieces, starts = [], [0]
        for text in documents(source):
            pieces.append(np.array(base.encode(text), dtype=np.uint32))
            starts.append(starts[-1] + len(pieces[-1]))
            if max_tokens is not None and starts[-1] >= max_tokens:
                break
        if starts[-1] == 0:
            raise ICAEError(f"{source} holds no text")
        for name, array in (("ids", np.concatenate(pieces)), ("starts", np.array(starts, dtype=np.int64))):
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                np.save(file, array)
            os.replace(file.name, folder / f"{name}.npy")
    return Corpus(np.load(folder / "ids.npy", mmap_mode="r"), np.load(folder / "starts.npy"))


def _state(source: str) -> Any:
    """Return what tells whether a source has changed."""
    path = Path(source)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path] if path.exists() else []
    return [source, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]


class Windows(Dataset):
    """Pretraining samples: windows of a corpus that autoencode or continue, by the curriculum of a `TrainConfig`.

    Raises
    ------
    ICAEError
        If no document is long enough for the curriculum's longest window.
    """

    def __init__(self, corpus: Corpus | Mixture, base: Base, config: ICAEConfig, train: TrainConfig, *, processes: int = 1):
        self.corpus, self.base, self.config, self.train = corpus, base, config, train
        self.samples_a_step = train.batch_size * train.accumulation * processes
        for step, *_ in train.windows:  # what would fail in the middle of a run is refused at its start
            length, segments = train.window(step)
            corpus.window(np.random.default_rng(), self._extent(length, segments))
            longest = max(2 * length * bool(train.autoencoding_share), self._extent(length, segments)) + config.marker_length
            if longest > base.max_positions:
                raise ICAEError(
                    f"window [{step}, {length}, {segments}] takes {longest} positions of {base.name}, which has {base.max_positions}"
                )

    def _extent(self, length: int, segments: int) -> int:
        """Return the tokens that a sample takes at most."""
        return length if self.train.autoencoding_share == 1 else length * segments + min(self.train.continuation_length, length)

    def __len__(self) -> int:
        """Return the samples of the whole run."""
        return self.train.steps * self.samples_a_step

    def __getitem__(self, index: int) -> Example:
        """Return sample `index`."""
        return self.sample(index, turn=index)

    def sample(self, index: int, turn: int) -> Example:
        """Return sample `index`; `turn`, its number among the pretraining samples, decides whether it autoencodes."""
        t = self.train
        step = index // self.samples_a_step
        length, most = t.window(step)
        chance = np.random.default_rng([t.seed, index])
        drawn = drawn_ratio(t, step)
        ratio = drawn or self.config.ratio
        if takes(turn, t.autoencoding_share):
            eos = self.base.tokenizer.eos_token_id if t.autoencoding_eos else None
            example = autoencoding(self.corpus.window(chance, length), self.config.segment_length, eos, ratio)
            example = replace(example, first=t.first_weight)
        else:
            segments = int(chance.integers(1, most + 1))
            target = min(t.continuation_length, length)
            ids = self.corpus.window(chance, length * segments + target)
            context, following = ids[:-target], ids[-target:]
            piece = min(length, self.config.segment_length)
            if chance.random() < t.recall_share and len(context) > t.recall_cue:
                begin = int(chance.integers(max(1, len(context) - t.recall_cue - target // 2)))
                example = recall(context, begin, t.recall_cue, target // 2, piece, ratio)
            else:
                example = continuation(context, following, piece, t.continuation_unscored, ratio)
            example = replace(example, teacher=self.base.lead + context + example.prompt, distil=t.continuation_distil, align=t.align)
        return replace(example, ratio=drawn)


class HeldOut(Dataset):
    """A fixed number of samples from held-out text, at the curriculum's last window and the checkpoint's own ratio."""

    def __init__(self, windows: Windows, samples: int):
        last = windows.train.windows[-1][1:]
        steps = math.ceil(samples / windows.train.batch_size)
        fixed = windows.train.replace(windows=[[0, *last]], ratios=None, first_weight=1.0, seed=20_240, steps=steps)
        self.windows = Windows(windows.corpus, windows.base, windows.config, fixed)
        self.samples = samples

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.samples

    def __getitem__(self, index: int) -> Example:
        """Return sample `index`."""
        return self.windows[index]


def takes(index: int, share: float) -> bool:
    """Tell whether sample `index` is among the `share`, spread as evenly as can be."""
    return math.floor((index + 1) * share) > math.floor(index * share)


def drawn_ratio(train: TrainConfig, step: int) -> int | None:
    """Return the compression ratio of a step's samples; none: the checkpoint's own."""
    return int(np.random.default_rng([train.seed, 1, step]).choice(train.ratios)) if train.ratios else None
