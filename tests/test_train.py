import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import LINES, make_icae, one_line, save_base

import icae.callbacks
import icae.matmul
import icae.train
import icae.triples
from icae.base import load_base
from icae.chat import chat_prompt, chat_response
from icae.config import ICAEConfig, TrainConfig
from icae.data import Windows
from icae.errors import ICAEError
from icae.model import ICAE
from icae.objectives import Marker, autoencoding, collate, instruction
from icae.train import starting_config

CONFIG = {"lora_rank": 4, "lora_alpha": 4, "segment_length": 16}
RUN = {
    "steps": 8,
    "windows": [[0, 8], [4, 16]],
    "batch_size": 2,
    "accumulation": 2,
    "continuation_length": 8,
    "warmup_steps": 2,
    "log_steps": 1,
    "save_steps": 3,
    "learning_rate": 0.01,
}

SCRIPT = """
import json, os, signal, sys
import icae.matmul
from icae.config import ICAEConfig, TrainConfig
from icae.data import Windows
from icae.train import train

icae.matmul.numpy_is_faster = lambda: False
settings, config, kill_at = json.loads(sys.argv[1])
if kill_at is not None:
    sample = Windows.__getitem__
    Windows.__getitem__ = lambda self, i: os.kill(os.getpid(), signal.SIGKILL) if i == kill_at else sample(self, i)
train(TrainConfig(**settings), ICAEConfig(**config), quiet=True)
"""


@pytest.fixture(scope="module", autouse=True)
def one_product():
    """Torch's matrix product everywhere: which is faster is timed anew in each process, and the two round differently."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(icae.matmul, "numpy_is_faster", lambda: False)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES))
    return str(path)


@pytest.fixture
def settings(text, tmp_path):
    return {**RUN, "train": text, "output": str(tmp_path / "run")}


@pytest.fixture
def config(base_folder, kind):
    return {**CONFIG, "base": str(base_folder), "kind": kind}


def train(settings, config, **changes):
    return icae.train.train(TrainConfig(**{**settings, **changes}), ICAEConfig(**config), quiet=True)


def in_a_process(*launcher, settings, config, kill_at=None):
    """Train in a process of its own, and return its exit code."""
    command = [sys.executable, *launcher, json.dumps([settings, config, kill_at])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode > 0:
        print(done.stderr[-4000:])
    return done.returncode


def losses(folder):
    """{step: training loss} of a finished run."""
    return {row["step"]: row["loss"] for row in history(folder) if "loss" in row}


def history(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def tensors(folder):
    return ICAE.from_pretrained(folder).adapter_tensors()


def assert_same_run(a, b, tolerance):
    assert list(losses(a)) == list(losses(b)) == list(range(1, RUN["steps"] + 1))
    assert list(losses(a).values()) == pytest.approx(list(losses(b).values()), abs=tolerance)
    mine, theirs = tensors(a), tensors(b)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def finished(text, base_folder, tmp_path_factory):
    """Uninterrupted runs of both kinds, one process, accumulation 2."""
    folders = {kind: tmp_path_factory.mktemp("finished") / kind for kind in ("kv", "embedding")}
    for kind, folder in folders.items():
        train({**RUN, "train": text, "output": str(folder)}, {**CONFIG, "base": str(base_folder), "kind": kind})
    return folders


# ---- what a run is ----


def test_a_paragraph_is_learned_by_heart_from_its_slots(tmp_path, kind):
    """A frozen random base can be steered this far if it is wide enough; the base alone knows nothing of the paragraph, so that what
    is read back can only come from the slots."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    base = load_base(str(save_base(tmp_path / "wide", **wide)))
    ids = base.encode(LINES[1])[:24]
    paragraph = base.decode(ids)
    (tmp_path / "paragraph.txt").write_text(paragraph)
    assert base.encode(paragraph) == ids
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"base": base.name, "kind": kind, "segment_length": 24, "lora_rank": 16, "lora_alpha": 16, "lora_targets": targets}
    settings = {"train": str(tmp_path / "paragraph.txt"), "output": str(tmp_path / "run"), "windows": [[0, 24]], "batch_size": 1}
    train({**settings, "steps": 200, "learning_rate": 0.01, "warmup_steps": 10, "autoencoding_share": 1.0, "save_steps": 1000}, config)
    model = ICAE.from_pretrained(tmp_path / "run", base=base)
    slots = model.compress(paragraph)
    (read,), (alone,) = (model.score(s, [autoencoding(ids, 24, base.tokenizer.eos_token_id)]) for s in ([slots], None))
    assert (slots.count, slots.tokens) == (6, 24)
    assert float(read.nll.mean()) < 0.1 and float(alone.nll.mean()) > 3
    assert model.reconstruct(slots) == paragraph


