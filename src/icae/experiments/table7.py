"""Table 7: seconds and memory to generate after a context, given as text or as slots; slots made anew, or kept.

Both sides generate greedily by the same `Decoder.generate`, never stopping early. They alternate (text, slots, text, slots, ...) so that a
machine that slows down slows both, after one short turn each that is not counted; medians are quoted, and the ratio of medians. Slots are
as the encoder writes them: what polishing adds is its steps, each about twice what the encoder takes.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from icae.base import cache_of
from icae.errors import ICAEError
from icae.experiments.context import Context, hashes
from icae.experiments.table import Cell, Column, Table
from icae.model import ICAE
from icae.objectives import Marker
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots

NEEDS = ("main", "text")
QUICK = {"batches": (1, 8), "contexts": (512,), "generated": 16, "repeats": 2}
COLUMNS = [
    Column("batch", "batch"),
    Column("length", "context, tokens"),
    Column("slots", "slots"),
    Column("text", "text, s", 2),
    Column("compress", "compress, s", 2),
    Column("decode", "decode from slots, s", 2),
    Column("total", "slots in all, s", 2),
    Column("speedup", "text over slots in all", 2),
    Column("speedup_kept", "text over kept slots", 2),
    Column("memory_text", "peak memory from text, MB", 0),
    Column("memory_slots", "from slots, MB", 0),
    Column("kv_text", "KV cache of text, MB", 1),
    Column("kv_slots", "of slots, MB", 1),
]


def run(
    context: Context,
    *,
    batches: Sequence[int] = (1, 8, 32),
    contexts: Sequence[int] = (512, 2048, 8192),
    generated: int = 64,
    repeats: int = 2,
    most_tokens: int = 16384,
) -> Table:
    """Time every batch and context whose product is at most `most_tokens`."""
    notes = context.text_note()
    positions = context.base.max_positions
    room = positions - generated - context.main.config.marker_length
    if room < 2:
        raise ICAEError(f"the base's {positions} positions leave no room for a context beside {generated} generated tokens")
    if long := [str(n) for n in contexts if n > room]:
        notes.append(f"{', '.join(long)} tokens of context are {room} here: the base has {positions} positions in all.")
    windows: list[list[int]] = []
    rows: list[dict[str, Cell]] = []
    for length in dict.fromkeys(min(n, room) for n in contexts):
        for batch in batches:
            if batch * length > most_tokens:
                notes.append(f"{batch} x {length} left out: more than {most_tokens} tokens of context would take too long here.")
                continue
            ids = _texts(context, length, batch)
            windows += ids
            context.say(f"  timing {batch} x {length} tokens")
            if not rows:
                _measure(context, context.main, [row[:32] for row in ids], 2, 1)
            rows.append(_measure(context, context.main, ids, generated, repeats))
    if not rows:
        rows.append({"batch": None})
    notes.append(f"{generated} tokens generated; medians of {repeats} turns, sides alternating. KV caches are those of the contexts alone.")
    notes.append(
        "Peak memory: the device allocator's, above what was held before the turn."
        if context.base.device.type == "cuda"
        else "Peak memory: the process's resident memory, sampled every 5 ms, above what was held before the turn."
    )
    return Table("table7", COLUMNS, rows, notes, hashes(windows))


def _texts(context: Context, length: int, batch: int) -> list[list[int]]:
    """Return texts of a length, from the corpus where a document is that long, else from its documents end to end, again and again."""
    if length <= context.longest:
        return context.windows(length, batch)
    ids = context.corpus.ids
    return [[int(ids[(i * 17 + j) % len(ids)]) for j in range(length)] for i in range(batch)]


def _measure(context: Context, model: ICAE, ids: list[list[int]], generated: int, repeats: int) -> dict[str, Cell]:
    kept: list[MemorySlots] = []

    def compress() -> None:
        kept[:] = model.compress_ids(ids, polish=0)

    seconds: dict[str, list[float]] = {"text": [], "compress": [], "decode": []}
    peaks: dict[str, list[float]] = {"text": [], "slots": []}
    for _ in range(repeats):
        with _peak(context) as peak:
            seconds["text"].append(_timed(context, lambda: generate_from_text(model, ids, generated)))
        peaks["text"].append(peak[0])
        with _peak(context) as peak:
            seconds["compress"].append(_timed(context, compress))
            seconds["decode"].append(_timed(context, lambda: generate_from_slots(model, kept, generated)))
        peaks["slots"].append(peak[0])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    total = statistics.median(c + d for c, d in zip(seconds["compress"], seconds["decode"], strict=True))
    batch, length, one = len(ids), len(ids[0]), _cache_bytes(context, model, kept)
    return {
        "batch": batch,
        "length": length,
        "slots": kept[0].count,
        **middle,
        "total": total,
        "speedup": middle["text"] / total,
        "speedup_kept": middle["text"] / middle["decode"],
        "memory_text": statistics.median(peaks["text"]) / 1e6,
        "memory_slots": statistics.median(peaks["slots"]) / 1e6,
        "kv_text": batch * length * one["token"] / 1e6,
        "kv_slots": one["slots"] / 1e6,
    }


@torch.no_grad()
def generate_from_text(model: ICAE, ids: list[list[int]], count: int) -> list[list[int | None]]:
    """Generate `count` tokens after texts of equal length, as the base alone does; one list a step."""
    text = torch.tensor(ids, device=model.base.device)
    places = torch.arange(text.shape[1], device=text.device).expand(len(ids), -1)
    real = torch.ones_like(text, dtype=torch.bool)
    return list(model.decoder.generate(None, model.base.embed(text), places, real, [count] * len(ids), stop=[]))


@torch.no_grad()
def generate_from_slots(model: ICAE, slots: Sequence[MemorySlots], count: int) -> list[list[int | None]]:
    """Generate `count` tokens that continue the slots' texts; one list a step."""
    batch = SlotBatch.pad([s.to(model.base.device) for s in slots])
    marker = model.markers[int(Marker.LM)].to(model.base.dtype).expand(len(slots), -1, -1)
    places = (torch.tensor(batch.spans)[:, None] + torch.arange(marker.shape[1])).to(model.base.device)
    return list(model.decoder.generate(batch, marker, places, torch.ones_like(places, dtype=torch.bool), [count] * len(slots), stop=[]))


def _timed(context: Context, step: Callable[[], object]) -> float:
    cuda = context.base.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextmanager
def _peak(context: Context) -> Iterator[list[float]]:
    """Yield a list whose one entry is, at the end, the peak memory above the start, in bytes."""
    found = [0.0]
    gc.collect()
    _give_back()
    if context.base.device.type == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[0] = torch.cuda.max_memory_allocated() - start
        return
    import psutil

    process, ended = psutil.Process(), threading.Event()
    start = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.005):
            found[0] = max(found[0], process.memory_info().rss - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def _give_back() -> None:
    """Have the C library give memory that is free already back to the system (glibc), so that a turn does not live on the last one's."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # other systems have no such library, or none without a name
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def _cache_bytes(context: Context, model: ICAE, slots: Sequence[MemorySlots]) -> dict[str, float]:
    """Return the bytes that the base's key-value cache takes for one token of text, and for all the slots."""

    def size(cache: object) -> int:
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))  # type: ignore[attr-defined]

    two = torch.zeros(1, 2, dtype=torch.long, device=model.base.device)
    token = size(cache_of(model.base.model(input_ids=two, use_cache=True))) / 2
    batch = SlotBatch.pad([s.to(model.base.device) for s in slots])
    return {"token": token, "slots": size(model.decoder.prefix(batch))}
