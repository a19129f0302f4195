"""Compare float32 matrix products at the sizes of SmolLM2-135M; prints medians in GFLOP/s and, beside each, the ratio to torch's plain one.

numpy's (its OpenBLAS) is what training may borrow (matmul.py), oneDNN's with the weight laid out once what reading does (packed.py).
Each side has a few runs in a row, the first of which are not counted: another's threads still spin then. Weights take turns, so that
they come from memory and not from the processor's cache, as in a model.
"""

import statistics
import time

import torch

from icae.matmul import product
from icae.packed import packed_product

SIZES = [(rows, *shape) for rows in (1, 4, 16, 32, 160, 640) for shape in ((576, 576), (576, 1536), (1536, 576), (576, 49152))]
TURNS = 40
"""Megabytes of weights that take turns, about."""


def main() -> None:
    sides = ("torch", "numpy", "oneDNN")
    print(f"{torch.get_num_threads()} threads\n{'rows x in x out':>19} {'torch':>7} {'numpy':>14} {'oneDNN':>14}")
    with torch.no_grad():
        for rows, inner, outer in SIZES:
            count = max(1, TURNS * 250_000 // (inner * outer))
            x, weights = torch.randn(rows, inner), [torch.randn(outer, inner) for _ in range(count)]
            packed = [packed_product(w) for w in weights]
            run = {
                "torch": lambda x=x, ws=weights: [x @ w.t() for w in ws],
                "numpy": lambda x=x, ws=weights: [product(x, w.t()) for w in ws],
                "oneDNN": lambda x=x, ps=packed: [p(x) for p in ps],
            }
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(3):
                for name in sides:
                    for i in range(5):
                        begin = time.perf_counter()
                        run[name]()
                        seconds[name] += [time.perf_counter() - begin] if i >= 2 else []
            speed = {name: 2e-9 * count * rows * inner * outer / statistics.median(s) for name, s in seconds.items()}
            beside = " ".join(f"{speed[name]:7.1f} {speed[name] / speed['torch']:5.2f}x" for name in sides[1:])
            print(f"{rows:>6} x {inner:4} x {outer:5} {speed['torch']:7.1f} {beside}", flush=True)


if __name__ == "__main__":
    main()
