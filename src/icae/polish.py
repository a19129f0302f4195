"""Slots are polished: a gradient step or two on the slots themselves, after which the frozen decoder reads their text back better.

    slots of a segment, its text -> loss of reading it back -> gradient at the slots -> slots with less of that loss

The encoder writes slots in one pass, by one function for all texts; a step on the slots is for this text alone (semi-amortized
inference, arXiv 1802.02550; vectors optimised for one text: arXiv 2502.13063). Adam (arXiv 1412.6980) takes it, in units of each layer's
own size: at the first step a number moves by up to its share of that (`POLISH_RATES`), in the direction that lowers the loss. Values,
which say what stands in a text, move further than keys, which say where it is found: then answers and what follows get likelier, too. Only
the slots change: no weight, no length, and nothing that reads them.

It costs a pass of the decoder over the text, forward and back, a step: about twice what the encoder costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from icae.config import POLISH_RATES
from icae.loss import batch_loss
from icae.matmul import fast_linear
from icae.objectives import Example, Marker, collate
from icae.reader import Reader
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots

BLOCK = 4
"""Tokens of a slot for which a further step is taken, by default."""
MOST_STEPS = 9
"""Steps by default, at most: as many as slots of 32 tokens get; beyond that they take long, and find less."""
BETAS = (0.8, 0.9)
"""How much of the mean gradient and of the mean squared one is kept from step to step."""
DAMPING = 0.3
"""In root mean squares of the layer's gradient: what is small beside it moves little, so that rounding decides nothing."""
TOKENS_AT_ONCE = 256
"""Text whose activations are held for the gradient."""


def default_steps(ratio: int) -> int:
    """Return the steps for slots that stand for `ratio` tokens each."""
    return min(1 + -(-ratio // BLOCK), MOST_STEPS)


def polishing(
    reader: Reader,
    slots: Sequence[MemorySlots],
    texts: Sequence[Sequence[int]],
    steps: int,
) -> Generator[None, None, list[MemorySlots]]:
    """Polish the slots of single segments; yields before each gradient step, so that other work may go between.

    Parameters
    ----------
    reader : Reader
        What reads the slots: frozen.
    slots : sequence of MemorySlots
        Of one segment each.
    texts : sequence of sequences of int
        The ids of each segment.
    steps : int
        Gradient steps; 0: the slots stay as they are.

    Returns
    -------
    list of MemorySlots
        As the generator's value: in order, with the same shapes and dtypes, their origin saying so.
    """
    made: list[MemorySlots] = []
    while steps and len(made) < len(slots):
        begin, end = len(made), len(made) + 1
        while end < len(slots) and (end + 1 - begin) * max(map(len, texts[begin : end + 1])) <= TOKENS_AT_ONCE:
            end += 1
        made += yield from _polished(reader, slots[begin:end], texts[begin:end], steps)
    return made if steps else list(slots)


@torch.inference_mode(False)
def _polished(
    reader: Reader, slots: Sequence[MemorySlots], texts: Sequence[Sequence[int]], steps: int
) -> Generator[None, None, list[MemorySlots]]:
    """Polish segments together."""
    data: Any = collate([Example([], Marker.AE, [], list(ids)) for ids in texts])
    data = [data[name] for name in ("markers", "text_ids", "real", "scored", "weights")]
    rows = [{name: t.float().clone() for name, t in s.tensors.items()} for s in slots]
    keys = [(b, name) for b, row in enumerate(rows) for name in row]
    sizes = {(b, name): _size(rows[b][name]) for b, name in keys}
    means = {key: (0.0, 0.0) for key in keys}
    scales = [(s.origin.ratio / BLOCK) ** 0.5 for s in slots]
    for step in range(1, steps + 1):
        yield
        leaves = {(b, name): rows[b][name].detach().requires_grad_() for b, name in keys}
        with torch.enable_grad(), fast_linear(reader.base.dtype):
            now = [dataclasses.replace(s, tensors={name: leaves[b, name] for name in s.tensors}) for b, s in enumerate(slots)]
            loss = batch_loss(reader, SlotBatch.pad(now), *data) * len(slots)
            gradients = dict(zip(keys, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        for key, gradient in gradients.items():
            first, second = ((b * m + (1 - b) * g) for b, m, g in zip(BETAS, means[key], (gradient, gradient**2), strict=True))
            means[key] = (first, second)  # type: ignore[assignment]
            first, second = (m / (1 - b**step) for b, m in zip(BETAS, (first, second), strict=True))
            floor = (DAMPING * _size(gradient)) ** 2
            b, name = key
            rows[b][name] = rows[b][name] - POLISH_RATES[name] * scales[b] * sizes[key] * first / (second + floor).sqrt().clamp(min=1e-30)
    return [
        dataclasses.replace(
            s,
            tensors={name: t.to(s.tensors[name].dtype) for name, t in row.items()},
            origin=dataclasses.replace(s.origin, polish=s.origin.polish + steps),
        )
        for s, row in zip(slots, rows, strict=True)
    ]


def _size(tensor: Tensor) -> Tensor:
    """Return the root mean square of a segment's tensor (k, ...): of each layer, where its second axis is the layers'."""
    return tensor.pow(2).mean([d for d in range(tensor.ndim) if d != 1 or tensor.ndim < 3], keepdim=True).sqrt()
