"""A Llama as few large products in bfloat16, for training on CPUs that have units for these (AMX, AVX512-BF16). Knows no slots.

Such a unit multiplies an order of magnitude faster than a CPU adds, casts and copies, so what costs is everything else: norms go into the
weights behind them, queries, keys and values come from one product and both halves of the MLP from another, LoRA's update is added by the
product that makes it, and torch can compile what is left of a layer into a few loops. docs/log.md measures what each is worth.

Shape legend: B rows, N inputs of a row, S what they may attend to, D hidden size, H heads, G groups of heads that share keys, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icae.base import Base

_TYPES = ("LlamaForCausalLM",)
_ANGLES = ("default", "linear", "llama3")
"""Kinds of rotary angles that depend on the place alone."""
Pair = tuple[Tensor, Tensor]
"""Of a layer: keys and values (B, G, S, E); or LoRA's matrices, (rank, in) and (out, rank)."""
Loras = Sequence[Sequence[Pair | None]]
"""Of each layer and each of its four products."""


def is_plain_llama(base: Base) -> bool:
    """Tell whether a base is one that this room computes: Llama's layers, without biases, with the plain rotary angles."""
    if type(base.model).__name__ not in _TYPES:
        return False
    settings: Any = base.model.config
    plain = not (getattr(settings, "attention_bias", False) or getattr(settings, "mlp_bias", False)) and settings.hidden_act == "silu"
    return plain and settings.rope_parameters.get("rope_type") in _ANGLES


class LeanLlama:
    """A base's weights, joined and laid out once; LoRA's matrices stay where they are, in float32, and get the gradients."""

    def __init__(self, base: Base, *, compiled: bool = False, dtype: torch.dtype = torch.bfloat16):
        body, settings = base.model.get_decoder(), base.model.config
        self.embed = base.embed
        self.heads, self.groups, self.dtype = settings.num_attention_heads, settings.num_key_value_heads, dtype
        self.eps, self.angles = settings.rms_norm_eps, base.rotations()[0].repeat(2)
        self.layers = [_Layer(layer, self.dtype) for layer in body.layers]
        self.norm = body.norm.weight.detach().to(self.dtype)
        self.head = (base.model.get_output_embeddings().weight.detach().float() * body.norm.weight.detach().float()).to(self.dtype)
        self.loops = _Loops(*map(_compiled, _PLAIN)) if compiled else _PLAIN

    def loras(self, wrapped: nn.Module) -> Loras:
        """Return the four joined LoRA pairs of every layer of the base's body with LoRA in it, with gradient to its own matrices."""
        layers: Any = wrapped.get_submodule("layers")
        return [weights.lora(layer) for weights, layer in zip(self.layers, layers, strict=True)]

    def read(
        self,
        inputs_BND: Tensor,
        places_BN: Tensor,
        mask_BNS: Tensor,
        before: Sequence[Pair] | None = None,
        loras: Loras | None = None,
        *,
        pairs_alone: bool = False,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Pair]]:
        """Pass inputs through all layers.

        Parameters
        ----------
        inputs_BND : Tensor
            Input embeddings.
        places_BN : Tensor
            int64 position ids.
        mask_BNS : Tensor
            bool: what each input attends to, of `before` and then of the inputs themselves; (1, N, S) where all rows are alike.
        before : sequence of (keys, values), optional
            For each layer, what stands before the inputs.
        loras : sequence, optional
            From `loras`.
        pairs_alone : bool
            Only keys and values are wanted: the last layer computes nothing else.
        states : list of Tensor, optional
            Gets the hidden states (B, N, D) behind each layer, the last ones normed, as transformers gives them.

        Returns
        -------
        Tensor
            (B, N, D) hidden states behind the last layer, not normed (`logits` does that); with `pairs_alone` those before it.
        list of (keys, values)
            Of the inputs, (B, G, N, E) each, a pair a layer; keys are turned to their places.
        """
        x = inputs_BND.to(self.dtype).flatten(0, 1)
        angles = places_BN[..., None].float() * self.angles
        turns = angles.cos().to(self.dtype)[:, :, None], angles.sin().to(self.dtype)[:, :, None]
        allowed = torch.zeros(mask_BNS.shape).masked_fill(~mask_BNS, -1e9)[:, None]
        sizes, made = (self.heads, self.groups, self.eps), []
        for n, weights in enumerate(self.layers):
            pairs = _NONE if loras is None else loras[n]
            if pairs_alone and n == len(self.layers) - 1:
                _, keys, values = _attending(self.loops, x, weights.attention, pairs[0], turns, sizes)
            else:
                x, keys, values = _layer(self.loops, x, weights.all, pairs, turns, allowed, None if before is None else before[n], sizes)
            made.append((keys, values))
            if states is not None:
                states.append((x if n < len(self.layers) - 1 else self.loops.normed(x, self.eps) * self.norm).view(inputs_BND.shape))
        return x.view(inputs_BND.shape), made

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states behind the last layer."""
        return self.loops.normed(hidden, self.eps) @ self.head.t()


class _Layer:
    """One layer's weights, with its norms in them."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        a, m = layer.self_attn, layer.mlp
        self.norms = (layer.input_layernorm.weight.detach().float(), None, layer.post_attention_layernorm.weight.detach().float(), None)
        self.parts = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
        owners = (a, a, m, m)
        self.all = tuple(
            self._normed(torch.cat([getattr(owner, name).weight.detach().float() for name in names]), norm).to(dtype).contiguous()
            for owner, names, norm in zip(owners, self.parts, self.norms, strict=True)
        )
        self.attention = self.all[0]

    @staticmethod
    def _normed(weight: Tensor, norm: Tensor | None) -> Tensor:
        return weight if norm is None else weight * norm

    def lora(self, layer: Any) -> list[Pair | None]:
        """Return LoRA's matrices for each of the joined weights: first ones below each other, second ones along a diagonal."""
        made: list[Pair | None] = []
        for names, norm, owner in zip(self.parts, self.norms, (layer.self_attn, layer.self_attn, layer.mlp, layer.mlp), strict=True):
            modules: list[Any] = [getattr(owner, name) for name in names]
            pairs = [_matrices(module) for module in modules]
            first, second = torch.cat([a for a, _ in pairs]), torch.block_diag(*[b for _, b in pairs])
            joined = self._normed(first, norm).to(self.attention.dtype), second.to(self.attention.dtype)
            made.append(joined if len(first) else None)
        return made