def test_training_moves_the_adapter_and_not_a_bit_of_the_base(finished, kind, base_folder, base):
    model = ICAE.from_pretrained(finished[kind])
    assert model.base.fingerprint == base.fingerprint
    assert all(torch.equal(t, base.model.state_dict()[name]) for name, t in model.base.model.state_dict().items())
    torch.manual_seed(0)
    start = make_icae(base, kind=kind, **CONFIG).adapter_tensors()
    moved = {name for name, t in model.adapter_tensors().items() if not torch.equal(t, start[name])}
    assert {"encoder.memory", "markers"} <= moved and any("lora_B" in name for name in moved)


def test_the_logged_loss_is_the_mean_over_the_steps_samples(finished, base, kind, text):
    """Step 1 sees the untouched model, so its loss can be made by hand."""
    logged = losses(finished[kind])[1]
    config = ICAEConfig(**CONFIG, base=base.name, kind=kind)
    torch.manual_seed(0)
    model = icae.train.build(TrainConfig(train=text), config, "cpu")
    data = Windows(icae.data.load_corpus(text, base), base, config, TrainConfig(**{**RUN, "train": text}))
    by_hand = sum(float(model(**collate([data[i]]))["loss"]) for i in range(4)) / 4
    assert logged == pytest.approx(by_hand, abs=1e-4)


def test_the_same_run_twice_is_the_same(finished, settings, config, kind):
    assert_same_run(finished[kind], train(settings, config), 0)


def test_checkpoints_are_kept_as_told_and_each_can_be_loaded(finished, settings, config):
    folder = train(settings, config, keep=1)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    assert (folder / "train_config.json").exists()
    last = tensors(folder / "checkpoint-8")
    assert all(torch.equal(t, last[name]) for name, t in tensors(folder).items())


# ---- interruptions ----


def test_a_run_killed_in_the_middle_goes_on_as_if_it_had_not_been(finished, settings, config, kind):
    killed = in_a_process("-c", SCRIPT, settings=settings, config=config, kill_at=21)  # in step 6 of 8, after the checkpoint at 3
    assert killed == -signal.SIGKILL
    folder = Path(settings["output"])
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-3"] and not (folder / "config.json").exists()
    assert_same_run(train(settings, config), finished[kind], 1e-6)
    costs, uninterrupted = ([row["context_tokens"] for row in history(f) if "loss" in row] for f in (folder, finished[kind]))
    assert costs == uninterrupted == sorted(costs) and costs[0] > 0
    assert [row["minutes"] for row in history(folder)] == sorted(row["minutes"] for row in history(folder))


@pytest.mark.parametrize("kind", ["kv"])
def test_a_run_goes_on_with_the_steps_between_checkpoints_that_it_is_told(settings, config, kind):
    folder = train(settings, config, steps=4, save_steps=4, log_steps=4)
    train(settings, config, steps=7, save_steps=2, log_steps=1, keep=9)
    assert sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*")) == [4, 6, 7]
    assert sorted(losses(folder)) == [4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["kv"])
def test_every_checkpoint_has_a_line_that_counts_what_was_spent(settings, config, kind):
    folder = train(settings, config, steps=5, save_steps=2, log_steps=100, keep=9)
    assert sorted(losses(folder)) == [2, 4, 5]


def test_a_checkpoint_that_a_kill_left_half_written_is_passed_over(finished, settings, config, kind):
    interrupted = train(settings, config, keep=5)
    for file in ("trainer_state.json", "optimizer.pt"):
        (interrupted / "checkpoint-8" / file).unlink()
    assert_same_run(train(settings, config), finished[kind], 1e-6)


