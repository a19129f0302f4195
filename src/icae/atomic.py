"""Files that are written whole or not at all: whatever fails on the way, what stood there before survives."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from icae.errors import ICAEError


def write_atomically(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write `data` to `path` so that the old content survives any failure; parameters and errors as for `write_together`."""
    write_together({path: data}, mode=mode)


def write_together(files: Mapping[Path, bytes], *, mode: int | None = None) -> None:
    """Write files that belong together: all of them to temporary neighbours first, and only then each under its name.

    Parameters
    ----------
    files : mapping of Path to bytes
        What each is to hold.
    mode : int, optional
        Permissions; none: those of the file that stood there, of a new one what the process's umask leaves.

    Raises
    ------
    ICAEError
        If a folder is missing or not writable, or the disk is full; every old file is then as it was. Where it fails later, which no disk
        should, the message names what was replaced.
    """
    made: dict[Path, Path] = {}
    path = next(iter(files))
    replaced: list[str] = []
    try:
        for path, data in files.items():
            if path.is_dir():
                raise IsADirectoryError(0, "there is a folder of that name")
            with neighbour(path, mode) as (made[path], file):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in made.items():
            os.replace(temporary, path)
            replaced.append(path.name)
    except OSError as error:
        done = f"only {', '.join(replaced)} was written" if replaced else "nothing was changed"
        raise ICAEError(f"could not write {path}: {error.strerror or error}; {done}") from error
    finally:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def neighbour(path: Path, mode: int | None = None) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new file beside `path`, with the permissions that `path` is to have (see `write_together`), and where it is."""
    begin = os.fsencode(path.name)[:200].decode(errors="ignore")  # file systems count bytes
    temporary = path.with_name(f".{begin}.{secrets.token_hex(8)}")
    with open(temporary, "xb") as file:
        if mode is not None or path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode) if mode is None else mode)
        yield temporary, file


def make_room(path: str | Path) -> Path:
    """Make the folder of a file that is to be written, and return the file; before hours are spent on what goes into it.

    Raises
    ------
    ICAEError
        If the folder cannot be made or written to, or there is another one in the file's place.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, f"{path.name} is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        raise ICAEError(f"nothing can be written to {path.parent}: {error.strerror or error}; name another file") from error
    return path


def check_apart(path: Path, source: str) -> None:
    """Raise `ICAEError` where a file that is to be written is what is read: the source itself, or a text in its folder."""
    read = Path(source)
    if path.exists() and read.exists() and (path.samefile(read) or (path.suffix == ".txt" and read.resolve() in path.resolve().parents)):
        raise ICAEError(f"{path} is the data itself; write to another file")
