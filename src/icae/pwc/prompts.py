"""What is asked about a passage: ten prompts of its own and five that suit any text (the scheme of arXiv 2307.06945, appendix C)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icae.data import check_whole
from icae.errors import ICAEError
from icae.pwc.passages import digest


@dataclass(frozen=True)
class Prompt:
    """A prompt, and how far its answer must stay with the text."""

    kind: str
    text: str


GENERAL = {
    "rephrase": [
        "Say the text again in other words, in two sentences.",
        "Rephrase the beginning of the text.",
        "Rewrite the passage briefly.",
    ],
    "summary": ["Summarise the text in one sentence.", "What does the text say, in two sentences?", "Give a summary in a few words."],
    "title": [
        "Write a title for the text, of at most six words.",
        "Which title would suit this passage?",
        "Name this text in a few words.",
    ],
    "keywords": ["List the keywords of the text.", "Which five words matter most in this passage?", "Give the key terms, with commas."],
    "continue": ["Continue the text.", "What could come next? Go on with the passage.", "Write the next sentence."],
}
"""Five general prompts, each in several wordings."""

SPECIFIC = {
    "topic": ["In one sentence, what is the text about?", "Name the subject of the passage in a few words."],
    "people": ["Who appears in the text? Give the names only.", "Name the people that the passage speaks of, and nothing else."],
    "place": ["Where does this take place? Answer in a few words.", "Which places does the text name? List them only."],
    "events": ["What happens in the passage? Answer in one sentence.", "In one sentence: what is done in the text, and by whom?"],
    "detail": ["Name one detail that the text gives, in a few words.", "Quote one short phrase from the text."],
    "tone": ["Which one word describes the mood of the text?", "How does the passage sound? Answer in a few words."],
    "reason": ["Why does this happen, according to the text? Answer briefly.", "Give the reason that the passage gives, in one sentence."],
}
"""Specific prompts that can be put to any passage, and answered only from it; short answers, as a small base goes astray in long ones."""

BRIEFLY = "Answer in a few words."
"""Put behind the questions that the base asks itself, for the same reason."""

ASKING = [
    "Write one short question that the text above answers. Write nothing but the question.",
    "Ask one question about a person, a place or a thing in the text. Write the question only.",
    "What would you ask someone who has read this text, to see whether they read it well? Write one short question.",
]
"""How the base is made to ask; its questions are the other three of ten specific prompts."""

_QUESTION = re.compile(r"^(?:question\s*\d*\s*[:.)-]\s*)?[\"'“]?(.{8,160}?\?)", re.IGNORECASE)


def plan(text: str, count: int, kinds: Sequence[str] = ()) -> list[Prompt]:
    """Draw `count` of the fifteen prompts for a text, by the text alone; kind `asking` stands for a question yet to be asked.

    `kinds`, where given, are those to draw from.
    """
    chance = random.Random(digest(text))
    every = {**GENERAL, **SPECIFIC}
    known = [*every, *["asking"] * len(ASKING)]
    wanted = [i for i, kind in enumerate(known) if not kinds or kind in kinds]
    drawn = chance.sample(wanted, min(count, len(wanted)))
    asking = iter(chance.sample(ASKING, len(ASKING)))
    return [Prompt(known[i], chance.choice(every[known[i]]) if known[i] in every else next(asking)) for i in sorted(drawn)]


def kinds_of(words: str) -> list[str]:
    """Return the kinds of prompts in a line with commas; raises `ICAEError` for one that there is not."""
    kinds, known = [kind.strip() for kind in words.split(",")], [*GENERAL, *SPECIFIC, "asking"]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ICAEError(f"no kind {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return kinds


def offered(kinds: Sequence[str]) -> int:
    """Return how many different prompts a text can get of these kinds (none: of all)."""
    return sum(not kinds or kind in kinds for kind in [*GENERAL, *SPECIFIC, *["asking"] * len(ASKING)])


def question(said: str) -> str | None:
    """Return the question in what a model said when it was made to ask, or none."""
    found = _QUESTION.match(" ".join(said.split()))
    return found[1].strip() if found and 3 <= len(found[1].split()) <= 25 else None


def request(text: str) -> str:
    """Return what an endpoint is asked about a text: all fifteen prompts, and their answers."""
    general = "; ".join(f"{kind}: {words[0]}" for kind, words in GENERAL.items())
    return f"""Here is a text.

<text>
{text}
</text>

Make exercises for a reader who has this text before them.

First ten prompts that fit this text and no other. Let five be instructions and five be questions; cover different sides of it, such as its
subject, its kind, its structure, its style, its attitude, and the facts and details it gives. Then these five general ones, in wordings of
your own: {general}.

Answer every prompt yourself, from the text alone. Reply with a JSON array of fifteen objects and nothing else, each of the form
{{"kind": "specific" or the general prompt's name, "prompt": "...", "answer": "..."}}."""


def replied(reply: str) -> list[tuple[str, str, str]]:
    """Return (kind, prompt, answer) of an endpoint's reply; what is no such array gives none, what is broken in it is left out."""
    found = []
    for row in _array(reply):
        if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("prompt", "answer")):
            try:
                check_whole(row["prompt"] + row["answer"])
            except ValueError:
                continue
            kind = row.get("kind")
            found.append((kind if isinstance(kind, str) and kind in GENERAL else "specific", row["prompt"], row["answer"]))
    return found


def _array(reply: str) -> list[Any]:
    """Return the first JSON array with objects in it, whatever is said around it."""
    for bracket in re.finditer(r"\[", reply):
        try:
            rows, _ = json.JSONDecoder().raw_decode(reply, bracket.start())
        except (ValueError, RecursionError):
            continue
        if any(isinstance(row, dict) for row in rows):
            return rows
    return []
