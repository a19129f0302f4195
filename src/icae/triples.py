"""(Context, prompt, response) triples, read in every form.

    .jsonl with input, prompt, answer      ->   (either also compressed: .jsonl.xz)
    .json of SQuAD's form                  ->   list[Triple]
    Hub name (sggetao/PwC, or name:split)  ->

Bad rows are named, counted and left out.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icae.base import Base
from icae.data import check_whole
from icae.errors import ICAEError, reason

_MOST_BAD = 0.01
"""Share of bad rows above which a source is refused."""


@dataclass(frozen=True)
class Triple:
    """A context, a prompt and its response; `answers` are all that count as right."""

    context: str
    prompt: str
    response: str
    answers: tuple[str, ...]
    teacher: str = ""
    """Who wrote the response, where `icae data build` did."""


def load_triples(source: str, base: Base | None = None, *, least: int = 2, most: int | None = None) -> list[Triple]:
    """Read triples.

    Parameters
    ----------
    source : str
        A .jsonl with PwC's fields `input`, `prompt`, `answer` (and `answers`, where several are right) or SQuAD's `context`,
        `question`, `answers`; a .json of SQuAD's form; or a Hub data set with such rows, `name` (split `train`) or `name:split`.
        SQuAD's questions without an answer are passed over.
    base : Base, optional
        Counts a context's tokens; none: lengths are not looked at.
    least, most : int
        Fewest tokens of a context (a slot's block, and never under two); shorter ones are bad. Longer ones than `most` are left out.

    Raises
    ------
    ICAEError
        If the source cannot be read, more than one row in a hundred is bad, or none is good.
    """
    found = read_triples(source, base, least=least, most=most)
    if not found.usable:
        if found.bad and (found.good or not found.long):
            lines = f"{len(found.bad)} of {found.rows} lines of {source}"
            raise ICAEError(f"{lines} are no triples of input, prompt, answer; first: {found.bad[0]}")
        if found.long:
            all_good = f"all {found.long} contexts of {source}" + (f" but {len(found.bad)} bad ones" if found.bad else "")
            raise ICAEError(f"{all_good} have more than {most} tokens; raise context_length, or cut them")
        raise ICAEError(f"{source} holds no triples; give lines with input, prompt and answer")
    for note in found.bad:
        print(f"skipped {note}", file=sys.stderr)
    if found.bad or found.long:
        long = f", {found.long} with more than {most} tokens left out" if found.long else ""
        counts = f"{len(found.good)} triples, {len(found.bad)} bad ones skipped{long}"
        print(f"{source}: {counts}", file=sys.stderr)
    return found.good


def digest(triples: Sequence[Triple]) -> str:
    """Return a short hash of triples: a file of the same name may hold others elsewhere."""
    return hashlib.sha256("\n".join(map(repr, triples)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Found:
    """What a source holds."""

    good: list[Triple]
    bad: list[str]
    """Place and reason of every bad row."""
    long: int
    """Rows whose context is too long."""

    @property
    def rows(self) -> int:
        """All rows."""
        return len(self.good) + len(self.bad) + self.long

    @property
    def usable(self) -> bool:
        """Whether there is something good, and not more than one bad row in a hundred."""
        return bool(self.good) and len(self.bad) <= _MOST_BAD * self.rows


def read_triples(source: str, base: Base | None = None, *, least: int = 2, most: int | None = None) -> Found:
    """Read triples and say which rows are none; parameters as for `load_triples`, errors where the source cannot be read at all."""
    good: list[Triple] = []
    bad: list[str] = []
    lengths: dict[str, int] = {}
    long = 0
    for place, read in _rows(source):
        try:
            row = read()
            if _unanswerable(row):
                continue
            found = _triple(row)
            if base is not None:
                tokens = lengths.get(found.context) or lengths.setdefault(found.context, len(base.encode(found.context)))
                if tokens < max(2, least):
                    raise ValueError(f"a context of {tokens} tokens, a slot stands for {max(2, least)}")
                if most is not None and tokens > most:
                    long += 1
                    continue
            good.append(found)
        except (ValueError, KeyError, TypeError) as error:
            bad.append(f"{place}: {f'no field {error}' if isinstance(error, KeyError) else error}")
    return Found(good, bad, long)


def _rows(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield each row's place in words, and what reads it; reading may raise ValueError, KeyError or TypeError."""
    if not source:
        raise ICAEError("the source is empty; name a .jsonl of triples, SQuAD's .json, or a Hub name")
    path = Path(source)
    if path.suffix not in (".json", ".jsonl", ".xz") and not path.exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        yield from _hub(source)
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ICAEError(f"could not read {source}: {error.strerror}; give a .jsonl of triples, SQuAD's .json, or a Hub name") from error
    if path.suffix == ".xz":
        try:
            data, path = lzma.decompress(data), path.with_suffix("")
        except (lzma.LZMAError, EOFError) as error:
            raise ICAEError(f"{source} is no .xz, or is not all of one ({error})") from error
    if path.suffix == ".json":
        yield from _squad(source, data)
        return
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            yield f"{source}, line {number}", lambda line=line: json.loads(line.decode("utf-8-sig"))  # type: ignore[misc]


def _squad(source: str, data: bytes) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the rows of a file of SQuAD's form; questions marked as impossible have no answer and are passed over."""
    try:
        articles = json.loads(data.decode("utf-8-sig"))["data"]
        asked = [(p["context"], q) for a in articles for p in a["paragraphs"] for q in p["qas"] if not q.get("is_impossible")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ICAEError(f"{source} is no JSON of SQuAD's form, data / paragraphs / qas ({type(error).__name__}: {error})") from error
    for number, (context, q) in enumerate(asked, 1):
        yield f"{source}, question {q.get('id', number)}", lambda context=context, q=q: {**q, "context": context}  # type: ignore[misc]


def _hub(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    from datasets import load_dataset

    name, _, split = source.partition(":")
    try:
        data = load_dataset(name, split=split or "train")
    except Exception as error:  # the Hub's client raises many kinds: all mean that there is no such data within reach
        raise ICAEError(f"no file {source!r}, and the Hub gave no data set of that name ({reason(error)})") from error
    for number, row in enumerate(data, 1):
        yield f"{source}, row {number}", lambda row=row: row  # type: ignore[misc]


def _unanswerable(row: Any) -> bool:
    """Tell whether a row is a question of SQuAD's that its text has no answer to."""
    found = row.get("answers") if isinstance(row, dict) and "context" in row and "input" not in row else None
    return isinstance(found, dict) and found.get("text") == []


def _triple(row: Any) -> Triple:
    """Return a row as a triple."""
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    if "input" not in row and "context" in row:
        found = row["answers"]
        texts = found["text"] if isinstance(found, dict) else [a["text"] for a in found]
        row = {"input": row["context"], "prompt": row["question"], "answer": (texts or [""])[0], "answers": texts}
    context, prompt, answer = fields = [row[name] for name in ("input", "prompt", "answer")]
    if not all(isinstance(f, str) and f.strip() for f in fields):
        raise ValueError("an empty field, or one that is no text")
    answers = row.get("answers") or [answer]
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError("answers is no list of texts")
    for text in (*fields, *answers):
        check_whole(text)
    return Triple(context, prompt, answer, tuple(a for a in answers if a.strip()) or (answer,), str(row.get("teacher", "")))
