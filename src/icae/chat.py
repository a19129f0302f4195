"""Chat messages -> token ids, in the tokenizer's own template. Knows the tokenizer alone: no model, no slots.

    messages -> text, cut where content only looks like a special token -> ids

What a template writes may become special tokens; what a user writes never does. Content that holds the text of a special token is cut
inside that text, and the pieces are tokenised apart. All other prompts get exactly the ids of the family's own template.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

from icae.errors import ICAEError, reason

CUT = "\ufdd0"
"""Stands where a rendered chat is tokenised in two: a noncharacter of Unicode, taken out of what users write."""


_turns = threading.Lock()


def tokenize(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the ids of a text, with no BOS or EOS put around it.

    With `special`, what looks like a special token becomes one; without, it stays ordinary characters. transformers keeps this choice
    as a state of the tokenizer, so threads take turns: else one's prompt is now and then cut by another's choice.

    Raises
    ------
    ICAEError
        If the text is no Unicode: bytes that were not UTF-8, read as half characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ICAEError(f"the text is not in UTF-8 (character {error.start + 1} is half of one); convert it first") from error
    with _turns:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]


def lead(tokenizer: Any) -> list[int]:
    """Return the special ids that a tokenizer itself puts before a text; in turns with `tokenize`, whose choice it would undo."""
    with _turns:
        ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return ids[: ids.index(bare[0])] if bare and bare[0] in ids else []


def full_text(text: str, prompt: str) -> str:
    """Return the prompt that holds a whole text and a question about it: what slots are compared with, and what teaches them."""
    return f"{text}\n\n{prompt}"


def chat_prompt(tokenizer: Any, prompt: str, history: list[dict[str, str]] | None = None) -> list[int]:
    """Return the ids of a user's prompt in the tokenizer's own chat template, up to where the response begins.

    A tokenizer without a chat template gets the prompt on a line of its own.

    Raises
    ------
    ICAEError
        If the template refuses the messages.
    """
    return encode(tokenizer, render(tokenizer, [*(history or []), {"role": "user", "content": prompt}]))


def chat_response(tokenizer: Any, response: str) -> list[int]:
    """Return the ids of a response, with what ends it in the template, if anything does."""
    ids, end = tokenize(tokenizer, response, special=False), end_of_turn(tokenizer)
    return ids if end is None else [*ids, end]


def chat_template(tokenizer: Any) -> str:
    """Return a tokenizer's chat template, of several the default one; "" where it has none."""
    found = getattr(tokenizer, "chat_template", None) or ""
    return found.get("default", "") if isinstance(found, dict) else found


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return a chat as text, up to where the response begins, for `encode`; it may be split anywhere else before.

    Raises
    ------
    ICAEError
        If the template refuses the messages.
    """
    looks_special = _looks_special(tokenizer, chat_template(tokenizer))
    return _template(tokenizer, [{**m, "content": _cut(m["content"], looks_special)} for m in messages])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of rendered chat text, of which every piece between cuts is tokenised alone."""
    return [i for piece in text.split(CUT) if piece for i in tokenize(tokenizer, piece, special=True)]


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the id that ends a response: the first special token that the template puts behind one, else the tokenizer's EOS."""
    template = chat_template(tokenizer)
    found = _end_of_turn(tokenizer, template) if template else None
    return tokenizer.eos_token_id if found is None else found


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, template: str) -> int | None:
    try:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": CUT}]
        behind = _template(tokenizer, turns, opens=False).rpartition(CUT)[2]
    except ICAEError:
        return None
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((i for i in tokenize(tokenizer, behind, special=True) if i in special), None)


def _template(tokenizer: Any, messages: list[dict[str, str]], *, opens: bool = True) -> str:
    if not (template := chat_template(tokenizer)):
        return "".join(f"{m['content']}\n" for m in messages)
    from jinja2 import TemplateError

    try:  # bases that think aloud first (Qwen3) answer at once, as slots do; other templates know nothing of it
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=opens, enable_thinking=False
        )
    except TemplateError as error:  # templates refuse what they do not know, such as two turns of one role
        raise ICAEError(f"the base's chat template refuses these messages: {reason(error)}") from error


@lru_cache(maxsize=8)
def _looks_special(tokenizer: Any, template: str) -> re.Pattern[str] | None:
    """Return a pattern of the texts that the tokenizer would take for special tokens: its special ones, and what the template writes.

    Families differ in what they mark as special, so that an added token which frames the turns counts too.
    """
    frame = _template(tokenizer, [{"role": "user", "content": "q"}]) if template else ""
    added = tokenizer.added_tokens_decoder.values()
    words = {t.content for t in added if t.special or (t.content in frame and not t.content.isspace())}
    words = {w for w in words if len(w) > 1}
    return re.compile(f"(?={'|'.join(map(re.escape, words))})") if words else None


def _cut(content: str, looks_special: re.Pattern[str] | None) -> str:
    """Put a cut behind the first character of every text that looks like a special token, overlapping ones too."""
    content = content.replace(CUT, "")
    places = [m.start() + 1 for m in looks_special.finditer(content)] if looks_special else []
    return CUT.join(content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True))