def test_ctrl_c_writes_a_checkpoint_and_the_run_can_go_on(finished, settings, config, kind, monkeypatch, capsys):
    sample, handler = Windows.__getitem__, signal.getsignal(signal.SIGINT)

    def interrupting(self, index):
        if index == 18:  # step 5
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, index)

    with monkeypatch.context() as m:
        m.setattr(Windows, "__getitem__", interrupting)
        folder = train(settings, config)
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().err
    assert max(losses(folder)) < RUN["steps"]
    assert (folder / f"checkpoint-{max(losses(folder))}" / "adapter_model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_run(train(settings, config), finished[kind], 1e-6)


@pytest.mark.parametrize("kind", ["kv"])
def test_a_run_that_fails_gives_ctrl_c_back(settings, config, kind, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Windows, "__getitem__", lambda self, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(settings, config)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("kind", ["kv"])  # its last layer has parameters that no loss reads, the harder case
def test_two_processes_train_as_one_at_the_same_global_batch(finished, settings, config, kind, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script))
    assert in_a_process(*launcher, settings={**settings, "accumulation": 1}, config=config) == 0
    assert_same_run(Path(settings["output"]), finished[kind], 1e-4)


# ---- settings ----


def test_a_run_that_goes_on_takes_the_rates_that_it_is_told(settings, config):
    train(settings, config)
    folder = train(settings, config, steps=10, learning_rate=0.5, schedule="constant")
    assert [row["learning_rate"] for row in history(folder) if "loss" in row][-2:] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["kv"])
def test_a_run_that_goes_on_says_what_is_otherwise_and_takes_it(settings, config, kind, capsys):
    train(settings, config, optimizer="adamw")
    capsys.readouterr()
    folder = train(settings, config, optimizer="adamw", steps=10, weight_decay=0.5, adam_beta2=0.7)
    said = capsys.readouterr().err
    assert "steps 8 -> 10" in said and "weight_decay 0.0 -> 0.5" in said and "adam_beta2 0.98 -> 0.7" in said
    state = torch.load(folder / "checkpoint-10" / "optimizer.pt", weights_only=True)
    assert {(g["weight_decay"], tuple(g["betas"])) for g in state["param_groups"]} == {(0.5, (0.9, 0.7))}
    with pytest.raises(ICAEError) as error:
        train(settings, config, steps=12, optimizer="muon")
    one_line(error.value, "optimizer=adamw")
    assert json.loads((folder / "train_config.json").read_text())["optimizer"] == "adamw"


@pytest.mark.parametrize("kind", ["kv"])
@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_one_line(settings, config, kind, file):
    folder = train(settings, config)
    (folder / "checkpoint-8" / file).write_bytes(b"{damaged")
    with pytest.raises(ICAEError) as error:
        train(settings, config, steps=10)
    one_line(error.value, "checkpoint-8", "damaged")


@pytest.mark.parametrize("kind", ["kv"])
def test_the_same_base_by_another_path_is_the_same(settings, config, kind, base_folder):
    train(settings, config)
    train(settings, {**config, "base": str(base_folder.parent / "." / ".." / base_folder.parent.name / base_folder.name)}, steps=9)


def test_an_adapter_goes_on_with_its_own_shape(finished, base, kind):
    for name, value in {"lora_rank": 8, "lora_alpha": 1, "marker_length": 1, "lora_targets": ["q_proj"]}.items():
        with pytest.raises(ICAEError) as error:
            icae.train.build(TrainConfig(init=str(finished[kind])), starting_config(str(finished[kind]), {name: value}), "cpu")
        one_line(error.value, f"model.{name} is")


