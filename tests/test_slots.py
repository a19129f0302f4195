import dataclasses
import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from tiny import assert_same_slots, one_line, random_slots

import icae.atomic
from icae.errors import ICAEError
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots, rotated

SEGMENTS = [((8, 2, 8),), ((9, 3, 9), (8, 2, 8)), ((4, 1, 4), (4, 1, 4), (3, 1, 3))]


@pytest.fixture
def file(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    random_slots(kind, SEGMENTS[1]).save(path)
    return path


def test_counts_are_sums_over_segments():
    slots = random_slots("kv", [(9, 3, 9), (8, 2, 7)])
    assert (slots.count, slots.tokens, slots.span) == (5, 17, 16)
    assert slots.nbytes == 2 * 5 * 2 * 2 * 8 * 4


def test_rotating_is_the_textbook_rotation_of_halves():
    keys = torch.tensor([[[[1.0, 0.0, 3.0, 2.0, 7.0]]]])  # (k, layers, heads, size): two pairs (0, 2), (1, 3), one dimension unturned
    turned = rotated(keys, torch.tensor([[torch.pi / 2, torch.pi]]), torch.tensor([1]))
    torch.testing.assert_close(turned, torch.tensor([[[[-3.0, 0.0, 1.0, -2.0, 7.0]]]]), atol=1e-6, rtol=0)


def test_rotations_add_up():
    slots = random_slots()
    assert_same_slots(slots.shifted(3).shifted(4), slots.shifted(7), 1e-5)
    assert_same_slots(slots.shifted(9).shifted(-9), slots, 1e-5)
    assert_same_slots(slots.shifted(0), slots, 0)


def test_shifting_leaves_values_and_embeddings_alone(kind):
    slots = random_slots(kind)
    moved = slots.shifted(5)
    assert (moved.positions - slots.positions).tolist() == [5] * slots.count
    for name in set(slots.tensors) - {"keys"}:
        assert torch.equal(moved.tensors[name], slots.tensors[name])
    if kind == "kv":
        assert not torch.allclose(moved.tensors["keys"], slots.tensors["keys"], atol=1e-2)


def test_splitting_what_was_joined_gives_back_the_parts(kind):
    parts = [random_slots(kind, [s]) for s in SEGMENTS[1] + SEGMENTS[0]]
    joined = MemorySlots.concatenate(parts)
    assert joined.positions.tolist() == [0, 1, 2, 9, 10, 17, 18]
    for part, back in zip(parts, joined.split(), strict=True):
        assert_same_slots(back, part, 1e-5)


def test_joining_is_associative(kind):
    a, b, c = (random_slots(kind, s) for s in SEGMENTS)
    join = MemorySlots.concatenate
    assert_same_slots(join([join([a, b]), c]), join([a, join([b, c])]), 1e-5)


@pytest.mark.parametrize("field", ["layout", "base_fingerprint", "adapter"])
def test_slots_of_another_origin_are_not_joined(kind, field):
    with pytest.raises(ICAEError) as error:
        MemorySlots.concatenate([random_slots(kind), random_slots(kind, **{field: "other"})])
    one_line(error.value, field, "other")


def test_slots_of_two_kinds_are_not_joined():
    with pytest.raises(ICAEError) as error:
        MemorySlots.concatenate([random_slots("kv"), random_slots("embedding")])
    one_line(error.value, "kind", "kv", "embedding")


def test_joining_nothing_is_refused():
    with pytest.raises(ICAEError, match="nothing to concatenate"):
        MemorySlots.concatenate([])


def test_moving_to_a_device_moves_every_tensor_and_a_dtype_only_the_slots(kind):
    slots = random_slots(kind)
    away = slots.to("meta")
    tensors = [*away.tensors.values(), away.positions, *([] if away.rotations is None else [away.rotations])]
    assert {t.device.type for t in tensors} == {"meta"}
    half = slots.to(torch.float16)
    assert {t.dtype for t in half.tensors.values()} == {torch.float16}
    assert half.positions.dtype == torch.int64
    assert half.rotations is None or half.rotations.dtype == torch.float32


# ---- batches ----


def test_padding_and_taking_rows_are_inverse(kind):
    rows = [random_slots(kind, s) for s in SEGMENTS]
    batch = SlotBatch.pad(rows)
    assert batch.mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5, [True] * 3 + [False] * 2]
    assert batch.spans == [8, 17, 11]
    for row, back in zip(rows, batch.rows(rows[0].origin), strict=True):
        assert_same_slots(back, row, 0)


