"""icae: compress a long context into a few memory slots that the same, unmodified LLM reads instead of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["ICAE", "ICAEConfig", "ICAEError", "MemorySlots", "Sampling", "TrainConfig", "__version__", "load_base"]

if TYPE_CHECKING:
    from icae.base import load_base
    from icae.config import ICAEConfig, TrainConfig
    from icae.errors import ICAEError
    from icae.model import ICAE
    from icae.reader import Sampling
    from icae.slots import MemorySlots

_HOMES = {
    "ICAE": "model",
    "ICAEConfig": "config",
    "ICAEError": "errors",
    "MemorySlots": "slots",
    "Sampling": "reader",
    "TrainConfig": "config",
    "load_base": "base",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import icae` alone is instant."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"icae.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'icae' has no attribute {name!r}")
