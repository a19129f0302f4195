"""Faster float32 matrix products on CPUs where the BLAS inside torch is slow.

torch's wheels carry MKL, which on AMD processors reaches about half of what the OpenBLAS inside numpy's wheels does at the sizes met
here, on others none less (benchmarks/matmul.py measures both). `fast_linear` lends numpy's product to every `nn.Linear` while it is
open, forward and backward; elsewhere (accelerators, other dtypes) torch's own is used. It knows nothing of models.

Both libraries have threads of their own, which spin for some milliseconds after each piece of work: where both have several, each
waits for the other's, and all becomes several times slower. So torch has one thread while numpy has the products.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_turn = threading.RLock()
_lent: list[Callable[..., Tensor]] = []
"""What is lent at this moment, by all threads; the last one is asked first."""
_threads: list[int] = []
"""torch's own, once for each thread in `fast_linear`."""


@contextmanager
def fast_linear(dtype: torch.dtype = torch.float32) -> Iterator[bool]:
    """Use the faster of torch's and numpy's matrix product in linear layers of a dtype; yields whether that is numpy's."""
    if dtype != torch.float32 or not numpy_is_faster():  # else torch would keep one thread for nothing
        yield False
        return

    def linear(original: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not plain_float32(x, weight):
            return original(x, weight, bias)
        y = _Linear.apply(x, weight) if torch.is_grad_enabled() else _forward(x, weight)
        return y if bias is None else y + bias

    with _turn:
        _threads.append(_threads[0] if _threads else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        with lend_linear(linear):
            yield True
    finally:
        with _turn:
            own = _threads.pop()
            if not _threads:
                torch.set_num_threads(own)


def plain_float32(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a product is wanted in float32 and on the CPU, which is all that is lent."""
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@contextmanager
def lend_linear(linear: Callable[..., Tensor]) -> Iterator[None]:
    """Have `linear(original, x, weight, bias)` do what `torch.nn.functional.linear`, its first argument, did until now.

    In all threads; these may come and go in any order.
    """
    with _turn:
        if not _lent:
            _own.append(torch.nn.functional.linear)
        _lent.append(linear)
        _hang()
    try:
        yield
    finally:
        with _turn:
            _lent.remove(linear)
            _hang()
            if not _lent:
                _own.pop()


_own: list[Callable[..., Tensor]] = []
"""torch's own function, while anything is lent."""


def _hang() -> None:
    """Put what is lent before torch's own function."""
    function = _own[0]
    for linear in _lent:

        def lent(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            linear: Callable[..., Tensor] = linear,
            below: Callable[..., Tensor] = function,
        ) -> Tensor:
            return linear(below, input, weight, bias)

        function = lent
    torch.nn.functional.linear = function  # type: ignore[assignment]


@cache
def numpy_is_faster() -> bool:
    """Time both once on this machine, each with what torch does between two products (about 100 ms); a tie goes to torch."""
    x, w, threads = torch.randn(160, 576), torch.randn(1536, 576), torch.get_num_threads()
    sides: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "torch": (threads, lambda: x @ w.t()),
        "numpy": (1, lambda: product(x, w.t())),
    }
    seconds: dict[str, float] = {}
    try:
        for name, (own, side) in sides.items():
            torch.set_num_threads(own)
            times = []
            for _ in range(13):
                begin = time.perf_counter()
                torch.nn.functional.silu(side())
                times.append(time.perf_counter() - begin)
            seconds[name] = float(np.median(times[3:]))  # the first ones still meet the other side's threads
    finally:
        torch.set_num_threads(threads)
    return seconds["numpy"] < 0.9 * seconds["torch"]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for two float32 CPU matrices, by numpy."""
    out = torch.empty(a.shape[0], b.shape[1])
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., in) times weight (out, in), transposed."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return product(rows, weight.detach().t()).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """`_forward` with gradients; no product is made for what needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x.detach().reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return _forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        grad = grad.detach().reshape(-1, grad.shape[-1])
        to_x = product(grad, weight.detach()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        to_weight = product(grad.t(), rows) if ctx.needs_input_grad[1] else None
        return to_x, to_weight
