"""benchmarks/full_text_qa.py, on a tiny base."""

import json

import pytest
import torch
from tiny import LINES, base_logits, load_script, make_icae

from icae.base import load_base
from icae.chat import chat_prompt, chat_response, full_text
from icae.config import TrainConfig, read_yaml
from icae.errors import ICAEError
from icae.model import ICAE
from icae.objectives import Marker, collate
from icae.train import build, make_data, starting_config, train
from icae.triples import digest, load_triples


@pytest.fixture(scope="module")
def bench():
    return load_script("benchmarks/full_text_qa.py")


@pytest.fixture
def config(base, tmp_path):
    make_icae(base).save_pretrained(tmp_path / "adapter")
    rows = [{"input": line, "prompt": f"What of {i}?", "answer": line.split()[1]} for i, line in enumerate(LINES)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "books.txt").write_text(" ".join(LINES))
    lines = {
        "train": tmp_path / "t.jsonl",
        "held_out": tmp_path / "t.jsonl",
        "replay": tmp_path / "books.txt",
        "init": tmp_path / "adapter",
    }
    lines |= {"output": tmp_path / "run", "pretrain_share": 0.5, "windows": [[0, 8]], "steps": 30, "learning_rate": 0.02, "log_steps": 1}
    lines |= {"batch_size": 2, "warmup_steps": 2, "save_steps": 10, "eval_steps": 30, "lora_b_multiplier": 2}
    (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return str(tmp_path / "c.yaml")


def test_the_bound_learns_with_the_full_text_and_is_scored_by_the_same_evaluation(bench, config, base, tmp_path):
    folder = bench.train(config, ["steps=20"])
    assert folder == bench.train(config, [])  # goes on from step 20
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = {row["step"]: row["loss"] for row in history if "loss" in row}
    assert list(found) == list(range(1, 31)) and sum(list(found.values())[-5:]) < 0.8 * sum(list(found.values())[:5])
    assert json.loads((folder / "full_text.json").read_text())["rank"] == 4  # the adapter's own
    report = bench.evaluate(folder, str(tmp_path / "t.jsonl"), 3, 0, 4, tmp_path / "r" / "full.json")
    assert report == json.loads((tmp_path / "r" / "full.json").read_text()) | {"results": report["results"]}
    assert {"n", "f1_text", "f1_text_interval", "rouge1_text", "f1_none"} <= report["results"].keys() and report["results"]["n"] == 3
    assert load_base(base.name).fingerprint == base.fingerprint
    # the same questions as `icae evaluate qa` reads, and as it names them
    assert report["settings"]["data_sha256"] == digest(load_triples(str(tmp_path / "t.jsonl"), base))


def test_the_bound_learns_from_questions_alone(bench, config, base, monkeypatch):
    """Replayed text that is to be continued as the base would has a teacher's text too, but no question."""
    learned = []
    forward = bench.FullText.forward

    def spying(self, **batch):
        learned.extend(batch["markers"][batch["teacher"]["rows"]].tolist() if "teacher" in batch else [])
        return forward(self, **batch)

    monkeypatch.setattr(bench.FullText, "forward", spying)
    bench.train(config, ["steps=6", "continuation_distil=0.7", "autoencoding_share=0", "align=1", "held_out=null"])
    assert learned and set(learned) == {int(Marker.FT)}


def test_the_bound_teaches_slots_to_answer(bench, config, base, tmp_path):
    folder = bench.train(config, ["steps=4"])
    tuned = base.tuned(folder)
    ids = torch.tensor([base.encode(LINES[0])])
    assert not torch.equal(tuned.model(ids).logits, base.model(ids).logits)
    assert base.model(ids).logits.equal(load_base(base.name).model(ids).logits)
    values = {"objective": "instruct", "teacher": str(folder), "align": 1.0, "distil": 0.5, "steps": 2, "output": str(tmp_path / "s")}
    settings = TrainConfig.from_dict(read_yaml(config) | values)
    losses = []
    for teacher in (str(folder), None):
        torch.manual_seed(0)
        model = build(settings.replace(teacher=teacher), starting_config(settings.init, {}), "cpu")
        samples, _ = make_data(settings, model.base, model.config, 1)
        losses.append(float(model(**collate([samples[i] for i in range(8)]))["loss"]))
    assert losses[0] != losses[1]
    train(settings, starting_config(settings.init, {}), quiet=True)
    assert ICAE.from_pretrained(tmp_path / "s").tutor is None
    with pytest.raises(ICAEError, match="no PEFT adapter"):
        base.tuned(tmp_path / "nowhere")


def test_before_training_its_loss_is_the_bases_own(bench, base):
    from icae.config import ICAEConfig
    from icae.instructions import Pool, Triples
    from icae.triples import Triple

    config = ICAEConfig(lora_rank=2, segment_length=16)
    triples = [Triple(line, "What?", line.split()[1], ()) for line in LINES]
    data = Triples([Pool(triples)], base, config, TrainConfig(objective="instruct", distil=1.0, steps=1))
    by_hand = []
    for i in range(4):
        t = data._triple(i)
        prompt, response = chat_prompt(base.tokenizer, full_text(t.context, t.prompt)), chat_response(base.tokenizer, t.response)
        likely = base_logits(base, prompt + response)[len(prompt) - 1 : -1].log_softmax(-1)
        by_hand.append(-float(likely[torch.arange(len(response)), torch.tensor(response)].mean()))
    with torch.no_grad():
        loss = float(bench.FullText(base, config)(**collate([data[i] for i in range(4)]))["loss"])
    assert loss == pytest.approx(sum(by_hand) / 4, rel=1e-4)


def test_a_folder_without_a_bound_is_refused(bench, tmp_path):
    with pytest.raises(ICAEError, match="train one first"):
        bench.evaluate(tmp_path, "x.jsonl", None, 0, 4, None)
