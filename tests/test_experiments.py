"""The experiments on tiny random bases: what each one's figures are equal to, and how a run behaves as a whole."""

import ast
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml

import icae
from icae import cli
from icae.baselines import surprise
from icae.errors import ICAEError
from icae.evaluate import autoencoding, continuation
from icae.experiments import EXPERIMENTS, asking, fig4, fig6, following, memory, paper, qa, reading, table2, table3, table5, table6, table7
from icae.experiments.context import Context, checkpoint_hash, open_context
from icae.experiments.runner import reproduce
from icae.experiments.table import Column, Table, number, perplexity
from icae.figures import PAINTERS, draw
from icae.model import ICAE
from icae.segments import slot_count

SMALL = {
    "fig4": {"samples": 3, "lengths": (8, 16)},
    "fig5": {"samples": 3, "lengths": (8, 16), "ratios": (2, 4)},
    "table1": {"samples": 3, "slots": 4, "target": 6, "ratios": (1, 2)},
    "table2": {"samples": 3, "length": 16},
    "table3": {"samples": 3, "length": 8},
    "table4": {"samples": 3, "max_new_tokens": 4},
    "table5": {"samples": 3, "max_new_tokens": 4},
    "table6": {"samples": 3, "length": 8, "context_length": 8, "target": 6},
    "table7": {"batches": (1, 2), "contexts": (16, 32), "generated": 3, "repeats": 2, "most_tokens": 40},
    "fig6": {"samples": 3, "lengths": (16, 32), "text_lengths": (0, 4, 16), "target": 6, "at_once": 32},
    "qa": {"samples": 3, "max_new_tokens": 4},
    "memory": {"samples": 4, "length": 16, "groups": 3},
}
QUESTIONS = [{"input": line, "prompt": f"What is told of {line.split()[1]}?", "answer": line.split()[2]} for line in tiny.LINES]


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Checkpoints of every role, a text and questions."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny.make_icae(base, stirred=0.05).save_pretrained(folder / "main")
    tiny.make_icae(base, kind="embedding", stirred=0.05).save_pretrained(folder / "embedding")
    for seed, name in enumerate(("full", "ae-only", "lm-only"), 1):
        tiny.make_icae(base, seed=seed, stirred=0.05).save_pretrained(folder / "ablations" / name)
    (folder / "text.txt").write_text(" ".join(tiny.LINES * 6))
    (folder / "qa.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


@pytest.fixture
def context(base, files):
    roles = {"main": files / "main", "embedding": files / "embedding"}
    return Context(base, roles, files / "text.txt", files / "qa.jsonl", files / "ablations", say=lambda _: None)


def small(name):
    return SMALL[name]


def cells(table):
    return [(row, c, row.get(c.key)) for row in table.rows for c in table.columns]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_gives_a_whole_table(name, context):
    table = importlib.import_module(f"icae.experiments.{name}").run(context, **small(name))
    assert table.name == name and table.rows and table.windows
    assert len({c.key for c in table.columns}) == len(table.columns)
    for row, column, cell in cells(table):
        if isinstance(cell, dict):
            assert cell["low"] <= cell["value"] + 1e-9 and cell["value"] <= cell["high"] + 1e-9
            assert all(math.isfinite(x) for x in cell.values())
        elif cell is None:
            assert any(str(row["pair"]) in note for note in table.notes), (row, column)
    text = table.to_markdown()
    assert table.title in text
    assert text.count("\n|") == len(table.rows) + 2
    assert set(draw(table)) == ({"png", "svg"} if name in PAINTERS else set())


def test_a_run_writes_tables_and_pictures_that_come_from_the_tables_alone(context, tmp_path):
    names = ["fig4", "table7"]
    assert reproduce(context, names, out=tmp_path, overrides=SMALL) == {"fig4": "done", "table7": "done"}
    for name in names:
        table = Table.load(tmp_path / f"{name}.json")
        assert {kind: (tmp_path / f"{name}.{kind}").read_bytes() for kind in ("png", "svg")} == draw(table)
        assert (tmp_path / f"{name}.md").read_text() == table.to_markdown()
        assert table.settings["samples" if name == "fig4" else "repeats"] == small(name)["samples" if name == "fig4" else "repeats"]
        assert {"base_fingerprint", "main", "text", "commit", "machine", "date", "seed"} <= table.provenance.keys()


def test_what_stands_is_kept_until_settings_adapter_or_will_change(context, files, tmp_path, monkeypatch):
    monkeypatch.setattr("icae.experiments.runner.commit", lambda: "0123456789")

    def run(where=context, **changes):
        overrides = {"fig4": {**small("fig4"), **changes.pop("settings", {})}}
        return reproduce(where, ["fig4"], out=tmp_path, overrides=overrides, **changes)["fig4"]

    assert [run(), run(), run(force=True), run()] == ["done", "kept", "done", "kept"]
    assert run(settings={"samples": 4}) == "done"
    assert run(where=dataclasses.replace(context, checkpoints={"main": files / "embedding"}, known={}), settings={"samples": 4}) == "done"
    assert run(where=dataclasses.replace(context, seed=1, known={}), settings={"samples": 4}) == "done"
    (tmp_path / "fig4.json").write_text("{}")
    assert [run(), run()] == ["done", "kept"]
    monkeypatch.setattr("icae.experiments.runner.commit", lambda: "0123456789+")
    assert [run(), run()] == ["done", "done"]  # who knows what was changed in between


def test_whoever_answers_and_what_it_is_computed_on_decide_what_is_kept(context, files):
    asked = importlib.import_module("icae.experiments.qa").NEEDS
    bare = [dataclasses.replace(context, checkpoints={"main": files / name}) for name in ("main", "embedding")]
    assert bare[0].identity(asked) != bare[1].identity(asked)
    assert {"device": "cpu", "dtype": "float32"}.items() <= context.identity(()).items()


def test_a_picture_that_is_drawn_no_more_goes(context, tmp_path):
    (tmp_path / "table3.png").write_bytes(b"of before")
    (tmp_path / "table4.png").write_bytes(b"another's")
    assert reproduce(context, ["table2"], out=tmp_path, overrides=SMALL) == {"table2": "done"} and len(list(tmp_path.glob("*.png"))) == 2
    (tmp_path / "table2.png").write_bytes(b"of before")
    reproduce(context, ["table2"], out=tmp_path, overrides=SMALL, force=True)
    assert {p.name for p in tmp_path.glob("*.png")} == {"table3.png", "table4.png"}


def test_one_that_fails_does_not_lose_the_others(context, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(context, "say", said.append)
    monkeypatch.setattr("icae.experiments.fig4.read_back", lambda *_: 1 / 0)
    outcome = reproduce(context, ["fig4", "table3"], out=tmp_path, overrides=SMALL)
    assert outcome == {"fig4": "failed", "table3": "done"}
    assert "ZeroDivisionError" in "".join(said)
    assert not (tmp_path / "fig4.json").exists()


def test_what_is_missing_is_said_and_never_made_up(base, files):
    bare = Context(base, {"main": files / "main"}, files / "text.txt", say=lambda _: None)
    table = table3.run(bare, **small("table3"))
    absent = [r for r in table.rows if r["kind"] == "embedding"]
    assert len(absent) == 3 and all(r.get("loss") is None for r in absent)
    assert any("--embedding" in n for n in table.notes) and "not measured" in table.to_markdown()
    other = dataclasses.replace(bare, checkpoints={"main": files / "embedding"}, _loaded={})
    table = table3.run(other, **small("table3"))
    assert [r["kind"] for r in table.rows] == ["embedding"] * 3 + ["kv"] * 3 and any("adapter with kv slots" in n for n in table.notes)
    for name in ("table4", "table5", "qa"):
        table = importlib.import_module(f"icae.experiments.{name}").run(bare, **small(name))
        assert all(number(r.get(k)) is None for r in table.rows for k in ("f1", "f1_first", "win"))
        assert any("--qa" in n for n in table.notes)
        assert draw(table) == {}


def test_ablations_that_were_not_trained_are_named(context):
    notes = table5.run(context, **small("table5")).notes
    assert not any("no adapter" in n for n in notes)
    bare = dataclasses.replace(context, ablations=None)
    table = table5.run(bare, **small("table5"))
    assert sum("no adapter full" in n and "--adapters" in n for n in table.notes) == 3
    assert [r["pair"] for r in table.rows if number(r.get("win")) is None] == [f"pretrained against {x}" for x in table5.OTHERS.values()]


def test_fine_tuned_ablations_are_preferred(context, files, base, tmp_path):
    for seed, name in enumerate(("full", "full-answers", "not-pretrained-answers")):
        tiny.make_icae(base, seed=seed, stirred=0.05).save_pretrained(tmp_path / name)
    notes = table5.run(dataclasses.replace(context, ablations=tmp_path), **small("table5")).notes
    assert any("not pretrained: both" in n and n.endswith(", fine-tuned.") for n in notes)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fig9"],
        ["--judge", "m", "--judge-url", "http://127.0.0.1:9", "--text", "nowhere"],
        ["--rival", "m"],
        ["--judge-url", "http://127.0.0.1:9"],
        ["--qa", "."],
    ],
)
def test_bad_input_ends_in_one_line_and_code_2(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["icae", "reproduce", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("icae: error: ")


def test_a_base_without_an_adapter_is_refused(base_folder, monkeypatch, files):
    monkeypatch.setattr("icae.experiments.context.find_checkpoint", lambda _: files / "main")
    assert open_context(base=str(base_folder)).base.name == str(base_folder)
    other = tiny.save_base(files / "other", seed=3)
    with pytest.raises(ICAEError) as error:
        open_context(base=str(other))
    tiny.one_line(error.value, "no adapter ships", "--model")


def test_roles_are_found_among_what_ships(base, files, tmp_path, monkeypatch):
    shipped = {
        "a-answers": ("kv", "instruct"),
        "b-emb-answers": ("embedding", "instruct"),
        "c-emb": ("embedding", "pretrain"),
        "d": ("kv", "pretrain"),
    }
    for name, (kind, objective) in shipped.items():
        tiny.make_icae(base, kind=kind).save_pretrained(tmp_path / name)
        (tmp_path / name / "train_config.json").write_text(json.dumps({"objective": objective}))
    monkeypatch.setattr("icae.experiments.context.SHIPPED", tmp_path)

    def roles(model):
        return {role: folder.name for role, folder in open_context(model=str(tmp_path / model), base=base.name).checkpoints.items()}

    assert roles("d") == {"main": "d", "answers": "a-answers", "embedding": "c-emb"}
    assert roles("a-answers") == {"main": "a-answers", "answers": "a-answers", "embedding": "c-emb"}
    tiny.make_icae(base).save_pretrained(tmp_path / "a-answers" / "checkpoint-3")
    assert roles("a-answers/checkpoint-3")["answers"] == "checkpoint-3"
    for note in ("{", "[]"):  # damaged
        (tmp_path / "d" / "train_config.json").write_text(note)
        assert roles("d")["answers"] == "d"
    (tmp_path / "d" / "train_config.json").unlink()  # from the Hub, say
    assert roles("d")["answers"] == "d"


CONFIGS = Path(__file__).parent.parent / "configs" / "ablations"


def test_the_ablations_differ_in_their_objectives_alone():
    full, ae, lm = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()) for n in ("full", "ae-only", "lm-only"))
    for name, config, share in (("ae-only", ae, 1.0), ("lm-only", lm, 0.0)):
        assert {k for k in full if full[k] != config[k]} == {"autoencoding_share", "output"} and full.keys() == config.keys()
        assert config["autoencoding_share"] == share and config["output"] == f"runs/ablations/{name}"
    tuned, fresh = (yaml.safe_load((CONFIGS / f"{n}.yaml").read_text()) for n in ("answers", "not-pretrained-answers"))
    assert fresh.pop("model") == full["model"] and tuned.pop("init") == full["output"]
    assert {k for k in tuned if tuned[k] != fresh[k]} == {"output"}


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.yaml")))
def test_every_ablation_config_trains(name, base_folder, files, monkeypatch, tmp_path):
    verb, data = ("finetune", files / "qa.jsonl") if "answers" in name else ("pretrain", files / "text.txt")
    settings = {"train": data, "held_out": "null", "output": tmp_path / "run", "steps": 1}
    settings |= {"init": files / "main"} if name == "answers" else {"model.base": base_folder}
    settings |= {"windows": "[[0,8]]"} if verb == "pretrain" else {}
    monkeypatch.setattr(sys, "argv", ["icae", verb, str(CONFIGS / f"{name}.yaml"), *(f"{k}={v}" for k, v in settings.items())])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("config", ["kv-4x", "embedding-4x", "ablations/not-pretrained-answers"])
