"""Where a store's slots lie: one safetensors file a chapter, in a local folder or behind any fsspec URL. Knows no names, no catalogue.

A blob is what `MemorySlots.save` writes, the chapter's token ids always among it. Packing chooses how numbers are kept:

    float32, float16, bfloat16     as they are, in that type
    int8                           whole numbers and a float32 scale for each channel (the largest of the chapter's slots / 127)
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from icae.errors import ICAEError, StorageError, reason
from icae.slots import MemorySlots

DTYPES = ("float16", "bfloat16", "float32", "int8")
_SCALE = ".scale"
CLAIM = "store-id"
"""The file in a place for blobs that says whose they are."""
_KEY = re.compile(r"[0-9a-f]{64}")
_BLOB = re.compile(rf"({_KEY.pattern})\.safetensors")
_NEIGHBOUR = re.compile(rf"\.{_BLOB.pattern}\.[0-9a-f]{{16}}")
"""What a blob is called while it is written (atomic.py)."""
_PART = re.compile(rf"{_BLOB.pattern}\.\d+\.part")
"""What a blob is called while it goes up."""


def pack(slots: MemorySlots, ids: list[int], dtype: str) -> MemorySlots:
    """Return slots as they are stored: in `dtype`, with the token ids (int32) they stand for.

    Raises
    ------
    ICAEError
        If `dtype` is none of `DTYPES`, or a number is too large for it.
    """
    if dtype not in DTYPES:
        raise ICAEError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensors = {}
    for name, t in slots.tensors.items():
        t = t.detach().float().cpu()
        if dtype == "int8":
            scale = t.abs().amax(0, keepdim=True).clamp(min=1e-12) / 127
            tensors[name + _SCALE] = scale
            tensors[name] = (t / scale).round().to(torch.int8)
        else:
            tensors[name] = t.to(getattr(torch, dtype))
        if not all(torch.isfinite(tensors[n]).all() for n in (name, name + _SCALE) if n in tensors):
            raise ICAEError(f"the slots' {name} do not fit into {dtype}; store them as bfloat16 or float32")
    return dataclasses.replace(slots, tensors=tensors, ids=torch.tensor(ids, dtype=torch.int32))


def unpack(packed: MemorySlots) -> tuple[MemorySlots, list[int]]:
    """Undo `pack`: the slots (int8 becomes float16) and the token ids."""
    tensors = dict(packed.tensors)
    if packed.ids is None:
        raise KeyError("token_ids")
    for name in [n for n in tensors if n.endswith(_SCALE)]:
        scale, plain = tensors.pop(name), name.removesuffix(_SCALE)
        tensors[plain] = (tensors[plain].float() * scale).to(torch.float16)
    return dataclasses.replace(packed, tensors=tensors), packed.ids.tolist()


class Blobs(Protocol):
    """Blobs by key (64 hexadecimal digits). Where the place cannot be reached, whatever is asked raises `StorageError`."""

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob, whole or not at all; return its bytes."""

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified; raises `ICAEError`, and no `StorageError`, if it is missing or damaged."""

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""

    def old(self, seconds: float) -> Iterator[str]:
        """Yield the keys of blobs older than `seconds`, and clear away what writers that died left behind; other files stay."""

    def claim(self, owner: str) -> None:
        """Note that the place is a store's own, by its id; raises `ICAEError` if it is another's."""


def open_blobs(place: str | Path) -> Blobs:
    """Return the blobs in a local folder, or at an fsspec URL such as `s3://bucket/slots`.

    Raises
    ------
    ICAEError
        If the URL needs a package that is not installed, or is of no kind that fsspec knows.
    """
    return RemoteBlobs(str(place)) if "://" in str(place) else FolderBlobs(Path(place))


def _file(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ICAEError(f"{key!r} is no blob key")
    return f"{key[:2]}/{key}.safetensors"


@contextmanager
def _reaching(place: object) -> Iterator[None]:
    """Turn a file system's own errors, of whatever kind, into one `StorageError` that names the place."""
    try:
        yield
    except ICAEError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise StorageError(str(error)) from error
        raise
    except Exception as error:
        said = getattr(error, "strerror", None) or reason(error)
        raise StorageError(f"the slots at {place} cannot be reached ({said}); see that they can, then try again") from error


