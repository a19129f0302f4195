"""Checkpoint folders: written, found, read. In the ecosystem's own formats, never pickled.

    FOLDER/
    config.json                  ICAEConfig and the library's version
    adapter_config.json          PEFT's own
    adapter_model.safetensors    PEFT's own: the encoder's LoRA
    memory.safetensors           memory token (rows, hidden), markers (3, marker_length, hidden): AE, LM, FT, and learned maps
    README.md                    model card

All files are written under temporary names first and then renamed into place, so that a full disk leaves the older checkpoint whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from icae.atomic import write_together
from icae.base import Base, load_base
from icae.config import ICAEConfig
from icae.errors import ICAEError, reason

if TYPE_CHECKING:
    from icae.model import ICAE

SHIPPED = Path(__file__).parent / "adapters"
"""Folder of the adapters that come with the package."""
DEFAULT = "smollm2-135m-kv-4x"
"""The adapter that is used where none is named."""
_FILES = ("config.json", "adapter_config.json", "adapter_model.safetensors", "memory.safetensors")


def find_checkpoint(name: str | Path | None) -> Path:
    """Resolve a folder, the name of a shipped adapter, or a Hub id, to a folder with all its files.

    Raises
    ------
    ICAEError
        If there is no such checkpoint, or a file of it is missing.
    """
    name = DEFAULT if name is None else name
    folder = Path(name)
    if not folder.is_dir() and (SHIPPED / name).is_dir():
        folder = SHIPPED / name
    elif not folder.is_dir() and str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        folder = _from_hub(str(name))
    if not folder.is_dir():
        shipped = sorted(p.name for p in SHIPPED.glob("*/")) if SHIPPED.is_dir() else []
        raise ICAEError(f"no checkpoint {str(name)!r}; give a folder, a Hub id, or one that ships: {', '.join(shipped) or 'none'}")
    for file in _FILES:
        if not (folder / file).is_file():
            raise ICAEError(f"checkpoint {folder} has no {file}; it needs {', '.join(_FILES)}")
    return folder


def read_config(folder: Path) -> ICAEConfig:
    """Read a checkpoint's config.

    Raises
    ------
    ICAEError
        If it is no JSON, or of another version.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ICAEError(f"{folder / 'config.json'} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ICAEError(f"{folder / 'config.json'} is damaged: it holds no settings")
    values.pop("library", None)
    return ICAEConfig.from_dict(values)


def load_checkpoint(cls: type[ICAE], name: str | Path | None, *, base: Base | str | None, device: str, **kwargs: Any) -> ICAE:
    """Build the model of a checkpoint; arguments and errors as for `ICAE.from_pretrained`."""
    folder = find_checkpoint(name)
    config = read_config(folder)
    if not isinstance(base, Base):
        base = load_base(base or config.base, device=device, **kwargs)
    if base.fingerprint != config.base_fingerprint:
        raise ICAEError(
            f"checkpoint {folder.name} was trained on base {config.base!r} ({config.base_fingerprint[:12]}), "
            f"but {base.name!r} is {base.fingerprint[:12]}; load it on the base it was trained on"
        )
    model = cls(base, config)
    load_weights(model, folder)
    model.eval()
    return model


def load_weights(model: ICAE, folder: Path, *, fresh: tuple[str, ...] = ()) -> None:
    """Put the tensors of a checkpoint folder into a model of the same config; `fresh` ones may be missing and stay as they start.

    Raises
    ------
    ICAEError
        If a file is damaged, or its tensors do not fit.
    """
    from peft import set_peft_model_state_dict

    lora, memory = (_tensors(folder / name) for name in ("adapter_model.safetensors", "memory.safetensors"))
    try:
        left: Any = set_peft_model_state_dict(model.encoder.peft, lora)
        if left.unexpected_keys or any("lora_" in name for name in left.missing_keys):
            raise ValueError("its LoRA tensors are not those of config.json")
        for name, mine in _own_tensors(model).items():
            if name in fresh and name not in memory:
                continue
            if memory[name].shape != mine.shape:
                raise ValueError(f"its {name} is {tuple(memory[name].shape)}, not {tuple(mine.shape)}")
            with torch.no_grad():
                mine.copy_(memory.pop(name))
        if memory:
            raise ValueError(f"it holds {', '.join(memory)} besides")
    except (RuntimeError, KeyError, ValueError) as error:
        raise ICAEError(f"checkpoint {folder} does not fit the config that it is read with: {reason(error)}") from error
    model.forget_hash()


def _own_tensors(model: ICAE) -> dict[str, torch.Tensor]:
    """Return what is trained besides LoRA: memory token, markers, and whatever maps the config asks for."""
    return {name.removeprefix("encoder."): p for name, p in model.adapter_tensors().items() if "lora_" not in name}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ICAEError(f"{path} is truncated or damaged: {error}") from error


def save_checkpoint(model: ICAE, folder: Path, *, dtype: torch.dtype | None, card: str | None) -> None:
    """Write a model's adapter to a folder; arguments as for `ICAE.save_pretrained`."""
    from peft import get_peft_model_state_dict

    from icae import __version__

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ICAEError(f"could not make the folder {folder}: {error.strerror}") from error

    def packed(tensors: dict[str, torch.Tensor]) -> bytes:
        return to_bytes({n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})

    lora = model.encoder.peft.peft_config["default"].to_dict()
    lora = {k: sorted(v) if isinstance(v, set) else v for k, v in lora.items()}
    files = {
        "adapter_model.safetensors": packed(get_peft_model_state_dict(model.encoder.peft, save_embedding_layers=False)),
        "memory.safetensors": packed(_own_tensors(model)),
        "adapter_config.json": _json({**lora, "base_model_name_or_path": model.config.base, "inference_mode": True}),
        "config.json": _json({**model.config.to_dict(), "library": f"icae {__version__}"}),
    }
    if card is not None or not (folder / "README.md").exists():
        files["README.md"] = (card or _plain_card(model.config)).encode()
    write_together({folder / name: data for name, data in files.items()})


def push_checkpoint(model: ICAE, repository: str, **kwargs: Any) -> str:
    """Upload a model's adapter to the Hub; arguments as for `ICAE.push_to_hub`."""
    import tempfile

    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, Path(folder), dtype=None, card=None)
        api = HfApi(token=kwargs.pop("token", None))
        try:
            api.create_repo(repository, exist_ok=True, repo_type=kwargs.get("repo_type"))
            return str(api.upload_folder(repo_id=repository, folder_path=folder, **kwargs))
        except Exception as error:  # as in `_from_hub`
            raise ICAEError(f"the Hub did not take {repository!r} ({reason(error)})") from error


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[*_FILES, "README.md"]))
    except Exception as error:  # the Hub's client raises many kinds: all mean that there is no such checkpoint within reach
        raise ICAEError(f"no folder {repository!r}, and the Hub did not give it ({reason(error)})") from error


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, default=str) + "\n").encode()


def _plain_card(config: ICAEConfig) -> str:
    return (
        f"---\nlibrary_name: icae\nbase_model: {config.base}\ntags: [icae, context-compression]\n---\n\n"
        f"# ICAE adapter: {config.kind} slots, {config.ratio}x, for {config.base}\n\n"
        "An In-context Autoencoder (arXiv 2307.06945). `icae evaluate autoencoding --text TEXTS --model FOLDER` measures it.\n"
    )