def test_what_was_made_from_nothing_begins_there(config, monkeypatch, tmp_path):
    """Fine-tuning begins with the adapter that ships, unless it is told otherwise."""
    began = []
    monkeypatch.setattr("icae.train.train", lambda settings, model, **_: began.append((settings, model)) or tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    monkeypatch.setattr(sys, "argv", ["icae", "finetune", str(CONFIGS.parent / f"{config}.yaml"), "minutes=null", "steps=1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    (settings, model), written = began[0], yaml.safe_load((CONFIGS.parent / f"{config}.yaml").read_text())["model"]
    assert not stop.value.code and settings.init is None and {k: model.to_dict()[k] for k in written} == written


def test_reproduce_quick_on_the_command_line(base_folder, files, monkeypatch, capsys, tmp_path):
    """Without a text: the sample that ships, and few samples."""
    monkeypatch.chdir(tmp_path)
    names = ["fig4", "table1", "table2", "table3", "table6", "fig6", "memory", "qa"]
    options = ["--model", files / "main", "--quick", "--samples", "2", "--qa", files / "qa.jsonl", "--json"]
    monkeypatch.setattr(sys, "argv", ["icae", "reproduce", *names, *map(str, options)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert not stop.value.code
    assert json.loads(captured.out) == dict.fromkeys(names, "done"), captured.err
    table = Table.load("results/fig4.json")
    assert table.settings["samples"] == 2 and table.settings["lengths"] == list(fig4.QUICK["lengths"])
    assert any("sample that ships" in n for n in table.notes)


def test_the_list_needs_no_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["icae", "reproduce", "--list", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out) == EXPERIMENTS


@pytest.mark.real
def test_reproduce_quick_on_the_shipped_adapter(monkeypatch, capsys, tmp_path, real_base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icae.experiments.context.load_base", lambda *_, **__: real_base)
    monkeypatch.setattr(sys, "argv", ["icae", "reproduce", "fig4", "table2", "memory", "--quick", "--samples", "2", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, capsys.readouterr().err
    assert number(Table.load("results/fig4.json").rows[0]["bleu"]) > 50
    assert number(Table.load("results/memory.json").rows[-1]["rank"]) > 0


def test_one_that_fails_on_the_command_line_gives_code_1(files, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icae.experiments.fig4.read_back", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["icae", "reproduce", "fig4", "--quick", "--model", str(files / "main"), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert json.loads(capsys.readouterr().out) == {"fig4": "failed"}


# ---- what the figures are equal to ----


@pytest.mark.parametrize("role", ["main", "embedding"])
def test_readings_are_what_icae_evaluate_measures(context, role):
    model = context.adapter(role)
    (row,) = autoencoding(model, context.corpus, lengths=[40], samples=3, seed=0)
    windows = context.windows(40, 3)
    readings = reading.read_back(context, model, windows)
    assert np.mean(reading.losses(readings)) == pytest.approx(row["loss"], abs=1e-5)
    assert np.mean(reading.bleus(model, readings, windows)) == pytest.approx(row["greedy_bleu"])
    assert np.mean(reading.matches(readings, windows)) == pytest.approx(row["exact_match"])


def test_a_context_that_begins_alike_is_read_from_what_is_known(context, monkeypatch):
    windows = context.windows(48, 2)
    whole = reading.read_back(context, context.main, windows)
    monkeypatch.setattr(type(context.main), "score", None)  # whoever calls it now fails
    half = reading.read_back(context, context.main, [w[:32] for w in windows])
    for a, b in zip(whole, half, strict=True):
        np.testing.assert_array_equal(a.nll[:32], b.nll)
        assert b.slots == 8 and a.slots == 12


def test_following_is_what_icae_evaluate_measures(context):
    expected = continuation(context.main, context.corpus, length=24, target=8, samples=4, seed=0)
    chance = np.random.default_rng([0, 24, 8])
    context.windows = lambda length, samples: [context.corpus.window(chance, length) for _ in range(samples)]
    nll = following.follow(context, context.main, length=24, target=8, samples=4)
    for side, values in nll.items():
        assert perplexity(values)["value"] == pytest.approx(expected[f"ppl_{side}"], rel=1e-5)


def test_answers_are_the_models_own_and_likelihood_is_of_the_reference(context):
    notes = []
    triples = context.triples(3, 384, notes)
    model = context.main
    side = asking.ask_text(context, model, triples, [t.context for t in triples], max_new_tokens=4)
    assert side.responses[1] == model.answer_text(triples[1].context, triples[1].prompt, max_new_tokens=4)
    from icae.chat import chat_prompt, chat_response

    prompt = chat_prompt(context.base.tokenizer, f"{triples[1].context}\n\n{triples[1].prompt}")
    response = chat_response(context.base.tokenizer, triples[1].response)
    likely = tiny.base_logits(context.base, prompt + response).log_softmax(-1)
    wanted = [float(likely[len(prompt) - 1 + i, token]) for i, token in enumerate(response)]
    assert side.likelihood[1] == pytest.approx(np.mean(wanted), abs=1e-4)
    slots = asking.ask_slots(context, model, triples, max_new_tokens=4)
    assert slots.responses[2] == model.answer(model.compress(triples[2].context), triples[2].prompt, max_new_tokens=4)


def test_the_budget_of_the_baselines_is_that_of_the_slots(context):
    rows = {r["side"]: r for r in qa.run(context, **small("qa")).rows}
    assert rows["cut-off text"]["tokens"] == rows["most surprising tokens"]["tokens"] == rows["slots, 4x"]["tokens"]
    assert rows["nothing"]["tokens"] == 0 < rows["slots, 4x"]["tokens"] < rows["full text"]["tokens"]


def test_summaries_have_at_most_as_many_tokens_as_slots(context):
    triples = context.triples(3, 384, [])
    for text, t in zip(table5.summaries(context, context.main, triples), triples, strict=True):
        assert len(context.base.encode(text)) <= slot_count(len(context.base.encode(t.context)), 4) + 1  # decoding may move one


def test_errors_are_classed(base):
    def kinds(original, again, alike=2.0):
        return [kind for *_, kind in table2.differences(base, original, again, alike) if kind]

    assert kinds("a b c d", "a b c d") == []
    assert kinds("a b c d", "a c d") == ["dropped"]
    assert kinds("a b c", "a b x c") == ["added"]
    assert kinds("a lamp c", "a ledger c") == ["swapped"]
    assert kinds("a lamp c", "a ledger c", alike=-1) == ["paraphrased"]
    assert kinds("July weather, then", "weather July, then") == ["swapped"]
    assert kinds("I had therefore slept a while", "I had slept therefore a while") == ["swapped", "swapped"]
    moved = table2.differences(base, "I had therefore slept a while", "I had slept therefore a while", 2.0)
    assert table2.counted(moved) == {"swapped": 1} and table2.counted(table2.differences(base, "a b c", "a x c", 2.0)) == {"swapped": 1}
    assert kinds("the heat", ", heat") == ["dropped"] and kinds(", heat", "the heat") == ["added"]
    assert kinds("so, you said", "so you said") == kinds("The Lamp", "the lamp") == kinds("a - b", "a b") == []
    (row,) = table2._rows(table2.differences(base, "so, you", "so you", 0.5), 16)
    assert row == {"original": "so, you", "again": "so you", "errors": ""}
    table = table2._rows(table2.differences(base, "a b c d", "a c d", 0.5), 16)
    assert table == [{"original": "a **b** c d", "again": "a c d", "errors": "dropped"}]


def test_patterned_text_is_each_id_plus_one_without_special_ids(base):
    assert table3.patterned(base, [10, 11, 299]) == [11, 12, 300]
    last, special = len(base.tokenizer) - 1, base.tokenizer.all_special_ids
    assert table3.patterned(base, [last]) == [min(set(range(last)) - set(special))]
    drawn = table3.random_ids(base, 5000, [0])
    assert not set(drawn) & set(special) and len(set(drawn)) > 250


def test_rank_correlation():
    x = np.array([1.0, 2.0, 3.0, 10.0])
    assert memory.spearman(x, x**3) == pytest.approx(1)
    assert memory.spearman(x, -x) == pytest.approx(-1)
    assert memory.ranks(np.array([5.0, 1.0, 5.0])).tolist() == [1.5, 0.0, 1.5]
    assert memory.spearman(x, np.ones(4)) == 0


def test_memory_holds_every_token_once(context):
    table = memory.run(context, **small("memory"))
    *groups, whole = table.rows
    assert sum(r["tokens"] for r in groups) == whole["tokens"] == 64
    assert [number(r["surprise"]) for r in groups] == sorted(number(r["surprise"]) for r in groups)
    windows = context.windows(16, 4)
    assert number(whole["surprise"]) == pytest.approx(np.mean([surprise(context.base, w) for w in windows]), rel=1e-4)


def test_generation_is_timed_on_what_the_base_really_says(context):
    ids = context.windows(12, 2)
    made = table7.generate_from_text(context.main, ids, 5)
    for row, text in enumerate(ids):
        read = list(text)
        for step in made:
            assert int(tiny.base_logits(context.base, read)[-1].argmax()) == step[row]
            read.append(step[row])
    slots = context.main.compress_ids(ids)
    first = context.main.continue_text(slots[0], max_new_tokens=5)
    assert context.base.decode([s[0] for s in table7.generate_from_slots(context.main, slots, 5)]).startswith(first)


def test_cache_bytes_are_those_of_the_base(context):
    table = table7.run(context, **small("table7"))
    a_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    for row in table.rows:
        assert row["kv_text"] == pytest.approx(row["batch"] * row["length"] * a_token / 1e6)
        assert row["kv_slots"] == pytest.approx(row["batch"] * row["slots"] * a_token / 1e6)
    assert {(r["batch"], r["length"]) for r in table.rows} == {(1, 16), (2, 16), (1, 32)}
    assert any("2 x 32 left out" in n for n in table.notes)


def test_contexts_beyond_the_positions_are_cut_said_and_timed_once(context):
    settings = {**small("table7"), "batches": (1,), "most_tokens": 10_000, "repeats": 1}
    table = table7.run(context, **{**settings, "contexts": (16, 5000, 9000)})
    assert len(table.rows) == 2 and sum("5000, 9000 tokens of context" in n for n in table.notes) == 1
    with pytest.raises(ICAEError, match="no room"):
        table7.run(context, **{**settings, "generated": 10_000})


def test_peak_memory_sees_what_a_turn_takes_even_after_one_that_took_as_much(context):
    for _ in range(2):
        with table7._peak(context) as peak:
            for _ in range(20):
                torch.ones(16_000_000).sum()  # 64 MB, longer than one sample
        assert 50e6 < peak[0] < 400e6


def test_contexts_of_several_segments_share_them_and_score_as_if_compressed_alone(context):
    table = fig6.run(context, **small("fig6"))
    windows = context.windows(32 + 6, 3)
    for length, segments in ((16, 1), (32, 2)):
        (row,) = (r for r in table.rows if r["side"] == "slots" and r["length"] == length)
        slots = context.main.compress_ids([w[32 - length : 32] for w in windows])
        nll = following.from_slots(context.main, slots, [w[32:] for w in windows])
        assert number(row["perplexity"]) == pytest.approx(perplexity(nll)["value"], rel=1e-4)
        assert row["segments"] == segments


def test_one_segment_is_what_the_encoder_makes_of_a_text_that_fits(context):
    ids = context.windows(16, 2)
    for mine, theirs in zip(fig6.one_segment(context.main, ids), context.main.compress_ids(ids), strict=True):
        tiny.assert_same_slots(mine, theirs, 1e-5)
    assert fig6.one_segment(context.main, context.windows(40, 1))[0].segments[0].tokens == 40


def test_the_random_base_is_marked_and_shares_the_tokenizer(context):
    rows = table6.run(context, **small("table6")).rows
    assert "form check" in rows[1]["base"] and rows[0]["base"] == context.base.name
    tiny_one = table6.random_base(context.base)
    state = torch.random.get_rng_state()
    assert table6.random_base(context.base).fingerprint == tiny_one.fingerprint
    assert torch.equal(state, torch.random.get_rng_state())


def test_another_base_is_measured_with_its_own_adapter(context, other_base, tmp_path, monkeypatch):
    tiny.make_icae(other_base, stirred=0.05).save_pretrained(tmp_path / "other")
    steps, compress = [], ICAE.compress_ids
    monkeypatch.setattr(ICAE, "compress_ids", lambda self, *a, **kw: steps.append(self.config.polish) or compress(self, *a, **kw))
    there = dataclasses.replace(context, also=[tmp_path / "other"], polish=3, known={}, _loaded={})
    rows = table6.run(there, **small("table6")).rows
    assert [r["base"] for r in rows] == [context.base.name, other_base.name] and set(steps) == {3}


def test_lengths_beyond_the_text_are_left_out_and_said(context):
    table = fig4.run(context, samples=2, lengths=(8, 100_000))
    assert [r["length"] for r in table.rows] == [8]
    assert any("100000" in n for n in table.notes)
    with pytest.raises(ICAEError, match="longer text"):
        fig4.run(context, samples=2, lengths=(100_000,))
    notes = fig6.run(context, **{**small("fig6"), "samples": 2, "text_lengths": (0, 64)}).notes
    assert any(n.startswith("Left out: 64 tokens") for n in notes)


def test_questions_left_out_are_counted_by_why(context, tmp_path):
    rows = [{**QUESTIONS[0], "input": "a"}, {**QUESTIONS[0], "input": "word " * 900}, QUESTIONS[0]]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = []
    assert len(dataclasses.replace(context, qa=tmp_path / "qa.jsonl").triples(9, 200, notes)) == 1
    assert [n[:9] for n in notes[:2]] == ["1 of the "] * 2 and "above 200" in notes[0] and "below 2" in notes[1]


# ---- tables and pictures ----


def test_a_table_survives_json(tmp_path):
    rows = [{"side": "a|b", "f1": {"value": 0.5, "low": 0.4, "high": 0.6}}, {"side": "c", "f1": None}]
    table = Table("qa", [Column("side", "side"), Column("f1", "F1", 2)], rows, ["A note."], ["abc"])
    (tmp_path / "t.json").write_text(table.to_json())
    assert Table.load(tmp_path / "t.json") == table
    assert "| a\\|b | 0.50 (0.40 to 0.60) |" in table.to_markdown()
    assert "| c | not measured |" in table.to_markdown()
    for bad in ("{", "[]", '{"name": "qa"}'):
        (tmp_path / "t.json").write_text(bad)
        with pytest.raises(ICAEError) as error:
            Table.load(tmp_path / "t.json")
        tiny.one_line(error.value, "t.json")


def test_the_page_sets_every_table_beside_the_paper(context):
    tables = {name: importlib.import_module(f"icae.experiments.{name}").run(context, **small(name)) for name in EXPERIMENTS}
    made = paper.page(tables, ["fig4"])
    for name, table in tables.items():
        assert f"## {name}: " in made and table.grid() in made and paper.PAPER[name] in made
        assert f"**Here**: {paper.verdict(table)}" in made
    assert "(../results/fig4.png)" in made and "(../results/fig5.png)" not in made
    assert paper.page({}, []).count("Not run yet") == len(EXPERIMENTS)


def test_the_page_tells_tables_of_an_adapter_that_ships_no_more(context):
    table = fig4.run(context, **small("fig4"))
    name, own = "some-adapter", checkpoint_hash(context.checkpoints["main"])
    table.provenance["main"] = {"name": name, "sha256": own}
    for shipped, old in (({}, False), ({"other": "0"}, False), ({name: own}, False), ({name: "0" * 16}, True)):
        assert ("another ships now" in paper.page({"fig4": table}, [], shipped)) == old


def test_a_sentence_follows_its_table():
    def table(text, slots):
        rows = [{"ratio": 4, "text": t, "slots": s, "none": 50.0} for t, s in zip(text, slots, strict=True)]
        return Table("table1", [], rows)

    assert "As in the paper" in paper.verdict(table([10.0], [10.2])) and "wider" not in paper.verdict(table([10.0], [10.2]))
    assert "wider" in paper.verdict(table([10.0], [20.0])) and "1 of 1" in paper.verdict(table([10.0], [20.0]))
    assert "no perplexity at all" in paper.verdict(table([10.0], [9.0])) and "0 of 1" in paper.verdict(table([10.0], [60.0]))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("fig4", {"length": 64, "bleu": 90.0, "loss": 0.01, "exact": 0.9}),
        ("fig5", {"length": 64, "ratio": 4, "bleu": 90.0}),
        ("fig6", {"side": "slots", "segments": 1, "length": 64, "read": 16, "perplexity": 9.0}),
    ],
)
def test_of_one_row_no_trend_is_told(name, row):
    more = {**row, "length": 128, "ratio": 8, "segments": 2, "bleu": 80.0, "exact": 0.5, "perplexity": 8.0}
    if name == "fig5":
        more["length"] = row["length"]
    assert "paper" in paper.verdict(Table(name, [], [row, more]))
    said = paper.verdict(Table(name, [], [row]))
    assert "paper" not in said and "help" not in said and said.endswith(".") and "9" in said


def test_the_c_library_is_asked_for_memory_only_where_there_is_one(monkeypatch):
    def nameless(name):
        raise TypeError("expected str, not NoneType")  # as on Windows

    monkeypatch.setattr("ctypes.CDLL", nameless)
    table7._give_back()


def test_figures_and_tables_know_no_model():
    for file in ("figures.py", "experiments/table.py", "experiments/paper.py"):
        tree = ast.parse((Path(icae.__file__).parent / file).read_text())
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)} | {
            a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names
        }
        assert not {n for n in names if n.split(".")[0] in ("torch", "transformers", "peft")}
        assert {n for n in names if n.startswith("icae")} <= {
            "icae.config",
            "icae.errors",
            "icae.experiments",
            "icae.experiments.table",
            "icae.metrics",
        }
