"""API keys: random tokens, of which only hashes are kept, each the way into one namespace. Knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icae.atomic import make_room, write_atomically
from icae.errors import ICAEError, StorageError

KEYS = "keys.json"
"""The file of a server's keys, in its store's folder."""
PREFIX = "icae_"
"""What every key begins with."""
WAIT = 30.0
"""Seconds that whoever changes the keys waits for another who does."""


class Keyring:
    """The keys in one file, read anew when it changes.

    A key has 256 random bits, so that a plain SHA-256 of it can neither be inverted nor guessed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._read_at: int | None = None
        self._rows: list[dict[str, str]] = []

    def rows(self) -> list[dict[str, str]]:
        """Return `name`, `sha256` and `made` of every key.

        Raises
        ------
        StorageError
            If the file is damaged: better nobody gets in than everybody.
        """
        try:
            changed = self.path.stat().st_mtime_ns
            if changed != self._read_at:
                rows = json.loads(self.path.read_text(encoding="utf-8"))
                self._rows = [{k: str(row[k]) for k in ("name", "sha256", "made")} for row in rows]
                self._read_at = changed
        except (FileNotFoundError, NotADirectoryError):
            self._rows, self._read_at = [], None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the key file {self.path} is damaged ({error}); delete it and make new keys") from error
        return self._rows

    @property
    def made(self) -> bool:
        """Whether there ever was a key: when the last one is taken away, the file stays. Errors as for `rows`."""
        self.rows()
        return self._read_at is not None

    def add(self, name: str, *, alone: bool = False) -> str:
        """Make a key for the namespace `name` and return it, the only time that it is seen.

        Several keys may have one name; `alone` takes the others of that name away in the same moment.
        """
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise ICAEError(f"a key's name has 1 to 100 printable characters, got {name[:40]!r}")
        key = PREFIX + secrets.token_urlsafe(32)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        make_room(self.path)
        with self._changing() as rows:
            kept = [row for row in rows if not alone or row["name"] != name]
            self._write([*kept, {"name": name, "sha256": _hash(key), "made": made}])
        return key

    def remove(self, name: str) -> int:
        """Take all keys of a name away, and return how many they were; raises `ICAEError` if there are none."""
        if not self.made:
            raise ICAEError(f"no key is named {name!r}; there are none")
        with self._changing() as rows:
            left = [row for row in rows if row["name"] != name]
            if len(left) == len(rows):
                names = ", ".join(sorted({row["name"] for row in rows}))
                raise ICAEError(f"no key is named {name!r}; there are {names or 'none'}")
            self._write(left)
        return len(rows) - len(left)

    def check(self, key: str) -> str | None:
        """Return the name of a key, or none; every stored hash is compared, in constant time, wherever a match stands."""
        given, found = _hash(key), None
        for row in self.rows():
            if hmac.compare_digest(row["sha256"], given):
                found = row["name"]
        return found

    @contextmanager
    def _changing(self) -> Iterator[list[dict[str, str]]]:
        """Yield the keys as they are now, and let nobody else change them meanwhile."""
        from filelock import FileLock

        try:
            with FileLock(f"{self.path}.lock", timeout=WAIT):
                yield Keyring(self.path).rows()
        except OSError as error:
            raise StorageError(f"the key file {self.path} cannot be changed now ({error.strerror or error}); try again") from error

    def _write(self, rows: list[dict[str, str]]) -> None:
        write_atomically(self.path, (json.dumps(rows, indent=2) + "\n").encode(), mode=0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
