"""Training on accelerators with fewer and larger kernels; a CPU gains nothing by it. Knows PEFT and the base's modules, no slots.

An accelerator works on small hidden sizes faster than Python can tell it to: at hidden size 576 a LoRA layer's own four products, casts
and additions cost more than the product they belong to. So LoRA's updates go into the weights first, all of a shape in one product, and
the plain LLM runs with these; norms run as one kernel each.
"""

from __future__ import annotations

from collections import defaultdict
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""transformers' norms that are `torch.nn.functional.rms_norm` (Gemma's add 1 to their weight)."""


def effective_weights(wrapped: nn.Module) -> dict[str, Tensor]:
    """Return the weights W + scale * B A, in W's dtype, of all linear layers under `wrapped` that have LoRA, by name, with gradient."""
    from peft.tuners.lora import Linear

    alike: dict[Any, list[tuple[str, Any]]] = defaultdict(list)
    modules: dict[str, Any] = dict(wrapped.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, Linear):
            alike[layer.base_layer.weight.shape].append((f"{name}.weight", layer))
    made: dict[str, Tensor] = {}
    for layers in alike.values():
        a, b = (torch.stack([getattr(layer, side)["default"].weight for _, layer in layers]) for side in ("lora_A", "lora_B"))
        scale = torch.tensor([layer.scaling["default"] for _, layer in layers]).to(a.device, non_blocking=True)[:, None, None]
        updates = torch.bmm(b * scale, a)
        for (name, layer), update in zip(layers, updates.unbind(), strict=True):
            made[name] = (layer.base_layer.weight + update).to(layer.base_layer.weight.dtype)
    return made


def fuse_norms(model: nn.Module) -> None:
    """Have the model's RMS norms run as one kernel each."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in _NORMS:
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
