"""Contexts compressed once and kept: text -> chapters -> blobs, found again by what made them. Knows no prompt and no decoder.

    FOLDER/
    catalogue.sqlite       names, contents, blobs' sizes and last use (catalogue.py)
    blobs/ab/KEY           slots of one chapter (blobs.py), or behind an fsspec URL

A blob's key is the hash of all that decides its slots: token ids, base, adapter, kind, ratio, layout, steps of polishing, segment
length, dtype, format.
A content is a list of keys, a name points at a content. Equal chapters are compressed and kept once, whoever asks, under any name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from icae.base import cache_folder
from icae.blobs import DTYPES, Blobs, open_blobs, pack, unpack
from icae.catalogue import KEY, Blob, Busy, Catalogue, Entry
from icae.chapters import chapters
from icae.config import FORMAT_VERSION, POLISH_RATES
from icae.errors import ICAEError, StorageError
from icae.segments import check_ratio, cut
from icae.slots import MemorySlots, Origin
from icae.stepwise import finished, saying

DECISIVE = ("base_fingerprint", "adapter", "kind", "ratio", "layout", "polish", "polish_rates", "segment_length", "dtype")
"""What decides, beside the token ids, which slots a chapter becomes."""
ORPHAN_SECONDS = 3600
"""Age at which a file that no row lists is taken for a dead writer's, in seconds."""
SHORT_WAIT = 0.05
"""Seconds that whoever adds a text waits for another process at once, before other work goes between."""

T = TypeVar("T")


class Gone(ICAEError):
    """A content is no longer in the store."""


class Compressor(Protocol):
    """What a store needs of an `ICAE`."""

    base: Any
    config: Any

    def origin_at(self, ratio: int) -> Origin:
        """Tell all that decides what the slots of a text are."""

    def compressing(self, rows: Any, *, ratio: int | None = None, batch_size: int = 8) -> Generator[int, None, list[MemorySlots]]:
        """Compress segments of token ids, each alone, step by step."""


@dataclass(frozen=True)
class Added:
    """What adding a text did."""

    entry: Entry
    fresh: int
    """Chapters that the store did not list: compressed, or found as files that an interrupted adding had finished."""


