import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny import LINES, one_line, save_base

import icae.base
from icae.base import EMBEDDED, check_device, fingerprint, load_base
from icae.config import ICAEConfig
from icae.errors import ICAEError
from icae.model import ICAE


def refused(call, *parts):
    with pytest.raises(ICAEError) as error:
        call()
    one_line(error.value, *parts)


@pytest.fixture
def folder(base_folder, tmp_path):
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# ---- loading ----


def test_a_loaded_base_is_frozen_and_says_what_it_is(base, base_folder):
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert (base.name, base.hidden_size, base.max_positions, base.dtype, base.device.type) == (
        str(base_folder),
        32,
        512,
        torch.float32,
        "cpu",
    )
    assert base.eos_ids == [1]


def test_encoding_adds_no_special_tokens_and_decoding_gives_the_text_back(base):
    for text in [*LINES, "né → 🙂\n\ttabs  and   spaces ", ""]:
        ids = base.encode(text)
        assert not {0, 1} & set(ids) and base.decode(ids) == text
    assert base.decode([0, *base.encode("hello"), 1]) == "hello"


def test_embed_is_the_bases_own(base):
    ids = torch.tensor([[3, 7]])
    assert torch.equal(base.embed(ids), base.model.get_input_embeddings().weight[ids])


@pytest.mark.parametrize("make", ["nothing", "empty", "no weights", "no causal LM", "damaged weights", "damaged config"])
def test_what_is_no_base_is_refused_by_name(folder, make):
    if make == "nothing":
        shutil.rmtree(folder)
    elif make == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif make == "no weights":
        (folder / "model.safetensors").unlink()
    elif make == "no causal LM":
        edit(folder, model_type="clip_vision_model", architectures=["CLIPVisionModel"])
    elif make == "damaged weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    else:
        (folder / "config.json").write_text("{")
    refused(lambda: load_base(str(folder)), str(folder))


def test_a_hub_name_out_of_reach_is_refused():
    refused(lambda: load_base("nobody/nothing"), "nobody/nothing")


# ---- fingerprints ----


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(base, folder):
    assert load_base(str(folder)).fingerprint == base.fingerprint == fingerprint(base.model)


def test_the_fingerprint_does_not_depend_on_the_dtype_of_use(base, base_folder):
    half = load_base(str(base_folder), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.fingerprint == base.fingerprint


def test_the_fingerprint_is_computed_once_for_each_state_of_the_files(folder, home, monkeypatch):
    counted = []

    def counting(model):
        counted.append(1)
        return fingerprint(model)

    monkeypatch.setattr(icae.base, "fingerprint", counting)
    first = load_base(str(folder)).fingerprint
    assert load_base(str(folder)).fingerprint == first and len(counted) == 1
    time.sleep(0.01)
    (folder / "model.safetensors").write_bytes((save_base(folder.parent / "other", seed=1) / "model.safetensors").read_bytes())
    assert load_base(str(folder)).fingerprint != first and len(counted) == 2


def test_one_changed_number_changes_the_fingerprint(base, folder):
    model = load_base(str(folder)).model
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert fingerprint(model) != base.fingerprint


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}])
def test_the_same_tensors_under_another_config_have_another_fingerprint(base, folder, change):
    edit(folder, **change)
    assert load_base(str(folder)).fingerprint != base.fingerprint


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 0.1}], ids=["rope", "norm"]
)
def test_settings_that_change_what_the_base_computes_change_the_fingerprint(base, folder, change):
    edit(folder, **change)
    other = load_base(str(folder))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert (other.model(ids).logits - base.model(ids).logits).abs().max() > 1e-3
    assert other.fingerprint != base.fingerprint


# ---- rotations ----


def test_rotations_are_ropes_angles_for_each_layer(base, tmp_path):
    theta = base.model.config.rope_parameters["rope_theta"]
    row = [theta ** (-2 * i / 8) for i in range(4)]
    torch.testing.assert_close(base.rotations(), torch.tensor([row, row]))
    local, whole = load_base(str(save_base(tmp_path / "gemma", "gemma3_text"))).rotations()
    torch.testing.assert_close(local, torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)]))
    torch.testing.assert_close(whole, torch.tensor([1_000_000.0 ** (-2 * i / 8) for i in range(4)]))


