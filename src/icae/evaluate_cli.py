"""`icae evaluate ...`: a checkpoint's figures on held-out text. Heavy imports inside the commands, as in cli.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from icae.atomic import check_apart, make_room, write_atomically
from icae.errors import ICAEError
from icae.segments import check_ratio
from icae.terminal import (
    BaseDtype,
    BaseName,
    Beginnings,
    Device,
    Focus,
    Grounding,
    Json,
    Model,
    Polish,
    Ratio,
    Refine,
    Seed,
    load_model,
    name_of,
    print_results,
    print_table,
    progress,
)

app = typer.Typer(help="Measure a checkpoint on held-out text.", no_args_is_help=True)

TextPath = Annotated[str, typer.Option("--text", help="Held-out text: a folder of .txt, a .txt or .jsonl file.", show_default=False)]
Save = Annotated[Path | None, typer.Option("--save", help="Also write the figures here, with settings, commit and machine.")]
Samples = Annotated[int, typer.Option("--samples", help="Samples a figure is taken over.")]


@app.command("autoencoding")
def evaluate_autoencoding(
    text: TextPath,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, with commas.")] = "64,128,256",
    samples: Samples = 32,
    ratio: Ratio = None,
    polish: Polish = None,
    refine: Refine = None,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Loss, BLEU and exact match of texts read back from their slots."""
    from icae.evaluate import autoencoding

    check_ratio(ratio)
    try:
        wanted = [int(n) for n in lengths.split(",")]
    except ValueError:
        raise ICAEError(f"lengths must be whole numbers with commas, got {lengths!r}; try 64,128,256") from None
    if min(wanted) < 2:
        raise ICAEError(f"lengths must be at least 2, got {lengths}")
    settings: dict[str, Any] = {"lengths": wanted, "samples": samples, "ratio": ratio, "refine": refine, "seed": seed}
    loading = {"model": model, "base": base, "device": device, "dtype": base_dtype, "polish": polish}
    rows = _evaluate(autoencoding, text, loading, save, **settings)
    columns = ["length", "ratio", "samples", "loss", "token_accuracy", "greedy_bleu", "greedy_exact_match", "bleu", "exact_match"]
    columns += [name for name in ("identical", "verified") if name in rows[0]]
    print_results(rows, as_json, lambda: print_table(columns, rows))


