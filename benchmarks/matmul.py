"""Compare torch's and numpy's float32 matrix product at the sizes of SmolLM2-135M; prints medians in GFLOP/s.

Each side has a few runs in a row, the first of which are not counted: the other's threads still spin then.
"""

import statistics
import time

import torch

from icae.matmul import product

SIZES = [(rows, *shape) for rows in (1, 4, 16, 32, 160, 640) for shape in ((576, 576), (576, 1536), (1536, 576))]


def main() -> None:
    print(f"{torch.get_num_threads()} threads\n{'rows x in x out':>18} {'torch':>7} {'numpy':>7} {'ratio':>6}")
    for rows, inner, outer in SIZES:
        x, w = torch.randn(rows, inner), torch.randn(outer, inner)
        sides = {"torch": lambda x=x, w=w: x @ w.t(), "numpy": lambda x=x, w=w: product(x, w.t())}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(4):
            for name, side in sides.items():
                for i in range(12):
                    begin = time.perf_counter()
                    side()
                    seconds[name] += [time.perf_counter() - begin] if i >= 4 else []
        speed = {name: 2e-9 * rows * inner * outer / statistics.median(s) for name, s in seconds.items()}
        print(f"{rows:>6} x {inner:4} x {outer:4} {speed['torch']:7.1f} {speed['numpy']:7.1f} {speed['numpy'] / speed['torch']:6.2f}")


if __name__ == "__main__":
    main()
