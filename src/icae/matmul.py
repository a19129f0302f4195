"""Faster float32 matrix products on CPUs where the BLAS inside torch is slow.

torch's wheels carry MKL, which on AMD processors reaches about half of what the OpenBLAS inside numpy's wheels does at the sizes met
here (benchmarks/matmul.py measures both). `fast_linear` lends numpy's product to every `nn.Linear` while it is open, forward and
backward; elsewhere (accelerators, other dtypes) torch's own is used. It knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def fast_linear() -> Iterator[bool]:
    """Use the faster of torch's and numpy's matrix product in linear layers; yields whether that is numpy's."""
    if not numpy_is_faster():
        yield False
        return
    original = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not plain:
            return original(x, weight, bias)
        y = _Linear.apply(x, weight)
        return y if bias is None else y + bias

    torch.nn.functional.linear = linear  # type: ignore[assignment]
    try:
        yield True
    finally:
        torch.nn.functional.linear = original


@cache
def numpy_is_faster() -> bool:
    """Time both once on this machine, alternating (about 50 ms); a tie goes to torch."""
    x, w = torch.randn(160, 576), torch.randn(1536, 576)
    seconds: dict[str, list[float]] = {"torch": [], "numpy": []}
    sides: dict[str, Callable[[], Any]] = {"torch": lambda: x @ w.t(), "numpy": lambda: product(x, w.t())}
    for _ in range(12):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    return float(np.median(seconds["numpy"])) < 0.9 * float(np.median(seconds["torch"]))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for two float32 CPU matrices, by numpy."""
    out = torch.empty(a.shape[0], b.shape[1])
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


class _Linear(torch.autograd.Function):
    """x (..., in) times weight (out, in), transposed; no product is made for what needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return product(rows, weight.detach().t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = grad.detach().reshape(-1, grad.shape[-1])
        to_x = product(grad, weight.detach()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_weight = product(grad.t(), rows) if ctx.needs_input_grad[1] else None
        return to_x, to_weight
