"""`icae reproduce`: the paper's tables and figures, by one command. Heavy imports inside the command."""

from __future__ import annotations

import json
import sys
from functools import partial
from os import cpu_count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae.experiments import EXPERIMENTS
from icae.terminal import BaseDtype, BaseName, Device, Json, Model, Seed

if TYPE_CHECKING:
    from icae.experiments.context import Context


def _path(name: str, help: str, default: str | bool = False) -> typer.models.OptionInfo:
    return typer.Option(name, help=help, show_default=default)


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments, by name.", show_default="all")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for tables (JSON, Markdown) and pictures (PNG, SVG).")] = Path("results"),
    text: Annotated[str | None, _path("--text", "Held-out text: a folder of .txt, a .txt or .jsonl.", "a sample; implies --quick")] = None,
    qa: Annotated[str | None, _path("--qa", "Questions: a .jsonl of input, prompt, answer (and answers).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few, short samples: shows that everything runs.")] = False,
    samples: Annotated[int | None, _path("--samples", "Samples a figure is taken over.", "each experiment's own")] = None,
    model: Model = None,
    polish: Annotated[
        int,
        typer.Option(
            "--polish", min=0, help="Gradient steps on slots that are read back or asked; compress takes more, and everything longer."
        ),
    ] = 1,
    base: BaseName = None,
    embedding: Annotated[str | None, _path("--embedding", "Checkpoint with slots of the other kind.", "one that ships")] = None,
    answers: Annotated[str | None, _path("--answers", "Checkpoint that was fine-tuned to answer.", "one that ships")] = None,
    adapters: Annotated[
        Path | None, _path("--adapters", "Folder of table5's ablations, trained by configs/ablations, such as runs/ablations.")
    ] = None,
    also: Annotated[list[Path] | None, _path("--also", "Checkpoint on another base, for table6; may be repeated.")] = None,
    judge: Annotated[str | None, _path("--judge", "Model that judges tables 4 and 5; the key is OPENAI_API_KEY.", "none")] = None,
    judge_url: Annotated[str | None, _path("--judge-url", "Its OpenAI-compatible endpoint.", "OPENAI_BASE_URL")] = None,
    rival: Annotated[list[str] | None, _path("--rival", "Model at that endpoint to compare answers with; may be repeated.")] = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Processes of one thread that work side by side.", show_default="as many as cores; on accelerators 1"
        ),
    ] = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Measure again what stands there from the same settings and commit.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the experiments and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Run the paper's experiments and write tables and figures; exits with 1 where one failed."""
    if list_:
        print(json.dumps(EXPERIMENTS) if as_json else "\n".join(f"{name:8} {title}" for name, title in EXPERIMENTS.items()))
        return
    from icae.errors import ICAEError

    if (rival or judge_url) and judge is None:
        raise ICAEError(f"{'--rival' if rival else '--judge-url'} needs a judge: give --judge MODEL")
    if adapters is not None and not adapters.is_dir():
        raise ICAEError(f"--adapters {adapters}: no such folder; train the ablations first (configs/ablations)")
    from icae.experiments.crew import GROUPS, side_by_side
    from icae.experiments.runner import FAILED

    begin = partial(
        _context,
        None if judge is None else (judge, out / "judge.jsonl", judge_url),
        model=model,
        base=base,
        polish=polish,
        embedding=embedding,
        answers=answers,
        device=device,
        dtype=base_dtype,
        text=text,
        qa=qa,
        ablations=adapters,
        also=also or [],
        rivals=rival or [],
        seed=seed,
    )
    together = jobs or (min(cpu_count() or 1, len(GROUPS)) if device == "cpu" else 1)
    outcome = side_by_side(begin, names or (), out=out, jobs=together, quick=quick or text is None, samples=samples, force=force)
    print(json.dumps(outcome) if as_json else "\n".join(f"{name:8} {how}" for name, how in outcome.items()))
    if FAILED in outcome.values():
        sys.exit(1)


def _context(judge: tuple[str, Path, str | None] | None, **settings: Any) -> Context:
    """Open what is measured, in this process or in one beside it."""
    from icae.experiments.context import open_context
    from icae.judge import Judge

    return open_context(judge=None if judge is None else Judge(*judge[:2], url=judge[2]), **settings)