def test_each_part_has_its_own_learning_rate(base):
    model = make_icae(base)
    optimizer = icae.loop._optimizer(model.adapter_tensors(), TrainConfig(learning_rate=0.1, lora_b_multiplier=4.0, memory_multiplier=0.5))
    names = {id(p): name for name, p in model.adapter_tensors().items()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == model.adapter_tensors().keys()
    for name, rate in rates.items():
        assert rate == pytest.approx(0.4 if "lora_B" in name else 0.1 if "lora_A" in name else 0.05), name


def test_the_held_out_loss_is_the_mean_over_its_samples(settings, config, text, base):
    folder = train(settings, config, held_out=text, eval_steps=4, eval_samples=6, steps=4)
    (logged,) = [row["eval_loss"] for row in history(folder) if "eval_loss" in row]
    model = ICAE.from_pretrained(folder)
    train_config = TrainConfig(**{**settings, "steps": 4})
    held = icae.data.HeldOut(Windows(icae.data.load_corpus(text, base), base, model.config, train_config), 6)
    with torch.no_grad():
        by_hand = [float(model(**collate([held[i]]))["loss"]) for i in range(6)]
    assert logged == pytest.approx(sum(by_hand) / 6, abs=1e-4)


def test_fine_tuning_starts_from_a_checkpoint_and_learns_its_triples(finished, settings, config, kind, tmp_path):
    rows = [{"input": LINES[i % 4], "prompt": f"Line {i}?", "answer": f"It is {i}."} for i in range(6)]
    (tmp_path / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = {"objective": "instruct", "train": str(tmp_path / "triples.jsonl"), "init": str(finished[kind])}
    folder = train(settings, config, **first, steps=6, held_out=str(tmp_path / "triples.jsonl"), eval_steps=6, eval_samples=4)
    assert losses(folder)[6] < losses(folder)[1]
    before, after = tensors(finished[kind]), tensors(folder)
    marker = (after["markers"] - before["markers"]).abs().amax((1, 2))
    assert marker[Marker.FT] > 0 and marker[Marker.AE] == marker[Marker.LM] == 0
    assert [row["step"] for row in history(folder) if "eval_loss" in row] == [6]


def test_a_run_is_refused_before_anything_is_written(settings, config, other_base, finished, tmp_path):
    def refused(*parts, config=config, **changes):
        with pytest.raises(ICAEError) as error:
            train(settings, config, **changes)
        one_line(error.value, *parts)
        assert not Path(settings["output"]).exists()

    refused("train is empty", train="")
    refused("nowhere.txt", train=str(tmp_path / "nowhere.txt"))
    refused("no document has 508 tokens", windows=[[0, 8], [7, 500]])
    refused("no checkpoint", init=str(tmp_path / "nowhere"))
    refused("windows must be", windows=[[5, 8]])
    refused("autoencoding_share", autoencoding_share=1.5)
    refused("lora_targets", config={**config, "lora_targets": ["c_attn"]})
    make_icae(other_base).save_pretrained(tmp_path / "other")
    text = (tmp_path / "other" / "config.json").read_text().replace(other_base.name, config["base"])
    (tmp_path / "other" / "config.json").write_text(text)
    refused("another base", init=str(tmp_path / "other"))


# ---- fine-tuning ----


@pytest.fixture
def questions(tmp_path):
    rows = [{"input": line, "prompt": f"Question {i}?", "answer": f"Answer {i}."} for i, line in enumerate(LINES * 3)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "questions.jsonl")


def test_a_response_is_learned_from_slots_among_others_with_a_teacher_and_replays(tmp_path, base_folder, kind, questions, text):
    """All options at once: the loss falls, the held-out one is of triples alone, and a killed run's steps are the same again."""
    config = {**CONFIG, "base": str(base_folder), "kind": kind}
    options = {"distil": 0.3, "distractors": 2, "pretrain_share": 0.25, "replay": text, "windows": [[0, 8]], "ratios": [2, 4]}
    settings = {**RUN, **options, "objective": "instruct", "train": {questions: 1.0}, "held_out": questions}
    train({**settings, "eval_steps": 40, "steps": 40, "output": str(tmp_path / "a")}, config)
    found = losses(tmp_path / "a")
    assert sum(list(found.values())[-8:]) < 0.95 * sum(list(found.values())[:8])
    (held_out,) = [row["eval_loss"] for row in history(tmp_path / "a") if "eval_loss" in row]
    model = ICAE.from_pretrained(tmp_path / "a")
    rows = [instruction_of(model, row) for row in icae.triples.load_triples(questions)]
    by_hand = [float(model(**collate([e]))["loss"]) for e in rows]
    assert held_out == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-3)


def instruction_of(model, row):
    prompt, response = chat_prompt(model.base.tokenizer, row.prompt), chat_response(model.base.tokenizer, row.response)
    return instruction(model.base.encode(row.context), prompt, response, model.config.segment_length, model.config.ratio)


def test_fine_tuning_settings_that_cannot_be_are_refused(settings, config, questions):
    for changes, words in (
        ({"objective": "instruct", "pretrain_share": 0.5}, "replay"),
        ({"distil": 1.5}, "distil"),
        ({"train": {questions: 0}}, "shares in train"),
        ({"replay": {questions: "much"}}, "shares in replay"),
        ({"objective": "instruct", "train": questions, "context_length": 3}, "more than 3 tokens"),
    ):
        with pytest.raises(ICAEError) as error:
            train(settings, config, **changes)
        one_line(error.value, words)


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is half a second on whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(icae.callbacks, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 2))


