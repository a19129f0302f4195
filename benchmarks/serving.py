"""What slots bring a server: speed, memory and, for int8, its cost in BLEU; every time a ratio of two sides that alternate in one run.

    python benchmarks/serving.py [PART ...] [--quick] [--text FOLDER] [--embedding CHECKPOINT]

Without a PART all run: throughput, latency, memory, load, soak, int8. `results/serving.json` keeps the parts that did not run. The
server is `icae serve` as a process of its own; full text is plain `transformers.generate` in this process, which keeps nothing from
one request to the next (within one it has its usual key-value cache). `hot` is a context asked lately, `cold` one that is read from
the disk, the system's copy of its files dropped first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import QUICK, Bench, Context, Size, drop_from_memory
from served import Answer, Served, ask, chat, stream
from soak import soak
from transformers import DynamicCache

from icae.base import cached
from icae.blobs import pack, unpack
from icae.chat import chat_prompt
from icae.checkpoint import find_checkpoint
from icae.experiments.context import checkpoint_hash
from icae.metrics import bleu, interval
from icae.packed import packed_linear
from icae.reader import GREEDY
from icae.report import commit, machine, write_report
from icae.server.batch import Batch
from icae.server.prefix import Prefixes, prefill
from icae.stepwise import finished

QUESTIONS = [
    "What is this text about?",
    "Summarise the text.",
    "Who is named in the text, and what do they do?",
    "What happens first, and what happens then?",
    "Describe the place in which this happens.",
]
ORDER = ("throughput", "latency", "memory", "load", "soak", "int8")


def measure(what: str, asked: str, value: float, enough: bool, shown: str) -> dict[str, Any]:
    """Return one line of the table; `enough` tells whether what was asked is reached."""
    return {"what": what, "asked": asked, "value": value, "enough": bool(enough), "shown": shown}


def throughput(bench: Bench) -> dict[str, Any]:
    """Clients at once against the same requests one at a time, on one server, contexts hot; the answers must be the same."""
    size, contexts = bench.size, bench.contexts(bench.size.context)
    with bench.serve() as server:
        pairs = _long_answers(server, contexts, size)
        asked = [pairs[i % len(pairs)] for i in range(size.clients * size.asks)]
        bodies = [chat({"context_id": c.id}, q, size.answer) for c, q in asked]
        clients = [server.connect() for _ in range(size.clients)]
        alone, together, different = [], [], 0
        for _ in range(size.rounds):
            begin = time.perf_counter()
            expected = [ask(server.client, body) for body in bodies]
            alone.append(time.perf_counter() - begin)
            got: list[str] = [""] * len(bodies)

            def one(i: int, got: list[str] = got) -> None:
                for at in range(i, len(bodies), size.clients):
                    got[at] = ask(clients[i], bodies[at])

            threads = [threading.Thread(target=one, args=(i,)) for i in range(size.clients)]
            begin = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            together.append(time.perf_counter() - begin)
            different += sum(a != b for a, b in zip(expected, got, strict=True))
    ratio = statistics.median(a / t for a, t in zip(alone, together, strict=True))
    what = f"answers a minute, {size.clients} clients at once against one at a time ({size.context} tokens, {size.answer} generated)"
    rates = [60 * len(bodies) / statistics.median(s) for s in (together, alone)]
    shown = f"{ratio:.1f}x ({rates[0]:.1f} against {rates[1]:.1f}); {different} of {size.rounds * len(bodies)} answers differ"
    return {
        "measures": [measure(what, "3x, same answers", ratio, ratio >= 3 and not different, shown)],
        "alone_s": alone,
        "together_s": together,
        "different": different,
    }


def latency(bench: Bench) -> dict[str, Any]:
    """First token and whole answer: context hot, context cold, full text; and the first token of a prompt that was never asked before."""
    size, contexts, kind = bench.size, bench.contexts(bench.size.context), bench.model.config.kind
    seconds: dict[str, list[Answer]] = {"hot": [], "cold": [], "text": []}
    new: list[float] = []
    with bench.serve() as hot, bench.serve(prefix_bytes=1, slot_bytes=1) as cold:
        pairs = _long_answers(hot, contexts, size)
        for i in range(size.repeats + 1):  # the first is a warm-up
            context, question = pairs[i % len(pairs)]
            body = chat({"context_id": context.id}, question, size.answer)
            drop_from_memory(bench.store, context.name)
            sides = {
                "cold": lambda body=body: stream(cold.client, body),
                "hot": lambda body=body: stream(hot.client, body),
                "text": partial(bench.full_text, context, question, size.answer),
            }
            for name, side in sides.items():
                answer = side()
                assert answer.tokens == size.answer, (name, answer)
                seconds[name] += [answer] if i else []
            other = chat({"context_id": context.id}, f"{question} ({i})", size.answer)
            new += [stream(hot.client, other).first] if i else []
    measures = []
    asked = {"first": (30 if kind == "kv" else 3.5), "whole": (3.5 if kind == "kv" else None)}
    for name, what in (("first", "time to first token"), ("whole", f"whole answer of {size.answer} tokens")):
        medians = {side: statistics.median(getattr(a, name) for a in answers) for side, answers in seconds.items()}
        for side in ("hot", "cold"):
            ratio, least = medians["text"] / medians[side], asked[name]
            shown = f"{ratio:.1f}x ({1e3 * medians[side]:.0f} ms against {1e3 * medians['text']:.0f} ms)"
            what_ = f"{what}, {size.context} tokens as {kind} slots, {side}, against full text"
            measures.append(measure(what_, f"{least:g}x" if least else "-", ratio, not least or ratio >= least, shown))
    ratio = statistics.median(a.first for a in seconds["text"]) / statistics.median(new)
    what_ = f"time to first token, {size.context} tokens as {kind} slots, hot, a prompt never asked before, against full text"
    measures.append(measure(what_, "-", ratio, True, f"{ratio:.1f}x ({1e3 * statistics.median(new):.0f} ms)"))
    times = {side: [[a.first, a.whole] for a in answers] for side, answers in seconds.items()}
    return {"measures": measures, "first_and_whole_s": times, "new_prompt_s": new}


def memory(bench: Bench) -> dict[str, Any]:
    """Keys and values that a context takes while it is asked: as slots, and as text."""
    size, model = bench.size, bench.model
    context = bench.contexts(size.context)[0]
    prefix = Prefixes(model, 1 << 40).put("x", bench.store.load(context.name))
    question = chat_prompt(model.base.tokenizer, QUESTIONS[0])
    row = finished(prefill(model, prefix, None, model.base.embed(torch.tensor(question)), size.answer, GREEDY))
    batch = Batch(model)
    batch.join(row)
    slots = {"context": prefix.bytes, "whole": prefix.bytes + sum(_bytes(layer) for layer in batch.layers)}  # they share the context
    text, cache = {}, DynamicCache()
    with torch.no_grad():
        for name, ids in (("context", context.ids), ("whole", question + [question[-1]] * size.answer)):
            model.base.model(input_ids=torch.tensor([ids]), **cached(model.base.model, cache), logits_to_keep=1)
            text[name] = sum(_bytes(layer) for layer in cache.layers)
    ratio = {name: text[name] / slots[name] for name in slots}

    def shown(name: str) -> str:
        return f"{ratio[name]:.2f}x ({slots[name] / 2**20:.1f} against {text[name] / 2**20:.1f} MiB)"

    what = f"keys and values while generating, {size.context} tokens as slots against text"
    return {
        "measures": [
            measure(f"{what}: the context", "4x", ratio["context"], ratio["context"] >= 4, shown("context")),
            measure(f"{what}: with question and {size.answer} tokens of answer", "-", ratio["whole"], True, shown("whole")),
        ],
        "slots": slots,
        "text": text,
    }


def load(bench: Bench) -> dict[str, Any]:
    """Read a stored context, checksums verified: its files in the system's memory, and on the disk alone."""
    size = bench.size
    name = bench.contexts(size.context)[0].name
    ms: dict[str, list[float]] = {"memory": [], "disk": []}
    for i in range(size.loads + 3):
        for where, drop in (("memory", False), ("disk", True)):
            if drop:
                drop_from_memory(bench.store, name)
            begin = time.perf_counter()
            slots = bench.store.load(name)
            if i >= 3:
                ms[where].append(1e3 * (time.perf_counter() - begin))
    median = {where: statistics.median(values) for where, values in ms.items()}
    what = f"load {size.context} tokens ({slots.count} {slots.origin.kind} slots, {slots.nbytes / 1e6:.1f} MB), checksums included"
    return {
        "measures": [
            measure(
                f"{what}, files in the system's memory", "25 ms", median["memory"], median["memory"] <= 25, f"{median['memory']:.1f} ms"
            ),
            measure(f"{what}, files on the disk alone", "-", median["disk"], True, f"{median['disk']:.1f} ms"),
        ],
        "ms": ms,
    }


