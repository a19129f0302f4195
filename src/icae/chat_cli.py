"""`icae chat`: several turns over the same slots, in a terminal or through a pipe. Heavy imports inside the command, as in cli.py."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icae.errors import ICAEError
from icae.terminal import (
    BaseDtype,
    BaseName,
    Beginnings,
    Device,
    Focus,
    Grounding,
    Key,
    MaxTokens,
    Model,
    Polish,
    SamplingSeed,
    Stored,
    StoreFolder,
    Temperature,
    check_stored,
    from_store,
    load_model,
    sampling_of,
    say,
)

if TYPE_CHECKING:
    from icae.model import ICAE
    from icae.slots import MemorySlots

_LEAVE = ("/quit", "/exit")


def chat(
    context: Annotated[
        Path | None, typer.Argument(help="A slot file, or a text file, which is compressed first.", show_default=False)
    ] = None,
    stored: Stored = None,
    key: Key = "",
    store: StoreFolder = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    ratio: Annotated[
        int | None, typer.Option("--ratio", help="Context tokens a slot, of a text file.", show_default="the checkpoint's")
    ] = None,
    polish: Polish = None,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
) -> None:
    """Talk about a text, turn by turn, over the same slots: one question a line; /forget begins anew, /quit or Ctrl-D leaves."""
    from icae.data import read_text
    from icae.slots import MemorySlots, is_slot_file

    if (context is None) == (not stored):
        raise ICAEError("give either a file or --stored NAME" + ("" if context is None else ", not both"))
    check_stored(stored, store, key)
    if str(context) == "-":
        raise ICAEError("standard input is where the questions come from; give the text as a file")
    made = context is None or is_slot_file(context)
    if (ratio, polish) != (None, None) and made:
        raise ICAEError("--ratio and --polish go with a text file, which is compressed first; these slots are made already")
    text, slots = "", None
    if context is None:
        slots = from_store(stored or [], store, key)
    elif made:
        slots = MemorySlots.load(context)
    else:
        text = read_text(context)
    icae = load_model(model, base, device, base_dtype, polish=polish, focus=focus, grounding=grounding, beginnings=beginnings)
    slots = slots or icae.compress(text, ratio=ratio)
    icae.check(slots)
    print(f"{slots.tokens} tokens in {slots.count} slots; /forget begins anew, /quit leaves", file=sys.stderr, flush=True)
    history: list[dict[str, str]] = []
    for said in _lines():
        if said in _LEAVE:
            return
        if said == "/forget":
            history = []
            continue
        answer, kept = "", history
        try:
            asked = icae.focused(slots, said, history=history)
            kept = fitting(icae, asked, history, said, max_tokens)
            sampling = sampling_of(temperature, seed + len(kept))
            for piece in icae.stream_answer(asked, said, history=kept, max_new_tokens=max_tokens, sampling=sampling):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # ends the answer, not the conversation
            pass
        except ICAEError as error:  # of what was said, such as too much of it: so the next turn may be better
            say(f"{error}")
            continue
        print(flush=True)
        history = [*kept, {"role": "user", "content": said}, {"role": "assistant", "content": answer.strip()}]


def fitting(icae: ICAE, slots: MemorySlots, history: list[dict[str, str]], prompt: str, limit: int) -> list[dict[str, str]]:
    """Return the latest turns that leave room for the prompt and an answer of `limit` tokens among the base's positions."""
    from icae.chat import chat_prompt

    room = icae.base.max_positions - slots.span - icae.config.marker_length - limit
    while history and len(chat_prompt(icae.base.tokenizer, prompt, history)) > room:
        history = history[2:]
    return history


def _lines() -> Iterator[str]:
    """Yield what is said, without empty lines, until the end of the input; a terminal gets a prompt and line editing.

    Bytes that are no UTF-8 come as half characters, which a turn refuses, and only that turn.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it
        while True:
            try:
                if not sys.stdout.isatty():  # input() would write its prompt among the answers
                    print("> ", end="", file=sys.stderr, flush=True)
                line = input("> " if sys.stdout.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            if line:
                yield line
    else:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
