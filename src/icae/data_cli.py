"""`icae data ...`: make and look at fine-tuning data. Heavy imports inside the commands, as in cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icae.atomic import check_apart
from icae.config import TrainConfig
from icae.errors import ICAEError
from icae.terminal import BaseDtype, Json, print_results, progress

if TYPE_CHECKING:
    from icae.pwc.teachers import Teacher

_SHOWN = 20
"""Bad lines that are named, but with --json."""
_OF_THE_BASE = ("prompts", "kinds", "answer_tokens", "base", "device", "base_dtype")
"""Options of `build` that no endpoint reads."""

app = typer.Typer(help="Make and check triples of context, prompt and response.", no_args_is_help=True)


@app.command()
def build(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Texts: a folder of .txt, a .txt or .jsonl file, or a Hub name.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Triples to write (.jsonl); raw replies and test triples go beside it.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="'base' (offline, the base reads the full text) or a model behind an endpoint.")] = "base",
    url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint.", show_default="OPENAI_BASE_URL, else OpenAI's")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Passages to ask about.")] = 500,
    least: Annotated[int, typer.Option(min=1, help="Characters of a passage, at least.")] = 400,
    most: Annotated[int, typer.Option(min=1, help="Characters of a passage, at most.")] = 1200,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a passage, of fifteen (teacher base; an endpoint writes all).")] = 6,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="Kinds of prompts (teacher base): rephrase, summary, title, keywords, continue, topic, ...",
            show_default="all",
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the answers.", show_default="0 from the base, 0.7 from an endpoint")] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most (teacher base).")] = 96,
    together: Annotated[int, typer.Option(min=1, help="Passages asked about at once.")] = 4,
    max_requests: Annotated[int | None, typer.Option(min=0, help="Passages asked about at most, over all runs.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens spent at most, over all runs.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after this long; the next run goes on.")] = None,
    test_share: Annotated[float, typer.Option(help="Share of the passages whose triples go to the test file.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Decides which passages are drawn.")] = 0,
    base: Annotated[str | None, typer.Option("--base", help="Base LLM of teacher base.", show_default="the embedded one")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")] = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Write triples about passages of any text; a run that stopped goes on where it was, and pays for nothing twice."""
    from itertools import islice

    from icae.data import documents
    from icae.packed import packed_linear
    from icae.pwc.build import Budget, files
    from icae.pwc.build import build as build_triples
    from icae.pwc.passages import chosen, passages
    from icae.pwc.prompts import kinds_of

    if out.suffix != ".jsonl":
        raise ICAEError(f"{out} must end in .jsonl")
    for path in files(out):
        check_apart(path, source)
    given = [name for name in _OF_THE_BASE if (source_of := context.get_parameter_source(name)) and source_of.name == "COMMANDLINE"]
    if teacher != "base" and given:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ICAEError(f"only --teacher base knows {told}; a model behind an endpoint writes all fifteen prompts, in its own way")
    if temperature is not None and not temperature >= 0:
        raise ICAEError(f"temperature must be at least 0, got {temperature}")
    wanted = [] if kinds is None else kinds_of(kinds)
    if not 0 <= test_share <= 1:
        raise ICAEError(f"test_share is a share, 0 to 1, got {test_share}")
    found = passages(documents(source), least=least, most=most)
    drawn = chosen(found if Path(source).exists() else islice(found, 20 * texts), texts, seed)
    if not drawn:
        raise ICAEError(f"{source} holds no passage of {least} to {most} characters; try other --least and --most")
    asked = _teacher(teacher, url, prompts, wanted, answer_tokens, temperature, together, seed, base, device, base_dtype)
    with progress("asking", "passages") as tick, packed_linear():
        budget = Budget(max_requests, max_tokens, minutes)
        counts = build_triples(drawn, out, asked, budget, test_share=test_share, progress=tick)
    if as_json:
        print(json.dumps(counts))
        return
    refused = ", ".join(f"{count} {reason}" for reason, count in counts["refused"].items()) or "none"
    print(f"{counts['triples']} triples in {out}, {counts['test']} for testing, from {counts['texts']} passages; refused: {refused}")
    if counts["stopped"]:
        print(f"stopped by the limit of {counts['stopped']}; run again to go on")


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="Triples: a .jsonl, SQuAD's .json, or a Hub name.", show_default=False)],
    base: Annotated[str | None, typer.Option("--base", help="Also count tokens, with this base's tokenizer.")] = None,
    least: Annotated[int, typer.Option(min=1, help="Fewest tokens of a context: the ratio, so that it fills a slot (with --base).")] = 4,
    most: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a context: the run's context_length (with --base).")
    ] = TrainConfig.context_length,
    as_json: Json = False,
) -> None:
    """Count what fine-tuning would read, and name bad lines; exits with 1 where there are too many of them to train on it."""
    from icae.base import load_base
    from icae.pwc.filters import refusal
    from icae.triples import read_triples

    loaded = None if base is None else load_base(base)
    found = read_triples(source, loaded, least=least, most=most)
    suspects: dict[str, int] = {}
    for t in found.good:
        if reason := refusal(t.context, "specific", t.prompt, t.response, True):
            suspects[reason] = suspects.get(reason, 0) + 1
    pairs = {(t.context, t.prompt) for t in found.good}
    results = {
        "rows": found.rows,
        "good": len(found.good),
        "bad": found.bad,
        "long": found.long,
        "usable": found.usable,
        "contexts": len({t.context for t in found.good}),
        "prompts": len({t.prompt for t in found.good}),
        "duplicates": len(found.good) - len(pairs),
        "suspect": suspects,
    }
    if loaded is not None and found.good:
        lengths = sorted(len(loaded.encode(t.context)) for t in found.good)
        results["context_tokens"] = {"median": lengths[len(lengths) // 2], "most": lengths[-1]}

    def plain() -> None:
        for name, value in results.items():
            if name != "bad":
                print(f"{name:16} {value}")
        for note in found.bad[:_SHOWN]:
            print(f"bad: {note}")
        if len(found.bad) > _SHOWN:
            print(f"... and {len(found.bad) - _SHOWN} more; --json names all")

    print_results(results, as_json, plain)
    if not found.usable:
        raise typer.Exit(1)


def _teacher(
    name: str,
    url: str | None,
    prompts: int,
    kinds: list[str],
    answer_tokens: int,
    temperature: float | None,
    together: int,
    seed: int,
    base: str | None,
    device: str,
    base_dtype: str,
) -> Teacher:
    from icae.pwc.teachers import BaseTeacher, EndpointTeacher

    if name != "base":
        return EndpointTeacher(name, url, temperature=0.7 if temperature is None else temperature, together=together)
    if url is not None:
        raise ICAEError("--url belongs to a model behind an endpoint: --teacher NAME")
    from icae.base import EMBEDDED, load_base

    loaded = load_base(base or EMBEDDED, device=device, dtype=base_dtype)
    return BaseTeacher(
        loaded,
        prompts=prompts,
        max_tokens=answer_tokens,
        temperature=temperature or 0.0,
        seed=seed,
        together=together,
        kinds=kinds,
    )