def _check_claim(place: object, found: str, owner: str) -> None:
    if found.strip() != owner:
        raise ICAEError(
            f"another store keeps its slots at {place}, and each would clear the other's away; name another place, or delete "
            f"{CLAIM} there if that store is gone"
        )


class FolderBlobs:
    """Blobs in a local folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob: to a neighbouring file first, which then takes the name."""
        path = self.folder / _file(key)
        with _reaching(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            packed.save(path)
            return path.stat().st_size

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified."""
        path = self.folder / _file(key)
        with _reaching(self.folder):
            try:
                with open(path, "rb") as file:  # safetensors does not tell a file that may not be read from one that is not there
                    file.read(1)
            except FileNotFoundError:
                self.folder.stat()
                raise ICAEError(f"blob {key[:12]} is not at {self.folder} any more") from None
            return MemorySlots.load(path)

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""
        with _reaching(self.folder):
            return [key for key in keys if not (self.folder / _file(key)).exists()]

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""
        with _reaching(self.folder):
            (self.folder / _file(key)).unlink(missing_ok=True)

    def old(self, seconds: float) -> Iterator[str]:
        """Yield old blobs' keys; unlink old temporary files."""
        before = time.time() - seconds
        with _reaching(self.folder):
            for path in self.folder.glob("??/*"):
                blob, left = _BLOB.fullmatch(path.name), _NEIGHBOUR.fullmatch(path.name)
                with suppress(FileNotFoundError):
                    if not (blob or left) or not path.is_file() or path.stat().st_mtime > before:
                        continue
                    if left:
                        path.unlink()
                if blob:
                    yield blob[1]

    def claim(self, owner: str) -> None:
        """Note that the folder is a store's own."""
        path = self.folder / CLAIM
        with _reaching(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(path, "x") as file:
                    file.write(owner)
            except FileExistsError:
                _check_claim(self.folder, path.read_text(errors="replace"), owner)


class RemoteBlobs:
    """Blobs behind an fsspec URL. Each goes up under its own name in one piece, or, where the file system can, by a rename."""

    def __init__(self, url: str):
        try:
            import fsspec

            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ICAEError(f"cannot open {url!r} ({error}); install icae[serve] and the file system's own package") from error
        self.root = self.root.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self.root}/{_file(key)}"

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob: written locally, uploaded under another name, then renamed."""
        path = self._path(key)
        with _reaching(self.root), tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "blob"
            packed.save(local)
            mark = f"{path}.{time.time_ns()}.part"
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self.fs.put_file(str(local), mark)
            self.fs.mv(mark, path)
            return local.stat().st_size

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified."""
        with _reaching(self.root), tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "blob"
            try:
                self.fs.get_file(self._path(key), str(local))
            except FileNotFoundError:
                raise ICAEError(f"blob {key[:12]} is not at {self.root} any more") from None
            return MemorySlots.load(local)

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""
        with _reaching(self.root):
            return [key for key in keys if not self._there(self._path(key))]

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""
        with _reaching(self.root), suppress(FileNotFoundError):
            if self._there(self._path(key)):
                self.fs.rm_file(self._path(key))

    def old(self, seconds: float) -> Iterator[str]:
        """Yield old blobs' keys; delete old halves of uploads."""
        before = time.time() - seconds
        with _reaching(self.root):
            for path, about in self.fs.find(self.root, detail=True).items():
                made: Any = about.get("mtime") or about.get("created") or about.get("LastModified")
                made = made.timestamp() if hasattr(made, "timestamp") else made
                if made is None or made > before:
                    continue
                name = path.rsplit("/", 1)[-1]
                if blob := _BLOB.fullmatch(name):
                    yield blob[1]
                elif _PART.fullmatch(name):
                    self.fs.rm_file(path)

    def claim(self, owner: str) -> None:
        """Note that the place is a store's own; read back, since of two that claim at once the last one's note stays."""
        path = f"{self.root}/{CLAIM}"
        with _reaching(self.root):
            if not self._there(path):
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.pipe_file(path, owner.encode())
            _check_claim(self.root, self.fs.cat_file(path).decode(errors="replace"), owner)

    def _there(self, path: str) -> bool:
        """Tell whether a file is there; `fs.exists` takes a place that is down for one without the file."""
        try:
            self.fs.info(path)
        except FileNotFoundError:
            return False
        return True
