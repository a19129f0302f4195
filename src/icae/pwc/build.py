"""Passages and a teacher -> files of triples, with every reply kept as soon as it is there.

    OUT.raw.jsonl    all that was ever said, one line a text; only ever appended to
    OUT.jsonl        triples to train on, made from it by filters.py
    OUT.test.jsonl   triples of other texts

A run that stopped, or failed, or met its budget goes on where it was: no text is asked about twice by the same teacher.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icae import journal
from icae.atomic import make_room, write_together
from icae.errors import ICAEError
from icae.pwc.filters import refusal
from icae.pwc.passages import digest, is_test
from icae.pwc.teachers import Reply, Teacher

_MOST_ALIKE = 20
"""Times that one and the same answer is taken, over all texts: more often it says nothing about any."""


_TELLING = 80
"""Characters from which on a paragraph tells where a passage comes from."""


@dataclass(frozen=True)
class Budget:
    """What may be spent; none: no limit. Requests (texts asked about) and tokens count over all runs into a file, minutes over this one."""

    requests: int | None = None
    tokens: int | None = None
    minutes: float | None = None


def files(out: Path) -> tuple[Path, Path, Path]:
    """Return all that is written for OUT: triples to train on, raw replies, and triples to test with."""
    return out, out.with_suffix(".raw.jsonl"), out.with_suffix(".test.jsonl")


def build(
    texts: Sequence[str],
    out: Path,
    teacher: Teacher,
    budget: Budget | None = None,
    *,
    test_share: float = 0.05,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Ask a teacher about texts, and write triples.

    Returns
    -------
    dict
        `texts` asked about so far, `tokens` spent, `triples`, `test`, `refused` by reason, `stopped` by which limit, if any.

    Raises
    ------
    ICAEError
        If a file cannot be written, or holds what was made otherwise, or the teacher fails; what it said before is in the files then.
    """
    train, raw, test = files(make_room(out))
    for path in (train, test):
        if not raw.exists() and path.exists() and path.stat().st_size:
            raise ICAEError(f"{path} was not made by icae data build ({raw.name} is not beside it); name another file")
    ledger = Ledger(raw)
    begun, limits, stopped = time.monotonic(), budget or Budget(), None
    todo = [text for text in texts if not ledger.has(teacher.name, text)]
    done = len(texts) - len(todo)
    try:
        while todo and stopped is None:
            batch: list[str] = []
            worst = 0
            for text in todo[: teacher.together]:
                worst += teacher.most(text)
                if limits.requests is not None and ledger.requests + len(batch) + 1 > limits.requests:
                    stopped = "requests"
                elif limits.tokens is not None and ledger.tokens + worst > limits.tokens:
                    stopped = "tokens"
                elif limits.minutes is not None and time.monotonic() - begun > 60 * limits.minutes:
                    stopped = "minutes"
                else:
                    batch.append(text)
                    continue
                break
            todo = todo[len(batch) :]
            for number, reply in teacher.read(batch) if batch else ():
                ledger.add(teacher.name, batch[number], reply)
                done += 1
                progress(done, len(texts))
    except ICAEError as error:
        counts = write(ledger, out, test_share)
        raise ICAEError(f"{error}; {counts['texts']} texts are kept in {ledger.path}, run again to go on") from error
    except BaseException:
        write(ledger, out, test_share)
        raise
    return write(ledger, out, test_share) | {"stopped": stopped}


class Ledger:
    """The file of raw replies.

    Raises
    ------
    ICAEError
        If a line of it is damaged; a last one that a kill cut short is dropped, and asked for again.
    """

    def __init__(self, path: Path):
        self.path = path
        names = ("teacher", "text", "said", "tokens", "raw")
        self.rows = journal.read(path, lambda row: {name: row[name] for name in names}, "reply of a teacher")
        self._known = {(row["teacher"], digest(row["text"])) for row in self.rows}

    @property
    def requests(self) -> int:
        """Texts asked about."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens spent."""
        return sum(row["tokens"] or 0 for row in self.rows)  # null, where an endpoint did not say

    def has(self, teacher: str, text: str) -> bool:
        """Tell whether that teacher was asked about a text."""
        return (teacher, digest(text)) in self._known

    def add(self, teacher: str, text: str, reply: Reply) -> None:
        """Write a reply to the disk, at once."""
        row = {"teacher": teacher, "text": text, **asdict(reply)}
        journal.append(self.path, row)
        self.rows.append(row)
        self._known.add((teacher, digest(text)))


def _paragraphs(text: str) -> set[str]:
    """Return a passage's paragraphs, but for such short ones as stand anywhere."""
    return {p for p in text.split("\n") if len(p) >= _TELLING}


def write(ledger: Ledger, out: Path, test_share: float) -> dict[str, Any]:
    """Write the triples of all replies that pass the filters, each prompt of a text once; returns counts."""
    refused: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    lines: dict[bool, list[str]] = {False: [], True: []}
    learned = {p for row in ledger.rows if not is_test(row["text"], test_share) for p in _paragraphs(row["text"])}
    for row in ledger.rows:
        if not row["said"]:
            refused["unreadable"] += 1
        for said in row["said"]:
            prompt, answer = said["prompt"].strip(), said["answer"].strip()
            key, words = (digest(row["text"]), " ".join(prompt.lower().split())), " ".join(answer.lower().split())
            reason = refusal(row["text"], said["kind"], prompt, answer, said["ended"])
            tests = is_test(row["text"], test_share)
            if reason is None and tests and learned & _paragraphs(row["text"]):
                reason = "in training"  # builds of other lengths cut the same pages otherwise
            if reason is None and (key in seen or alike[words] >= _MOST_ALIKE):
                reason = "duplicate"
            if reason is not None:
                refused[reason] += 1
                continue
            seen.add(key)
            alike[words] += 1
            triple = {"input": row["text"], "prompt": prompt, "answer": answer, "kind": said["kind"], "teacher": row["teacher"]}
            lines[tests].append(json.dumps(triple, ensure_ascii=False) + "\n")
    train, _, test = files(out)
    write_together({train: "".join(lines[False]).encode(), test: "".join(lines[True]).encode()})
    counts = {"texts": ledger.requests, "tokens": ledger.tokens}
    return counts | {"triples": len(lines[False]), "test": len(lines[True]), "refused": dict(sorted(refused.items()))}