def _matrices(module: Any) -> Pair:
    """Return LoRA's matrices of a linear layer, the second one scaled; without LoRA, of rank 0."""
    if not hasattr(module, "lora_A"):
        weight = module.weight
        return weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
    return module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]


_NONE: list[Any] = [None] * 4


class _Loops(NamedTuple):
    """What a layer does beside its products."""

    normed: Callable[..., Tensor]
    turned: Callable[..., Tensor]
    shared: Callable[..., Tensor]
    gated: Callable[..., Tensor]


def _normed(x: Tensor, eps: float) -> Tensor:
    """Return rows x (R, D) with a root mean square of 1; the norm's weight is in what they are multiplied with."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return queries or keys (B, N, H, E) turned to their places, (B, N, 1, E)."""
    one, other = x.chunk(2, -1)
    return x * cosines + torch.cat([-other, one], -1) * sines


def _shared(scores: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Return the shares of attention of scores (B, H, N, S); `allowed` (B, 1, N, S) is added."""
    return (scores.float() * scale + allowed).softmax(-1).to(scores.dtype)


def _gated(x: Tensor) -> Tensor:
    """Return (R, width) of an MLP's gates and values, (R, 2 * width)."""
    gates, values = x.chunk(2, -1)
    return nn.functional.silu(gates) * values


_PLAIN = _Loops(_normed, _turned, _shared, _gated)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function compiled for all shapes."""
    return torch.compile(function, dynamic=True)


def _layer(
    loops: _Loops,
    x: Tensor,
    weights: Sequence[Tensor],
    loras: Sequence[Pair | None],
    turns: Pair,
    allowed: Tensor,
    before: Pair | None,
    sizes: tuple[int, int, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a layer makes of rows x (B * N, D), and the keys and values of its inputs."""
    queries, keys, values = _attending(loops, x, weights[0], loras[0], turns, sizes)
    every = (keys, values) if before is None else (torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2))
    x = x + _product(_attended(loops, queries, *every, allowed), weights[1], loras[1])
    gated = loops.gated(_product(loops.normed(x, sizes[2]), weights[2], loras[2]))
    return x + _product(gated, weights[3], loras[3]), keys, values


def _attending(
    loops: _Loops, x: Tensor, weight: Tensor, lora: Pair | None, turns: Pair, sizes: tuple[int, int, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, H, N, E), keys and values (B, G, N, E), the first two turned to their places."""
    heads, groups, eps = sizes
    batch, count = turns[0].shape[:2]
    made = _product(loops.normed(x, eps), weight, lora).view(batch, count, heads + 2 * groups, -1)
    turned = loops.turned(made[:, :, : heads + groups], *turns)
    return tuple(t.transpose(1, 2) for t in (turned[:, :, :heads], turned[:, :, heads:], made[:, :, heads + groups :]))  # type: ignore[return-value]


def _attended(loops: _Loops, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Return rows (B * N, H * E); heads of a group are multiplied with its keys together."""
    batch, heads, count, size = queries.shape
    groups, there = keys.shape[1], keys.shape[2]
    grouped = queries.reshape(batch, groups, -1, size)
    scores = (grouped @ keys.transpose(-1, -2)).view(batch, heads, count, there)
    found = loops.shared(scores, allowed, size**-0.5).view(batch, groups, -1, there) @ values
    return found.view(batch, heads, count, size).transpose(1, 2).reshape(batch * count, heads * size)


def _product(rows: Tensor, weight: Tensor, lora: Pair | None) -> Tensor:
    """Return rows (R, in) times weight (out, in), transposed, and LoRA's update."""
    made = rows @ weight.t()
    return made if lora is None else torch.addmm(made, rows @ lora[0].t(), lora[1].t())
