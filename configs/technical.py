"""Gather technical and legal English that lies on any Debian with Python: `python configs/technical.py runs/technical`.

Books alone make an adapter that stumbles over manuals. What is gathered: the reference of Python's help(), docstrings and some source of
the standard library and the installed packages, their READMEs and licences, and Debian's common licences. One piece in twelve, chosen by a
hash of its text, goes to `dev` instead of `train`; a piece that stands twice counts once. Of `dev` only those paragraphs stay that have no
twelve words in a row with anything in `train`: licences are copied, and a docstring stands in its source, too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
MOST = 6_000_000
"""Characters of one kind, at most."""
LEAST = 400
"""Characters of a piece, at least."""
ALIKE = 12
"""Words in a row that a held-out paragraph has in common with nothing that is trained on."""


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


def runs_of_words(text: str) -> Iterator[int]:
    """Yield a hash of every few words in a row."""
    words = re.findall(r"\w+", text.lower())
    yield from (hash(tuple(words[at : at + ALIKE])) for at in range(len(words) - ALIKE + 1))


def apart(text: str, known: set[int]) -> str:
    """Return those paragraphs of a text that have no run of words in common with what is known."""
    return "\n\n".join(part for part in re.split(r"\n\s*\n", text) if known.isdisjoint(runs_of_words(part)))


def main() -> None:
    """Write a file a kind into `train` and `dev` of the folder that is named."""
    warnings.simplefilter("ignore")  # old modules' escapes
    out, kinds = Path(sys.argv[1]), (reference, docstrings, source, readmes, licences)
    gathered: dict[str, dict[str, list[str]]] = {}
    for kind in kinds:
        seen, pieces = set(), {"train": [], "dev": []}
        for text in kind():
            digest = hashlib.sha256(text.encode("utf-8", "ignore")).digest()
            if len(text) > LEAST and "\0" not in text and digest not in seen and sum(map(len, pieces["train"])) < MOST:
                seen.add(digest)
                pieces["train" if digest[0] % 12 else "dev"].append(text)
        gathered[kind.__name__] = pieces
    known = {run for pieces in gathered.values() for text in pieces["train"] for run in runs_of_words(text)}
    for name, pieces in gathered.items():
        pieces["dev"] = [left for text in pieces["dev"] if len(left := apart(text, known)) > LEAST]
        for part, texts in pieces.items():
            (out / part / name).mkdir(parents=True, exist_ok=True)
            (out / part / name / "all.txt").write_text("\n\n".join(texts), encoding="utf-8", errors="ignore")
            print(f"{part}/{name}: {len(texts)} pieces, {sum(map(len, texts)) / 1e6:.2f} million characters")


if __name__ == "__main__":
    main()
