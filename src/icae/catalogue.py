"""A store's catalogue: names -> contents -> blobs, in SQLite (WAL), for any number of processes at once. Knows no tensor and no blob.

    names (namespace, name) -- id, source --> entries -- in order --> parts --> blobs (key, bytes, tokens, slots)

The rules that make a kill harmless: a blob is written before the row that lists it; all rows of an entry come in one transaction;
a blob's row goes before its file. Files are deleted only under the write lock, and a writer looks for its files under that same lock
before it commits: what is listed is there.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icae.errors import ICAEError, StorageError

VERSION = 1
"""Version of the tables; a store of another version is refused."""

USED_GRAIN = 1.0
"""A use is noted when the last one noted is at least so many seconds ago."""

AT_ONCE = 16
"""Files that are deleted under one lock."""

KEY = "key/"
"""What the namespace of an API key's name begins with."""

_TABLES = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE blobs (
    key TEXT PRIMARY KEY, bytes INTEGER NOT NULL, tokens INTEGER NOT NULL, slots INTEGER NOT NULL, segments INTEGER NOT NULL);
CREATE TABLE entries (id TEXT PRIMARY KEY, about TEXT NOT NULL, made REAL NOT NULL, used REAL NOT NULL);
CREATE TABLE parts (
    entry TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, place INTEGER NOT NULL, blob TEXT NOT NULL REFERENCES blobs,
    PRIMARY KEY (entry, place));
CREATE INDEX parts_by_blob ON parts (blob);
CREATE TABLE names (
    namespace TEXT NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
    entry TEXT NOT NULL REFERENCES entries ON DELETE CASCADE, source TEXT NOT NULL, made REAL NOT NULL,
    PRIMARY KEY (namespace, name));
CREATE INDEX names_by_entry ON names (entry);
CREATE TABLE trash (key TEXT PRIMARY KEY);
"""

_SELECT = """
SELECT n.namespace, n.name, n.id, n.entry, n.source, n.made, e.used, e.about,
       SUM(b.tokens) AS tokens, SUM(b.slots) AS slots, SUM(b.segments) AS segments, COUNT(*) AS chapters, SUM(b.bytes) AS bytes
FROM names n JOIN entries e ON e.id = n.entry JOIN parts p ON p.entry = e.id JOIN blobs b ON b.key = p.blob
"""


def namespace_of(key: str) -> str:
    """Return the namespace of an API key's name; none: that of the command line and of a server without keys."""
    return f"{KEY}{key}" if key else ""


class Busy(StorageError):
    """Another process holds the catalogue's lock."""


@dataclass(frozen=True)
class Blob:
    """What the catalogue knows of one blob."""

    key: str
    bytes: int
    tokens: int
    slots: int
    segments: int


@dataclass(frozen=True)
class Entry:
    """One name in a store, and the content it points at."""

    namespace: str
    name: str
    id: str
    """A random handle of this name's content; it changes when the name is given another content."""
    entry: str
    """Hash of the content: the same for equal texts compressed alike, whatever their names."""
    source: str
    """Where the text came from, in the words of who added it."""
    made: float
    """Seconds since 1970, as `used`."""
    used: float
    tokens: int
    slots: int
    segments: int
    chapters: int
    bytes: int
    """Of its blobs; contents that share a chapter both count it."""
    about: dict[str, Any]
    """What made it: base, adapter, kind, ratio, layout, dtype."""


