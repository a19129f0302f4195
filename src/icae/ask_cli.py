"""`icae ask`: one question about a text, from its slots. Heavy imports inside the command, as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from icae.errors import ICAEError
from icae.terminal import (
    BaseDtype,
    BaseName,
    Beginnings,
    Device,
    Focus,
    Grounding,
    Json,
    Key,
    MaxTokens,
    Model,
    SamplingSeed,
    Stored,
    StoreFolder,
    Temperature,
    check_stored,
    from_store,
    load_model,
    print_stream,
    sampling_of,
    say,
    stripped,
    text_of,
)


def ask(
    slots: Annotated[str, typer.Argument(help="A slot file; with --stored or --text, the question itself.", show_default=False)],
    question: Annotated[str | None, typer.Argument(help="The question or instruction.", show_default=False)] = None,
    stored: Stored = None,
    key: Key = "",
    store: StoreFolder = None,
    text: Annotated[Path | None, typer.Option("--text", help="Ask this text file in full, uncompressed, for comparison.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Ask about a text, from its slots (or, with --text, from the full text)."""
    from icae.slots import MemorySlots

    check_stored(stored, store, key)
    instead = [name for name, given in (("--stored NAME", stored), ("--text FILE", text)) if given]
    if len(instead) > 1 or (instead and question is not None):
        raise ICAEError(f"give either {' or '.join(instead) if len(instead) > 1 else f'a slot file or {instead[0]}'}, not both")
    if not instead and question is None:
        raise ICAEError('the question is missing: icae ask slots.safetensors "What ...?", or icae ask --stored NAME "What ...?"')
    prompt = slots if question is None else question
    if not prompt.strip():
        raise ICAEError("the question is empty")
    about: dict[str, Any] = {}
    if text is not None:
        from icae.chat import full_text

        own = {"--focus": focus, "--grounding": grounding, "--beginnings": beginnings}
        if useless := [name for name, given in own.items() if given is not None]:
            raise ICAEError(f"only slots know {' and '.join(useless)}; with --text the base reads the full text as it is")
        loaded, prompt = None, full_text(text_of(str(text), literal=False), prompt)
        icae = load_model(model, base, device, base_dtype)
    else:
        loaded = from_store(stored, store, key) if stored else MemorySlots.load(slots)
        icae = load_model(model, base, device, base_dtype, focus=focus, grounding=grounding, beginnings=beginnings)
        about["segments"] = len(loaded.segments)
        loaded = icae.focused(loaded, prompt)
        about["segments_asked"] = len(loaded.segments)
    pieces = icae.stream_answer(loaded, prompt, max_new_tokens=max_tokens, sampling=sampling_of(temperature, seed))
    print_stream("answer", stripped(pieces), as_json, **about)
    if not as_json and about and about["segments_asked"] < about["segments"]:
        say("from {segments_asked} of {segments} segments, those that the question is about; --focus 0 asks all".format(**about))
