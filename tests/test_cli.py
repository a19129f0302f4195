"""The command line, run in this process on a tiny checkpoint, through `main`, so that error lines and exit codes are the real ones."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml
from typer.testing import CliRunner

from icae import cli, terminal
from icae.checkpoint import DEFAULT
from icae.data import Windows
from icae.model import ICAE
from icae.slots import MemorySlots
from icae.store import SlotStore

ROOT = Path(__file__).parent.parent
TEXT = " ".join(tiny.LINES)


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-kv-4x"
    tiny.make_icae(base, stirred=0.05).save_pretrained(folder)
    return folder


@pytest.fixture
def icae(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command line and gives (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=None):
        monkeypatch.setattr(sys, "argv", ["icae", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def slots(icae, checkpoint, text):
    assert icae("compress", text, "-o", "slots.safetensors", "--model", checkpoint, "--json")[0] == 0
    return Path("slots.safetensors")


def test_help_takes_less_than_half_a_second_of_cpu():
    code = "import resource, sys; sys.argv = ['icae', '--help']; import icae.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
    code += "u = resource.getrusage(resource.RUSAGE_SELF); print(u.ru_utime + u.ru_stime, 'torch' in sys.modules, file=sys.stderr)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split() for _ in range(3)]
    assert {has_torch for _, has_torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.5  # other work on the cores only ever adds


def test_compress_tells_what_it_made(icae, checkpoint, text):
    code, out, _ = icae("compress", text, "-o", "s.safetensors", "--ratio", 2, "--model", checkpoint, "--json")
    result = json.loads(out)
    assert code == 0
    assert {"tokens", "slots", "ratio", "seconds"} <= result.keys()
    assert result["ratio"] == pytest.approx(2, rel=0.1)
    assert Path("s.safetensors").stat().st_size == result["bytes"]


def test_text_comes_from_an_argument_a_file_or_standard_input(icae, checkpoint, text):
    counts = []
    for source, stdin in ((TEXT, None), (text, None), ("-", TEXT.encode()), ("-", b"\xef\xbb\xbf" + TEXT.encode())):
        code, out, _ = icae("compress", source, "-o", "s.safetensors", "--model", checkpoint, "--json", stdin=stdin)
        counts.append((code, json.loads(out)["tokens"]))
    assert len(set(counts)) == 1


def test_reconstruct_prints_text_and_measures_against_the_original(icae, checkpoint, slots, text):
    code, out, _ = icae("reconstruct", slots, "--model", checkpoint, "--json", "--against", text)
    result = json.loads(out)
    assert code == 0
    assert {"text", "verified", "loss", "bleu", "exact_match", "greedy_bleu"} <= result.keys()
    shown = {name: result[name] for name in ("text", "verified")}
    assert icae("reconstruct", slots, "--model", checkpoint, "--json") == (0, json.dumps(shown, ensure_ascii=False) + "\n", "")
    _, out, err = icae("reconstruct", slots, "--model", checkpoint)
    assert out.strip() == result["text"].strip() and ("verified" in err) == result["verified"]
    assert "segments" in err or result["verified"]


def test_reconstruct_says_what_the_decoder_reads_where_that_is_asked_for(icae, checkpoint, slots, text):
    _, out, _ = icae("reconstruct", slots, "--model", checkpoint, "--json", "--against", text, "--no-refine")
    result = json.loads(out)
    assert result["bleu"] == result["greedy_bleu"] and "verified" not in result
    streamed = icae("reconstruct", slots, "--model", checkpoint, "--no-refine")[1]
    assert streamed.strip() == result["text"].strip()


def test_ask_answers_from_slots_and_from_full_text(icae, checkpoint, slots, text):
    for arguments, more in (((slots, "Who?"), ["segments", "segments_asked"]), (("Who?", "--text", text), [])):
        code, out, _ = icae("ask", *arguments, "--max-tokens", 4, "--model", checkpoint, "--json")
        assert code == 0
        assert list(json.loads(out)) == ["answer", *more]


def test_ask_tells_how_much_of_a_long_context_it_asked(icae, checkpoint, slots):
    count, asked = len(MemorySlots.load(slots).segments), (slots, "Who?", "--max-tokens", 4, "--model", checkpoint)
    assert count > 1
    code, out, err = icae("ask", *asked, "--focus", 1)
    assert code == 0 and f"from 1 of {count} segments" in err
    result = json.loads(icae("ask", *asked, "--focus", 1, "--json")[1])
    assert result == {"answer": out.strip(), "segments": count, "segments_asked": 1}
    code, _, err = icae("ask", *asked, "--focus", 0)
    assert code == 0 and "segments" not in err
    code, out, err = icae("ask", *asked, "--focus", -1)
    assert (code, out) == (2, "") and "focus" in err and err.count("\n") == 1


def test_ask_finds_contexts_in_the_store(icae, checkpoint, slots, text):
    asked = ("--store", "kept", "--model", checkpoint)
    Path("other.txt").write_text("A storm took the roof of the mill in the night. " * 2)
    assert icae("store", "add", text, "other.txt", "--dtype", "float32", *asked)[0] == 0
    model, store = ICAE.from_pretrained(checkpoint), SlotStore("kept")
    one, both = store.load(str(text)), MemorySlots.concatenate([store.load("other.txt"), store.load(str(text))])
    for names, loaded in (([text], one), (["other.txt", text], both)):
        options = [option for name in names for option in ("--stored", name)]
        code, out, _ = icae("ask", *options, "Who?", "--max-tokens", 4, *asked, "--json")
        result = json.loads(out)
        assert code == 0 and result["answer"] == model.answer(loaded, "Who?", max_new_tokens=4)
        assert result["segments"] == len(loaded.segments)


def test_continue_is_greedy_unless_a_temperature_is_given_and_then_follows_the_seed(icae, checkpoint, slots):
    def said(*extra):
        return json.loads(icae("continue", slots, "--max-tokens", 8, "--model", checkpoint, "--json", *extra)[1])["text"]

    assert said() == said("--seed", 3)
    assert said("--temperature", 5, "--seed", 3) == said("--temperature", 5, "--seed", 3) != said("--temperature", 5, "--seed", 4)


def test_evaluate_prints_figures_and_saves_them_with_their_origin(icae, checkpoint, text):
    code, out, _ = icae(
        *(
            "evaluate",
            "autoencoding",
            "--text",
            text,
            "--lengths",
            "8,12",
            "--samples",
            2,
            "--model",
            checkpoint,
            "--json",
            "--save",
            "r/a.json",
        )
    )
    assert code == 0
    assert [set(r) >= {"length", "loss", "bleu", "exact_match", "token_accuracy"} for r in json.loads(out)] == [True, True]
    report = json.loads(Path("r/a.json").read_text())
    assert report["results"] == json.loads(out)
    assert report["checkpoint"] == "tiny-kv-4x" and len(report["settings"]["text_sha256"]) == 12
    assert {"commit", "machine", "settings", "adapter"} <= report.keys()
    code, out, _ = icae(
        *("evaluate", "continuation", "--text", text, "--length", 10, "--target", 4, "--samples", 2, "--model", checkpoint, "--json")
    )
    assert {"ppl_text", "ppl_slots", "ppl_none"} <= json.loads(out).keys()


def test_finetune_begins_with_the_default_adapter_whatever_else_is_set(icae, checkpoint, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("icae.checkpoint.DEFAULT", str(checkpoint))
    begun = []
    monkeypatch.setattr("icae.train.train", lambda settings, config, resume: begun.append(settings.init) or sys.exit(0))
    for more in ((), ("model.focus=8",), ("init=null",), (f"model.base={base_folder}",)):
        icae("finetune", "train=t.jsonl", "output=run", *more)
    assert begun == [str(checkpoint), str(checkpoint), None, None]


@pytest.mark.parametrize(("more", "code"), [({"minutes": 2}, 130), ({"minutes": 1.5}, 0), ({}, 130), ({"steps": 3}, 0)])
def test_a_run_that_was_stopped_says_so(icae, checkpoint, tmp_path, monkeypatch, more, code):
    """By Ctrl-C: before its steps, and before its minutes, where it has any."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3, "log_history": [{"minutes": 1.5}, {"eval_loss": 1}]}')
    monkeypatch.setattr("icae.train.train", lambda settings, config, resume: tmp_path)
    settings = [f"{name}={value}" for name, value in {"steps": 9, **more}.items()]
    got, _, err = icae("finetune", "train=t.jsonl", f"init={checkpoint}", *settings)
    assert got == code and ("stopped at step 3" in err) is bool(code)


