"""Faster linear layers for reading on CPUs: the weights laid out once as oneDNN wants them, the copy kept for the next product.

torch hands a product with a plain weight to MKL, which lays it out anew each time; at the few dozen rows that a step of generation
has, that costs as much again as the product (benchmarks/matmul.py measures both). oneDNN, which torch carries as well, takes a weight
that was laid out before: what torch's own compiler does with weights that are frozen. A copy takes as much memory as its weight, so
only a weight that was used `PATIENCE` times gets one: a command that asks one question and ends pays nothing. It knows nothing of models.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from icae.matmul import lend_linear, plain_float32

PATIENCE = 32
"""Products that a weight has taken part in before it is worth a copy."""
SMALLEST = 64 * 1024
"""Elements of the smallest weight that is."""
ROWS = 16
"""Rows that a layout is chosen for; others are multiplied with it as well."""


@contextmanager
def packed_linear() -> Iterator[bool]:
    """Multiply with copies of the weights in every linear layer that no gradient is wanted of; yields whether that is any faster here."""
    if not packing_is_faster():
        yield False
        return
    weights = Packed()
    with lend_linear(weights.linear):
        yield True


class Packed:
    """Weights laid out for oneDNN, each kept as long as the weight itself lives and is not written to."""

    def __init__(self) -> None:
        self.used: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.copies: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def linear(self, original: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x (..., in) times weight (out, in), transposed, plus bias (out); `original` does what is not for here."""
        copy = self.copy(weight) if not torch.is_grad_enabled() and plain_float32(x, weight) and x.numel() else None
        return original(x, weight, bias) if copy is None else _product(x, copy, bias)

    def copy(self, weight: Tensor) -> Tensor | None:
        """Return a weight's copy; none if it has not been used often enough, or is small."""
        if weight.numel() < SMALLEST:
            return None
        version, copy = self.copies.get(weight, (None, None))
        if version == weight._version:
            return copy
        self.copies.pop(weight, None)
        before, count = self.used.get(weight, (weight._version, 0))
        count = count + 1 if before == weight._version else 1
        self.used[weight] = (weight._version, count)
        if count <= PATIENCE:
            return None
        copy = _pack(weight)
        self.copies[weight] = (weight._version, copy)
        return copy


@cache
def packing_is_faster() -> bool:
    """Time a step's largest product on this machine, both ways (a few ms); false where torch has no oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, w = torch.randn(ROWS, 576), torch.randn(6144, 576)
    try:
        multiply = packed_product(w)
        sides: dict[str, Callable[[], Tensor]] = {"plain": lambda: x @ w.t(), "packed": lambda: multiply(x)}
        if not torch.allclose(sides["plain"](), sides["packed"](), atol=1e-2):
            return False
    except (AttributeError, NotImplementedError, RuntimeError):  # the two operators are torch's compiler's, and no promise
        return False
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(7):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - begin)
    plain, packed = (statistics.median(seconds[name][2:]) for name in ("plain", "packed"))
    return packed < 0.95 * plain


def packed_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what multiplies x (..., in) with a copy of a weight (out, in), transposed."""
    copy = _pack(weight)
    return lambda x: _product(x, copy, None)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
