"""What a training step costs, in floating-point operations: a formula a part. Pure functions; a test pins them to torch's own counter.

A product of (n, a) and (a, b) counts 2 n a b. Legend: n rows, D hidden size, Q and KV widths of queries and of keys, F width of the MLP,
V vocabulary, r rank, L context tokens, K slots, T target tokens. Attention counts every pair of places, masked or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from icae.config import ICAEConfig
from icae.segments import slot_count


@dataclass(frozen=True)
class Shape:
    """The sizes of a base and of the LoRA beside it."""

    layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    vocabulary: int
    rank: int
    targets: tuple[str, ...]
    marker: int = 2
    """Vectors of the marker before the target."""

    @classmethod
    def of(cls, base_config: Any, config: ICAEConfig) -> Shape:
        """Read the sizes from a base's transformers config and from an adapter's config."""
        size = getattr(base_config, "head_dim", None) or base_config.hidden_size // base_config.num_attention_heads
        return cls(
            base_config.num_hidden_layers,
            base_config.hidden_size,
            base_config.num_attention_heads * size,
            base_config.num_key_value_heads * size,
            base_config.intermediate_size,
            base_config.vocab_size,
            config.lora_rank,
            tuple(config.lora_targets),
            config.marker_length,
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (in, out) of every linear module of a layer."""
        d, q, k, f = self.hidden, self.queries, self.keys, self.mlp
        ends = {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d)}
        return {**ends, "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    def products(self, names: Iterable[str] | None = None) -> tuple[int, int]:
        """Return the operations of one row in one layer's linear modules, and in the LoRA beside them (of `names` alone, if given)."""
        mine = {n: e for n, e in self.linears().items() if names is None or n in names}
        plain = sum(2 * a * b for a, b in mine.values())
        return plain, sum(2 * self.rank * (a + b) for n, (a, b) in mine.items() if n in self.targets)


def step(shape: Shape, length: int, ratio: int, target: int, *, cached: bool = True, plain: bool = False) -> dict[str, int]:
    """Return the operations of one autoencoding sample's forward and backward pass, by part.

    Parameters
    ----------
    shape : Shape
        Sizes of base and LoRA.
    length, ratio : int
        Context tokens of the one segment, and context tokens a slot.
    target : int
        Target tokens, EOS included.
    cached : bool
        Slots are keys and values (else embeddings): the decoder does not compute theirs again, and the encoder's last layer needs no
        backward pass behind its own.
    plain : bool
        The path without savings: the base's own weights are differentiated too.
    """
    slots = slot_count(length, ratio)
    mine = shape.marker + target - 1  # the last target is not read
    rows, seen = length + slots, slots + mine
    read = mine if cached else seen
    own = int(plain)  # the weights' own gradients: one product more a linear module
    linear, lora = shape.products()
    pairs = 4 * rows * rows * shape.queries
    whole = rows * ((1 + own) * linear + 2 * lora) + 2 * pairs
    last = whole
    if cached:  # nothing reads what the last layer does behind its keys and values
        linear_last, lora_last = shape.products(("k_proj", "v_proj"))
        last = rows * ((1 + own) * linear_last + 2 * lora_last)
    return {
        "encoder forward": shape.layers * (rows * (linear + lora) + pairs),
        "encoder backward": (shape.layers - 1) * whole + last,
        "decoder forward": shape.layers * (read * linear + 4 * read * seen * shape.queries),
        "decoder backward": shape.layers * (read * (1 + own) * linear + 8 * read * seen * shape.queries),
        "logits": (2 + own) * 2 * target * shape.hidden * shape.vocabulary,
    }