def test_bases_whose_keys_cannot_be_moved_are_refused_for_kv_slots(folder, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    load_base(str(folder)).tokenizer.save_pretrained(folder / "gpt2")
    refused(load_base(str(folder / "gpt2")).rotations, "gpt2", "no rotary position embedding", "kind embedding")
    edit(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refused(load_base(str(folder)).rotations, "depend on the text's length", "kind embedding")


# ---- the embedded base: prepared once, whole or not at all ----


def pretend(base_folder, log, pause):
    """Put a slow copy of the tiny base in place of fetching and dequantising; each preparation leaves a line in `log`."""

    def dequantise(gguf, folder):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        folder.mkdir()
        for source in sorted(Path(base_folder).iterdir()):  # config.json comes early: a half-made folder has one
            shutil.copy(source, folder)
            time.sleep(pause)

    icae.base._find_gguf = lambda scratch: scratch / "none.gguf"
    icae.base._dequantise = dequantise


def prepare(base_folder, log, pause, home):
    os.environ["ICAE_HOME"] = str(home)
    pretend(base_folder, log, pause)
    made = icae.base._embedded_folder()
    assert sorted(os.listdir(made)) == sorted(os.listdir(base_folder))


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=prepare, args=arguments)
    process.start()
    return process


def test_processes_that_start_together_share_one_preparation(base_folder, home, tmp_path):
    processes = [start(base_folder, tmp_path / "log", 0.05, home) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert not list(home.glob("*.making-*"))


def test_a_kill_in_the_middle_leaves_nothing_that_looks_like_a_model(base_folder, home, tmp_path, monkeypatch):
    process = start(base_folder, tmp_path / "log", 30, home)
    deadline = time.time() + 60
    while not list(home.glob("*/model/*")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (home / EMBEDDED).exists() and list(home.glob(f"{EMBEDDED}.making-*"))
    for name in ("_find_gguf", "_dequantise"):
        monkeypatch.setattr(icae.base, name, getattr(icae.base, name))  # puts the real ones back afterwards
    pretend(base_folder, tmp_path / "log", 0)
    assert load_base().fingerprint == load_base(str(base_folder)).fingerprint
    assert not list(home.glob("*.making-*"))


def test_a_failed_preparation_is_one_line_and_leaves_nothing(home, monkeypatch):
    monkeypatch.setattr(icae.base, "_find_gguf", lambda scratch: scratch / "none.gguf")

    def full(gguf, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(icae.base, "_dequantise", full)
    refused(load_base, EMBEDDED, "No space left on device")
    assert [p.name for p in home.iterdir() if not p.name.endswith(".lock")] == []


def test_without_a_network_the_fetch_is_refused_with_what_to_do(home, monkeypatch):
    class Failed:
        stderr = "some lines\nERROR: No matching distribution found"

    monkeypatch.setattr(icae.base.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(icae.base.subprocess, "run", lambda *a, **k: Failed())
    refused(load_base, "ERROR: No matching distribution found", "check the network", "pip install")
    assert not (home / EMBEDDED).exists()


@pytest.mark.real
def test_the_embedded_base_knows_its_language(real_base):
    ids = torch.tensor([real_base.encode("The capital of France is")])
    with torch.no_grad():
        assert real_base.decode([int(real_base.model(ids).logits[0, -1].argmax())]).strip() == "Paris"
    assert (real_base.name, real_base.hidden_size) == (EMBEDDED, 576)


def test_a_dtype_may_be_told_by_its_name(base_folder):
    assert load_base(str(base_folder), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ICAEError, match="dtype must be float32, bfloat16, float16 or auto, got 'half'"):
        load_base(str(base_folder), dtype="half")


def test_rotary_angles_are_the_same_in_every_dtype(base, base_folder):
    """As transformers loads a base: rounded to bfloat16, angles would be off by some tenths after a hundred tokens already."""
    for dtype in ("bfloat16", "float16", "auto"):
        other = load_base(str(base_folder), dtype=dtype)
        assert torch.equal(other.rotations(), base.rotations()), dtype
        assert dtype == "auto" or {str(p.dtype) for p in other.model.parameters()} == {f"torch.{dtype}"}


def test_embeddings_are_what_the_llm_is_fed_where_a_family_scales_them_too(base, tmp_path):
    assert torch.equal(base.embeddings(), base.model.get_input_embeddings().weight)
    gemma = load_base(str(save_base(tmp_path / "gemma", "gemma3_text")))
    scale = gemma.hidden_size**0.5
    torch.testing.assert_close(gemma.embeddings(), gemma.model.get_input_embeddings().weight * scale, atol=1e-2, rtol=1e-2)
    config = ICAEConfig(base=gemma.name, kind="embedding", slot_norm=1.0, lora_rank=2)
    slots = ICAE(gemma, config).eval().compress_ids([list(range(3, 19))], polish=0)[0].tensors["embeddings"]
    assert float(slots.pow(2).mean().sqrt()) == pytest.approx(float(gemma.embeddings().pow(2).mean().sqrt()), rel=0.01)


def test_where_nothing_can_be_kept_a_base_is_loaded_all_the_same(base, folder, monkeypatch):
    monkeypatch.setenv("ICAE_HOME", "/proc/nothing/here")
    assert load_base(str(folder)).fingerprint == base.fingerprint
    refused(lambda: load_base(EMBEDDED), "nothing can be written to")


def test_a_device_beyond_the_last_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    refused(lambda: check_device("cuda:7"), "cuda:7", "the last one", "cuda:1")
