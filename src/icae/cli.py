"""The command line: one command a verb. Results on standard output, progress on standard error, heavy imports inside the commands."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae import chat_cli, data_cli, reproduce_cli, serve_cli, store_cli
from icae.errors import ICAEError

if TYPE_CHECKING:
    from icae.model import ICAE

app = typer.Typer(
    name="icae",
    help="Compress a long text into a few memory slots that the same, unmodified LLM reads instead of the text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
evaluation = typer.Typer(help="Measure a checkpoint on held-out text.", no_args_is_help=True)
app.add_typer(evaluation, name="evaluate")
app.add_typer(data_cli.app, name="data")
app.add_typer(store_cli.app, name="store")
app.command()(chat_cli.chat)
app.command()(serve_cli.serve)
app.command()(reproduce_cli.reproduce)

Source = Annotated[str, typer.Argument(help="A text file, '-' for standard input, or the text itself.", show_default=False)]
SlotFile = Annotated[Path, typer.Argument(help="A slot file, as `icae compress` writes it.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", help="Checkpoint: a folder, a shipped name or a Hub id. [default: ships with icae]")]
BaseName = Annotated[str | None, typer.Option("--base", help="Base LLM: name, folder or Hub id. [default: the checkpoint's]")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Ratio = Annotated[int | None, typer.Option("--ratio", help="Context tokens a slot. [default: the checkpoint's]", show_default=False)]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens to generate, at most.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
TextPath = Annotated[str, typer.Option("--text", help="Held-out text: a folder of .txt, a .txt or .jsonl file.", show_default=False)]
Save = Annotated[Path | None, typer.Option("--save", help="Also write the figures here, with settings, commit and machine.")]
Samples = Annotated[int, typer.Option("--samples", help="Samples a figure is taken over.")]
Seed = Annotated[int, typer.Option("--seed", help="Decides which samples are drawn.")]
Config = Annotated[str, typer.Argument(help="YAML config, such as configs/kv-4x.yaml, or a first name=value.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings over the config's: name=value, or model.name=value.", show_default=False)
]


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(help="A text file. [default: a sample that ships]", show_default=False)] = None,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="A question to ask; may be repeated.")] = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compress a text, read it back, continue it, and ask it, beside the full text and nothing."""
    from icae.demo import run, show

    icae = _load(model, base, device)
    results = run(icae, None if source is None else _text(source), question or None, progress=_say)
    _print(results, as_json, lambda: show(results))