class SlotStore:
    """Memory slots on disk, by name and by content."""

    def __init__(self, folder: str | Path | None = None, *, blobs: str | None = None):
        """Open a store, making it if need be.

        Parameters
        ----------
        folder : str or Path, optional
            Where the catalogue is; none: `store` in the user's cache folder.
        blobs : str, optional
            Local folder or fsspec URL of the slots, decided when the store is made; none: where they are, or `blobs` beside it.

        Raises
        ------
        ICAEError
            If the folder cannot be written, the store was made with other `blobs`, or another store was made with these.
        """
        self.folder = Path(folder) if folder is not None else cache_folder() / "store"
        self.catalogue = Catalogue(self.folder / "catalogue.sqlite")
        if blobs is not None and self.catalogue.fixed("blobs") is None:
            self._at(blobs).claim(self.catalogue.setting("id", secrets.token_hex(16)))
        place = self.catalogue.setting("blobs", blobs or "blobs")
        if blobs is not None and place != blobs:
            raise ICAEError(f"the store {self.folder} keeps its slots in {place!r}, not in {blobs!r}; leave that option away")
        self.blobs = self._at(place)

    def _at(self, place: str) -> Blobs:
        return open_blobs(place if "://" in place else self.folder / place)

    # ---- writing ----

    def add(
        self, model: Compressor, text: str, name: str | None = None, *, progress: Callable[[int, int], None] | None = None, **kw: Any
    ) -> Added:
        """Compress a text, chapters that are there already left out, and give it a name; arguments and errors as for `adding`."""
        steps = self.adding(model, model.base.encode(text), name, **kw)
        return finished(steps, None if progress is None else lambda counts: progress(*counts))

    def adding(
        self,
        model: Compressor,
        ids: list[int],
        name: str | None = None,
        *,
        namespace: str = "",
        source: str = "",
        ratio: int | None = None,
        dtype: str = "float16",
        batch_size: int = 8,
        most: int | None = None,
    ) -> Generator[tuple[int, int], None, Added]:
        """Add a text step by step (`ICAE.compressing`), so that other work may go between.

        Parameters
        ----------
        model : ICAE
            The encoder.
        ids : list of int
            The text's token ids.
        name : str, optional
            What to call it; none: after its content.
        namespace : str
            Names of one namespace are unknown in another; contents are shared.
        source : str
            Where the text came from, for people.
        ratio : int, optional
            Context tokens a slot; none: the checkpoint's own.
        dtype : str
            One of `icae.blobs.DTYPES`.
        batch_size : int
            Segments encoded at once.
        most : int, optional
            Bytes that its slots may take.

        Yields
        ------
        (int, int)
            Segments done, and segments to do in all.

        Returns
        -------
        Added
            As the generator's value. Until then nothing is listed.

        Raises
        ------
        ICAEError
            If the text is too short, its slots take more than `most`, or `name`, `ratio` or `dtype` is out of range; `StorageError` if the
            slots cannot be written.
        """
        if dtype not in DTYPES:
            raise ICAEError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if name is not None:
            check_name(name)
        check_ratio(ratio)
        length, ratio = model.config.segment_length, model.config.ratio if ratio is None else ratio
        newlines = {i: n for i in set(ids) if (n := model.base.decode([i]).count("\n"))}
        rows = [ids[a:b] for a, b in chapters(ids, length, newlines)]
        origin = model.origin_at(ratio)
        rates = POLISH_RATES if origin.polish else {}
        about = {**dataclasses.asdict(origin), "polish_rates": rates, "segment_length": length, "dtype": dtype}
        keys = [blob_key(row, about) for row in rows]
        content = content_hash(keys)
        todo, fresh = {k: row for k, row in zip(keys, rows, strict=True)}, {}
        for key in (sizes := self.catalogue.sizes(todo)):
            del todo[key]
        done, total = 0, sum(len(cut(len(row), length, ratio)) for row in todo.values())

        def told(more: int) -> tuple[int, int]:
            return done + more, max(done + more, total)

        while True:
            for key, row in todo.items():
                pieces, made = [row[a:b] for a, b in cut(len(row), length, ratio)], []
                if (packed := self._finished(key, row)) is not None:
                    done += len(pieces)
                    yield told(0)
                else:
                    for at in range(0, len(pieces), batch_size):
                        made += yield from saying(told, model.compressing(pieces[at : at + batch_size], ratio=ratio, batch_size=batch_size))
                        done += len(pieces[at : at + batch_size])
                    packed = pack(MemorySlots.concatenate(made, same=True), row, dtype)
                sizes[key] = self.blobs.write(key, packed)
                fresh[key] = Blob(key, sizes[key], packed.tokens, packed.count, len(packed.segments))
            if most is not None and (size := sum(sizes[key] for key in keys)) > most:
                self.catalogue.sweep(self.blobs.remove, fresh)
                raise ICAEError(f"the text's slots take {size} bytes, the store may keep {most} (--limit store_bytes)")
            commit = partial(
                self.catalogue.commit,
                namespace,
                name or f"text-{content[:12]}",
                content,
                keys,
                list(fresh.values()),
                about=about,
                source=source,
                missing=self.blobs.missing,
            )
            gone = yield from saying(lambda _: told(0), self._patiently(commit))
            if not gone:
                return Added(self.entry(name or f"text-{content[:12]}", namespace), len(fresh))
            todo = {k: row for k, row in zip(keys, rows, strict=True) if k in gone}  # dropped by another process meanwhile

    # ---- reading ----

    def entry(self, name: str, namespace: str = "") -> Entry:
        """Return the entry of a name.

        Raises
        ------
        ICAEError
            If there is no such name.
        """
        for found in self.catalogue.entries(namespace, name=name):
            return found
        raise ICAEError(f"no context {name!r} in the store; `icae store ls{_of(namespace)}` lists what there is")

    def entries(self, namespace: str | None = "") -> list[Entry]:
        """Return the entries of a namespace (none: of all), in order of name."""
        return self.catalogue.entries(namespace)

    def load(self, name: str, namespace: str = "") -> MemorySlots:
        """Return the slots of a name, every checksum verified (int8 becomes float16).

        Raises
        ------
        ICAEError
            If there is no such name, `Gone` if there is no such content any more; `StorageError` if a blob of it is missing, damaged or
            out of reach.
        """
        return self.read(self.entry(name, namespace).entry)[0]

    def read(self, content: str) -> tuple[MemorySlots, list[int]]:
        """Return slots and token ids of a content, and note its use; errors as for `load`."""
        parts = self.catalogue.parts(content)
        if not parts:
            raise Gone("this context is no longer in the store; add it again")
        try:
            with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as several:  # reading and hashing let other threads run
                read = list(several.map(self._blob, parts))
        except StorageError:
            if self.catalogue.parts(content):
                raise
            raise Gone("this context is no longer in the store; add it again") from None
        self.catalogue.touch(content)
        return MemorySlots.concatenate([slots for slots, _ in read], same=True), [i for _, ids in read for i in ids]

    def _blob(self, key: str) -> tuple[MemorySlots, list[int]]:
        try:
            return unpack(self.blobs.read(key))
        except StorageError:
            raise
        except (ICAEError, KeyError) as error:
            raise StorageError(f"{error}; `icae store verify --drop` clears it away, then add the text again") from error

    def _finished(self, key: str, ids: list[int]) -> MemorySlots | None:
        """Return the blob of a chapter, as it is stored, that an interrupted adding had finished; its key vouches for all but the ids."""
        if self.blobs.missing([key]):
            return None
        try:
            packed = self.blobs.read(key)
        except StorageError:
            raise
        except (ICAEError, KeyError):
            return None
        return packed if packed.ids is not None and packed.ids.tolist() == ids else None

    # ---- keeping house ----

    def remove(self, name: str, namespace: str = "") -> None:
        """Take a name away, and its slots where no other name keeps them; raises `ICAEError` if there is no such name."""
        if not self.catalogue.unname(namespace, name):
            raise ICAEError(f"no context {name!r} in the store; `icae store ls{_of(namespace)}` lists what there is")
        self.catalogue.sweep(self.blobs.remove)

    def verify(self, *, drop: bool = False, progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
        """Read every blob and check it: there, whole, and made of the token ids that its key says.

        Parameters
        ----------
        drop : bool
            Take damaged blobs away with all names that need them, so that adding makes them anew.
        progress : callable, optional
            Called with (blobs done, blobs in all).

        Returns
        -------
        list of dict
            For each damaged blob its `key`, the `problem`, and the `names` that need it.

        Raises
        ------
        StorageError
            If blobs cannot be reached; nothing is dropped then.
        """
        bad: list[dict[str, Any]] = []
        listed, entries = self.catalogue.blobs(), self.catalogue.entries()
        users: dict[str, list[Entry]] = {}
        for e in entries:
            for key in self.catalogue.parts(e.entry):
                users.setdefault(key, []).append(e)
        for done, blob in enumerate(listed, 1):
            problem = self._problem(blob, users.get(blob.key, []))
            if problem is not None and self.catalogue.sizes([blob.key]):  # not removed by another process meanwhile
                bad.append({"key": blob.key, "problem": problem, "names": [e.name for e in users.get(blob.key, [])]})
            if progress is not None:
                progress(done, len(listed))
        if drop:
            for b in bad:
                self.catalogue.disown(b["key"])
            self.catalogue.sweep(self.blobs.remove)
        return bad

    def _problem(self, blob: Blob, users: list[Entry]) -> str | None:
        try:
            slots, ids = unpack(self.blobs.read(blob.key))
        except StorageError:
            raise
        except (ICAEError, KeyError) as error:
            return str(error)
        if slots.count != blob.slots or slots.tokens != len(ids):
            return f"it holds {slots.count} slots for {len(ids)} tokens, the catalogue says {blob.slots} for {blob.tokens}"
        if not all(set(DECISIVE) <= set(e.about) for e in users):
            return "an older version made it, which did not note all that decides its slots"
        if any(blob_key(ids, e.about) != blob.key for e in users):
            return "its token ids are not those that its key was made of"
        return None

    def gc(self, max_bytes: int | None = None) -> dict[str, Any]:
        """Clear away what nothing lists, and drop contents used longest ago; parameters, result and errors as for `clearing`."""
        return finished(self.clearing(max_bytes))

    def clearing(self, max_bytes: int | None = None) -> Generator[None, None, dict[str, Any]]:
        """Clear away what nothing lists, and drop contents used longest ago until `max_bytes` are kept.

        Yields where another process is waited for, so that other work may go between.

        Returns
        -------
        dict
            `removed` names, `files` deleted, `bytes` kept.

        Raises
        ------
        ICAEError
            If `max_bytes` is negative.
        """
        if max_bytes is not None and max_bytes < 0:
            raise ICAEError(f"max_bytes must be at least 0, got {max_bytes}")
        gone = [] if max_bytes is None else (yield from self._patiently(partial(self.catalogue.evict, max_bytes)))
        orphans = list(self.blobs.old(ORPHAN_SECONDS))
        files = yield from self._patiently(partial(self.catalogue.sweep, self.blobs.remove, orphans))
        return {"removed": [name for _, name in gone], "files": files, "bytes": sum(b.bytes for b in self.catalogue.blobs())}

    def _patiently(self, step: Callable[..., T]) -> Generator[None, None, T]:
        """Do what needs the catalogue's lock in short waits, with other work between them, for as long as the catalogue waits."""
        until = time.monotonic() + self.catalogue.wait
        while True:
            try:
                return step(wait=SHORT_WAIT)
            except Busy:
                if time.monotonic() > until:
                    raise
            yield


def check_name(name: str) -> None:
    """Raise `ICAEError` where a context cannot be called so."""
    if not name.strip() or len(name) > 400 or not name.isprintable():
        raise ICAEError(f"a name has 1 to 400 printable characters, got {name[:40]!r}")


def _of(namespace: str) -> str:
    return f" --key {namespace.removeprefix(KEY)}" if namespace else ""


def blob_key(ids: list[int], about: dict[str, Any]) -> str:
    """Return the key of a chapter's blob: the hash of its token ids and of all that decides what slots they become."""
    sha = hashlib.sha256(json.dumps([FORMAT_VERSION, {name: about[name] for name in DECISIVE}], sort_keys=True).encode())
    sha.update(b"".join(i.to_bytes(4, "little") for i in ids))
    return sha.hexdigest()


def content_hash(keys: list[str]) -> str:
    """Return the hash of a content: that of its blobs' keys, in order."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()