def soaking(bench: Bench) -> dict[str, Any]:
    """Many clients, mixed requests: see soak.py."""
    size = bench.size
    texts = {c.id: c.text for c in bench.contexts(size.soak_context)}
    with bench.serve() as server:
        found = soak(server, texts, QUESTIONS[:3], requests=size.requests, clients=size.clients, limit=size.soak_answer)
    bad, grown = found["outcomes"]["wrong"] + found["outcomes"]["lost"] + found["left_over"], found["memory_ratio"] - 1
    what = f"{size.requests} mixed requests of {size.clients} clients, 5% cancelled, 5% malformed"
    outcomes = ", ".join(f"{n} {name}" for name, n in found["outcomes"].items())
    return {
        "measures": [
            measure(f"{what}: lost or mixed up", "none", bad, not bad, outcomes),
            measure(f"{what}: the server's memory after them", "within 10%", grown, abs(grown) <= 0.1, f"{100 * grown:+.1f}%"),
        ],
        **found,
    }


def int8(bench: Bench) -> dict[str, Any]:
    """Read texts back from slots stored as float16 and as int8."""
    size, model = bench.size, bench.model
    windows = bench.windows(size.windows, size.window)
    score: dict[str, list[float]] = {"float16": [], "int8": []}
    held = dict.fromkeys(score, 0)
    with packed_linear():
        for at in range(0, len(windows), 16):
            part = windows[at : at + 16]
            made = model.compress_ids(part)
            for dtype, scores in score.items():
                packed = [pack(slots, ids, dtype) for slots, ids in zip(made, part, strict=True)]
                held[dtype] += sum(p.nbytes for p in packed)
                back = model.reconstruct_ids([unpack(p)[0].to(torch.float32) for p in packed])
                scores += [bleu(model.base.decode(b), model.base.decode(w)) for b, w in zip(back, part, strict=True)]
    cost = [a - b for a, b in zip(score["float16"], score["int8"], strict=True)]
    low, high = interval(cost)
    means = {dtype: statistics.mean(values) for dtype, values in score.items()}
    shown = f"{statistics.mean(cost):+.2f} ({low:.2f} to {high:.2f}); {means['float16']:.2f} against {means['int8']:.2f}"
    what = (
        f"BLEU lost by int8 against float16, {size.windows} windows of {size.window} tokens, {held['float16'] / held['int8']:.2f}x smaller"
    )
    return {"measures": [measure(what, "-", statistics.mean(cost), True, shown)], "bleu": score, "bytes": held}


