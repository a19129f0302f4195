import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LINES, assert_same_slots, make_icae, one_line

import icae.atomic
from icae.checkpoint import find_checkpoint, load_weights, read_config
from icae.errors import ICAEError
from icae.model import ICAE

FILES = ["config.json", "adapter_config.json", "adapter_model.safetensors", "memory.safetensors"]
TEXT = " ".join(LINES)


@pytest.fixture
def model(base):
    return make_icae(base, stirred=0.1)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(call, *parts):
    with pytest.raises(ICAEError) as error:
        call()
    one_line(error.value, *parts)


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("memory", ["pooled", "mixed", "shared", "learned"])
def test_saving_and_loading_is_the_identity_to_the_bit(base, kind, layout, memory, tmp_path):
    model = make_icae(base, stirred=0.1, kind=kind, layout=layout, memory=memory)
    model.save_pretrained(tmp_path)
    back = ICAE.from_pretrained(tmp_path, base=base)
    mine, theirs = model.adapter_tensors(), back.adapter_tensors()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert (back.config, back.origin, back.training) == (model.config, model.origin, False)
    slots, again = model.compress(TEXT), back.compress(TEXT)
    assert_same_slots(again, slots, 0)
    assert back.answer(again, "Who?", max_new_tokens=12) == model.answer(slots, "Who?", max_new_tokens=12)


def test_an_adapter_without_encoder_pass_is_the_start_of_one_with(base, tmp_path):
    settings = {"kind": "embedding", "memory": "mixed", "slot_norm": 20.0}
    make_icae(base, stirred=0.1, readout="memory", **settings).save_pretrained(tmp_path / "first")
    second = make_icae(base, readout="residual", **settings)
    with pytest.raises(ICAEError, match="connector"):
        load_weights(second, tmp_path / "first")
    load_weights(second, tmp_path / "first", fresh=("connector",))
    assert_same_slots(second.compress(TEXT), ICAE.from_pretrained(tmp_path / "first", base=base).compress(TEXT), 1e-4)
    second.save_pretrained(tmp_path / "second")
    assert {"memory", "mix", "connector", "markers"} == load_file(tmp_path / "second" / "memory.safetensors").keys()
    with pytest.raises(ICAEError, match="connector besides"):
        load_weights(make_icae(base, readout="memory", **settings), tmp_path / "second")


def test_a_checkpoint_holds_its_files_and_nothing_pickled_and_no_base(folder, base):
    assert sorted(os.listdir(folder)) == sorted([*FILES, "README.md"])
    assert load_file(folder / "memory.safetensors").keys() == {"memory", "markers"}
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    assert config["base_fingerprint"] == base.fingerprint and config["library"].startswith("icae ")


def test_the_adapter_is_pefts_own(folder, base, model):
    from peft import PeftModel

    plain = PeftModel.from_pretrained(base.twin(), folder)
    theirs = {n.split("base_model.")[1]: p for n, p in plain.named_parameters() if "lora_" in n}
    mine = {n.split("base_model.")[1]: p for n, p in model.adapter_tensors().items() if "lora_" in n}
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[n], mine[n]) for n in mine)


def test_half_precision_rounds_what_is_stored_and_nothing_else(model, base, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.float16)
    assert {t.dtype for f in FILES[2:] for t in load_file(tmp_path / f).values()} == {torch.float16}
    back = ICAE.from_pretrained(tmp_path, base=base).adapter_tensors()
    for name, tensor in model.adapter_tensors().items():
        assert torch.equal(back[name], tensor.half().float()), name


def test_weights_that_are_put_into_a_model_change_what_its_slots_say_of_it(folder, base, model):
    other = make_icae(base)
    before = other.origin
    load_weights(other, folder)
    assert other.origin == model.origin != before


def test_the_base_named_in_the_config_is_loaded_where_none_is_given(folder, base_folder, model):
    back = ICAE.from_pretrained(folder)
    assert back.base.name == str(base_folder)
    assert_same_slots(back.compress(TEXT), model.compress(TEXT), 1e-6)


def test_another_base_is_refused_with_both_names(folder, base, other_base):
    load = lambda: ICAE.from_pretrained(folder, base=other_base)  # noqa: E731
    refused(load, base.name, other_base.name, base.fingerprint[:12], other_base.fingerprint[:12])


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(folder, base, file):
    (folder / file).unlink()
    refused(lambda: ICAE.from_pretrained(folder, base=base), file)


@pytest.mark.parametrize("file", [f for f in FILES if f != "adapter_config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 20 + data[20:]])
def test_a_damaged_file_is_named(folder, base, file, damage):
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    refused(lambda: ICAE.from_pretrained(folder, base=base), file)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"version": 99}, ("99",)),
        ({"kind": "audio"}, ("kind", "audio")),
        ({"ratio": 0}, ("ratio", "0")),
        ({"ratio": "four"}, ("ratio", "four")),
        ({"rotio": 4}, ("rotio", "ratio")),
        ({"lora_rank": 8}, ("does not fit",)),
        ({"lora_targets": ["q_proj"]}, ("does not fit",)),
        ({"lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, ("does not fit",)),
        ({"memory": "learned"}, ("does not fit",)),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, base, changes, parts):
    edit(folder / "config.json", **changes)
    refused(lambda: ICAE.from_pretrained(folder, base=base), *parts)


@pytest.mark.parametrize("text", ["[1]", "7", "null", "{"])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(lambda: read_config(folder), "config.json")


@pytest.mark.parametrize("file", FILES[2:])
def test_tensors_of_something_else_are_refused(folder, base, file):
    save_file({"weight": torch.zeros(3)}, folder / file)
    refused(lambda: ICAE.from_pretrained(folder, base=base), "does not fit")


def test_names_that_are_no_checkpoint_are_refused(tmp_path):
    refused(lambda: find_checkpoint(tmp_path / "none"), "none")
    refused(lambda: find_checkpoint("nobody-trained-this"), "nobody-trained-this")
    refused(lambda: find_checkpoint("some/repository"), "some/repository")


@pytest.mark.parametrize("file", FILES)
def test_a_disk_that_fills_leaves_every_older_file_whole(folder, model, tmp_path, monkeypatch, file):
    """Each file is its old or its new self, never a part of one; nothing is left lying about."""
    before, replace = {f: (folder / f).read_bytes() for f in FILES}, os.replace

    def full(source, target):
        if str(target).endswith(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    changed = make_icae(model.base, stirred=0.2)
    changed.save_pretrained(tmp_path / "changed")
    monkeypatch.setattr(icae.atomic.os, "replace", full)
    refused(lambda: changed.save_pretrained(folder), file, "No space left")
    after = {f: (folder / f).read_bytes() for f in FILES}
    assert after[file] == before[file]
    assert all(after[f] in (before[f], (tmp_path / "changed" / f).read_bytes()) for f in FILES)
    assert not [f for f in os.listdir(folder) if f.startswith(".")]


def test_a_card_is_written_and_kept(model, folder):
    assert "library_name: icae" in (folder / "README.md").read_text()
    model.save_pretrained(folder, card="# measured\n")
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# measured\n"


def test_a_file_where_the_folder_should_be_is_refused(model, tmp_path):
    (tmp_path / "taken").write_text("")
    refused(lambda: model.save_pretrained(tmp_path / "taken"), "taken")