class Catalogue:
    """The tables of one store."""

    def __init__(self, path: Path, *, wait: float = 30.0):
        """Open the catalogue at `path`, making it if need be; operations wait up to `wait` seconds for another process."""
        self.path, self.wait = path, wait
        from filelock import FileLock

        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(str(path) + ".lock", timeout=wait), self._connected() as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
                elif version != VERSION:
                    raise ICAEError(f"the store {path.parent} is of version {version}, this version reads {VERSION}; make a new one")
        except (OSError, StorageError) as error:
            raise ICAEError(f"{path.parent} is no store and cannot become one: {error}") from error

    def fixed(self, name: str) -> str | None:
        """Return a setting of the store; none: it has no such one yet."""
        with self._connected() as db:
            found = db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            return found[0] if found else None

    def setting(self, name: str, default: str) -> str:
        """Return a setting of the store, fixed to `default` by the first who asks."""
        if (found := self.fixed(name)) is not None:
            return found
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, default))
            return db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0]

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """Return the bytes of those blobs of `keys` that are listed."""
        with self._connected() as db:
            rows = ((k, db.execute("SELECT bytes FROM blobs WHERE key = ?", (k,)).fetchone()) for k in keys)
            return {key: row[0] for key, row in rows if row}

    def commit(
        self,
        namespace: str,
        name: str,
        content: str,
        keys: list[str],
        fresh: Iterable[Blob],
        *,
        about: dict[str, Any],
        source: str,
        missing: Callable[[list[str]], list[str]],
        wait: float | None = None,
    ) -> list[str]:
        """List a finished entry under a name, all or nothing.

        Parameters
        ----------
        namespace, name : str
            The name; if it pointed elsewhere, that content is dropped where no other name keeps it.
        content : str
            Hash of the content.
        keys : list of str
            Its blobs, in order.
        fresh : iterable of Blob
            Those of them that have just been written.
        about, source
            As in `Entry`.
        missing : callable
            Tells which of some keys have no file; asked under the write lock.
        wait : float, optional
            Seconds to wait for another process; none: the catalogue's own.

        Returns
        -------
        list of str
            Empty when done; else nothing was changed, and these blobs must be written first.

        Raises
        ------
        Busy
            If the wait was in vain.
        """
        now = time.time()
        with self._writing(wait) as db:
            rows = [(b.key, b.bytes, b.tokens, b.slots, b.segments) for b in fresh]
            db.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?, ?, ?)", rows)
            unlisted = [k for k in keys if not db.execute("SELECT 1 FROM blobs WHERE key = ?", (k,)).fetchone()]
            if gone := sorted({*unlisted, *missing(keys)}):
                db.rollback()
                return gone
            db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?)", (content, json.dumps(about), now, now))
            db.execute("UPDATE entries SET used = ? WHERE id = ?", (now, content))
            db.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?, ?)", [(content, i, k) for i, k in enumerate(keys)])
            old = db.execute("SELECT entry FROM names WHERE namespace = ? AND name = ?", (namespace, name)).fetchone()
            if old is None or old[0] != content:
                row = (namespace, name, secrets.token_hex(16), content, source, now)
                db.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?, ?, ?)", row)
                self._drop_unnamed(db)
            return []

    def entries(
        self, namespace: str | None = None, *, name: str | None = None, id: str | None = None, content: str | None = None
    ) -> list[Entry]:
        """Return entries by namespace (none: all), name, id or content, in order of name."""
        wanted = {"n.namespace": namespace, "n.name": name, "n.id": id, "n.entry": content}
        wanted = {column: value for column, value in wanted.items() if value is not None}
        where = "WHERE " + " AND ".join(f"{column} = ?" for column in wanted) if wanted else ""
        with self._connected() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute(f"{_SELECT} {where} GROUP BY n.namespace, n.name ORDER BY n.namespace, n.name", list(wanted.values()))
            return [Entry(**{**dict(r), "about": json.loads(r["about"])}) for r in rows]

    def parts(self, content: str) -> list[str]:
        """Return the blobs of a content, in order; empty if it is not listed."""
        with self._connected() as db:
            return [k for (k,) in db.execute("SELECT blob FROM parts WHERE entry = ? ORDER BY place", (content,))]

    def segments(self, content: str) -> int:
        """Return how many segments a content has; 0 if it is not listed."""
        with self._connected() as db:
            asked = "SELECT COALESCE(SUM(segments), 0) FROM parts JOIN blobs ON blobs.key = parts.blob WHERE entry = ?"
            return db.execute(asked, (content,)).fetchone()[0]

    def blobs(self) -> list[Blob]:
        """Return all listed blobs."""
        with self._connected() as db:
            return [Blob(*row) for row in db.execute("SELECT * FROM blobs ORDER BY key")]

    def touch(self, content: str) -> None:
        """Note that a content was used now; left out where another process holds the lock."""
        now = time.time()
        try:
            with self._connected() as db:
                if db.execute("SELECT 1 FROM entries WHERE id = ? AND used > ?", (content, now - USED_GRAIN)).fetchone():
                    return
            with self._writing(wait=0.05) as db:
                db.execute("UPDATE entries SET used = ? WHERE id = ?", (now, content))
        except StorageError:
            pass

    def unname(self, namespace: str, name: str) -> bool:
        """Take a name away, and its content where no other name keeps it; tell whether it was there."""
        with self._writing() as db:
            found = db.execute("DELETE FROM names WHERE namespace = ? AND name = ?", (namespace, name)).rowcount
            self._drop_unnamed(db)
            return bool(found)

    def evict(self, max_bytes: int, *, wait: float | None = None) -> list[tuple[str, str]]:
        """Drop the contents used longest ago until the blobs are at most `max_bytes`; return the (namespace, name) pairs that went."""
        gone: list[tuple[str, str]] = []
        with self._writing(wait) as db:
            for (content,) in db.execute("SELECT id FROM entries ORDER BY used, id").fetchall():
                if db.execute("SELECT COALESCE(SUM(bytes), 0) FROM blobs").fetchone()[0] <= max_bytes:
                    break
                gone += db.execute("SELECT namespace, name FROM names WHERE entry = ?", (content,)).fetchall()
                db.execute("DELETE FROM names WHERE entry = ?", (content,))
                self._drop_unnamed(db)
        return gone

    def disown(self, key: str) -> None:
        """Drop every content that has the blob `key`, with its names."""
        with self._writing() as db:
            having = "SELECT entry FROM parts WHERE blob = ?"
            db.execute(f"DELETE FROM names WHERE entry IN ({having})", (key,))
            self._drop_unnamed(db)

    def sweep(self, remove: Callable[[str], None], orphans: Iterable[str] = (), *, wait: float | None = None) -> int:
        """Delete files that no row lists: those of dropped contents, and those of `orphans` that are none's; return how many.

        A few at a time, with the lock let go between: files may lie on a slow file system, and others wait to write.
        """
        with self._connected(wait) as db:
            listed = {k for (k,) in db.execute("SELECT key FROM blobs")}
            trash = [k for (k,) in db.execute("SELECT key FROM trash")]
            keys = list(dict.fromkeys([*trash, *(k for k in orphans if k not in listed)]))
        gone = 0
        for at in range(0, len(keys), AT_ONCE):
            with self._writing(wait) as db:
                for key in keys[at : at + AT_ONCE]:
                    if not db.execute("SELECT 1 FROM blobs WHERE key = ?", (key,)).fetchone():
                        remove(key)
                        gone += 1
                    db.execute("DELETE FROM trash WHERE key = ?", (key,))
        return gone

    @staticmethod
    def _drop_unnamed(db: sqlite3.Connection) -> None:
        """Drop contents without a name, then blobs without a content; their files go to the trash list."""
        db.execute("DELETE FROM entries WHERE id NOT IN (SELECT entry FROM names)")
        unused = "FROM blobs WHERE key NOT IN (SELECT blob FROM parts)"
        db.execute(f"INSERT OR IGNORE INTO trash SELECT key {unused}")
        db.execute(f"DELETE {unused}")

    @contextmanager
    def _connected(self, wait: float | None = None) -> Iterator[sqlite3.Connection]:
        """Yield a connection of this operation's own, so that threads and forks share nothing; SQLite's errors become `StorageError`."""
        try:
            with closing(sqlite3.connect(self.path, timeout=self.wait if wait is None else wait, isolation_level=None)) as db:
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise Busy(f"another process holds the store's catalogue {self.path}; try again") from error
            raise StorageError(f"the store's catalogue {self.path} cannot be read or written: {error}") from error

    @contextmanager
    def _writing(self, wait: float | None = None) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a write transaction, committed at the end unless it was rolled back or an error flies."""
        with self._connected(wait) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.rollback()
                raise
            if db.in_transaction:
                db.commit()
