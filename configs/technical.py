"""Gather technical and legal English that lies on any Debian with Python: `python configs/technical.py runs/technical`.

Books alone make an adapter that stumbles over manuals. What is gathered: the reference of Python's help(), docstrings and some source of
the standard library and the installed packages, their READMEs and licences, and Debian's common licences. One piece in twelve, chosen by a
hash of its text, goes to `dev` instead of `train`; a piece that stands twice counts once.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
MOST = 6_000_000
"""Characters of one kind, at most."""


def reference() -> Iterator[str]:
    """Yield the pages of Python's help()."""
    from pydoc_data.topics import topics

    yield from topics.values()


def docstrings() -> Iterator[str]:
    """Yield, for each module, its docstrings of two lines or more."""
    for tree, _ in modules():
        found = [
            inspect.cleandoc(text)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)) and text.count("\n") > 1
        ]
        yield "\n\n".join(found)


def source() -> Iterator[str]:
    """Yield modules as they are written."""
    for _, text in modules():
        yield text


def modules() -> Iterator[tuple[ast.Module, str]]:
    """Yield the syntax tree and text of every tenth module."""
    for library in LIBRARIES:
        for i, path in enumerate(sorted(library.rglob("*.py"))):
            if i % 10 or "/tests/" in path.as_posix():
                continue
            try:
                text = path.read_text(encoding="utf-8")
                yield ast.parse(text), text
            except (SyntaxError, ValueError, OSError):
                continue


def readmes() -> Iterator[str]:
    """Yield the long descriptions of installed packages."""
    for path in sorted(LIBRARIES[1].glob("*.dist-info/METADATA")):
        yield path.read_text(encoding="utf-8", errors="ignore").partition("\n\n")[2]


def licences() -> Iterator[str]:
    """Yield the licences of packages and of Debian."""
    for path in [*sorted(LIBRARIES[1].glob("*.dist-info/**/*LICEN[SC]E*")), *sorted(Path("/usr/share/common-licenses").glob("*"))]:
        if path.is_file():
            yield path.read_text(encoding="utf-8", errors="ignore")


def main() -> None:
    """Write a file a kind into `train` and `dev` of the folder that is named."""
    warnings.simplefilter("ignore")  # old modules' escapes
    out = Path(sys.argv[1])
    for kind in (reference, docstrings, source, readmes, licences):
        seen, pieces = set(), {"train": [], "dev": []}
        for text in kind():
            digest = hashlib.sha256(text.encode("utf-8", "ignore")).digest()
            if len(text) > 400 and "\0" not in text and digest not in seen and sum(map(len, pieces["train"])) < MOST:
                seen.add(digest)
                pieces["train" if digest[0] % 12 else "dev"].append(text)
        for part, texts in pieces.items():
            (out / part / kind.__name__).mkdir(parents=True, exist_ok=True)
            (out / part / kind.__name__ / "all.txt").write_text("\n\n".join(texts), encoding="utf-8", errors="ignore")
            print(f"{part}/{kind.__name__}: {len(texts)} pieces, {sum(map(len, texts)) / 1e6:.2f} million characters")


if __name__ == "__main__":
    main()