def _long_answers(server: Served, contexts: list[Context], size: Size) -> list[tuple[Context, str]]:
    """Return the (context, question) pairs whose answers go on to the limit, contexts in turn; asking them makes the contexts hot."""
    pairs = [(c, q) for q in QUESTIONS for c in contexts]
    answers = [stream(server.client, chat({"context_id": c.id}, q, size.answer)) for c, q in pairs]
    long = [pair for pair, answer in zip(pairs, answers, strict=True) if answer.tokens == size.answer]
    if not long:
        raise SystemExit(f"no answer of this checkpoint has {size.answer} tokens: there is nothing to compare")
    return long


def _bytes(layer: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = dict(zip(ORDER, (throughput, latency, memory, load, soaking, int8), strict=True))


def _kept(out: Path) -> dict[str, Any]:
    """Return the parts of a report, each with what its header says: that of the next one is its last part's."""
    report = json.loads(out.read_text(encoding="utf-8"))
    return {name: {key: report[key] for key in ("checkpoint", "machine")} | part for name, part in report["results"].items()}


def main() -> int:
    """Run the parts, print the table and write the report; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(ORDER)}; none: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; writes no report unless --out is given")
    parser.add_argument("--model", help="checkpoint of kv slots; none: the one that ships")
    parser.add_argument("--embedding", help="checkpoint of embedding slots, for latency alone")
    parser.add_argument("--base", help="base of both, where it is not the checkpoint's own")
    parser.add_argument("--text", help="folder of held-out .txt; none: the bundled sample, repeated")
    parser.add_argument("--out", type=Path, help="report [default: results/serving.json]")
    for name, number in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"[default: {number}; --quick: {getattr(QUICK, name)}]")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(ORDER):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}")
    usual = asdict(QUICK if given.quick else Size())
    size = Size(**{name: usual[name] if getattr(given, name) is None else getattr(given, name) for name in usual})
    out = given.out or (None if given.quick else Path("results/serving.json"))
    wanted = [name for name in ORDER if name in (given.parts or ORDER)]
    jobs = [(name, given.model) for name in wanted] + [("latency", given.embedding)] * bool(given.embedding and "latency" in wanted)
    results = _kept(out) if out is not None and out.exists() else {}
    good = True
    for part, checkpoint in jobs:
        print(f"{part} ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(checkpoint, given.base, given.text, size, Path(folder))
            found = PARTS[part](bench)
        name = part if checkpoint == given.model else f"{part}, {bench.model.config.kind}"
        text = Path(given.text).name if given.text else "the bundled sample"
        about = "smollm2-135m-kv-4x" if checkpoint is None else Path(checkpoint).name
        results[name] = {
            **found,
            "size": asdict(size),
            "text": text,
            "commit": commit(),
            "checkpoint": about,
            "adapter": checkpoint_hash(find_checkpoint(checkpoint)),
            "machine": machine(),
        }
        for m in found["measures"]:
            print(f"{'' if m['enough'] else 'MISSED  '}{m['what']}: {m['shown']}  [asked: {m['asked']}]", flush=True)
            good = good and m["enough"]
        if out is not None:
            write_report(out, "serving", about, bench.model, {}, results)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
