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
from pathlib import Path
from typing import Any, Protocol

import torch

from icae.errors import ICAEError
from icae.slots import MemorySlots

DTYPES = ("float16", "bfloat16", "float32", "int8")
_SCALE = ".scale"
_KEY = re.compile(r"[0-9a-f]{64}")


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
    """Blobs by key (64 hexadecimal digits)."""

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob, whole or not at all; return its bytes."""

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified; raises `ICAEError` if it is missing or damaged."""

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""

    def old(self, seconds: float) -> Iterator[str]:
        """Yield the keys of blobs older than `seconds`, and clear away what writers that died left behind."""


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


class FolderBlobs:
    """Blobs in a local folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob: to a neighbouring file first, which then takes the name."""
        path = self.folder / _file(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ICAEError(f"could not write to the store {self.folder}: {error.strerror or error}") from error
        packed.save(path)
        return path.stat().st_size

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified."""
        return MemorySlots.load(self.folder / _file(key))

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""
        return [key for key in keys if not (self.folder / _file(key)).exists()]

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""
        (self.folder / _file(key)).unlink(missing_ok=True)

    def old(self, seconds: float) -> Iterator[str]:
        """Yield old blobs' keys; unlink old temporary files."""
        before = time.time() - seconds
        for path in self.folder.glob("??/*"):
            try:
                if path.stat().st_mtime > before:
                    continue
            except FileNotFoundError:
                continue
            if _KEY.fullmatch(path.stem):
                yield path.stem
            else:
                path.unlink(missing_ok=True)


class RemoteBlobs:
    """Blobs behind an fsspec URL. Each goes up under its own name in one piece, or, where the file system can, by a rename."""

    def __init__(self, url: str):
        try:
            import fsspec

            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ICAEError(f"cannot open {url!r} ({error}); install icae[serve] and the file system's own package") from error

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{_file(key)}"

    def write(self, key: str, packed: MemorySlots) -> int:
        """Store a blob: written locally, uploaded under another name, then renamed."""
        path = self._path(key)
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "blob"
            packed.save(local)
            mark = f"{path}.{time.time_ns()}.part"
            with self._named(key):
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self.fs.put_file(str(local), mark)
                self.fs.mv(mark, path)
            return local.stat().st_size

    def read(self, key: str) -> MemorySlots:
        """Return a blob, its checksum verified."""
        with tempfile.TemporaryDirectory() as scratch:
            local = Path(scratch) / "blob"
            with self._named(key):
                self.fs.get_file(self._path(key), str(local))
            return MemorySlots.load(local)

    def missing(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that are not there."""
        return [key for key in keys if not self.fs.exists(self._path(key))]

    def remove(self, key: str) -> None:
        """Delete a blob, if it is there."""
        if self.fs.exists(self._path(key)):
            self.fs.rm_file(self._path(key))

    def old(self, seconds: float) -> Iterator[str]:
        """Yield old blobs' keys; delete old halves of uploads."""
        before = time.time() - seconds
        for path, about in self.fs.find(self.root, detail=True).items():
            made: Any = about.get("mtime") or about.get("created") or about.get("LastModified")
            made = made.timestamp() if hasattr(made, "timestamp") else made
            if made is None or made > before:
                continue
            stem = path.rsplit("/", 1)[-1].split(".", 1)
            if _KEY.fullmatch(stem[0]) and stem[1] == "safetensors":
                yield stem[0]
            elif path.endswith(".part"):
                self.fs.rm_file(path)

    def _named(self, key: str) -> Any:
        """Turn a file system's own errors, of whatever kind, into one that names the blob."""
        return _Named(self.root, key)


@dataclasses.dataclass
class _Named:
    root: str
    key: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ICAEError(f"blob {self.key[:12]} at {self.root} is not to be had ({reason}); check the store's URL") from error
