"""Files that are written whole or not at all: whatever fails on the way, what stood there before survives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from icae.errors import ICAEError


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` so that the old content survives any failure; errors as for `write_together`."""
    write_together({path: data}, mode=mode)


def write_together(files: Mapping[Path, bytes], *, mode: int = 0o644) -> None:
    """Write files that belong together: all of them to temporary neighbours first, and only then each under its name, under `mode`.

    Raises
    ------
    ICAEError
        If a folder is missing or not writable, or the disk is full; every old file is then as it was.
    """
    made: dict[Path, Path] = {}
    path = next(iter(files))
    try:
        for path, data in files.items():
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                made[path] = Path(file.name)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(made[path], mode)
        for path, temporary in made.items():
            os.replace(temporary, path)
    except OSError as error:
        raise ICAEError(f"could not write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)
