"""Muon for LoRA's matrices, AdamW for everything else: one optimizer. Knows tensors alone: no model, no schedule.

Muon (Jordan et al., 2024) replaces a matrix's averaged gradient by the nearest matrix whose singular values are all about 1, so that
every direction of the matrix learns alike fast; docs/log.md measures what that is worth here. torch has one of its own
(`torch.optim.Muon`), which computes in bfloat16 and one matrix at a time: slow on CPUs without bfloat16 products, where this one works
on all matrices of a shape together, in their own precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
"""Decay of the averaged gradient (Nesterov's form)."""
_STEPS = 5
_COEFFICIENTS = (3.4445, -4.775, 2.0315)
"""Of the quintic Newton-Schulz iteration: singular values of 0.01 to 1 end up between 0.7 and 1.2."""
_RMS = 0.2
"""Root mean square of an update at a learning rate of 1: AdamW's own, so that both take the same rates (arXiv 2502.16982, section 2.2)."""


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `muon=True`, which hold matrices alone, are updated by Muon, with decoupled weight decay too."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all groups; arguments and result as for `torch.optim.AdamW.step`."""
        groups = self.param_groups
        for group in groups:
            if group.get("muon"):
                self._update(group)
        try:
            self.param_groups = [group for group in groups if not group.get("muon")]
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _update(self, group: dict[str, Any]) -> None:
        """Update one group of matrices, all those of a shape together."""
        alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[p.shape].append(p)
        for shape, matrices in alike.items():
            updates = orthogonal(torch.stack([self._averaged(p) for p in matrices]))
            for p, update in zip(matrices, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * _RMS * max(shape) ** 0.5)

    def _averaged(self, p: Tensor) -> Tensor:
        """Average a matrix's gradient into its state, and return it one step ahead."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for one when it loads a state
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM), MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return (N, a, b) matrices with the same singular vectors and singular values near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