def test_joining_rows_keeps_values_and_gradients(kind):
    rows = [random_slots(kind, [s]) for s in SEGMENTS[1] + SEGMENTS[0]]
    batch = SlotBatch.pad(rows)
    leaves = {name: t.requires_grad_() for name, t in batch.tensors.items()}
    both = batch.select([0, 1]), batch.select([2])
    assert both[1].mask.shape[1] < batch.mask.shape[1]
    grouped = SlotBatch.stack(both).joined([[0, 2], [1]])
    assert_same_slots(grouped.select([1]).rows(rows[0].origin)[0], rows[1], 0)
    first, second = grouped.rows(rows[0].origin)
    assert_same_slots(first, MemorySlots.concatenate([rows[0], rows[2]]), 1e-6)
    assert_same_slots(second, rows[1], 0)
    sum(t[grouped.mask].pow(2).sum() for t in grouped.tensors.values()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * leaf.detach(), msg=lambda m, name=name: f"{name}: {m}")


# ---- files ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_saving_and_loading_is_the_identity_to_the_bit(tmp_path, kind, segments, dtype):
    slots = random_slots(kind, segments).to(dtype)
    slots.save(tmp_path / "a.safetensors")
    back = MemorySlots.load(tmp_path / "a.safetensors")
    assert (back.origin, back.segments) == (slots.origin, slots.segments)
    assert torch.equal(back.positions, slots.positions)
    assert {n: t.dtype for n, t in back.tensors.items()} == dict.fromkeys(slots.tensors, dtype)
    assert all(torch.equal(back.tensors[n], slots.tensors[n]) for n in slots.tensors)
    assert (back.rotations is None) == (kind == "embedding")
    assert back.rotations is None or torch.equal(back.rotations, slots.rotations)


def refused(path, *parts):
    with pytest.raises(ICAEError) as error:
        MemorySlots.load(path)
    one_line(error.value, path.name, *parts)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0xFF])
def test_a_flipped_byte_anywhere_is_refused(file, flip):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(header), *range(header, len(data), 37), len(data) - 1]:
        broken = bytearray(data)
        broken[place] ^= flip
        file.write_bytes(broken)
        refused(file)
    file.write_bytes(data)
    MemorySlots.load(file)


def test_a_truncated_or_lengthened_file_is_refused(file):
    data = file.read_bytes()
    for length in [0, 1, 7, 8, 100, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:length])
        refused(file)
    file.write_bytes(data + b"\0")
    refused(file)


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(icae.slots, "FORMAT_VERSION", 99)
        random_slots().save(tmp_path / "new.safetensors")
    refused(tmp_path / "new.safetensors", "99", "1")


def test_files_that_hold_no_slots_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", "no memory slots")
    (tmp_path / "text.txt").write_text("not a safetensors file at all, but long enough to look at")
    refused(tmp_path / "text.txt")
    refused(tmp_path / "missing.safetensors", "no slot file")
    refused(tmp_path, "no slot file")


def test_metadata_that_was_exchanged_is_refused(file):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about = json.loads(metadata["icae"])
    about["origin"]["base_fingerprint"] = "f" * 64
    save_file(tensors, file, metadata={**metadata, "icae": json.dumps(about)})
    refused(file, "checksum")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_leaves_the_old_file_whole(file, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = file.read_bytes()
    monkeypatch.setattr(icae.atomic.os, call, full)
    with pytest.raises(ICAEError) as error:
        random_slots().save(file)
    one_line(error.value, file.name, "No space left on device", "nothing was changed")
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_files_have_the_permissions_that_the_umask_leaves_or_had_before(tmp_path):
    before = os.umask(0o077)
    try:
        random_slots().save(tmp_path / "new")
        random_slots().save(tmp_path / "again")
        (tmp_path / "again").chmod(0o640)
        random_slots().save(tmp_path / "again")
        icae.atomic.write_atomically(tmp_path / "told", b"", mode=0o604)
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "again", "told")] == [0o600, 0o640, 0o604]


def test_files_that_belong_together_are_all_refused_where_a_folder_has_ones_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ICAEError, match="nothing was changed"):
        icae.atomic.write_together({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_saving_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ICAEError) as error:
        random_slots().save(tmp_path / "nowhere" / "a.safetensors")
    one_line(error.value, "nowhere", "No such file or directory")


def test_slots_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_slots().positions = torch.zeros(2)
