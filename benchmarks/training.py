"""Context tokens a second in training, side by side: the plain path, ours, ours in two processes of one thread each, and in bfloat16.

    python benchmarks/training.py [--length 128] [--batch 4] [--rounds 5] [--out results/training-speed.json]

plain      two full passes with everything differentiated: the base's own weights too, torch's matrix product, all threads
saved      only what training needs: frozen weights, the faster matrix product (matmul.py), all threads
processes  the same, in one process a core with one thread each, which average their gradients after each step, as torchrun does
bfloat16   such processes with few large products in bfloat16 and compiled loops (lean.py), for CPUs that have units for these

The sides take turns, each for one step a round, on the same samples; medians are printed, with the operations of a step by the cost model
(cost.py), the rate that they imply, and the loss, which is the same on every side but for rounding (of bfloat16: to two or three digits).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

SIDES = ("plain", "saved", "processes", "bfloat16")
SHARED = ("processes", "bfloat16")


def work(side: str, rank: int, threads: int, options: argparse.Namespace, meeting: str, pipe: Any) -> None:
    """Run a step, or two processes' steps together, whenever asked; answer with (seconds, loss)."""
    import numpy as np
    import torch

    from icae.base import load_base
    from icae.data import load_corpus
    from icae.matmul import fast_linear
    from icae.model import ICAE
    from icae.objectives import autoencoding, collate

    torch.set_num_threads(threads)
    if side in SHARED:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    dtype = torch.bfloat16 if side == "bfloat16" else torch.float32
    model = ICAE.from_pretrained(base=load_base(dtype=dtype)).train()
    if side == "bfloat16":
        model.encoder.train_lean(compiled=True)
    corpus = load_corpus(options.text, model.base)
    for p in model.base.model.parameters():
        p.requires_grad_(side == "plain")
    trained = list(model.adapter_tensors().values())

    def step(number: int) -> tuple[float, float]:
        chance = np.random.default_rng(number * options.processes + rank)
        windows = [corpus.window(chance, options.length) for _ in range(options.batch)]
        batch = collate([autoencoding(w, model.config.segment_length, None) for w in windows])
        begin = time.perf_counter()
        loss = model(**batch)["loss"]
        loss.backward()
        if side in SHARED:
            grads = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
            torch.distributed.all_reduce(grads)
        seconds = time.perf_counter() - begin
        model.zero_grad()
        for p in model.base.model.parameters():
            p.grad = None
        return seconds, float(loss.detach())

    def answer() -> None:
        for warming in range(2):  # the second one's gradients are compiled for every shape
            step(10**6 + warming)
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            pipe.send(step(number))

    if side == "plain":
        answer()
    else:
        with fast_linear():
            answer()


def hear(pipes: list) -> list[Any]:
    """Return what each process answers; where one is gone, for which others may wait, the run ends."""
    answers: dict[Any, Any] = {}
    while len(answers) < len(pipes):
        for pipe in wait([p for p in pipes if p not in answers]):
            try:
                answers[pipe] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                sys.exit("a process ended before it answered; what it said stands above")
    return [answers[pipe] for pipe in pipes]


def main() -> None:
    from icae.checkpoint import find_checkpoint, read_config

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--text", default="src/icae/samples", help="Folder of .txt or a file to take windows from.")
    parser.add_argument("--length", type=int, default=128, help="Context tokens of a sample, one segment.")
    parser.add_argument("--batch", type=int, default=4, help="Samples a step and process.")
    parser.add_argument("--rounds", type=int, default=5, help="Steps of each side.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Processes of the third side.")
    parser.add_argument("--out", help="JSON file for the results.")
    options = parser.parse_args()
    if options.length > (segment := read_config(find_checkpoint(None)).segment_length):
        parser.error(f"--length is of one segment, {segment} tokens at most")
    os.environ["OMP_WAIT_POLICY"] = "passive"
    context = multiprocessing.get_context("spawn")
    workers: dict[str, list] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            count, threads = (options.processes, 1) if side in SHARED else (1, os.cpu_count() or 1)
            os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
            workers[side] = []
            for rank in range(count):
                here, there = context.Pipe()
                context.Process(target=work, args=(side, rank, threads, options, f"{folder}/{side}", there), daemon=True).start()
                there.close()  # the process's alone, so that its end is heard
                workers[side].append(here)
            hear(workers[side])
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        losses: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES:
                for pipe in workers[side]:
                    pipe.send(number)
                answers = hear(workers[side])
                taken[side].append(max(seconds for seconds, _ in answers))
                losses[side].append(answers[0][1])
        for pipe in [p for pipes in workers.values() for p in pipes]:
            pipe.send(None)
    results = _results(options, taken, losses)
    print(f"{'side':>10} {'context tokens/s':>17} {'over plain':>10} {'GFLOP/token':>12} {'GFLOP/s':>8} {'loss':>7}")
    for side, row in results["sides"].items():
        print(
            f"{side:>10} {row['tokens_per_second']:17.1f} {row['over_plain']:10.2f} {row['flop_per_token'] / 1e9:12.2f} "
            f"{row['flops'] / 1e9:8.1f} {row['loss']:7.4f}"
        )
    for part, share in results["parts"].items():
        print(f"{part:>17}: {share / 1e9:.3f} GFLOP a context token")
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=2) + "\n")


def _results(options: argparse.Namespace, taken: dict[str, list[float]], losses: dict[str, list[float]]) -> dict[str, Any]:
    """Put figures, the cost model's operations and their origin into one table."""
    from icae.base import load_base
    from icae.checkpoint import find_checkpoint, read_config
    from icae.cost import Shape, step
    from icae.report import commit, machine

    config = read_config(find_checkpoint(None))
    shape = Shape.of(load_base(config.base).model.config, config)
    costs = {side: step(shape, options.length, config.ratio, options.length, plain=side == "plain") for side in SIDES}
    rows = {}
    for side in SIDES:
        tokens = options.length * options.batch * (options.processes if side in SHARED else 1)
        rate = tokens / statistics.median(taken[side])
        flop = sum(costs[side].values()) / options.length
        rows[side] = {
            "tokens_per_second": rate,
            "seconds": taken[side],
            "flop_per_token": flop,
            "flops": flop * rate,
            "loss": statistics.fmean(losses[side]),
        }
    for row in rows.values():
        row["over_plain"] = row["tokens_per_second"] / rows["plain"]["tokens_per_second"]
    return {
        "name": "training-speed",
        "settings": {name: getattr(options, name) for name in ("length", "batch", "rounds", "processes")},
        "sides": rows,
        "parts": {part: flop / options.length for part, flop in costs["saved"].items()},
        "commit": commit(),
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
