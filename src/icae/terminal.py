"""What the commands share at the terminal: their common options, and how they show progress and results. Light: cli.py imports it first."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from icae.model import ICAE

Model = Annotated[str | None, typer.Option("--model", help="Checkpoint: a folder, a shipped name or a Hub id. [default: ships with icae]")]
BaseName = Annotated[str | None, typer.Option("--base", help="Base LLM: name, folder or Hub id. [default: the checkpoint's]")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Ratio = Annotated[int | None, typer.Option("--ratio", help="Context tokens a slot. [default: the checkpoint's]", show_default=False)]
Polish = Annotated[
    int | None,
    typer.Option(
        "--polish",
        help="Gradient steps on the slots once they are written: each makes them truer to the text, and takes about twice what writing "
        "them does; 0: none. [default: the checkpoint's; 2 at 4x, 3 at 8x]",
        show_default=False,
    ),
]
Focus = Annotated[
    int | None,
    typer.Option(
        "--focus",
        help="Segments that a question is answered from, at most: of several documents, and of a longer one, those that it is about; "
        "0: all. [default: the checkpoint's; 4]",
        show_default=False,
    ),
]
Grounding = Annotated[
    float | None,
    typer.Option(
        "--grounding",
        help="How strongly an answer keeps to the words of its context; 0: not at all. [default: the checkpoint's; 1]",
        show_default=False,
    ),
]
Refine = Annotated[
    bool | None,
    typer.Option(
        "--refine/--no-refine",
        help="Compress what was read back again, and put it right where the slots differ. [default: where that is quick]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Decides which samples are drawn.")]


lent = ExitStack()
"""What a command borrowed until it ends: cli.main gives it back, or the next command of this process."""


GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
"""Has transformers leave keys and values that several heads share as they are: on CPUs faster, under a mask, than a copy a head."""


def load_model(model: str | None, base: str | None, device: str, **settings: float | None) -> ICAE:
    """Load a checkpoint, to run with the fastest matrix products there are; errors as for `ICAE.from_pretrained`.

    Settings (`polish`, `focus`, `grounding`) replace the checkpoint's own where they are not none.
    """
    from icae.model import ICAE
    from icae.packed import packed_linear

    lent.close()
    lent.enter_context(packed_linear())
    if device == "cpu" and GROUPED not in os.environ:
        os.environ[GROUPED] = "1"
        lent.callback(os.environ.pop, GROUPED, None)
    loaded = ICAE.from_pretrained(model, base=base, device=device)
    loaded.config = loaded.config.replace(**{name: value for name, value in settings.items() if value is not None})
    return loaded


def print_results(results: Any, as_json: bool, plain: Callable[[], None]) -> None:
    """Print results: as JSON, or in the plain way."""
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        plain()


def print_table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Print rows as a table; it is cut nowhere: folded in a terminal, and as wide as it needs to be elsewhere."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def say(message: str) -> None:
    """Tell the user something, on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(verb: str, unit: str = "segments") -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) behind a progress bar on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
