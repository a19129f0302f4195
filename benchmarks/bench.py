"""What a serving benchmark is done on: a checkpoint, a store of contexts, a server on it, and plain transformers beside it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from served import Answer, Served
from transformers.generation.streamers import BaseStreamer

from icae.blobs import FolderBlobs
from icae.chat import chat_prompt, full_text
from icae.data import load_corpus
from icae.demo import SAMPLE
from icae.model import ICAE
from icae.store import SlotStore


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    context: int = 2048
    contexts: int = 4
    answer: int = 64
    clients: int = 16
    asks: int = 2
    """Requests that each client makes, one after the other, in the measure of throughput."""
    rounds: int = 3
    repeats: int = 7
    loads: int = 40
    requests: int = 1000
    soak_context: int = 256
    soak_answer: int = 12
    windows: int = 48
    window: int = 128


QUICK = Size(
    context=96,
    contexts=2,
    answer=8,
    clients=4,
    asks=1,
    rounds=2,
    repeats=2,
    loads=5,
    requests=60,
    soak_context=64,
    soak_answer=4,
    windows=2,
    window=48,
)


@dataclass(frozen=True)
class Context:
    """A stored text."""

    id: str
    name: str
    ids: list[int]
    text: str


class Bench:
    """One checkpoint with a store of contexts."""

    def __init__(self, name: str | None, base: str | None, text: str | None, size: Size, folder: Path):
        self.name, self.base_name, self.size, self.folder = name, base, size, folder
        self.model = ICAE.from_pretrained(name, base=base)
        self.store = SlotStore(folder)
        self.corpus = load_corpus(text or str(SAMPLE), self.model.base)
        self.repeated = text is None

    def windows(self, count: int, length: int) -> list[list[int]]:
        """Draw windows of held-out text; of the bundled sample, repeated where it is too short."""
        chance = np.random.default_rng([count, length])
        if not self.repeated:
            return [self.corpus.window(chance, length) for _ in range(count)]
        whole = self.corpus.ids.tolist()
        starts = chance.integers(0, max(1, len(whole) - length), count)
        return [(whole[s:] + whole * (length // len(whole) + 1))[:length] for s in starts.tolist()]

    def contexts(self, length: int) -> list[Context]:
        """Store contexts of so many tokens."""
        made = []
        for i, ids in enumerate(self.windows(self.size.contexts, length)):
            steps = self.store.adding(self.model, ids, f"{length}-{i}")
            while (entry := _next(steps)) is None:
                pass
            made.append(Context(entry.id, entry.name, ids, self.model.base.decode(ids)))
        return made

    def serve(self, **limits: int) -> Served:
        """Start a server on the store."""
        return Served(self.folder, self.name, self.base_name, **limits)

    def full_text(self, context: Context, question: str, tokens: int) -> Answer:
        """Answer from the whole text with plain transformers."""
        ids = torch.tensor([chat_prompt(self.model.base.tokenizer, full_text(context.text, question))])
        clock = Clock()
        begin = time.perf_counter()
        made = self.model.base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.model.base.eos_ids[0],
            streamer=clock,
        )
        whole = time.perf_counter() - begin
        return Answer(
            self.model.base.decode(made[0, ids.shape[1] :].tolist()), made.shape[1] - ids.shape[1], clock.first - begin, whole, {}
        )


class Clock(BaseStreamer):
    """Notes when the first token came; `put` gets the prompt before it."""

    def __init__(self) -> None:
        self.puts, self.first = 0, 0.0

    def put(self, value: Any) -> None:
        """Count."""
        self.puts += 1
        if self.puts == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        """Nothing is left to do."""


def drop_from_memory(store: SlotStore, name: str) -> None:
    """Ask the system to forget what it keeps of a context's files, so that the next read goes to the disk."""
    assert isinstance(store.blobs, FolderBlobs)
    for key in store.catalogue.parts(store.entry(name).entry):
        with open(store.blobs.folder / key[:2] / f"{key}.safetensors", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _next(steps: Any) -> Any:
    """Advance `SlotStore.adding`; return the entry once it is done."""
    try:
        next(steps)
    except StopIteration as end:
        return end.value.entry
