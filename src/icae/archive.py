"""Contexts of a store <-> one file: a plain zip of blobs with a list of names, to carry from machine to machine.

    contexts.json            [{name, source, entry, about, parts: [key, ...]}, ...]
    blobs/KEY.safetensors    as in the store

Nothing in an archive names a path, and every blob is checked against its own checksum and key before the store lists it. A key
binds the token ids, not the numbers of the slots: import archives of people you trust.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from icae.atomic import neighbour
from icae.blobs import unpack
from icae.catalogue import Blob
from icae.errors import ICAEError
from icae.slots import MemorySlots, is_slot_file
from icae.store import DECISIVE, SlotStore, blob_key, check_name, content_hash

_LIST = "contexts.json"
_MAX_LIST = 64 << 20
"""Bytes of an archive's list, at most."""
_MAX_BLOB = 4 << 30
"""Bytes of one blob, at most."""


def check_place(path: Path) -> None:
    """Raise `ICAEError` where nothing is exported to: another kind of file, by its name or by what stands in it."""
    if path.suffix not in (".zip", ".safetensors"):
        raise ICAEError(f"{path} must end in .zip, or for one name in .safetensors: icae store export contexts.zip NAME")
    if path.is_file() and path.stat().st_size and not (zipfile.is_zipfile(path) or is_slot_file(path)):
        raise ICAEError(f"{path} is no archive and no slot file, and is not written over; name another file")


def export(store: SlotStore, path: str | Path, names: list[str] | None = None, *, namespace: str = "") -> int:
    """Write contexts to an archive, whole or not at all.

    Parameters
    ----------
    store : SlotStore
        Where they are.
    path : str or Path
        The archive to write.
    names : list of str, optional
        Which; none: all of the namespace.
    namespace : str
        Whose names.

    Returns
    -------
    int
        Contexts written.

    Raises
    ------
    ICAEError
        If a name is unknown, a blob is damaged, or the file cannot be written.
    """
    path = Path(path)
    entries = [store.entry(n, namespace) for n in names] if names else store.entries(namespace)
    rows: list[dict[str, Any]] = []
    for e in entries:
        parts = store.catalogue.parts(e.entry)
        rows.append({"name": e.name, "source": e.source, "entry": e.entry, "about": e.about, "parts": parts})
    temporary = None
    try:
        with neighbour(path) as (temporary, file), zipfile.ZipFile(file, "w") as archive, tempfile.TemporaryDirectory() as scratch:
            archive.writestr(_LIST, json.dumps(rows))
            for key in dict.fromkeys(k for row in rows for k in row["parts"]):
                blob = Path(scratch) / "blob"
                store.blobs.read(key).save(blob)
                archive.write(blob, f"blobs/{key}.safetensors")
        temporary.replace(path)
    except OSError as error:
        raise ICAEError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return len(rows)


def import_(store: SlotStore, path: str | Path, *, namespace: str = "") -> list[str]:
    """Take the contexts of an archive into a store; a name that is there already points at the archive's content then.

    Returns
    -------
    list of str
        The names.

    Raises
    ------
    ICAEError
        If the file is no archive, or any part of it is damaged; what came before that part is kept.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as scratch:
            if archive.getinfo(_LIST).file_size > _MAX_LIST:
                raise ValueError("its list is too long")
            rows = json.loads(archive.read(_LIST))
            return [_take(store, archive, Path(scratch) / "blob", row, namespace) for row in rows]
    except FileNotFoundError as error:
        raise ICAEError(f"no archive at {path}; make one with `icae store export {path}`") from error
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ICAEError(f"{path} is no archive of a store, or it is damaged ({error}); export it again") from error


def _take(store: SlotStore, archive: zipfile.ZipFile, scratch: Path, row: dict[str, Any], namespace: str) -> str:
    """List one context, its missing blobs written first."""
    name, keys, about, source = str(row["name"]), list(row["parts"]), dict(row["about"]), str(row["source"])
    try:
        check_name(name)
    except ICAEError as error:
        raise ValueError(error) from error
    source = "".join(c for c in source if c.isprintable())
    if not keys or content_hash(keys) != row["entry"]:
        raise ValueError(f"the parts of {name!r} are not those of its content")
    if missing := sorted(set(DECISIVE) - set(about)):
        raise ValueError(f"{name!r} does not tell its {', '.join(missing)}")
    fresh: dict[str, Blob] = {}
    known = set(store.catalogue.sizes(keys))
    todo = [k for k in keys if k not in known]
    if any(blob_key(unpack(store.blobs.read(k))[1], about) != k for k in known):
        raise ValueError(f"what the store has of {name!r} was made otherwise than it says")
    while True:
        for key in dict.fromkeys(todo):
            member = archive.getinfo(f"blobs/{key}.safetensors")
            if member.file_size > _MAX_BLOB:
                raise ValueError(f"blob {key[:12]} is too large")
            scratch.write_bytes(archive.read(member))
            try:
                packed = MemorySlots.load(scratch)
            except ICAEError as error:
                raise ValueError(f"blob {key[:12]} does not match its checksum") from error
            slots, ids = unpack(packed)
            if blob_key(ids, about) != key or slots.tokens != len(ids):
                raise ValueError(f"blob {key[:12]} is not what its key says")
            fresh[key] = Blob(key, store.blobs.write(key, packed), slots.tokens, slots.count, len(slots.segments))
        todo = store.catalogue.commit(
            namespace, name, row["entry"], keys, fresh.values(), about=about, source=source, missing=store.blobs.missing
        )
        if not todo:
            return name