def test_finetune_starts_from_an_adapter_and_evaluate_qa_measures_it(icae, checkpoint, tmp_path):
    rows = [{"input": line, "prompt": f"What of {i}?", "answer": line.split()[1]} for i, line in enumerate(tiny.LINES)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (f"init={checkpoint}", "model.segment_length=16", "steps=2", "batch_size=2", "output=tuned")
    code, _, err = icae("finetune", "train=t.jsonl", *small)
    assert code == 0, err
    assert json.loads(Path("tuned/train_config.json").read_text())["objective"] == "instruct"
    asked = ("--data", "t.jsonl", "--model", "tuned", "--max-tokens", 3, "--json", "--seed", 1)
    code, out, err = icae("evaluate", "qa", *asked, "--samples", 3, "--responses", "said.jsonl", "--save", "r/qa.json")
    assert code == 0, err
    result = json.loads(out)
    wanted = {
        "n",
        "f1_text",
        "f1_slots",
        "f1_none",
        "f1_cut",
        "f1_deleted",
        "rouge1_text",
        "rouge1_slots",
        "f1_slots_minus_deleted_interval",
    }
    assert wanted <= result.keys() and result["n"] == 3
    assert [set(json.loads(line)) for line in Path("said.jsonl").read_text().splitlines()] == [
        {"prompt", "answers", "text", "slots", "none", "cut", "deleted"}
    ] * 3
    report = json.loads(Path("r/qa.json").read_text())
    assert report["results"] == result and report["name"] == "qa" and report["settings"]["seed"] == 1
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row | {"answer": "Nothing"}) + "\n" for row in rows))
    icae("evaluate", "qa", *asked, "--samples", 1, "--sides", "none", "--save", "r/other.json")
    other = json.loads(Path("r/other.json").read_text())["settings"]  # of data of the same name
    assert other["data"] == report["settings"]["data"] and other["data_sha256"] != report["settings"]["data_sha256"]
    assert json.loads(icae("evaluate", "qa-documents", *asked)[1])["documents"] == 2
    code, out, err = icae("evaluate", "qa-places", *asked, "--length", 60, "--sides", "slots,text", "--save", "r/places.json")
    assert {"f1_slots_start", "f1_text_end", "worst_over_best_slots"} <= json.loads(out).keys(), err
    assert json.loads(Path("r/places.json").read_text())["name"] == "qa-places"
    for mistake, words in ((("--sides", "x"), "deleted"), (("--samples", 0), "samples"), (("--data", "none.jsonl"), "none.jsonl")):
        code, out, err = icae("evaluate", "qa", *asked, *mistake)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_of_a_cut_off_evaluation_the_answers_remain(icae, checkpoint, monkeypatch):
    import icae.qa as measured
    from icae.errors import ICAEError

    def cut_off(model, triples, heard, **_):
        heard({"prompt": "What of 0?", "slots": "größer"})
        raise ICAEError("cut off")

    monkeypatch.setattr(measured, "qa", cut_off)
    Path("t.jsonl").write_text(json.dumps({"input": tiny.LINES[0], "prompt": "What?", "answer": "x"}))
    code, _, err = icae("evaluate", "qa", "--data", "t.jsonl", "--model", checkpoint, "--responses", "said.jsonl")
    assert code == 2 and "cut off" in err and json.loads(Path("said.jsonl").read_text()) == {"prompt": "What of 0?", "slots": "größer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sides", "slot"], "deleted"),
        (["--responses", "t.jsonl"], "the data itself"),
        (["--responses", "."], "folder"),
        (["--save", "."], "folder"),
        (["--save", "./said.jsonl"], "a file of its own"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_a_mistake_in_the_options_costs_no_file(icae, checkpoint, options, words):
    Path("t.jsonl").write_text(row := json.dumps({"input": tiny.LINES[0], "prompt": "What?", "answer": "x"}))
    Path("said.jsonl").write_text("hours")
    code, _, err = icae("evaluate", "qa", "--data", "t.jsonl", "--model", checkpoint, "--responses", "said.jsonl", *options)
    assert code == 2 and words in err and "Traceback" not in err
    assert Path("said.jsonl").read_text() == "hours" and Path("t.jsonl").read_text() == row


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_terminal_cannot_show_is_escaped_and_json_stays_json(monkeypatch, encoding):
    said = "größer \u6f22 \U0001f600 \ud83d"
    monkeypatch.setattr(cli, "app", lambda: print(json.dumps(said, ensure_ascii=False)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding=encoding))
    cli.main()
    sys.stdout.flush()
    assert json.loads(written.getvalue().decode(encoding)) == said


def test_another_text_is_found_before_anything_is_read(icae, checkpoint, slots, monkeypatch):
    monkeypatch.setattr(ICAE, "read_segments", lambda *_: pytest.fail("it was read"))
    Path("other.txt").write_text("A ship.")
    code, out, err = icae("reconstruct", slots, "--against", "other.txt", "--model", checkpoint)
    assert (code, out) == (2, "") and "not the text" in err


@pytest.mark.parametrize("source", ["t.txt", "."])
def test_a_report_is_not_written_over_the_text(icae, source):
    Path("t.txt").write_text(TEXT)
    code, _, err = icae("evaluate", "autoencoding", "--text", source, "--save", "t.txt", "--model", "none")
    assert code == 2 and "t.txt is the data itself" in err and Path("t.txt").read_text() == TEXT


@pytest.mark.parametrize("command", [("autoencoding", "--lengths=-64"), ("continuation", "--length=-1"), ("qa-places", "--length=-1")])
def test_lengths_are_two_tokens_at_least(icae, checkpoint, command):
    Path("t.txt").write_text(" ".join(tiny.LINES))
    source = "--data" if command[0] == "qa-places" else "--text"
    code, _, err = icae("evaluate", *command, source, "t.txt", "--model", checkpoint)
    assert code == 2 and "length" in err and "Traceback" not in err


def test_demo_runs_on_any_file_and_prints_for_people(icae, checkpoint, text):
    code, out, _ = icae("demo", text, "--model", checkpoint, "-q", "Who painted the door?")
    assert code == 0
    assert all(words in out for words in ("memory slots", "BLEU", "Who painted the door?", "nothing", "peak"))
    code, out, _ = icae("demo", text, "--model", checkpoint, "--json", "--refine")
    result = json.loads(out)
    assert {"compress", "reconstruct", "continue", "ask"} <= result.keys()
    assert all(result[step]["seconds"] > 0 and result[step]["memory_mb"] > 0 for step in ("compress", "reconstruct", "continue"))


def test_of_a_book_its_beginning_is_set_side_by_side():
    from icae.demo import SAMPLE, marked

    assert sum(word == "bell" for left, _ in marked("bell " * 3000, "bell " * 3000) for word, _ in left) == 2000
    text = SAMPLE.read_text(encoding="utf-8").strip()
    rows = marked(text, text.replace("bell", "bull"))
    assert len(rows) == len(text.split("\n\n")) and ("bell", "red") in [piece for left, _ in rows for piece in left]
    assert "\n\n".join("".join(piece for piece, _ in left) for left, _ in rows) == text


def test_peak_memory_is_told_where_there_is_no_resource_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delitem(sys.modules, "icae.demo", raising=False)
    from icae import demo

    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3e6)))
    monkeypatch.setattr("sys.platform", "win32")
    assert demo.peak_memory_mb() == 3