@app.command("continuation")
def evaluate_continuation(
    text: TextPath,
    length: Annotated[int, typer.Option(min=2, help="Context tokens.")] = 512,
    target: Annotated[int, typer.Option(help="Tokens that are scored after it.")] = 128,
    samples: Samples = 32,
    ratio: Ratio = None,
    polish: Polish = None,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Perplexity of what follows a context, given as text, as slots, or not at all."""
    from icae.evaluate import continuation

    check_ratio(ratio)
    settings = {"length": length, "target": target, "samples": samples, "ratio": ratio, "seed": seed}
    loading = {"model": model, "base": base, "device": device, "dtype": base_dtype, "polish": polish}
    result = _evaluate(continuation, text, loading, save, **settings)
    print_results(result, as_json, lambda: print_table(list(result), [result]))


QaData = Annotated[str, typer.Option("--data", help="Triples: a .jsonl, SQuAD's .json, or a Hub name.", show_default=False)]
QaSamples = Annotated[int | None, typer.Option("--samples", help="Questions asked, drawn by --seed.", show_default="all")]
QaTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of a response, at most.")]
Responses = Annotated[
    Path | None, typer.Option("--responses", help="Also write every question with its responses here, as .jsonl, as they come.")
]


@app.command("qa")
def evaluate_qa(
    data: QaData,
    sides: Annotated[str, typer.Option(help="What is asked, with commas.")] = "text,slots,none,cut,deleted",
    samples: QaSamples = None,
    ratio: Ratio = None,
    polish: Polish = None,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    jobs: Annotated[int, typer.Option(min=1, help="Processes of one thread each that share the questions; 1: this one alone.")] = 1,
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Token F1 and ROUGE-1 of responses from the full text, slots, nothing, cut-off text and deleted text (as many tokens as slots)."""
    from icae.qa import qa

    settings = {"sides": [side.strip() for side in sides.split(",")], "ratio": ratio, "max_new_tokens": max_tokens}
    own = {"polish": polish, "focus": focus, "grounding": grounding, "beginnings": beginnings}
    loading: dict[str, Any] = {"model": model, "base": base, "device": device, "dtype": base_dtype} | own
    ask: Callable[..., Any] = qa
    if jobs > 1:
        from icae.shares import qa_side_by_side

        def ask(icae: Any, triples: Any, **how: Any) -> Any:
            return qa_side_by_side(icae, partial(load_model, **loading), triples, jobs=jobs, **how)

    _evaluate_qa("qa", ask, data, samples, seed, loading, responses, save, as_json, **settings)


@app.command("qa-documents")
def evaluate_qa_documents(
    data: QaData,
    documents: Annotated[int, typer.Option(help="Documents whose slots are joined; one of them answers.")] = 2,
    samples: QaSamples = None,
    ratio: Ratio = None,
    polish: Polish = None,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """F1 of responses from one document's slots, and from several documents' slots, each made alone."""
    from icae.several import documents as ask_documents

    settings = {"count": documents, "ratio": ratio, "max_new_tokens": max_tokens}
    own = {"polish": polish, "focus": focus, "grounding": grounding, "beginnings": beginnings}
    loading = {"model": model, "base": base, "device": device, "dtype": base_dtype} | own
    _evaluate_qa("qa-documents", ask_documents, data, samples, seed, loading, responses, save, as_json, **settings)


@app.command("qa-places")
def evaluate_qa_places(
    data: QaData,
    length: Annotated[int, typer.Option(min=2, help="Tokens of all paragraphs together.")] = 2048,
    whole: Annotated[bool, typer.Option("--whole/--apart", help="Compress the paragraphs as one text, or each alone.")] = False,
    sides: Annotated[str, typer.Option(help="slots, text, or both with a comma.")] = "slots",
    samples: QaSamples = None,
    ratio: Ratio = None,
    polish: Polish = None,
    focus: Focus = None,
    grounding: Grounding = None,
    beginnings: Beginnings = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """F1 of responses from a long context, with the paragraph that answers at the start, in the middle, and at the end."""
    from icae.several import places

    wanted = [side.strip() for side in sides.split(",")]
    settings = {"length": length, "whole": whole, "sides": wanted, "ratio": ratio, "max_new_tokens": max_tokens}
    own = {"polish": polish, "focus": focus, "grounding": grounding, "beginnings": beginnings}
    loading = {"model": model, "base": base, "device": device, "dtype": base_dtype} | own
    _evaluate_qa("qa-places", places, data, samples, seed, loading, responses, save, as_json, **settings)


def _evaluate(function: Callable[..., Any], text: str, loading: dict[str, Any], save: Path | None, **settings: Any) -> Any:
    """Load model and corpus, call an evaluation with a progress bar, and keep its figures where asked to."""
    from icae.data import load_corpus

    if settings["samples"] < 1:
        raise ICAEError(f"samples must be at least 1, got {settings['samples']}")
    if save is not None:
        make_room(save)
        check_apart(save, text)
    icae = load_model(**loading)
    corpus = load_corpus(text, icae.base)
    with progress("evaluating", "samples") as tick:
        results = function(icae, corpus, progress=tick, **settings)
    if save is not None:
        from icae.report import write_report

        read = hashlib.sha256(corpus.ids.tobytes()).hexdigest()[:12]
        about: dict[str, Any] = {"text": "/".join(Path(text).parts[-2:]), "text_sha256": read}
        about |= {"polish": icae.origin_at(settings["ratio"]).polish, **settings}
        write_report(save, function.__name__, name_of(loading["model"]), icae, about, results)
    return results


def _evaluate_qa(
    name: str,
    function: Callable[..., Any],
    data: str,
    samples: int | None,
    seed: int,
    loading: dict[str, Any],
    responses: Path | None,
    save: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Load model and triples, ask with a progress bar, print the figures, and keep them where asked to."""
    from icae.qa import drawn
    from icae.triples import digest, load_triples

    check_ratio(settings["ratio"])
    if samples is not None and samples < 1:
        raise ICAEError(f"samples must be at least 1, got {samples}")
    if responses is not None and save is not None and responses.resolve() == save.resolve():
        raise ICAEError(f"--responses and --save both name {save}; give each a file of its own")
    for path in (responses, save):
        if path is not None:
            make_room(path)
            check_apart(path, data)
    icae = load_model(**loading)
    every = load_triples(data, icae.base)
    with _lines(responses) as heard, progress("asking", "questions") as tick:
        if name != "qa":  # the others also draw what stands around a context
            settings["seed"] = seed
        results, rows = function(icae, drawn(every, samples, seed), progress=tick, heard=heard, **settings)
    if responses is not None:  # in the order of the questions now
        write_atomically(responses, "".join(map(_line, rows)).encode())
    if save is not None:
        from icae.report import write_report

        asked = {"polish": icae.origin_at(settings["ratio"]).polish}
        asked |= {name: getattr(icae.config, name) for name in ("focus", "grounding", "beginnings")}
        about: dict[str, Any] = {"data": Path(data).name, "data_sha256": digest(every)}
        about |= {"samples": samples, "seed": seed, **asked, **settings}
        write_report(save, name, name_of(loading["model"]), icae, about, results)

    def plain() -> None:
        for name in results:
            if not name.endswith("_interval"):
                low, high = results.get(f"{name}_interval", (None, None))
                value = f"{results[name]:.4g}" if isinstance(results[name], float) else str(results[name])
                print(f"{name:28} {value}" + ("" if low is None else f"  ({low:.4g} to {high:.4g})"))

    print_results(results, as_json, plain)


@contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """Yield what appends a row to a file at once, so that of a run that is cut off all answers remain; none without a file.

    What stood in the file is gone with the first row, not before: a mistake in the options costs nothing.
    """
    if path is None:
        yield None
        return
    with ExitStack() as stack:
        opened: list[TextIO] = []

        def write(row: dict[str, Any]) -> None:
            try:
                if not opened:
                    opened.append(stack.enter_context(open(path, "w", encoding="utf-8", buffering=1)))
                opened[0].write(_line(row))
            except OSError as error:
                raise ICAEError(f"could not write {path}: {error.strerror}") from error

        yield write


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
