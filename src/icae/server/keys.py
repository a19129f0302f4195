"""API keys: random tokens, of which only hashes are kept, each the way into one namespace. Knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from pathlib import Path

from icae.atomic import write_atomically
from icae.errors import ICAEError, StorageError

KEYS = "keys.json"
"""The file of a server's keys, in its store's folder."""
PREFIX = "icae_"
"""What every key begins with."""


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
        except FileNotFoundError:
            self._rows, self._read_at = [], None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"the key file {self.path} is damaged ({error}); delete it and make new keys") from error
        return self._rows

    def add(self, name: str, *, alone: bool = False) -> str:
        """Make a key for the namespace `name` and return it, the only time that it is seen.

        Several keys may have one name; `alone` takes the others of that name away in the same moment.
        """
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise ICAEError(f"a key's name has 1 to 100 printable characters, got {name[:40]!r}")
        key = PREFIX + secrets.token_urlsafe(32)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kept = [row for row in self.rows() if not alone or row["name"] != name]
        self._write([*kept, {"name": name, "sha256": _hash(key), "made": made}])
        return key

    def remove(self, name: str) -> int:
        """Take all keys of a name away, and return how many they were; raises `ICAEError` if there are none."""
        left = [row for row in self.rows() if row["name"] != name]
        gone = len(self.rows()) - len(left)
        if not gone:
            names = ", ".join(sorted({row["name"] for row in self.rows()}))
            raise ICAEError(f"no key is named {name!r}; there are {names or 'none'}")
        self._write(left)
        return gone

    def check(self, key: str) -> str | None:
        """Return the name of a key, or none; every stored hash is compared, in constant time, wherever a match stands."""
        given, found = _hash(key), None
        for row in self.rows():
            if hmac.compare_digest(row["sha256"], given):
                found = row["name"]
        return found

    def _write(self, rows: list[dict[str, str]]) -> None:
        write_atomically(self.path, (json.dumps(rows, indent=2) + "\n").encode(), mode=0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