@app.command()
def compress(
    source: Source = "-",
    out: Annotated[Path, typer.Option("--out", "-o", help="Slot file to write.")] = Path("slots.safetensors"),
    ratio: Ratio = None,
    half: Annotated[bool, typer.Option("--half/--full", help="Store in float16 (half the bytes) or as computed.")] = True,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compress a text into memory slots, once."""
    text = _text(source)
    _at_least_one(ratio)
    icae = _load(model, base, device)
    import torch

    ids = icae.base.encode(text)
    begin = time.perf_counter()
    with _progress("compressing", "segments") as tick:
        slots = icae.compress_ids([ids], ratio=ratio, progress=tick)[0]
    seconds = time.perf_counter() - begin
    if half:
        slots = slots.to(torch.float16)
    slots.save(out)
    results = {
        "file": str(out),
        "tokens": slots.tokens,
        "slots": slots.count,
        "segments": len(slots.segments),
        "ratio": slots.tokens / slots.count,
        "bytes": out.stat().st_size,
        "seconds": seconds,
    }
    _print(
        results, as_json, lambda: print(f"{slots.tokens} tokens -> {slots.count} slots ({results['ratio']:.2f}x) in {seconds:.1f} s: {out}")
    )


@app.command()
def reconstruct(
    slots: SlotFile,
    against: Annotated[Path | None, typer.Option("--against", help="The original text, to measure against.")] = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Read the text back from its slots."""
    original = None if against is None else _text(str(against), literal=False)
    loaded, icae = _load_slots(slots, model, base, device)
    if original is None and not as_json:
        _stream(icae.stream_reconstruction(loaded))
        return
    ids = icae.reconstruct_ids([loaded])[0]
    results: dict[str, Any] = {"text": icae.base.decode(ids)}
    if original is not None:
        from icae.evaluate import score_reconstruction
        from icae.metrics import bleu, exact_match

        truth = icae.base.encode(original)
        loss, accuracy = score_reconstruction(icae, loaded, truth)
        results |= {
            "loss": loss,
            "bleu": bleu(results["text"], original),
            "exact_match": exact_match(ids, truth),
            "token_accuracy": accuracy,
        }

    def plain() -> None:
        print(results["text"])
        print("  ".join(f"{name} {results[name]:.4g}" for name in results if name != "text"), file=sys.stderr)

    _print(results, as_json, plain)


@app.command("continue")
def continue_(
    slots: SlotFile,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue the text that the slots stand for."""
    loaded, icae = _load_slots(slots, model, base, device)
    pieces = icae.stream_continuation(loaded, max_new_tokens=max_tokens, sampling=_sampling(temperature, seed))
    _print_stream("text", pieces, as_json)


@app.command()
def ask(
    slots: Annotated[str, typer.Argument(help="A slot file; with --text, the question itself.", show_default=False)],
    question: Annotated[str | None, typer.Argument(help="The question or instruction.", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option("--text", help="Ask this text file in full, uncompressed, for comparison.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Ask about a text, from its slots (or, with --text, from the full text)."""
    sampling = _sampling(temperature, seed)
    if text is not None:
        if question is not None:
            raise ICAEError("give either a slot file or --text FILE, not both")
        from icae.chat import full_text

        prompt = full_text(_text(str(text), literal=False), _question(slots))
        icae = _load(model, base, device)
        pieces = icae.stream_answer(None, prompt, max_new_tokens=max_tokens, sampling=sampling)
    else:
        if question is None:
            raise ICAEError('the question is missing: icae ask slots.safetensors "What ...?"')
        prompt = _question(question)
        loaded, icae = _load_slots(Path(slots), model, base, device)
        pieces = icae.stream_answer(loaded, prompt, max_new_tokens=max_tokens, sampling=sampling)
    _print_stream("answer", pieces, as_json)


@app.command()
def pretrain(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; refused where the output folder holds checkpoints.")] = False,
) -> None:
    """Pretrain an adapter by autoencoding and continuation; goes on from the newest checkpoint in its output folder."""
    _train(config, "pretrain", overrides, fresh)


@app.command()
def finetune(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; refused where the output folder holds checkpoints.")] = False,
) -> None:
    """Fine-tune an adapter on (context, prompt, response) triples; from the default adapter, unless told otherwise."""
    _train(config, "instruct", overrides, fresh)


@evaluation.command("autoencoding")
def evaluate_autoencoding(
    text: TextPath,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, with commas.")] = "64,128,256",
    samples: Samples = 32,
    ratio: Ratio = None,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Loss, BLEU and exact match of texts read back from their slots."""
    from icae.evaluate import autoencoding

    _at_least_one(ratio)
    try:
        wanted = [int(n) for n in lengths.split(",")]
    except ValueError:
        raise ICAEError(f"lengths must be whole numbers with commas, got {lengths!r}; try 64,128,256") from None
    rows = _evaluate(autoencoding, text, model, base, device, save, lengths=wanted, samples=samples, ratio=ratio, seed=seed)
    columns = ["length", "ratio", "samples", "loss", "token_accuracy", "bleu", "exact_match"]
    _print(rows, as_json, lambda: _table(columns, rows))


@evaluation.command("continuation")
def evaluate_continuation(
    text: TextPath,
    length: Annotated[int, typer.Option(help="Context tokens.")] = 512,
    target: Annotated[int, typer.Option(help="Tokens that are scored after it.")] = 128,
    samples: Samples = 32,
    ratio: Ratio = None,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Perplexity of what follows a context, given as text, as slots, or not at all."""
    from icae.evaluate import continuation

    _at_least_one(ratio)
    result = _evaluate(continuation, text, model, base, device, save, length=length, target=target, samples=samples, ratio=ratio, seed=seed)
    _print(result, as_json, lambda: _table(list(result), [result]))


QaData = Annotated[str, typer.Option("--data", help="Triples: a .jsonl, SQuAD's .json, or a Hub name.", show_default=False)]
QaSamples = Annotated[int | None, typer.Option("--samples", help="Questions asked, drawn by --seed. [default: all]", show_default=False)]
QaTokens = Annotated[int, typer.Option("--max-tokens", help="Tokens of a response, at most.")]
Responses = Annotated[Path | None, typer.Option("--responses", help="Also write every question with its responses here, as .jsonl.")]


@evaluation.command("qa")
def evaluate_qa(
    data: QaData,
    sides: Annotated[str, typer.Option(help="What is asked, with commas.")] = "text,slots,none,cut,deleted",
    samples: QaSamples = None,
    ratio: Ratio = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Token F1 and ROUGE-1 of responses from the full text, slots, nothing, cut-off text and deleted text (as many tokens as slots)."""
    from icae.qa import qa

    settings = {"sides": [side.strip() for side in sides.split(",")], "ratio": ratio, "max_new_tokens": max_tokens}
    _evaluate_qa("qa", qa, data, samples, seed, model, base, device, responses, save, as_json, **settings)


@evaluation.command("qa-documents")
def evaluate_qa_documents(
    data: QaData,
    documents: Annotated[int, typer.Option(help="Documents whose slots are joined; one of them answers.")] = 2,
    samples: QaSamples = None,
    ratio: Ratio = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """F1 of responses from one document's slots, and from several documents' slots, each made alone."""
    from icae.qa import documents as ask_documents

    settings = {"count": documents, "ratio": ratio, "max_new_tokens": max_tokens}
    _evaluate_qa("qa-documents", ask_documents, data, samples, seed, model, base, device, responses, save, as_json, **settings)


@evaluation.command("qa-places")
def evaluate_qa_places(
    data: QaData,
    length: Annotated[int, typer.Option(help="Tokens of all paragraphs together.")] = 2048,
    whole: Annotated[bool, typer.Option("--whole/--apart", help="Compress the paragraphs as one text, or each alone.")] = False,
    sides: Annotated[str, typer.Option(help="slots, text, or both with a comma.")] = "slots",
    samples: QaSamples = None,
    ratio: Ratio = None,
    max_tokens: QaTokens = 48,
    seed: Seed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    responses: Responses = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """F1 of responses from a long context, with the paragraph that answers at the start, in the middle, and at the end."""
    from icae.qa import places

    wanted = [side.strip() for side in sides.split(",")]
    settings = {"length": length, "whole": whole, "sides": wanted, "ratio": ratio, "max_new_tokens": max_tokens}
    _evaluate_qa("qa-places", places, data, samples, seed, model, base, device, responses, save, as_json, **settings)


@app.command()
def info(
    path: Annotated[
        str | None, typer.Argument(help="A slot file or checkpoint. [default: the shipped adapters]", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a slot file or a checkpoint is."""
    from icae import __version__
    from icae.checkpoint import DEFAULT, SHIPPED, find_checkpoint, read_config

    if path is not None and Path(path).is_file():
        from icae.slots import MemorySlots

        slots = MemorySlots.load(path)
        results: dict[str, Any] = {"slots": slots.count, "tokens": slots.tokens, "segments": len(slots.segments), "bytes": slots.nbytes}
        results |= {"origin": slots.origin.__dict__, "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in slots.tensors.items()}}
    elif path is not None:
        results = read_config(find_checkpoint(path)).to_dict()
    else:
        shipped = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.is_dir() else []
        results = {"version": __version__, "adapters": shipped, "default": DEFAULT}

    def plain() -> None:
        for name, value in results.items():
            print(f"{name:20} {value}")

    _print(results, as_json, plain)


def _text(source: str, *, literal: bool = True) -> str:
    """Return the text that `source` names or is.

    Raises
    ------
    ICAEError
        If it is empty, or looks like the path of a file that is not there.
    """
    from icae.data import read_text

    if not source.strip():
        text = ""
    elif source == "-":
        if sys.stdin.isatty():
            _say("reading standard input, until Ctrl-D ...")
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ICAEError(f"standard input is not text in UTF-8 ({error})") from error
    elif not literal or os.path.exists(source) or not any(c.isspace() for c in source):
        text = read_text(source)
    else:
        text = source
    if not text.strip():
        raise ICAEError("the text is empty; give a text of at least two tokens")
    return text


def _question(text: str) -> str:
    if not text.strip():
        raise ICAEError("the question is empty")
    return text


def _load(model: str | None, base: str | None, device: str) -> ICAE:
    from icae.model import ICAE

    return ICAE.from_pretrained(model, base=base, device=device)


def _load_slots(path: Path, model: str | None, base: str | None, device: str) -> tuple[Any, ICAE]:
    """Return slots and the model to read them; a bad slot file is named before a model is loaded."""
    from icae.slots import MemorySlots

    slots = MemorySlots.load(path)
    return slots, _load(model, base, device)


def _evaluate(
    function: Callable[..., Any], text: str, model: str | None, base: str | None, device: str, save: Path | None, **settings: Any
) -> Any:
    """Load model and corpus, call an evaluation with a progress bar, and keep its figures where asked to."""
    from icae.data import load_corpus
    from icae.matmul import fast_linear

    if settings["samples"] < 1:
        raise ICAEError(f"samples must be at least 1, got {settings['samples']}")
    icae = _load(model, base, device)
    corpus = load_corpus(text, icae.base)
    with _progress("evaluating", "samples") as tick, fast_linear():
        results = function(icae, corpus, progress=tick, **settings)
    if save is not None:
        from icae.report import write_report

        write_report(save, function.__name__, _checkpoint_name(model), icae, {"text": Path(text).name, **settings}, results)
    return results


def _evaluate_qa(
    name: str,
    function: Callable[..., Any],
    data: str,
    samples: int | None,
    seed: int,
    model: str | None,
    base: str | None,
    device: str,
    responses: Path | None,
    save: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Load model and triples, ask with a progress bar, print the figures, and keep them where asked to."""
    from icae.matmul import fast_linear
    from icae.qa import drawn
    from icae.triples import load_triples

    _at_least_one(settings["ratio"])
    if samples is not None and samples < 1:
        raise ICAEError(f"samples must be at least 1, got {samples}")
    every = load_triples(data)
    icae = _load(model, base, device)
    with _progress("asking", "questions") as tick, fast_linear():
        if name != "qa":  # the others also draw what stands around a context
            settings["seed"] = seed
        results, rows = function(icae, drawn(every, samples, seed), progress=tick, **settings)
    if responses is not None:
        from icae.slots import write_atomically

        write_atomically(responses, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    if save is not None:
        from icae.report import write_report

        about = {"data": Path(data).name, "samples": samples, "seed": seed, **settings}
        write_report(save, name, _checkpoint_name(model), icae, about, results)

    def plain() -> None:
        for name in results:
            if not name.endswith("_interval"):
                low, high = results.get(f"{name}_interval", (None, None))
                value = f"{results[name]:.4g}" if isinstance(results[name], float) else str(results[name])
                print(f"{name:28} {value}" + ("" if low is None else f"  ({low:.4g} to {high:.4g})"))

    _print(results, as_json, plain)


def _checkpoint_name(model: str | None) -> str:
    from icae.checkpoint import find_checkpoint

    return find_checkpoint(model).name


def _train(config: str, objective: str, overrides: list[str] | None, fresh: bool) -> None:
    import yaml

    from icae.config import TrainConfig, read_yaml

    if "=" in config and not os.path.exists(config):
        values, overrides = {}, [config, *(overrides or [])]
    else:
        values = read_yaml(config)
    model = values.pop("model", None) or {}
    if not isinstance(model, dict):
        raise ICAEError(f"model in {config} must hold settings of its own, got {model!r}")
    for override in overrides or []:
        name, sign, value = override.partition("=")
        if not sign:
            raise ICAEError(f"override {override!r} is not of the form name=value")
        target, key = (model, name.removeprefix("model.")) if name.startswith("model.") else (values, name)
        try:
            target[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ICAEError(f"override {override!r}: the value is no YAML ({' '.join(str(error).split())})") from error
    if objective == "instruct" and "init" not in values and not model:
        from icae.checkpoint import DEFAULT

        values["init"] = DEFAULT
    settings = TrainConfig.from_dict({**values, "objective": objective})
    from icae.train import starting_config, train

    folder = train(settings, starting_config(settings.init, model), resume=not fresh)
    _say(f"adapter in {folder}")


def _sampling(temperature: float, seed: int) -> Any:
    from icae.model import Sampling

    return Sampling(temperature=temperature, seed=seed if temperature else None)


def _at_least_one(ratio: int | None) -> None:
    if ratio is not None and ratio < 1:
        raise ICAEError(f"ratio must be at least 1, got {ratio}; 4 keeps about everything, 16 the gist")


def _print(results: Any, as_json: bool, plain: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        plain()


def _print_stream(name: str, pieces: Iterator[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: "".join(pieces).strip()}, ensure_ascii=False))
    else:
        _stream(pieces)


def _stream(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _table(columns: list[str], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    Console().print(table)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _progress(verb: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) behind a progress bar on standard error; silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main() -> None:
    """Run the command line; what a user can mend ends in one line on standard error and exit code 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads of torch's pool must not take the cores from numpy's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' talk among themselves
    try:
        app()
    except ICAEError as error:
        _say(f"icae: error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
