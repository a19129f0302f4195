"""A .jsonl that is only ever appended to: what was paid for is on the disk at once, and a kill cuts short its last line at most.

Knows lines and rows, not what they mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from icae.errors import ICAEError

Kept = TypeVar("Kept")


def read(path: Path, keep: Callable[[Any], Kept], what: str) -> list[Kept]:
    """Return what `keep` takes of each row; a last line that a kill cut short is taken off the file, one that is whole is ended.

    A missing file has no rows.

    Raises
    ------
    ICAEError
        If the file cannot be read or mended, or a line of it is no `what`: no JSON, or `keep` raises ValueError, KeyError or TypeError.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise ICAEError(f"could not read {path}: {error.strerror}") from error
    whole = _is_row(last)  # as an editor leaves it, which ends no last line
    found = []
    for number, line in enumerate([*lines, last] if whole else lines, 1):
        try:
            found.append(keep(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ICAEError(f"{path}, line {number}: no {what}; mend or delete that line") from error
    if last:  # only now: what is no such file is left alone
        try:
            with path.open("ab") as file:
                _ = file.write(b"\n") if whole else file.truncate(file.tell() - len(last))
        except OSError as error:
            raise ICAEError(f"could not write {path}: {error.strerror}") from error
    return found


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def append(path: Path, row: dict[str, Any]) -> None:
    """Write one row to the disk, at once; half characters, as JSON can spell them, are written as question marks.

    Raises
    ------
    ICAEError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ICAEError(f"could not write {path}: {error.strerror}") from error
