"""Tiny random-weight bases of every family, a tokenizer trained on a few lines, and shorthands that many tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from icae.base import Base, cached
from icae.config import ICAEConfig
from icae.model import ICAE
from icae.slots import MemorySlots, Origin, Segment

LINES = [
    "The harbour master keeps a brass lamp in the window, and lights it whenever fog comes in from the western bank.",
    "Nobody remembers who painted the second door green; the ledger only says that two tins were bought in April.",
    "A kettle, a map of the river, and nine letters tied with string were all that the surveyor left behind.",
    "If the bell rings twice before noon, the ferry is late; if it rings three times, there is no ferry at all.",
]
"""Text of the tests; the tokenizer is trained on it."""

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # about 1 / sqrt(hidden): what attention reads then matters to the output
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
}
"""transformers' model types, and what their configs need beside SHAPE."""


def make_tokenizer() -> object:
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # as Llama's and Gemma's do
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def load_script(path: str) -> Any:
    """Return a script of the project, named from its root, as a module."""
    file = Path(__file__).parent.parent / path
    spec: Any = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_base(folder: Path, family: str = "llama", *, seed: int = 0, **shape: object) -> Path:
    """Write a random base of a family, with the tests' tokenizer, as `save_pretrained` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], "vocab_size": len(tokenizer), **shape})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_icae(base: Base, *, seed: int = 0, stirred: float = 0.0, **settings: object) -> ICAE:
    """Build an ICAE on a base; `stirred` adds noise of that size to all that is trained, so that LoRA is no longer the identity."""
    torch.manual_seed(seed)
    settings = {"lora_rank": 4, "lora_alpha": 4, "segment_length": 16, "polish": 0, "focus": 0, "grounding": 0, "beginnings": 1, **settings}
    model = ICAE(base, ICAEConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.adapter_tensors().values():
            p += stirred * torch.randn_like(p)
    return model


def random_ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Rows of ordinary token ids (no special ones)."""
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 300, (n,), generator=chance).tolist() for n in lengths]


def random_slots(kind: str = "kv", segments: Iterable[tuple[int, int, int]] = ((8, 2, 8),), **origin: object) -> MemorySlots:
    """Slots of random numbers, made without a model: segments are (tokens, slots, span)."""
    segments = tuple(Segment(*s) for s in segments)
    k = sum(s.slots for s in segments)
    chance = torch.Generator().manual_seed(k)
    names = {"kv": {"keys": (2, 2, 8), "values": (2, 2, 8)}, "embedding": {"embeddings": (32,)}}[kind]
    tensors = {name: torch.randn(k, *shape, generator=chance) for name, shape in names.items()}
    about = {"ratio": 4, "layout": "spread", "base": "tiny", "base_fingerprint": "b" * 64, "adapter": "a" * 64, **origin}
    rotations = torch.tensor([[1.0, 0.3, 0.1, 0.03], [0.5, 0.2, 0.1, 0.01]]) if kind == "kv" else None
    return MemorySlots(tensors, torch.arange(k), segments, Origin(kind=kind, **about), rotations)


def base_logits(base: Base, ids: list[int], first: int = 0) -> Tensor:
    """What the base itself says about plain ids at positions from `first` on: (tokens, vocabulary)."""
    with torch.no_grad():
        places = torch.arange(first, first + len(ids))[None]
        return base.model(input_ids=torch.tensor([ids]), position_ids=places).logits[0]


def prefix_cache(base: Base, ids: list[int], first: int = 0) -> dict[str, Tensor]:
    """The base's own keys and values of plain ids, in the shape of kv slots: (tokens, layers, heads, size)."""
    from transformers import DynamicCache

    places, cache = torch.arange(first, first + len(ids))[None], DynamicCache()
    with torch.no_grad():
        base.model(input_ids=torch.tensor([ids]), position_ids=places, **cached(base.model, cache))
    return {name: torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers], 1) for name in ("keys", "values")}


def prefix_as_slots(base: Base, ids: list[int], first: int = 0) -> MemorySlots:
    """The base's own prefix cache over plain ids, as kv slots at ratio 1."""
    origin = Origin("kv", 1, "spread", base.name, base.fingerprint, "none")
    places = torch.arange(first, first + len(ids))
    return MemorySlots(prefix_cache(base, ids, first), places, (Segment(*[len(ids)] * 3),), origin, base.rotations())


def assert_same_slots(a: MemorySlots, b: MemorySlots, tolerance: float) -> None:
    assert a.positions.tolist() == b.positions.tolist()
    assert a.segments == b.segments
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        torch.testing.assert_close(tensor, b.tensors[name], atol=tolerance, rtol=0)


def one_line(error: BaseException, *parts: object) -> None:
    """Assert that an error is one readable line that holds every part."""
    text = str(error)
    assert text and "\n" not in text
    for part in parts:
        assert str(part) in text
