"""What the commands share at the terminal: their common options, and how they show progress and results. Light: cli.py imports it first."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae.errors import ICAEError

if TYPE_CHECKING:
    from icae.model import ICAE
    from icae.reader import Sampling
    from icae.slots import MemorySlots
    from icae.store import SlotStore

Model = Annotated[
    str | None, typer.Option("--model", help="Checkpoint: a folder, a shipped name or a Hub id.", show_default="ships with icae")
]
BaseName = Annotated[str | None, typer.Option("--base", help="Base LLM: name, folder or Hub id.", show_default="the checkpoint's")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")]
BaseDtype = Annotated[str, typer.Option("--base-dtype", help="What the base is kept in: float32, bfloat16, float16, or auto (as stored).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Ratio = Annotated[int | None, typer.Option("--ratio", help="Context tokens a slot.", show_default="the checkpoint's")]
Polish = Annotated[
    int | None,
    typer.Option(
        "--polish",
        help="Gradient steps on the slots once they are written: each makes them truer to the text, and takes about twice what writing "
        "them does; 0: none.",
        show_default="the checkpoint's; 2 at 4x, 3 at 8x",
    ),
]
Focus = Annotated[
    int | None,
    typer.Option(
        "--focus",
        help="Segments that a question is answered from, at most: of several documents, and of a longer one, those that it is about; "
        "0: all.",
        show_default="the checkpoint's; 4",
    ),
]
Grounding = Annotated[
    float | None,
    typer.Option(
        "--grounding",
        help="How strongly an answer keeps to the words of its context; 0: not at all.",
        show_default="the checkpoint's; 1",
    ),
]
Beginnings = Annotated[
    int | None,
    typer.Option(
        "--beginnings",
        help="Likeliest first tokens that an answer is begun with, to go on from the likeliest beginning; 1: the likeliest token.",
        show_default="the checkpoint's; 3",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to generate, at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")]
SamplingSeed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of what is drawn, where the temperature is above 0.")]
Key = Annotated[
    str,
    typer.Option("--key", metavar="NAME", help="Of this key of a server (`icae serve --add-key`).", show_default="of none"),
]
Stored = Annotated[
    list[str] | None,
    typer.Option("--stored", metavar="NAME", help="Ask contexts of the store (`icae store ls`); may be given several times."),
]
StoreFolder = Annotated[Path | None, typer.Option("--store", help="The store's folder.", show_default="`store` in the user's cache folder")]
Refine = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine",
        help="Compress what was read back again, and put it right where the slots differ.",
        show_default="where that is quick",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides which samples are drawn.")]


lent = ExitStack()
"""What a command borrowed until it ends: cli.main gives it back, or the next command of this process."""


GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Has transformers leave keys and values that several heads share as they are: on CPUs faster, under a mask, than a copy a head."""


def load_model(model: str | None, base: str | None, device: str, dtype: str = "float32", **settings: float | None) -> ICAE:
    """Load a checkpoint, to run with the fastest matrix products there are; errors as for `ICAE.from_pretrained`.

    Settings (`polish`, `focus`, `grounding`, `beginnings`) replace the checkpoint's own where they are not none.
    """
    from icae.model import ICAE
    from icae.packed import packed_linear

    lent.close()
    lent.enter_context(packed_linear())
    if device == "cpu" and GROUPED not in os.environ:
        os.environ[GROUPED] = "1"
        lent.callback(os.environ.pop, GROUPED, None)
    loaded = ICAE.from_pretrained(model, base=base, device=device, dtype=dtype)
    loaded.config = loaded.config.replace(**{name: value for name, value in settings.items() if value is not None})
    return loaded


def name_of(model: str | None) -> str:
    """Return what a checkpoint is called: a shipped name or Hub id as it is given, a folder by its last name."""
    from icae.checkpoint import DEFAULT

    return Path(os.path.abspath(model)).name if model and Path(model).is_dir() else model or DEFAULT


def text_of(source: str, *, literal: bool = True) -> str:
    """Return the text that `source` names or is.

    Raises
    ------
    ICAEError
        If it is empty, or looks like the path of a file that is not there.
    """
    from icae.data import decoded, read_text

    if not source.strip():
        text = ""
    elif source == "-":
        if sys.stdin.isatty():
            say("reading standard input, until Ctrl-D ...")
        text = decoded(sys.stdin.buffer.read(), "standard input")
    elif not literal or os.path.exists(source):
        text = read_text(source)
    elif not any(c.isspace() for c in source) or re.fullmatch(r"[^\n]{1,200}\.[^\W\d]\w{0,7}", source):
        raise ICAEError(f"no file at {source}; if that is the text itself, give it on standard input: echo ... | icae ... -")
    else:
        text = source
    if not text.strip():
        raise ICAEError("the text is empty; give a text of at least two tokens")
    return text


def open_store(folder: Path | None, blobs: str | None = None, *, make: bool = False) -> SlotStore:
    """Open the store; one that was named outright and is not there is made only where `make` says so."""
    from icae.store import SlotStore

    if folder is not None and not make and not (folder / "catalogue.sqlite").is_file():
        raise ICAEError(f"no store at {folder}; `icae store add FILE --store {folder}` makes one")
    return SlotStore(folder, blobs=blobs)


def from_store(names: list[str], folder: Path | None, key: str) -> MemorySlots:
    """Return the slots of stored contexts, several of them joined as documents; raises `ICAEError` for a name that is not there."""
    from icae.catalogue import namespace_of
    from icae.slots import MemorySlots

    kept = open_store(folder)
    return MemorySlots.concatenate([kept.load(name, namespace_of(key)) for name in dict.fromkeys(names)])


def check_stored(names: list[str] | None, folder: Path | None, key: str) -> None:
    """Raise `ICAEError` where options of the store come without `--stored`."""
    if not names and (folder is not None or key):
        raise ICAEError(f"{'--key' if key else '--store'} goes with --stored NAME, which names a context of the store")


def sampling_of(temperature: float, seed: int) -> Sampling:
    """Return how tokens are chosen: the likeliest, or drawn by the seed."""
    from icae.reader import Sampling

    return Sampling(temperature=temperature, seed=seed if temperature else None)


def escape_what_cannot_be_written() -> None:
    """Have characters that the terminal's encoding lacks, and half ones, written as JSON spells them, so that no answer breaks off."""
    codecs.register_error("icae.escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="icae.escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2)), error.end


def print_results(results: Any, as_json: bool, plain: Callable[[], None]) -> None:
    """Print results: as JSON, or in the plain way."""
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        plain()


def print_stream(name: str, pieces: Iterator[str], as_json: bool, **about: int) -> None:
    """Print what is generated, as it comes, or as JSON when it is whole."""
    if as_json:
        print(json.dumps({name: "".join(pieces), **about}, ensure_ascii=False))
    else:
        print_pieces(pieces)


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces of text without the whitespace before and behind all of them."""
    begun, kept = False, ""
    for piece in pieces:
        text = kept + piece if begun else piece.lstrip()
        shown = text.rstrip()
        begun, kept = begun or bool(shown), text[len(shown) :]
        yield shown


def print_pieces(pieces: Iterator[str]) -> None:
    """Print pieces of text as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def print_table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; it is cut nowhere: folded in a terminal, and as wide as it needs to be elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c])) for c in columns))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def say(message: str) -> None:
    """Tell the user something, on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(verb: str, unit: str = "segments") -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) behind a progress bar on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
