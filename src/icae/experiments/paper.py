"""The paper's own figures (arXiv 2307.06945, Llama-7b on 8 A100s), and sentences that set ours beside them, made from our tables.

Figures of the paper are quoted; every figure of ours comes out of a table. `page` makes docs/results.md of both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from icae.config import POLISH_RATES
from icae.experiments import EXPERIMENTS
from icae.experiments.table import Cell, Table, number

PAPER = {
    "fig4": "128 slots: loss below 0.05; BLEU and exact match near 100% up to 300 tokens; at 500 tokens a median BLEU above 0.98 and an "
    "exact match of about 0.6.",
    "fig5": "128 slots keep BLEU above 95% at 500 tokens; 64 and 32 slots degrade sharply.",
    "table1": "Perplexity from text -> from slots: 1x 9.99 -> 10.15; 2x 9.45 -> 9.77; 4x 9.01 -> 9.50.",
    "table2": "Errors of reading back look like those of people: words dropped or replaced by some that mean alike.",
    "table3": "Loss / BLEU: normal text 0.01 / 99.3; patterned (each id + 1) 1.63 / 3.5; random 4.55 / 0.2.",
    "table4": "GPT-4's verdicts, win / lose / tie: Llama-7b slots against Alpaca with the full text 56.7 / 26.9 / 16.4; Llama-2-7b-chat "
    "with 128 slots against itself with the full text 19.6 / 45.4 / 35.0, with 256 slots 22.0 / 22.2 / 55.8.",
    "table5": "GPT-4's verdicts, win / lose / tie: 128 against 64 slots 57.6 / 19.5 / 22.9; pretrained against not 60.4 / 9.5 / 30.1; "
    "against autoencoding alone 36.4 / 28.5 / 35.1; against continuation alone 35.1 / 24.9 / 40.0; "
    "against a 128-token summary 34.1 / 17.6 / 48.3.",
    "table6": "BLEU, loss, perplexity from text -> from slots: Llama-7b 99.1, .017, 9.01 -> 9.50; Llama-2-7b 99.5, .009, 8.81 -> 9.18; "
    "Llama-2-13b 99.8, .004, 8.15 -> 8.45.",
    "table7": "Seconds for 128 tokens, text -> compress + decode: 8 x 2048 24.0 -> 3.4 + 3.9; 8 x 512 9.3 -> 0.6 + 3.7; 32 x 512 24.3 -> "
    "2.6 + 4.2: 2.2 to 3.6 times as fast, over 7 times with slots kept.",
    "fig6": "Slots of several segments, joined, fail until a few such samples are trained on; 2,048 slots then do what 4,096 tokens do.",
    "qa": "Not in the paper. On PwC (IC-Former's paper), ROUGE-1 F1: full context 0.501, ICAE 0.555.",
    "memory": "Told in words: memorising is selective, as people's is; what the LLM knows needs less of the slots.",
}
"""What the paper reports under each name."""

AS_WRITTEN = ("table1", "fig6", "table7")
"""What is measured from unpolished slots, whatever the steps of polishing elsewhere."""
SMALL = "smollm2-135m"


def verdict(table: Table) -> str:
    """Return how a table stands to the paper, in a sentence or two."""
    said = _VERDICTS[table.name](table)
    sample = any("sample that ships" in note for note in table.notes)
    return said + (" Measured on the sample that ships alone: a check of the form." if sample else "")


def _base(table: Table) -> str:
    """Return why the base may decide a difference."""
    name = table.provenance.get("base", "another base")
    small = "; it is 50 times smaller, and its adapter has seen millions of tokens, not billions" if name == SMALL else ""
    return f"the base is {name}, the paper's is Llama-7b{small}"


def page(tables: Mapping[str, Table], pictures: Collection[str], shipped: Mapping[str, str] | None = None) -> str:
    """Return docs/results.md of the tables at hand.

    Parameters
    ----------
    tables : mapping of str to Table
        By the experiment's name.
    pictures : collection of str
        Names of those that have one beside them.
    shipped : mapping of str to str, optional
        The hash of each adapter that ships: tables of another one under its name say so.
    """
    lines = [
        "# Results beside the paper's",
        "",
        "Made by `python docs/make.py` from results/*.json, which `icae reproduce` wrote. Every cell was computed, at the commit that",
        "stands under its table; the sentences that compare are made from the tables too. The paper is arXiv 2307.06945.",
        "",
        "Slots were polished by the steps that stand under each table, one or none, which keeps hundreds of samples affordable.",
        "`icae compress` takes two at 4x, three at 8x and five at 16x, and reads back better: those figures are in the",
        "[README](../README.md#results).",
        "",
    ]
    for name, title in EXPERIMENTS.items():
        lines += [f"## {name}: {title}", "", f"The paper: {PAPER[name]}", ""]
        table = tables.get(name)
        if table is None:
            lines += [f"Not run yet: `icae reproduce {name}`.", ""]
            continue
        lines += [table.grid(), "", f"**Here**: {verdict(table)}", ""]
        if name in pictures:
            lines += [f"![{title}](../results/{name}.png)", ""]
        lines += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
        about = table.provenance
        names = [_name(x, shipped or {}) for x in about.values() if isinstance(x, dict) and "sha256" in x]
        steps = f"steps of polishing: {0 if name in AS_WRITTEN else about['polish']}" if "polish" in about else None
        if steps and name not in AS_WRITTEN and about.get("polish_rates") != POLISH_RATES:
            steps += " (at other rates than now)"
        told = [about.get("base"), *names, steps, f"commit {about.get('commit')}", about.get("date"), about.get("machine")]
        lines += [f"<sub>{'; '.join(str(x) for x in told if x)}</sub>", ""]
    return "\n".join(lines)


def _name(about: dict[str, str], shipped: Mapping[str, str]) -> str:
    """Return the name of a text or a checkpoint; of an adapter that ships, whether it has been trained on since."""
    changed = shipped.get(about["name"], about["sha256"]) != about["sha256"]
    return f"{about['name']} as it was at this commit (another ships now)" if changed else about["name"]


# ---- one a table ----


def _of(row: dict[str, Cell], key: str) -> float:
    return number(row.get(key)) or 0.0


def _row(table: Table, **wanted: Cell) -> dict[str, Cell] | None:
    return next((r for r in table.rows if all(r.get(k) == v for k, v in wanted.items())), None)


def _fig4(table: Table) -> str:
    first, last = table.rows[0], table.rows[-1]
    if first is last:
        said = f"BLEU is {_of(last, 'bleu'):.1f} at {last['length']} tokens, loss {_of(last, 'loss'):.3f}, exact prefix"
        said += f" {_of(last, 'exact'):.2f}."
    else:
        said = (
            f"BLEU is {_of(first, 'bleu'):.1f} at {first['length']} tokens and {_of(last, 'bleu'):.1f} at {last['length']}, "
            f"loss {_of(last, 'loss'):.3f}, exact prefix {_of(first, 'exact'):.2f} and {_of(last, 'exact'):.2f}."
        )
        said += (
            " As in the paper, the exact prefix falls with length"
            if _of(last, "exact") < _of(first, "exact")
            else " Unlike the paper's, the exact prefix does not fall with length"
        )
        said += ", while the loss hardly moves here, since every segment is read back from its own slots."
    steps = table.provenance.get("polish")
    polished = f"with {steps} step{'' if steps == 1 else 's'} of polishing" if steps else "with no polishing"
    return said + ("" if _of(last, "loss") < 0.05 else f" The loss is above the paper's 0.05, {polished}: {_base(table)}.")


def _fig5(table: Table) -> str:
    length = max(_of(r, "length") for r in table.rows)
    rows = sorted((r for r in table.rows if r["length"] == length), key=lambda r: _of(r, "ratio"))
    told = ", ".join(f"{r['ratio']}x {_of(r, 'bleu'):.1f}" for r in rows)
    if len(rows) == 1:
        return f"BLEU at {length:.0f} tokens: {told}."
    falls = all(_of(a, "bleu") > _of(b, "bleu") for a, b in zip(rows[:-1], rows[1:], strict=True))
    agrees = "As in the paper, fewer slots read back worse" if falls else "Unlike in the paper, fewer slots do not always read back worse"
    return f"BLEU at {length:.0f} tokens: {told}. {agrees}; one adapter reads all ratios, where the paper trained one for each."


def _table1(table: Table) -> str:
    told = "; ".join(f"{r['ratio']}x {_of(r, 'text'):.2f} -> {_of(r, 'slots'):.2f}" for r in table.rows)
    costs = all(_of(r, "slots") >= _of(r, "text") for r in table.rows)
    helps = [r for r in table.rows if _of(r, "slots") < _of(r, "none")]
    said = f"{told}. " + (
        "As in the paper, slots cost some perplexity at every ratio" if costs else "At some ratio slots cost no perplexity at all"
    )
    said += f", and at {len(helps)} of {len(table.rows)} ratios they are better than nothing."
    worst = max(_of(r, "slots") / max(_of(r, "text"), 1e-9) for r in table.rows)
    return said + (f" The gap is wider than the paper's 1.05: {_base(table)}." if worst > 1.1 else "")


def _table2(table: Table) -> str:
    wrong = sum(1 for r in table.rows if r["errors"])
    return f"{wrong} of the {len(table.rows)} lines shown hold an error; the note below counts the classes over all windows."


def _table3(table: Table) -> str:
    said = []
    for kind in dict.fromkeys(r["kind"] for r in table.rows):
        normal, patterned, chance = (_row(table, kind=kind, content=c) for c in ("normal", "patterned", "random"))
        if normal is None or patterned is None or chance is None or number(normal.get("loss")) is None:
            continue
        order = _of(normal, "loss") < _of(patterned, "loss") < _of(chance, "loss")
        agrees = "in the paper's order" if order else "not in the paper's order"
        told = " / ".join(f"{_of(r, 'loss'):.2f}" for r in (normal, patterned, chance))
        said.append(f"{kind}: loss {told} for normal, patterned and random text, {agrees}")
    return ". ".join(said) + (". Slots that lean on language lose what is none." if said else "Not measured.")


def _versus(table: Table) -> str:
    rows = [r for r in table.rows if number(r.get("win")) is not None]
    if not rows:
        return "Not measured."
    told = "; ".join(f"{r['pair']}: {100 * _of(r, 'win'):.1f} / {100 * _of(r, 'lose'):.1f} / {100 * _of(r, 'tie'):.1f}" for r in rows)
    by = rows[0]["by"]
    why = (
        "Decided by token F1 against short references, so that ties are more frequent than with a judge"
        if by == "token F1"
        else f"Judged by {by}"
    )
    return f"Win / lose / tie, in %: {told}. {why}."


def _table6(table: Table) -> str:
    real = [r for r in table.rows if "form check" not in str(r["base"])]
    told = "; ".join(
        f"{r['base']} {_of(r, 'bleu'):.1f}, {_of(r, 'loss'):.3f}, {_of(r, 'text'):.2f} -> {_of(r, 'slots'):.2f}" for r in table.rows
    )
    return f"{told}. " + ("That a larger base reads back better cannot be said from one base." if len(real) < 2 else "")


def _table7(table: Table) -> str:
    rows = [r for r in table.rows if number(r.get("speedup")) is not None]
    if not rows:
        return "Not measured."
    low, high = min(_of(r, "speedup") for r in rows), max(_of(r, "speedup") for r in rows)
    kept = max(_of(r, "speedup_kept") for r in rows)
    said = f"Slots in all take {1 / high:.2f} to {1 / low:.2f} of the text's time; from kept slots, up to {kept:.1f} times as fast."
    slower = low < 1
    why = (
        " Where they are slower: compressing reads the context once, as the text's side does, and the memory tokens besides; it pays back "
        "only over many generated tokens, or when slots are kept"
        if slower
        else " As in the paper, slots are faster in every cell"
    )
    return f"{said}{why}; the KV cache shrinks by the compression ratio."


def _fig6(table: Table) -> str:
    rows = [r for r in table.rows if r["side"] == "slots"]
    first, last = rows[0], rows[-1]
    told = f"{first['segments']} segment(s): perplexity {_of(first, 'perplexity'):.2f}"
    if last is not first:
        better = _of(last, "perplexity") < _of(first, "perplexity")
        told += f"; {last['segments']}: {_of(last, 'perplexity'):.2f}. "
        told += "More segments help, as in the paper after training on such samples" if better else "More segments do not help yet"
    same = [r for r in table.rows if r["side"] == "text" and r["read"] == last["read"]]
    beside = f" {last['read']} slots stand against {_of(same[0], 'perplexity'):.2f} of as many tokens of text." if same else ""
    return f"{told}.{beside}"


def _qa(table: Table) -> str:
    rows = [r for r in table.rows if number(r.get("f1")) is not None]
    if not rows:
        return "Not measured."
    told = ", ".join(f"{r['side']} {_of(r, 'f1'):.3f}" for r in rows)
    slots = next(r for r in rows if str(r["side"]).startswith("slots"))
    rivals = [r for r in rows if r["side"] in ("cut-off text", "most surprising tokens")]
    better = all(_of(slots, "f1") > _of(r, "f1") for r in rivals)
    return f"Token F1: {told}. Slots are {'above' if better else 'not above'} both kinds of text of the same budget."


def _memory(table: Table) -> str:
    whole = table.rows[-1]
    rank = _of(whole, "rank")
    agrees = "agrees with" if rank > 0.1 else "does not bear out"
    return f"The rank correlation is {rank:.2f}, which {agrees} the paper: what surprises the base is lost more often."


_VERDICTS: dict[str, Callable[[Table], str]] = {
    "fig4": _fig4,
    "fig5": _fig5,
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _versus,
    "table5": _versus,
    "table6": _table6,
    "table7": _table7,
    "fig6": _fig6,
    "qa": _qa,
    "memory": _memory,
}