def test_info_tells_about_slots_checkpoints_and_itself(icae, checkpoint, slots):
    assert json.loads(icae("info", slots, "--json")[1])["origin"]["kind"] == "kv"
    assert json.loads(icae("info", checkpoint, "--json")[1])["ratio"] == 4
    assert "adapters" in json.loads(icae("info", "--json")[1])


def test_the_version_is_told(icae):
    import icae as package

    assert icae("--version")[:2] == (0, f"icae {package.__version__}\n")


@pytest.mark.parametrize("options", [("--max-tokens", 0), ("--temperature", -1)])
def test_generation_options_out_of_range_are_refused(icae, slots, options):
    code, out, err = icae("ask", slots, "What?", *options)
    assert (code, out) == (2, "") and options[0] in err


def test_a_demo_of_what_cannot_be_compressed_says_so(icae, checkpoint, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    code, out, err = icae("demo", "one.txt", "--model", checkpoint)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("icae: error: a context needs at least two tokens")


def bad_inputs(tmp_path, checkpoint, slots):
    """Return the arguments of each mistake, and words that its message must hold."""
    (tmp_path / "binary").write_bytes(b"\x00\xff\xfe\x00" * 50)
    (tmp_path / "latin.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "half.safetensors").write_bytes(slots.read_bytes()[:500])
    flipped = bytearray(slots.read_bytes())
    flipped[-9] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(bytes(flipped))
    (tmp_path / "typo.yaml").write_text("stpes: 3\n")
    (tmp_path / "half.yaml").write_text("train: x\nmodel: {polish: 1.5}\n")
    (tmp_path / "t.jsonl").write_text(json.dumps({"input": "The mill grinds grain.", "prompt": "What?", "answer": "grain"}))
    model = ("--model", checkpoint)
    return {
        "empty argument": (("compress", ""), "empty"),
        "empty file": (("compress", "empty.txt"), "empty"),
        "one token": (("compress", "one.txt", *model), "two tokens"),
        "no such file": (("compress", "nothing.txt"), "nothing.txt"),
        "no such file, with a space": (("compress", "my manul.txt"), "no file at my manul.txt"),
        "no such file, of any kind": (("compress", "Missing Notes.CSV"), "no file at Missing Notes.CSV"),
        "a folder": (("compress", "."), "could not read"),
        "not a text": (("compress", "binary"), "UTF-8"),
        "another encoding": (("compress", "latin.txt"), "UTF-8"),
        "the text's own file": (("compress", "one.txt", "-o", "one.txt"), "is the text itself"),
        "no such device": (("compress", TEXT, "--device", "tpu", *model), "no device is called 'tpu'"),
        "no such device to train on": (("pretrain", "train=one.txt", "device=cuda", "output=run"), "this torch finds no CUDA"),
        "half a character": (("ask", slots, "What \udcff is it?", *model), "not in UTF-8"),
        "ratio 0": (("compress", TEXT, "--ratio", 0), "ratio must be at least 1"),
        "ratio 0 in a store": (("store", "add", TEXT, "--ratio", 0), "ratio must be at least 1"),
        "no documents": (("evaluate", "qa-documents", "--data", "t.jsonl", "--documents", 0, *model), "documents must be at least 1"),
        "one token of target": (("evaluate", "continuation", "--text", "other.txt", "--target", 1, *model), "target must be at least 2"),
        "half a step": (("pretrain", "half.yaml"), "polish must be a whole number"),
        "half a ratio": (("pretrain", "model.ratio=4.5"), "ratio must be a whole number"),
        "no checkpoint": (("compress", TEXT, "--model", "./no-such-folder"), "no-such-folder"),
        "no slot file": (("reconstruct", "none.safetensors"), "icae compress"),
        "truncated slots": (("reconstruct", "half.safetensors"), "truncated"),
        "flipped byte": (("reconstruct", "flipped.safetensors"), "checksum"),
        "another text": (("reconstruct", slots, "--against", "other.txt", *model), "not the text"),
        "no question": (("ask", slots), "question"),
        "two questions": (("ask", "--stored", "a", "Who?", "What?"), "not both"),
        "slots' options of a text": (
            ("ask", "--text", text, "Who?", "--focus", 2, "--beginnings", 1),
            "only slots know --focus and --beginnings",
        ),
        "two things with keys": (("serve", "--add-key", "a", "--remove-key", "b", "--store", "s"), "two names go one at a time"),
        "two sources": (("ask", "--stored", "a", "--text", text, "Who?"), "not both"),
        "store of nothing": (("ask", slots, "Who?", "--store", "kept"), "--stored NAME"),
        "key of nothing": (("ask", slots, "Who?", "--key", "ada"), "--stored NAME"),
        "not stored": (("ask", "--stored", "a", "Who?", "--store", "empty"), "no store at empty"),
        "empty question": (("ask", slots, " "), "question"),
        "long prompt": (("ask", slots, "word " * 600, *model), "shorten"),
        "bad lengths": (("evaluate", "autoencoding", "--text", "x", "--lengths", "a"), "whole numbers"),
        "no samples": (("evaluate", "autoencoding", "--text", "x", "--samples", 0), "samples"),
        "no text there": (("evaluate", "autoencoding", "--text", "./none", *model), "none"),
        "no config": (("pretrain", "none.yaml"), "none.yaml"),
        "typo in config": (("pretrain", "typo.yaml"), "steps"),
        "bad override": (("pretrain", "typo.yaml", "steps"), "name=value"),
        "no folder to save in": (("compress", TEXT, "-o", "no/such/s.safetensors", *model), "could not write"),
    }


def test_every_mistake_ends_in_one_line_and_exit_code_2(icae, checkpoint, slots, tmp_path):
    (tmp_path / "other.txt").write_text("A short one.")
    for name, (arguments, words) in bad_inputs(tmp_path, checkpoint, slots).items():
        code, out, err = icae(*arguments)
        assert (code, out) == (2, ""), (name, code, err)
        assert err.startswith("icae: error: ") and err.count("\n") == 1 and words in err, (name, err)


def test_slots_of_another_base_are_refused_with_both_names(icae, slots, other_base, tmp_path):
    tiny.make_icae(other_base).save_pretrained(tmp_path / "other")
    code, _, err = icae("reconstruct", slots, "--model", tmp_path / "other")
    assert code == 2
    assert "tiny-llama" in err and "other-llama" in err


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_trains(icae, base_folder, config, tmp_path):
    for n, line in enumerate(tiny.LINES):
        (tmp_path / f"{n}.txt").write_text(" ".join([line] * 6))
    triple = {"input": tiny.LINES[0], "prompt": "Who?", "answer": "The harbour master."}
    (tmp_path / "t.jsonl").write_text((json.dumps(triple) + "\n") * 4)
    tunes = "replay" in yaml.safe_load((ROOT / "configs" / config).read_text())
    data = tmp_path / "t.jsonl" if tunes else tmp_path
    small = ["steps=1", "batch_size=2", "eval_steps=1", "save_steps=1", "eval_samples=2", "windows=[[0, 8]]", f"model.base={base_folder}"]
    small += ["model.lora_rank=2", "init=null", f"train={data}", f"held_out={data}", "output=run"]
    small += ["minutes=null", "device=cpu", "bf16=false", "compile=false", "workers=0"]
    small += [f"replay={tmp_path}", "teacher=null"] if tunes else []
    code, _, err = icae("finetune" if tunes else "pretrain", ROOT / "configs" / config, *small)
    assert code == 0, err
    assert {"config.json", "adapter_model.safetensors", "memory.safetensors", "trainer_state.json"} <= {
        p.name for p in Path("run").iterdir()
    }


def test_a_run_that_was_interrupted_says_where_it_stopped(icae, base_folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(" ".join(tiny.LINES * 4))
    sample = Windows.__getitem__

    def interrupted(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, index)

    monkeypatch.setattr(Windows, "__getitem__", interrupted)
    small = ["steps=9", "batch_size=1", "windows=[[0, 8]]", f"model.base={base_folder}", "model.lora_rank=2", "output=run"]
    code, _, err = icae("pretrain", "train=a.txt", *small)
    assert code == 130
    assert re.search(r"stopped at step [123] of 9; the same command goes on", err)


def test_every_default_is_in_the_made_page_and_the_page_is_up_to_date():
    result = subprocess.run([sys.executable, ROOT / "docs" / "make.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"`icae evaluate autoencoding`", (ROOT / "docs" / "cli.md").read_text())


def test_help_shows_what_the_documents_list(monkeypatch):
    """Every default and every sentence of docs/cli.md, on the help page that a terminal shows."""
    monkeypatch.setenv("COLUMNS", "400")
    page = (ROOT / "docs" / "cli.md").read_text()
    parts = page.split("## `icae ")[1:]
    assert len(parts) > 20
    for part in parts:
        command, _, rows = part.partition("`")
        shown = re.sub(r"[\s│]+", " ", CliRunner().invoke(cli.app, [*command.split(), "--help"]).output)
        shown = re.sub(r"\[default: \((.*?)\)\]", r"[default: \1]", shown)
        for told in re.findall(r"^\| `[^`]+` \| (.*) \|$", rows, re.MULTILINE):
            assert told.replace("\\|", "|") in shown, (command, told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_nothing_more_is_one_line_or_none(unbuffered):
    command = [sys.executable, "-m", "icae", "reproduce", "--list"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        told = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert told.returncode == 2 and told.stderr.startswith("icae: error: could not write") and told.stderr.count("\n") == 1
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        told = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, env=environment)
    assert (told.returncode, told.stderr) == (1, "")


def test_an_answer_comes_without_the_whitespace_around_it():
    said = ["", " \n", " a", "b ", " ", "c", "\n", " "]
    assert "".join(terminal.stripped(iter(said))) == "ab  c" and "".join(terminal.stripped(iter([" "]))) == ""


def test_a_checkpoint_is_called_by_its_last_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert [terminal.name_of(name) for name in (".", str(tmp_path / "mine"), "them/theirs", None)] == [
        "mine",
        "mine",
        "them/theirs",
        DEFAULT,
    ]


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_compressed(icae, text, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, _, err = icae("compress", text, "-o", "s.safetensors", "--model", "none")
    assert code == 2 and "read-only" in err


@pytest.mark.parametrize("limit, words", [("shutdown=inf", "finite"), ("max_rows=1.5", "whole number"), ("timeout=x", "be a number")])
def test_limits_are_numbers_of_their_kind(icae, limit, words):
    code, _, err = icae("serve", "--limit", limit)
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_page_without_a_place_for_results_is_told(tmp_path):
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    spec.loader.exec_module(make := importlib.util.module_from_spec(spec))
    (tmp_path / "page.md").write_text("No place.")
    with pytest.raises(SystemExit, match="0 places"):
        make._with_table(tmp_path / "page.md", "| table |")


def test_python_runs_it_as_a_module():
    """As launchers do: `torchrun -m icae finetune ...`."""
    told = subprocess.run([sys.executable, "-m", "icae", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "finetune" in told.stdout
