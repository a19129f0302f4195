"""Attention of several rows to contexts that they share: each context's keys and values stand once, and a layer reads them once for all.

    a row's query  ->  attention to its context (with all queries about that context)     ->  output, log-sum-exp
                   ->  attention to its own columns (prompt, and answer so far)           ->  output, log-sum-exp
                   ->  both outputs, each weighted by its share of the softmax

This is exact: the two parts of a softmax make the whole once they are weighted (Hydragen, arXiv 2402.05099). It is what generation
after slots spends its attention on, as a context is long, an answer short, and many ask about the same. On CPUs only, whose attention
tells its log-sum-exp; elsewhere, and for bases that don't read all columns alike, a row keeps its context among its own columns.

Shape legend: R rows, P contexts side by side, g rows of the context that most rows read, K slots of the longest, H key-value heads,
G query heads of each, n tokens that a row reads, S head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Layers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values, layer by layer."""

NAME = "icae_shared"


@dataclass(frozen=True)
class Shared:
    """The contexts that the rows of one pass read."""

    layers: Layers
    """(P, H, K, S) each."""
    rows: Tensor
    """(P, g) int64: the rows that read each context, filled up with any."""
    places: Tensor
    """(R,) int64: where each row stands in `rows`, counted through; anywhere if it reads no context."""
    beyond: Tensor | None = None
    """(P, 1, 1, K) float: 0, or minus infinity where a context has no slot; none: all have K."""
    without: Tensor | None = None
    """(R, 1, 1) bool: rows that read no context; none: all read one."""


_now: ContextVar[Shared | None] = ContextVar("contexts that are shared", default=None)


def shareable(model: Any) -> bool:
    """Tell whether a base's rows can share contexts."""
    return model.device.type == "cpu" and model.config._attn_implementation in ("sdpa", NAME) and not has_windows(model)


def has_windows(model: Any) -> bool:
    """Tell whether some layers of a base read its last columns alone."""
    config = model.config
    kinds = getattr(config, "layer_types", None)
    return any("full" not in kind for kind in kinds) if kinds else getattr(config, "sliding_window", None) is not None


@contextmanager
def sharing(model: Any, shared: Shared | None) -> Iterator[None]:
    """Have a base's rows read these contexts before their own columns; none: only those."""
    if shared is None:
        yield
        return
    before, token = model.config._attn_implementation, _now.set(shared)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _now.reset(token)


def alone(layers: Layers) -> Shared:
    """Return a context (1, H, K, S) as the one row's of a pass."""
    zero = torch.zeros(1, 1, dtype=torch.long)
    return Shared(layers, zero, zero[0])


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the shared contexts and to each row's own columns; arguments and returns as transformers' attention functions."""
    shared = _now.get()
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    theirs, theirs_lse = _to_contexts(query, shared, module.layer_idx, scaling)
    mask = None if attention_mask is None else torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    own, own_lse = _flash(query, key, value, mask, scaling, causal=mask is None and query.shape[2] > 1)
    share = torch.sigmoid(theirs_lse - own_lse)
    if shared.without is not None:
        share = share.masked_fill(shared.without, 0)
    return torch.lerp(own, theirs, share.unsqueeze(-1).to(own.dtype)).transpose(1, 2).contiguous(), None


def _to_contexts(query: Tensor, shared: Shared, layer: int, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Attend from queries (R, H x G, n, S) to each row's context; returns (R, H x G, n, S), and (R, H x G, n) log-sum-exp."""
    keys, values = shared.layers[layer]
    (contexts, most), (_, _, read, size), heads = shared.rows.shape, query.shape, keys.shape[1]
    groups = query.shape[1] // heads
    one = contexts * most == len(query) == 1
    asked = query if one else query[shared.rows.flatten()]
    asked = asked.view(contexts, most, heads, groups, read, size).transpose(1, 2).reshape(contexts, heads, most * groups * read, size)
    out, lse = _flash(asked, keys, values, shared.beyond, scaling)
    out = out.reshape(contexts, heads, most, groups, read, size).transpose(1, 2).reshape(contexts * most, heads * groups, read, size)
    lse = lse.reshape(contexts, heads, most, groups, read).transpose(1, 2).reshape(contexts * most, heads * groups, read)
    return (out, lse) if one else (out[shared.places], lse[shared.places])


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool = False) -> Any:
    """Return torch's attention on CPUs with its log-sum-exp; key and value may have fewer heads than the query."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