def test_minutes_end_a_run_and_its_schedule_before_its_steps_do(settings, config, ticking):
    folder = train(settings, config, steps=10**6, minutes=0.08, save_steps=10**6)
    rates = [row["learning_rate"] for row in history(folder) if "loss" in row]
    assert history(folder)[-1]["step"] == 10
    assert rates[-1] < 0.3 * max(rates)


@pytest.mark.parametrize("kind", ["kv"])
def test_a_run_whose_minutes_are_over_is_left_as_it_is(settings, config, kind, ticking):
    more = {"steps": 10**6, "minutes": 0.05, "save_steps": 10**6, "log_steps": 4}
    folder = train(settings, config, **more)
    before, adapter = history(folder)[-1], tensors(folder)
    assert (before["minutes"], before["step"]) == (0.05, 6) and (folder / "checkpoint-6").is_dir()
    train(settings, config, **more)
    assert history(folder)[-1]["step"] == 6
    assert all(torch.equal(t, adapter[name]) for name, t in tensors(folder).items())


@pytest.mark.parametrize("kind", ["kv"])
def test_a_run_taken_up_again_has_only_the_minutes_that_are_left(settings, config, kind, ticking):
    more = {"steps": 10**6, "save_steps": 10**6, "log_steps": 1}
    folder = train(settings, config, minutes=0.05, **more)
    assert history(folder)[-1]["step"] == 6
    train(settings, config, minutes=0.1, **more)
    assert (history(folder)[-1]["minutes"], history(folder)[-1]["step"]) == (0.1, 12)
    assert [row["learning_rate"] for row in history(folder) if "loss" in row][-1] < 0.1 * settings["learning_rate"]


TOGETHER = """
import json, os, sys, time
import icae.callbacks, icae.train
from icae.config import ICAEConfig, TrainConfig

class Ahead:  # the second process's clock is a second ahead, of three
    start = time.monotonic()
    def monotonic(self):
        now = time.monotonic()
        return now + (os.environ["RANK"] == "1" and now > self.start + 1)

icae.callbacks.time = Ahead()
settings, config = json.loads(sys.argv[1])
made = []
trainee = icae.train.Trainee
icae.train.Trainee = lambda model: made.append(model) or trainee(model)
icae.train.train(TrainConfig(**settings), ICAEConfig(**config), quiet=True)
made[0].forget_hash()
with open(settings["output"] + "-" + os.environ["RANK"], "w") as file:
    file.write(made[0].origin.adapter)
os._exit(0)  # how torch takes its threads and sockets down is not what is tested
"""


def test_processes_end_together_as_the_same_model(settings, config, tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    run = [{**settings, "steps": 10**6, "minutes": 0.05, "save_steps": 10**6, "warmup_steps": 0}, config]
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(tmp_path / "together.py"), json.dumps(run)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (Path(f"{settings['output']}-{rank}").read_text() for rank in range(2))
    assert len(one) == 64
    assert one == two
    assert history(Path(settings["output"]))[-1]["minutes"] >= 0.05  # as both read it, or the first would go on if taken up again
