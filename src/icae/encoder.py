"""Segments of token ids -> memory slots. Knows no text, no prompt, no decoder.

    ids (B, L) -> embeddings -> [context | memory tokens] -> LLM with LoRA -> readout at the memory positions -> SlotBatch

The encoder is a second module tree over the base's own tensors with PEFT's LoRA in it. Memory tokens (ICAE, arXiv 2307.06945,
section 2) are appended to the context in the sequence, so that each attends to the whole segment; where they stand among the
position ids is the layout's business (segments.py).

Shape legend: B segments, L context tokens of the longest, K memory tokens of the longest, D hidden size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from icae.base import Base, cache_of, cached
from icae.config import ICAEConfig
from icae.errors import ICAEError, reason
from icae.fused import effective_weights
from icae.lean import LeanLlama, Loras, is_plain_llama
from icae.segments import positions, slot_count
from icae.slot_batch import SlotBatch, filled
from icae.slots import Segment, rotated


class Encoder(nn.Module):
    """The base with LoRA and memory tokens."""

    fused = False
    """Train with LoRA's updates in the weights (fused.py)."""
    lean: LeanLlama | None = None
    """What trains kv slots on a CPU with bfloat16 units; none: the LLM's own layers."""

    def __init__(self, base: Base, config: ICAEConfig):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        if config.kind == "kv" and (config.readout != "last" or config.slot_norm is not None):
            raise ICAEError("readout and slot_norm are for embedding slots; kv slots are read from every layer")
        self.config = config
        self._base = base
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_targets),
            base_model_name_or_path=config.base,
        )
        try:
            self.peft: Any = get_peft_model(base.twin(), lora)
        except ValueError as error:
            raise ICAEError(f"lora_targets {config.lora_targets} do not name linear modules of {base.name} ({reason(error)})") from error
        embeddings, unit = base.embeddings(), torch.eye(base.hidden_size, device=base.device)
        self._size = float(embeddings.pow(2).mean().sqrt())
        self.memory = nn.Parameter(self._initial_memory(float(embeddings.std())))
        if config.memory == "mixed":
            self.mix = nn.Parameter(unit.repeat(config.ratio, 1, 1) / (self._size * config.ratio**0.5))
        if config.readout == "residual":
            self.connector = nn.Parameter(torch.zeros_like(unit))
        self._rotations = _proven_rotations(base) if config.kind == "kv" else None

    def forward(self, ids_BL: Tensor, lengths: list[int], ratio: int | None = None, loras: Loras | None = None) -> SlotBatch:
        """Compress a batch of segments.

        Parameters
        ----------
        ids_BL : Tensor
            (B, L) int64, padded on the right with any id.
        lengths : list of int
            Real tokens of each segment.
        ratio : int, optional
            Context tokens a slot; the checkpoint's own where not given.
        loras : optional
            From `joined`, where several batches of a training step share it.

        Returns
        -------
        SlotBatch
            Slots at the decoder's positions, one segment a row, with gradient if one is wanted.

        Raises
        ------
        ICAEError
            If a segment needs more slots than there are learned memory tokens.
        """
        ratio = self.config.ratio if ratio is None else ratio
        longest = ids_BL.shape[1]
        layout = [positions(self.config.layout, n, ratio) for n in lengths]
        count = slot_count(longest, ratio)
        context_BLD = self.peft.get_input_embeddings()(ids_BL)
        real_BL = filled(lengths, longest).to(ids_BL.device, non_blocking=True)
        memory_BKD = self.memory_tokens(context_BLD, real_BL, count, ratio)
        slots = [len(p.memory) for p in layout]
        real_BK = filled(slots, count).to(ids_BL.device, non_blocking=True)
        at_memory = _padded([p.memory for p in layout], count).to(ids_BL.device, non_blocking=True)
        places = _padded([p.slots for p in layout], count).to(ids_BL.device, non_blocking=True)

        output = None
        if self.config.readout != "memory":
            at_context = _padded([p.context for p in layout], longest).to(ids_BL.device, non_blocking=True)
            output = self._llm(
                torch.cat([context_BLD, memory_BKD], 1), torch.cat([at_context, at_memory], 1), torch.cat([real_BL, real_BK], 1), loras
            )
        return SlotBatch(
            self.read(output, longest, places - at_memory, memory_BKD),
            real_BK,
            places,
            [(Segment(n, k, p.span),) for n, k, p in zip(lengths, slots, layout, strict=True)],
            self._rotations,
        )

    def joined(self) -> Loras | None:
        """Return LoRA's matrices as lean training takes them, with gradient; none where training is not lean."""
        return self.lean.loras(self.peft.get_base_model().get_decoder()) if self.lean is not None and self.training else None

    def _llm(self, inputs_BND: Tensor, places_BN: Tensor, real_BN: Tensor, loras: Loras | None) -> Any:
        """Pass inputs through the LLM with LoRA; its cache comes back where kv slots are read from it."""
        from transformers import DynamicCache

        kv, body = self.config.kind == "kv", self.peft.get_base_model().get_decoder()
        if self.lean is not None and self.training:
            sees = real_BN[:, None] & torch.ones(real_BN.shape[1], real_BN.shape[1], dtype=torch.bool).tril()
            pairs = self.lean.read(inputs_BND, places_BN, sees, loras=loras or self.joined(), pairs_alone=True)[1]
            return SimpleNamespace(cache=SimpleNamespace(layers=[SimpleNamespace(keys=k, values=v) for k, v in pairs]))
        arguments = dict(
            inputs_embeds=inputs_BND,
            position_ids=places_BN,
            attention_mask=real_BN.long(),
            **(cached(body, DynamicCache()) if kv else {"use_cache": False}),  # told nothing of sliding windows, it keeps every key
        )
        if self.fused and self.training and not self.config.lora_dropout:
            return functional_call(self._base.model.get_decoder(), effective_weights(body), kwargs=arguments)
        return body(**arguments)

    def train_lean(self, *, compiled: bool = False) -> None:
        """Train with few large products on the CPU from now on (lean.py), where slots are read from every layer of a plain Llama."""
        if self.read_from == "layers" and not self.config.lora_dropout and is_plain_llama(self._base):
            self.lean = LeanLlama(self._base, compiled=compiled)

    def _initial_memory(self, spread: float) -> Tensor:
        """Return the memory tokens' start: zero where a block's mean is added to it, else noise of the embeddings' own `spread`."""
        rows = slot_count(self.config.segment_length, self.config.ratio) if self.config.memory == "learned" else 1
        size = 0.0 if self.config.memory in ("pooled", "mixed") else spread
        return torch.randn(rows, self._base.hidden_size, device=self._base.device) * size

    def memory_tokens(self, context_BLD: Tensor, real_BL: Tensor, count: int, ratio: int) -> Tensor:
        """Return the memory tokens' input embeddings, (B, K, D)."""
        batch, longest, hidden = context_BLD.shape
        memory = self.memory.to(context_BLD.dtype)
        if self.config.memory == "learned":
            if count > memory.shape[0]:
                raise ICAEError(f"{count} slots needed, but this adapter learned {memory.shape[0]} memory tokens; use a higher ratio")
            return memory[:count].expand(batch, -1, -1)
        if self.config.memory == "shared":
            return memory.expand(batch, count, -1)
        # pooled: the mean of a block of m embeddings, scaled by sqrt(m) so that it keeps the size of one of them
        missing = count * ratio - longest
        real = nn.functional.pad(real_BL, (0, missing)).view(batch, count, ratio, 1)
        blocks = nn.functional.pad(context_BLD, (0, 0, 0, missing)).view(batch, count, ratio, hidden)
        if self.config.memory == "mixed":
            maps = self.mix[torch.arange(ratio, device=blocks.device) * len(self.mix) // ratio].to(blocks.dtype)
            size = self._size * (len(self.mix) / ratio) ** 0.5
            return torch.einsum("bkjd,jde->bke", blocks * real, maps) * size + memory
        tokens = real.sum(2).clamp(min=1).to(context_BLD.dtype)
        return (blocks * real).sum(2) / tokens.sqrt() + memory

    @property
    def read_from(self) -> str:
        """Where slots are read from: `layers` (each of them), `memory` (the memory token, with or without the output), `output`."""
        if self.config.kind == "kv":
            return "layers"
        return "output" if self.config.readout == "last" else "memory"

    def memory_of(self, blocks_P: Tensor, context_PMD: Tensor, real_PM: Tensor, ratio: int) -> Tensor:
        """Return the memory token, (P, 1, D), of each of P single blocks: their numbers, token embeddings, and which of these are real."""
        if self.config.memory == "learned":
            return self.memory[blocks_P][:, None].to(context_PMD.dtype)
        return self.memory_tokens(context_PMD, real_PM, 1, ratio)

    def read(self, output: Any, start: int, moved_BK: Tensor, memory_BKD: Tensor) -> dict[str, Tensor]:
        """Read slots off the LLM's output (None where only the memory tokens are read), from place `start` of its sequence on.

        `moved_BK` tells how many positions each slot is moved by, from where it was encoded to where it is read.
        """
        if self.read_from == "layers":
            return self._read_keys_and_values(output, start, moved_BK)
        return {"embeddings": self._read_hidden_states(output, start, memory_BKD)}

    def _read_hidden_states(self, output: Any, start: int, memory_BKD: Tensor) -> Tensor:
        """Read the last layer's output at the memory positions, the memory tokens, or both; scale them where asked to.

        A slot far larger than the base's embeddings passes through its layers nearly unchanged, so that each layer reads it as it is:
        docs/log.md measures what that is worth.
        """
        slots_BKD = memory_BKD if self.config.readout == "memory" else output.last_hidden_state[:, start:]
        if self.config.readout == "residual":
            slots_BKD = memory_BKD / self._size + slots_BKD @ self.connector.to(slots_BKD.dtype)
        if self.config.slot_norm is not None:
            slots_BKD = nn.functional.rms_norm(slots_BKD, slots_BKD.shape[-1:]) * (self.config.slot_norm * self._size)
        return slots_BKD

    def _read_keys_and_values(self, output: Any, start: int, moved_BK: Tensor) -> dict[str, Tensor]:
        """Read the keys and values of every layer that was passed at the memory positions (500xCompressor, arXiv 2408.03094)."""
        layers = cache_of(output).layers
        keys = torch.stack([layer.keys[:, :, start:].transpose(1, 2) for layer in layers], 2)  # (B, K, layers, heads, size)
        values = torch.stack([layer.values[:, :, start:].transpose(1, 2) for layer in layers], 2)
        assert self._rotations is not None
        moved = self.config.layout != "spread"  # spread slots are read where they were encoded
        return {"keys": rotated(keys, self._rotations[: len(layers)], moved_BK) if moved else keys, "values": values}


@torch.no_grad()
def _proven_rotations(base: Base) -> Tensor:
    """Return the base's rotary angles, after checking on one token that they turn a key as the base itself does.

    Raises
    ------
    ICAEError
        If they do not: some families pair the halves of a key in another way.
    """
    from transformers import DynamicCache

    angles = base.rotations()
    ids = torch.tensor([[base.eos_ids[0] if base.eos_ids else 0]], device=base.device)

    def keys(position: int) -> Tensor:
        cache: Any = DynamicCache()
        place = torch.tensor([[position]], device=base.device)
        base.model.get_decoder()(input_ids=ids, position_ids=place, **cached(base.model.get_decoder(), cache))
        return torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers], 1).float()  # (1, layers, heads, size)

    here, there = keys(0), keys(7)
    same = here.shape[1] == angles.shape[0] and torch.allclose(
        rotated(here, angles, torch.tensor([7], device=base.device)), there, atol=1e-2 * float(there.abs().max())
    )
    if not same:
        raise ICAEError(f"{base.name} rotates keys in a way that kv slots do not know; use kind embedding")
    return angles


def _padded(rows: list[list[int]], width: int) -> Tensor:
    """Return rows of whole numbers as (rows, width) int64, padded with 0."""
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
