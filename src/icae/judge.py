"""Pairwise judging by a model behind any OpenAI-compatible endpoint (ICAE, arXiv 2307.06945, section 3.3).

    context, prompt, two responses -> win, lose or tie

Each pair is judged in both orders; where the two verdicts disagree, it is a tie (judges prefer a place: arXiv 2306.05685). Every reply is
written to a JSONL record as it comes, under the hash of what was asked, so that a run that stopped goes on without paying twice, and
every verdict can be read again. Knows no slots and no base.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icae import journal
from icae.chat import full_text
from icae.endpoint import connect, reply
from icae.errors import ICAEError

PROMPT = """Two assistants were given a text and an instruction about it. Compare their answers.

A good answer does what the instruction asks, says what the text supports and nothing that it contradicts, and leaves out nothing that was
asked for. Length, style and the order in which the answers stand here do not count.

[Text]
{context}

[Instruction]
{prompt}

[Answer 1]
{first}

[Answer 2]
{second}

Reason in two or three sentences. Then end with one line of exactly this form: "Verdict: 1" if the first answer is better, "Verdict: 2" if
the second is, "Verdict: tie" if they are equally good or equally bad."""

_VERDICT = re.compile(r"verdict:\W*(1|2|tie)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """Two responses to one prompt about one context."""

    context: str
    prompt: str
    first: str
    second: str


class Judge:
    """A model that judges, its endpoint, and the record of all it said.

    Parameters
    ----------
    model : str
        Its name at the endpoint.
    record : Path
        JSONL file; made where it is missing.
    url : str, optional
        The endpoint; none: `OPENAI_BASE_URL`, else OpenAI's own. The key is `OPENAI_API_KEY`.
    client : optional
        Anything with `chat.completions.create`, instead of a client for `url`.

    Raises
    ------
    ICAEError
        If the `openai` package is missing, or the record is damaged.
    """

    def __init__(self, model: str, record: str | Path, *, url: str | None = None, client: Any = None):
        self.model, self.url = model, url or os.environ.get("OPENAI_BASE_URL")
        self.record = Path(record)
        self._client = client or connect(url, purpose="judging", extra="judge", instead="give --judge-url")
        self._known = dict(journal.read(self.record, lambda row: (row["key"], str(row["reply"])), "reply of a judge"))

    def compare(self, name: str, items: Sequence[Item], progress: Callable[[int, int], None] = lambda *_: None) -> tuple[list[int], int]:
        """Judge each pair in both orders.

        Returns
        -------
        list of int
            For each item 1 (the first response wins), -1 (the second) or 0 (a tie, or no agreement).
        int
            How many of the replies held no verdict.

        Raises
        ------
        ICAEError
            If the endpoint fails; what it said before is kept.
        """
        verdicts, unread = [], 0
        for done, item in enumerate(items, 1):
            said = [
                verdict(self._say(self.model, [_message(item, swapped)], 512, {"kind": "verdict", "pair": name, "swapped": swapped}))
                for swapped in (False, True)
            ]
            unread += said.count(None)
            verdicts.append(agreement(*said))
            progress(done, len(items))
        return verdicts, unread

    def ask(
        self, model: str, asked: Sequence[tuple[str, str]], max_tokens: int, progress: Callable[[int, int], None] = lambda *_: None
    ) -> list[str]:
        """Have a model at the same endpoint answer (context, prompt) pairs from the full text; errors as for `compare`."""
        made = []
        for context, prompt in asked:
            messages = [{"role": "user", "content": full_text(context, prompt)}]
            made.append(self._say(model, messages, max_tokens, {"kind": "answer"}))
            progress(len(made), len(asked))
        return made

    def _say(self, model: str, messages: list[dict[str, str]], max_tokens: int, about: dict[str, Any]) -> str:
        """Return the endpoint's reply, from the record where it was asked before: models of one name may differ elsewhere."""
        where = [self.url] if self.url else []
        key = hashlib.sha256(json.dumps([model, messages, max_tokens, *where]).encode()).hexdigest()[:32]
        if key not in self._known:
            try:
                text = reply(self._client, model, messages, max_tokens=max_tokens, temperature=0)[0]
            except ICAEError as error:
                raise ICAEError(f"{error}; {len(self._known)} replies are kept in {self.record}, run again to go on") from error
            text = text.encode(errors="replace").decode()  # half characters, as JSON can spell them, cannot be written
            row = {"key": key, "model": model, **about, "messages": messages, "max_tokens": max_tokens, "reply": text}
            journal.append(self.record, row)
            self._known[key] = text
        return self._known[key]


def verdict(reply: str) -> int | None:
    """Return 1 or 2 for the better answer, 0 for a tie, None where the reply says none; its last word counts."""
    found = _VERDICT.findall(reply)
    return {"1": 1, "2": 2, "tie": 0}[found[-1].lower()] if found else None


def agreement(plain: int | None, swapped: int | None) -> int:
    """Return 1 where both orders prefer the first response, -1 where both prefer the second, else 0."""
    if plain == 1 and swapped == 2:
        return 1
    return -1 if plain == 2 and swapped == 1 else 0


def _message(item: Item, swapped: bool) -> dict[str, str]:
    first, second = (item.second, item.first) if swapped else (item.first, item.second)
    return {"role": "user", "content": PROMPT.format(context=item.context, prompt=item.prompt, first=first, second=second)}
