"""The main job on one text: compress, read back, continue, ask; each with its seconds and memory.

`run` measures and returns plain values; `show` prints them for people. Neither knows how a model works.
"""

from __future__ import annotations

import difflib
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icae.errors import ICAEError
from icae.evaluate import score_reconstruction
from icae.metrics import bleu, exact_match
from icae.model import ICAE, joined

SAMPLE = Path(__file__).parent / "samples" / "handbook.txt"
"""The text that ships: what is looked at, and measured, where no other is given."""
QUESTIONS = ["Where is the steel pick kept?", "When does the small bell ring?"]
GENERAL_QUESTIONS = ["What is this text about?", "Give this text a title."]
ANSWER_TOKENS = 48
CONTINUATION_TOKENS = 48
_SHOWN = 4000
"""Words, and spaces between them, that are set side by side: what that takes grows with their square."""


def run(
    model: ICAE,
    text: str | None,
    questions: list[str] | None,
    *,
    refine: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Do it all on one text.

    Parameters
    ----------
    model : ICAE
        The model.
    text : str, optional
        None: the sample that ships.
    questions : list of str, optional
        None: two that suit the sample, or two that suit any text.
    refine : bool
        Whether what was read back is compressed again and put right.
    progress : callable
        Called with a line before each step.

    Returns
    -------
    dict
        JSON-ready results; every step has `seconds` and `memory_mb`, the peak of the process so far.
    """
    questions = questions or (QUESTIONS if text is None else GENERAL_QUESTIONS)
    text = SAMPLE.read_text(encoding="utf-8").strip() if text is None else text
    ids = model.base.encode(text)

    progress(f"compressing {len(ids)} tokens ...")
    slots, compressed = _timed(lambda: model.compress_ids([ids])[0])
    progress(f"reading {slots.count} slots back ...")
    segments, read = _timed(lambda: model.read_segments([slots]))
    greedy = joined(segments[0])
    loss, accuracy = score_reconstruction(model, slots, ids)
    back, refining = greedy, {}
    if refine:
        progress("compressing that again, and putting it right where the slots differ ...")
        (refined,), cost = _timed(lambda: model.refine_ids([slots], segments))
        back, refining = refined.ids, {"refine": {"verified": refined.verified, **cost}}
    again = model.base.decode(back)
    progress("continuing ...")
    more, continued = _timed(lambda: _tried(lambda: model.continue_text(slots, max_new_tokens=CONTINUATION_TOKENS)))
    asked = []
    for question in questions:
        progress(f"asking: {question}")
        sides: dict[str, Callable[[], str]] = {
            "slots": lambda q=question: model.answer(slots, q, max_new_tokens=ANSWER_TOKENS),  # type: ignore[misc]
            "text": lambda q=question: model.answer_text(text, q, max_new_tokens=ANSWER_TOKENS),  # type: ignore[misc]
            "nothing": lambda q=question: model.answer(None, q, max_new_tokens=ANSWER_TOKENS),  # type: ignore[misc]
        }
        answers = {}
        for name, side in sides.items():
            answer, cost = _timed(lambda side=side: _tried(side))  # type: ignore[misc]
            answers[name] = {"answer": answer, **cost}
        asked.append({"question": question, **answers})
    return {
        "tokens": slots.tokens,
        "slots": slots.count,
        "ratio": slots.tokens / slots.count,
        "compress": compressed,
        "reconstruct": {
            "text": again,
            "original": text,
            "bleu": bleu(again, text),
            "exact_match": exact_match(back, ids),
            "greedy_bleu": bleu(model.base.decode(greedy), text),
            "loss": loss,
            "token_accuracy": accuracy,
            **read,
        },
        **refining,
        "continue": {"text": more, **continued},
        "ask": asked,
    }


def show(results: dict[str, Any]) -> None:
    """Print the results of `run`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    back = results["reconstruct"]
    console.rule("compress")
    console.print(f"{results['tokens']} tokens -> {results['slots']} memory slots ({results['ratio']:.2f}x), {_cost(results['compress'])}")
    console.rule("read back from the slots")
    beside = Table("original", "read back", show_lines=False, expand=True)
    for left, right in marked(back["original"], back["text"]):
        beside.add_row(Text.assemble(*left), Text.assemble(*right))
    console.print(beside)
    if len(_pieces(back["original"])) > _SHOWN:
        console.print(f"the first {_SHOWN // 2} words; --json has all of them")
    console.print(
        f"as the decoder reads it: BLEU {back['greedy_bleu']:.1f}, loss {back['loss']:.3f}, token accuracy {back['token_accuracy']:.3f}, "
        f"{_cost(back)}"
    )
    if "refine" in results:
        verdict = "its slots are the given ones" if results["refine"]["verified"] else "some slots still differ"
        console.print(f"compressed again and put right: BLEU {back['bleu']:.1f}, {verdict}, {_cost(results['refine'])}")
    console.rule("continue")
    console.print(Text(results["continue"]["text"].strip()))
    console.print(_cost(results["continue"]))
    console.rule("ask")
    for asked in results["ask"]:
        table = Table("from", "answer", "cost", title=Text(asked["question"]), expand=True)
        for side in ("slots", "text", "nothing"):
            table.add_row(side, Text(asked[side]["answer"]), _cost(asked[side]))
        console.print(table)


def marked(original: str, again: str) -> list[tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Set the beginnings of two texts side by side, paragraph by paragraph of the original, as (piece, style) lists.

    What the text read back lacks is red in the original; what it has instead, or too much, is yellow in its own column.
    """
    mine, theirs = _pieces(original)[:_SHOWN], _pieces(again)[:_SHOWN]
    rows: list[tuple[list, list]] = [([], [])]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        if tag != "equal":
            rows[-1][0].append(("".join(mine[a:b]), "red"))
            rows[-1][1].append(("".join(theirs[c:d]), "yellow"))
            continue
        for word in mine[a:b]:
            if word.count("\n") > 1:
                rows.append(([], []))
            else:
                rows[-1][0].append((word, ""))
                rows[-1][1].append((word, ""))
    return rows


def _pieces(text: str) -> list[str]:
    return re.findall(r"\S+|\s+", text)


def _tried(step: Callable[[], str]) -> str:
    """Return what a step says, or why it cannot: a text may be too long for one step, and fit the others."""
    try:
        return step()
    except ICAEError as error:
        return f"({error})"


def _timed(step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    begin = time.perf_counter()
    value = step()
    return value, {"seconds": time.perf_counter() - begin, "memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    """Return the process's peak memory so far, in MB (10^6 bytes)."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _cost(step: dict[str, Any]) -> str:
    return f"{step['seconds']:.1f} s, peak {step['memory_mb'] / 1000:.2f} GB"
