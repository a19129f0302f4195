"""What ships of a run: its adapter in float16, and the curve of all stages as one."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import load_script, make_icae

from icae import ICAE


@pytest.fixture
def script(monkeypatch, tmp_path):
    module = load_script("configs/ship.py")
    monkeypatch.setattr(module, "ADAPTERS", tmp_path / "adapters")
    return module


def run_of(base, folder, init, lines):
    make_icae(base, stirred=0.1).save_pretrained(folder)
    (folder / "train_config.json").write_text(json.dumps({"init": init}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 9, "max_steps": 9, "epoch": 1, "log_history": lines}))
    return folder


def test_a_second_stage_counts_on_where_the_first_ended(script, base, tmp_path):
    first = run_of(
        base, tmp_path / "first", None, [{"step": 5, "loss": 3.0, "minutes": 1.5}, {"step": 9, "context_tokens": 70, "minutes": 2.0}]
    )
    second = run_of(base, tmp_path / "second", str(first), [{"step": 4, "loss": 1.0, "minutes": 0.5, "context_tokens": 30}])
    folder = script.ship(second, "both")
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["log_history"][:2] == json.loads((first / "trainer_state.json").read_text())["log_history"]
    assert state["log_history"][2] == {"step": 13, "loss": 1.0, "minutes": 2.5, "context_tokens": 100}
    assert "epoch" not in state and state["adapter"] == ICAE.from_pretrained(folder).origin.adapter


def test_a_checkpoint_ships_in_half_precision_with_the_settings_of_its_run(script, base, tmp_path):
    run = run_of(base, tmp_path / "run", None, [])
    checkpoint = run_of(base, tmp_path / "run" / "checkpoint-3", None, [])
    (checkpoint / "train_config.json").unlink()
    folder = script.ship(checkpoint, "one")
    assert (folder / "train_config.json").read_text() == (run / "train_config.json").read_text()
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {torch.float16}
