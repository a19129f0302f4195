"""The command line: one command a verb. Results on standard output, progress on standard error, heavy imports inside the commands."""

from __future__ import annotations

import errno
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from icae import ask_cli, chat_cli, data_cli, evaluate_cli, reproduce_cli, serve_cli, store_cli, train_cli
from icae.errors import ICAEError
from icae.segments import check_ratio
from icae.terminal import (
    BaseDtype,
    BaseName,
    Device,
    Json,
    MaxTokens,
    Model,
    Polish,
    Ratio,
    Refine,
    SamplingSeed,
    Temperature,
    escape_what_cannot_be_written,
    lent,
    load_model,
    print_pieces,
    print_results,
    print_stream,
    progress,
    sampling_of,
    say,
    text_of,
)

app = typer.Typer(
    name="icae",
    help="Compress a long text into a few memory slots that the same, unmodified LLM reads instead of the text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        from icae import __version__

        print(f"icae {__version__}")
        raise typer.Exit


@app.callback()
def _icae(
    version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Take the options of no command."""


SOURCE = "A text file, '-' for standard input, or the text itself."
Source = Annotated[str, typer.Argument(help=SOURCE)]
SlotFile = Annotated[Path, typer.Argument(help="A slot file, as `icae compress` writes it.", show_default=False)]


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(help=SOURCE, show_default="a sample that ships")] = None,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="A question to ask; may be repeated.")] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Put right what was read back, as `icae reconstruct` does: takes longer.")
    ] = False,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Compress a text, read it back, continue it, and ask it, beside the full text and nothing."""
    from icae.demo import run, show

    icae = load_model(model, base, device, base_dtype)
    results = run(icae, None if source is None else text_of(source), question or None, refine=refine, progress=say)
    print_results(results, as_json, lambda: show(results))


@app.command()
def compress(
    source: Source = "-",
    out: Annotated[Path, typer.Option("--out", "-o", help="Slot file to write.")] = Path("slots.safetensors"),
    ratio: Ratio = None,
    polish: Polish = None,
    half: Annotated[bool, typer.Option("--half/--full", help="Store in float16 (half the bytes) or as computed.")] = True,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Compress a text into memory slots, once."""
    text = text_of(source)
    if out.exists() and os.path.exists(source) and os.path.samefile(source, out):
        raise ICAEError(f"{out} is the text itself, which the slots would overwrite; name another file with -o")
    for holds, why in (
        (out.is_dir(), "it is a folder"),
        (not out.parent.is_dir(), f"there is no folder {out.parent}"),
        (not os.access(out.parent, os.W_OK), f"folder {out.parent} is read-only"),
    ):
        if holds:
            raise ICAEError(f"could not write {out}: {why}; name a file with -o")
    check_ratio(ratio)
    icae = load_model(model, base, device, base_dtype, polish=polish)
    import torch

    ids = icae.base.encode(text)
    begin = time.perf_counter()
    with progress("compressing", "segments") as tick:
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
    print_results(
        results, as_json, lambda: print(f"{slots.tokens} tokens -> {slots.count} slots ({results['ratio']:.2f}x) in {seconds:.1f} s: {out}")
    )


@app.command()
def reconstruct(
    slots: SlotFile,
    against: Annotated[Path | None, typer.Option("--against", help="The original text, to measure against.")] = None,
    refine: Refine = None,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Read the text back from its slots; what the slots do not bear out is put right."""
    from icae.slots import MemorySlots

    original = None if against is None else text_of(str(against), literal=False)
    loaded = MemorySlots.load(slots)  # a bad file is named before a model is loaded
    icae = load_model(model, base, device, base_dtype)
    icae.check(loaded)
    truth = [] if original is None else icae.base.encode(original)
    if original is not None:
        from icae.evaluate import check_original

        check_original(loaded, truth)  # before it is read
    refines = icae.refines(refine)
    if original is None and not as_json and not refines:
        print_pieces(icae.stream_reconstruction(loaded))
        return
    from icae.model import joined

    read = icae.read_segments([loaded])
    ids = greedy = joined(read[0])
    results: dict[str, Any] = {}
    if refines:
        with progress("refining", "segments") as tick:
            (refined,) = icae.refine_ids([loaded], read, progress=tick)
        ids, results["verified"] = refined.ids, refined.verified
    results = {"text": icae.base.decode(ids), **results}
    if original is not None:
        from icae.evaluate import score_reconstruction
        from icae.metrics import bleu, exact_match

        loss, accuracy = score_reconstruction(icae, loaded, truth)
        results |= {
            "loss": loss,
            "bleu": bleu(results["text"], original),
            "exact_match": exact_match(ids, truth),
            "token_accuracy": accuracy,
            "greedy_bleu": bleu(icae.base.decode(greedy), original),
        }

    def plain() -> None:
        print(results["text"])
        about = [f"{name} {value:.4g}" for name, value in results.items() if name not in ("text", "verified")]
        if refines:
            said = f"of {len(refined.mismatches)} segments {refined.doubtful} may differ from the text compressed"
            about.append("verified: compressed again, it has these very slots" if results["verified"] else said)
        print("  ".join(about), file=sys.stderr)

    print_results(results, as_json, plain)


@app.command("continue")
def continue_(
    slots: SlotFile,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: SamplingSeed = 0,
    model: Model = None,
    base: BaseName = None,
    device: Device = "cpu",
    base_dtype: BaseDtype = "float32",
    as_json: Json = False,
) -> None:
    """Continue the text that the slots stand for."""
    from icae.slots import MemorySlots

    loaded = MemorySlots.load(slots)  # a bad file is named before a model is loaded
    icae = load_model(model, base, device, base_dtype)
    pieces = icae.stream_continuation(loaded, max_new_tokens=max_tokens, sampling=sampling_of(temperature, seed))
    print_stream("text", pieces, as_json)


@app.command()
def info(
    path: Annotated[str | None, typer.Argument(help="A slot file or checkpoint.", show_default="the shipped adapters")] = None,
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

    print_results(results, as_json, plain)


# in the order in which `icae --help` lists them, behind those above
app.command()(ask_cli.ask)
app.command()(chat_cli.chat)
app.command()(serve_cli.serve)
app.command()(train_cli.pretrain)
app.command()(train_cli.finetune)
app.command()(reproduce_cli.reproduce)
app.add_typer(store_cli.app, name="store")
app.add_typer(data_cli.app, name="data")
app.add_typer(evaluate_cli.app, name="evaluate")


def main() -> None:
    """Run the command line; what a user can mend ends in one line on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    escape_what_cannot_be_written()
    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' talk among themselves
    try:
        with lent:
            try:
                app()
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where its failure can be told
    except ICAEError as error:
        say(f"icae: error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what waits there still goes nowhere
        if error.errno == errno.EPIPE:
            sys.exit(1)
        say(f"icae: error: could not write the output: {error.strerror}")
        sys.exit(2)


if __name__ == "__main__":
    main()
