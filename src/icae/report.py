"""Results on disk, with what they were computed from: settings, adapter, base, commit, machine. A figure without these is hearsay."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from icae.atomic import make_room, write_atomically
from icae.config import POLISH_RATES
from icae.model import ICAE


def write_report(path: str | Path, name: str, checkpoint: str, model: ICAE, settings: dict[str, Any], results: Any) -> None:
    """Write one evaluation's results as JSON, with their provenance.

    Raises
    ------
    ICAEError
        If the file cannot be written.
    """
    path = make_room(path)
    report = {
        "name": name,
        "checkpoint": checkpoint,
        "settings": settings,
        "results": results,
        "adapter": model.origin.adapter,
        "polish_rates": POLISH_RATES,
        "base": model.config.base,
        "base_fingerprint": model.config.base_fingerprint,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
    }
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())


def commit() -> str:
    """Return the commit of the checkout that this package runs from, with a + where files were changed since; '' outside of one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # a repository around an installed package is somebody else's
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", str(here)) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    """Return what the figures were computed on, in words."""
    import torch

    cores = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return ", ".join([cores, *([torch.cuda.get_device_name()] if torch.cuda.is_available() else []), software])
