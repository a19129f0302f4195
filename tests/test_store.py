import dataclasses
import errno
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time
import zipfile
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from tiny import LINES, make_icae, one_line, random_ids
from typer.testing import CliRunner

from icae import archive
from icae.blobs import DTYPES, open_blobs, pack, unpack
from icae.catalogue import AT_ONCE, Catalogue, namespace_of
from icae.chapters import SEGMENTS, chapters
from icae.errors import ICAEError, StorageError
from icae.server.keys import KEYS, Keyring
from icae.slots import MemorySlots, Origin, Segment
from icae.stepwise import finished
from icae.store import SlotStore
from icae.store_cli import app


class Fake:
    """A compressor without a model: a slot holds the mean of its ids, and what was compressed is counted."""

    def __init__(self, segment_length=8, adapter="a", polish=0):
        self.base = SimpleNamespace(encode=lambda text: [ord(c) for c in text], decode=lambda ids: "".join(map(chr, ids)))
        self.config = SimpleNamespace(segment_length=segment_length, ratio=4)
        self.origin = Origin("embedding", 4, "spread", "fake", "f" * 64, adapter * 64, polish)
        self.compressed = 0

    def origin_at(self, ratio):
        return dataclasses.replace(self.origin, ratio=ratio)

    def compressing(self, contexts, *, ratio=None, batch_size=8):
        yield 0
        made = []
        for ids in contexts:
            self.compressed += len(ids)
            rows = [torch.tensor(ids[i : i + ratio], dtype=torch.float32).mean().repeat(3) for i in range(0, len(ids), ratio)]
            segment = Segment(len(ids), len(rows), len(ids))
            made.append(MemorySlots({"embeddings": torch.stack(rows)}, torch.arange(len(rows)), (segment,), self.origin))
        return made


@pytest.fixture
def store(tmp_path):
    return SlotStore(tmp_path / "store")


def text_of(seed, letters=300):
    chance = random.Random(seed)
    return "".join(chance.choice("abcdefghij \n") for _ in range(letters))


def blob_files(store):
    return sorted(p.stem for p in (store.folder / "blobs").rglob("*.safetensors"))


# ---- chapters ----


def test_chapters_cover_the_text_and_keep_their_bounds():
    for n, length in [(2, 4), (64, 8), (65, 8), (1000, 8), (5000, 16)]:
        cuts = chapters(random_ids(n)[0], length)
        assert cuts[0][0] == 0 and cuts[-1][1] == n
        assert all(a[1] == b[0] for a, b in zip(cuts, cuts[1:], strict=False))
        limit = SEGMENTS * length
        assert all(b - a <= limit for a, b in cuts)
        assert len(cuts) == 1 or all(b - a >= limit // 4 for a, b in cuts)


def test_chapters_of_one_repeated_token_end_and_keep_their_bounds():
    cuts = chapters([7] * 20_000, 8)
    assert cuts[-1][1] == 20_000 and all(32 <= b - a <= 128 for a, b in cuts)


def test_cuts_fall_behind_paragraphs():
    text = "".join("word " * 9 + ("\n\n" if i % 3 == 2 else "\n") for i in range(60))
    ids = [ord(c) for c in text]
    inner = chapters(ids, 32, {10: 1})[1:]
    assert len(inner) > 5
    assert all(text[:a].endswith("\n\n") for a, _ in inner)


@pytest.mark.parametrize("change", ["replace", "insert", "delete"])
def test_an_edit_changes_few_chapters(change):
    ids = random_ids(8000)[0]
    before = {tuple(ids[a:b]) for a, b in chapters(ids, 16)}
    assert len(before) > 40
    costs = []
    for at in range(100, 8000, 790):
        edited = ids[:at] + {"replace": [5, 6], "insert": [5, 6, 7, 8, 9] + ids[at : at + 2], "delete": []}[change] + ids[at + 2 :]
        costs.append(len({tuple(edited[a:b]) for a, b in chapters(edited, 16)} - before))
    assert sorted(costs)[len(costs) // 2] == 1
    assert max(costs) <= 4


@pytest.mark.parametrize("ids, length, part", [([3], 8, "two tokens"), ([], 8, "two tokens"), ([1, 2, 3], 3, "at least 4")])
def test_texts_that_cannot_be_cut_are_refused(ids, length, part):
    with pytest.raises(ICAEError) as error:
        chapters(ids, length)
    one_line(error.value, part)


# ---- content, names ----


def test_a_stored_context_is_what_the_model_makes_of_it(base, kind, layout, tmp_path):
    model = make_icae(base, kind=kind, layout=layout, stirred=0.05)
    store, text = SlotStore(tmp_path), LINES[0]
    store.add(model, text, "a", dtype="float32")
    kept, made = store.load("a"), model.compress(text)
    assert kept.segments == made.segments and kept.origin == made.origin  # one chapter: cut as without a store
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(kept.tensors[name], tensor, atol=1e-5, rtol=0)
    assert model.reconstruct_ids([kept]) == model.reconstruct_ids([made])


def test_chapters_of_a_long_context_join_as_concatenated_slots(base, kind, tmp_path):
    model = make_icae(base, kind=kind, stirred=0.05, segment_length=8)
    store, ids = SlotStore(tmp_path), random_ids(200)[0]
    list(store.adding(model, ids, "a", dtype="float32"))
    kept, read = store.read(store.entry("a").entry)
    assert read == ids and kept.tokens == 200
    newlines = {i: base.decode([i]).count("\n") for i in ids}
    made = MemorySlots.concatenate(model.compress_ids([ids[a:b] for a, b in chapters(ids, 8, newlines)]))
    assert torch.equal(kept.positions, made.positions)
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(kept.tensors[name], tensor, atol=1e-4, rtol=0)


def test_adding_again_compresses_nothing_and_an_edit_little(store):
    fake, text = Fake(), text_of(0, 3000)
    first = store.add(fake, text, "a")
    assert first.fresh == first.entry.chapters > 30 and fake.compressed == 3000
    assert store.add(fake, text, "a").fresh == 0
    again = store.add(fake, text, "b")
    assert again.fresh == 0 and again.entry.entry == first.entry.entry and again.entry.id != first.entry.id
    assert fake.compressed == 3000
    edited = store.add(fake, text[:1500] + "edited" + text[1506:], "a")
    assert 1 <= edited.fresh <= 3 and fake.compressed < 3200
    assert edited.entry.id != first.entry.id and store.entry("b").entry == first.entry.entry
    assert len(blob_files(store)) == first.entry.chapters + edited.fresh


def test_a_name_that_moves_on_leaves_nothing_behind(store):
    fake = Fake()
    store.add(fake, text_of(1), "a")
    store.add(fake, text_of(2), "a")
    store.gc()
    assert len(blob_files(store)) == store.entry("a").chapters
    assert [e.name for e in store.entries()] == ["a"]


def test_slots_polished_at_other_rates_are_made_anew(store, monkeypatch):
    polished, plain = Fake(polish=1), Fake()
    before = [store.add(maker, text_of(0), name) for maker, name in ((polished, "a"), (plain, "b"))]
    monkeypatch.setattr("icae.store.POLISH_RATES", {"embeddings": 0.5})
    after = [store.add(maker, text_of(0), name) for maker, name in ((polished, "a"), (plain, "b"))]
    assert after[0].fresh == before[0].fresh and after[0].entry.entry != before[0].entry.entry
    assert after[1].fresh == 0 and after[1].entry.entry == before[1].entry.entry
    assert not [problem for problem in store.verify() if problem]


@pytest.mark.parametrize("change", [{"adapter": "b"}, {"segment_length": 16}, {"polish": 1}])
def test_another_maker_makes_another_content(store, change):
    one, two = store.add(Fake(), text_of(0), "a"), store.add(Fake(**change), text_of(0), "b")
    assert two.fresh == two.entry.chapters and one.entry.entry != two.entry.entry


def test_ratio_and_dtype_make_another_content(store):
    contents = {store.add(Fake(), text_of(0), f"{r}{d}", ratio=r, dtype=d).entry.entry for r in (2, 4) for d in DTYPES}
    assert len(contents) == 2 * len(DTYPES)


def test_a_content_without_a_name_is_named_after_itself(store):
    one, two = store.add(Fake(), text_of(0)), store.add(Fake(), text_of(0))
    assert one.entry.id == two.entry.id and one.entry.name == f"text-{one.entry.entry[:12]}"


def test_removing_keeps_what_another_name_needs(store):
    fake = Fake()
    store.add(fake, text_of(0), "a")
    store.add(fake, text_of(0), "b", namespace="other")
    store.remove("a")
    assert store.entries() == [] and store.load("b", "other").tokens == 300
    store.remove("b", "other")
    assert blob_files(store) == []
    with pytest.raises(ICAEError) as error:
        store.remove("b", "other")
    one_line(error.value, "'b'", "icae store ls")


def test_namespaces_do_not_see_each_other(store):
    store.add(Fake(), text_of(0), "mine", namespace="x")
    assert store.entries("y") == [] and len(store.entries("x")) == 1 and len(store.entries(None)) == 1
    with pytest.raises(ICAEError):
        store.load("mine", "y")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0b", "x" * 401])
def test_bad_names_are_refused(store, name):
    with pytest.raises(ICAEError) as error:
        store.add(Fake(), text_of(0), name)
    one_line(error.value, "name")
    assert store.entries() == []


def test_an_interrupted_adding_lists_nothing(store):
    steps = store.adding(Fake(), [ord(c) for c in text_of(0, 3000)], "a", batch_size=1)
    for _ in range(30):
        next(steps)
    steps.close()
    assert store.entries() == [] and store.catalogue.blobs() == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_an_interrupted_adding_had_finished_is_not_compressed_again(store, dtype):
    ids, fake, due = [ord(c) for c in text_of(0, 3000)], Fake(), SlotStore(store.folder / "due")
    steps = store.adding(fake, ids, "a", batch_size=1, dtype=dtype)
    for _ in range(30):
        next(steps)
    steps.close()
    one, two, *others = blob_files(store)
    assert others
    damage(store, one)
    path = store.folder / "blobs" / two[:2] / f"{two}.safetensors"
    path.write_bytes((path.parent.parent / others[0][:2] / f"{others[0]}.safetensors").read_bytes())  # reads well, but of other ids
    for other in others:
        os.utime(store.folder / "blobs" / other[:2] / f"{other}.safetensors", (0, 0))
    told, again, total = [], Fake(), 3000
    total -= sum(unpack(store.blobs.read(key))[0].tokens for key in others)
    made = finished(store.adding(again, ids, "a", dtype=dtype), told.append)
    assert again.compressed == total < 3000 and made.fresh == made.entry.chapters
    assert all(done <= most for done, most in told) and store.verify() == []
    finished(due.adding(Fake(), ids, "a", dtype=dtype))
    assert torch.equal(store.load("a").tensors["embeddings"], due.load("a").tensors["embeddings"])
    assert [b.bytes for b in store.catalogue.blobs()] == [b.bytes for b in due.catalogue.blobs()]
    assert store.catalogue.sweep(store.blobs.remove, store.blobs.old(60)) == 0 and not list(store.blobs.old(60))


# ---- damage ----


def broken(*_, **__):
    raise OSError(errno.EIO, "the disk does not answer")


def damage(store, key):
    path = store.folder / "blobs" / key[:2] / f"{key}.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)


def test_every_read_verifies_and_verify_names_the_damage(store):
    fake = Fake()
    store.add(fake, text_of(0), "a")
    store.add(fake, text_of(1), "b")
    assert store.verify() == []
    key = store.catalogue.parts(store.entry("a").entry)[1]
    damage(store, key)
    with pytest.raises(ICAEError) as error:
        store.load("a")
    one_line(error.value, "checksum", "verify --drop")
    assert store.load("b").tokens == 300
    (bad,) = store.verify()
    assert bad["key"] == key and bad["names"] == ["a"]
    assert len(store.verify(drop=True)) == 1 and [e.name for e in store.entries()] == ["b"]
    assert store.add(fake, text_of(0), "a").fresh >= 1
    assert store.verify() == [] and store.load("a").tokens == 300


def test_chapters_of_a_version_that_noted_less_are_named_and_dropped(store):
    store.add(Fake(), text_of(0), "old")
    store.add(Fake(), text_of(1), "new")
    about = {k: v for k, v in store.entry("old").about.items() if k != "polish"}
    with sqlite3.connect(store.folder / "catalogue.sqlite") as db:
        db.execute("UPDATE entries SET about = ? WHERE id = ?", (json.dumps(about), store.entry("old").entry))
    assert {name for bad in store.verify(drop=True) for name in bad["names"]} == {"old"}
    assert [e.name for e in store.entries()] == ["new"] and store.verify() == []


def test_what_is_out_of_reach_is_not_taken_for_damage(store, monkeypatch):
    store.add(Fake(), text_of(0), "a")
    store.add(Fake(), text_of(1), "b")
    (store.folder / "blobs").rename(store.folder / "unmounted")
    unreachable(store)
    (store.folder / "unmounted").rename(store.folder / "blobs")
    with monkeypatch.context() as down:
        down.setattr("builtins.open", lambda path, *a, real=open, **kw: broken() if "blobs/" in str(path) else real(path, *a, **kw))
        unreachable(store)
    with monkeypatch.context() as down:
        down.setattr("icae.slots.safe_open", broken)
        unreachable(store)
    damage(store, store.catalogue.parts(store.entry("b").entry)[0])
    with monkeypatch.context() as down:  # goes down on the way
        read, last = store.blobs.read, store.catalogue.blobs()[-1].key
        down.setattr(store.blobs, "read", lambda key: (_ for _ in ()).throw(StorageError("down")) if key == last else read(key))
        unreachable(store)
    assert len(store.entries()) == 2
    for data in (b"", b"no slots"):
        key = store.catalogue.parts(store.entry("a").entry)[0]
        (store.folder / "blobs" / key[:2] / f"{key}.safetensors").write_bytes(data)
        assert {name for bad in store.verify() for name in bad["names"]} == {"a", "b"}
    store.blobs.remove(key)
    assert len(store.verify(drop=True)) == 2 and store.entries() == []


def unreachable(store):
    with pytest.raises(StorageError) as error:
        store.verify(drop=True)
    assert "--drop" not in str(error.value)
    one_line(error.value)
    assert len(store.entries()) == 2


def test_a_remote_place_that_is_down_is_not_taken_for_damage(tmp_path, monkeypatch):
    store = SlotStore(tmp_path, blobs="memory://out-of-reach")
    for i, name in enumerate("ab"):
        store.add(Fake(), text_of(i), name)
    with monkeypatch.context() as down:
        for method in ("get_file", "info", "find", "rm_file", "put_file"):
            down.setattr(f"fsspec.implementations.memory.MemoryFileSystem.{method}", broken)
        unreachable(store)
        asks_in_vain(store)
    store.blobs.remove(store.catalogue.blobs()[0].key)
    assert len(store.verify(drop=True)) == 1


def test_a_folder_out_of_reach_is_one_line(store, monkeypatch):
    store.add(Fake(), text_of(0), "a")
    for path in store.folder.rglob("*.safetensors"):
        os.utime(path, (0, 0))
    for method in ("stat", "unlink", "mkdir"):
        monkeypatch.setattr(f"pathlib.Path.{method}", broken)
    asks_in_vain(store)


def asks_in_vain(store):
    key = store.catalogue.blobs()[0].key
    for ask in (
        lambda: store.blobs.remove(key),
        lambda: store.blobs.missing([key]),
        lambda: list(store.blobs.old(-60)),
        lambda: store.add(Fake(), text_of(5), "c"),
    ):
        with pytest.raises(StorageError) as error:
            ask()
        one_line(error.value, "the disk does not answer")


def test_a_blob_under_another_key_is_found_out(store):
    store.add(Fake(), text_of(0), "a")
    one, two = store.catalogue.parts(store.entry("a").entry)[:2]
    folder = store.folder / "blobs"
    (folder / one[:2] / f"{one}.safetensors").write_bytes((folder / two[:2] / f"{two}.safetensors").read_bytes())
    assert [bad["key"] for bad in store.verify()] == [one]


def test_a_missing_blob_is_made_anew_when_its_text_is_added(store):
    fake = Fake()
    store.add(fake, text_of(0), "a")
    key = store.catalogue.parts(store.entry("a").entry)[0]
    store.blobs.remove(key)
    assert store.add(fake, text_of(0), "b").fresh == 1
    assert store.load("a").tokens == 300


def test_a_blob_removed_between_looking_and_listing_is_written_again(store):
    fake = Fake()
    store.add(fake, text_of(0), "a")
    steps = store.adding(fake, [ord(c) for c in text_of(0) + text_of(1)], "b")
    next(steps)
    store.remove("a")
    for _ in steps:
        pass
    assert store.load("b").tokens == 600 and store.verify() == []


def test_a_store_of_another_version_is_refused(store):
    with sqlite3.connect(store.folder / "catalogue.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ICAEError) as error:
        SlotStore(store.folder)
    one_line(error.value, "99")


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "catalogue.sqlite").write_text("no database " * 100)
    with pytest.raises(ICAEError) as error:
        SlotStore(tmp_path)
    one_line(error.value, "no store")


# ---- sizes ----


def test_gc_drops_what_was_used_longest_ago(store, monkeypatch):
    monkeypatch.setattr("icae.catalogue.USED_GRAIN", 0)
    fake = Fake()
    for i in range(4):
        store.add(fake, text_of(i), f"t{i}")
    store.load("t0")
    size = store.entry("t0").bytes
    done = store.gc(2 * size + size // 2)
    assert done["removed"] == ["t1", "t2"] and [e.name for e in store.entries()] == ["t0", "t3"]
    assert done["bytes"] == sum(p.stat().st_size for p in (store.folder / "blobs").rglob("*.safetensors"))
    assert store.gc(0)["bytes"] == 0 and blob_files(store) == []


def test_gc_clears_what_dead_writers_left_but_not_what_is_being_written(store):
    store.add(Fake(), text_of(0), "a")
    kept, folder = blob_files(store), store.folder / "blobs" / "ab"
    folder.mkdir(exist_ok=True)
    names = ["ab" + "0" * 62 + ".safetensors", "." + "ab" + "1" * 62 + ".safetensors." + "1f" * 8]
    for name in names:
        (folder / name).write_bytes(b"left")
    store.gc()
    assert all((folder / name).exists() for name in names)
    for name in names:
        os.utime(folder / name, (time.time() - 7200,) * 2)
    store.gc()
    assert not any((folder / name).exists() for name in names) and blob_files(store) == kept


@pytest.mark.parametrize("remote", [False, True])
def test_in_a_place_of_the_user_s_own_no_other_file_is_touched(tmp_path, remote):
    place = tmp_path / "mine"
    store = SlotStore(tmp_path / "store", blobs=f"file://{place}" if remote else str(place))
    (place / "ab" / ("b" * 64 + ".safetensors")).mkdir(parents=True)
    key = "ab" + "0" * 62
    for name in ("notes.txt", key, key + ".zip", "." + key + ".safetensors.x1y2", "thesis.part", key + ".safetensors.old"):
        (place / "ab" / name).write_text("mine")
    left = f"{key}.safetensors.17.part" if remote else f".{key}.safetensors.{'0f' * 8}"
    (place / "ab" / left).write_text("half")
    before = {p.name for p in place.rglob("*")}
    for path in place.rglob("*"):
        os.utime(path, (1, 1))
    assert store.gc()["files"] == 0 and {p.name for p in place.rglob("*")} == before - {left}


def test_one_place_is_one_store_s(tmp_path):
    for i, place in enumerate((str(tmp_path / "slots"), "memory://of-one-store")):
        mine = SlotStore(tmp_path / f"mine{i}", blobs=place)
        mine.add(Fake(), text_of(0), "a")
        assert SlotStore(mine.folder, blobs=place).load("a").tokens == 300
        theirs = tmp_path / f"theirs{i}"
        for _ in range(2):
            with pytest.raises(ICAEError) as error:
                SlotStore(theirs, blobs=place)
            one_line(error.value, "another store", place[-8:], "delete store-id")
        SlotStore(theirs).gc()  # has its slots beside it, since it was refused the place
        assert mine.verify() == []
    assert not (SlotStore(tmp_path / "plain").folder / "blobs" / "store-id").exists()


def test_a_place_that_is_down_keeps_nobody_from_listing(tmp_path, monkeypatch):
    SlotStore(tmp_path, blobs="memory://down").add(Fake(), text_of(0), "a")
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", broken)
    assert [e.name for e in SlotStore(tmp_path).entries()] == ["a"]


def test_files_are_deleted_a_few_at_a_time(store):
    """So that whoever waits to write is let in between; one failure on the way forgets nothing."""
    keys = [f"{n:064x}" for n in range(AT_ONCE + 3)]
    with closing(sqlite3.connect(store.catalogue.path)) as db, db:
        db.executemany("INSERT INTO trash VALUES (?)", [(key,) for key in keys])
    gone: list[str] = []

    def remove(key: str) -> None:
        if len(gone) == AT_ONCE + 1 and failing:
            raise OSError("the network is down")
        gone.append(key)

    failing = True
    with pytest.raises(OSError, match="network"):
        store.catalogue.sweep(remove)
    done, failing = len(gone), False
    assert done == AT_ONCE + 1 and store.catalogue.sweep(remove) == 3
    assert gone[:AT_ONCE] + gone[AT_ONCE + 1 :] == sorted(keys) and store.catalogue.sweep(remove) == 0


def test_listed_files_that_are_old_cost_no_transaction(store, monkeypatch):
    store.add(Fake(), text_of(0, 3000), "a")
    keys, begun, writing = blob_files(store), [], Catalogue._writing
    monkeypatch.setattr(Catalogue, "_writing", lambda self, wait=None: begun.append(wait) or writing(self, wait))
    assert store.catalogue.sweep(store.blobs.remove, keys) == 0 and begun == []
    assert store.catalogue.sweep(store.blobs.remove, [*keys, "0" * 64]) == 1 and len(begun) == 1
    assert store.verify() == []


@pytest.mark.parametrize("dtype, size, error", [("float32", 4, 0), ("float16", 2, 1e-3), ("bfloat16", 2, 1e-2), ("int8", 1, 1e-2)])
def test_dtypes_cost_what_they_say(dtype, size, error):
    slots = finished(Fake().compressing([list(range(40, 80))], ratio=1))[0]
    slots = MemorySlots({"embeddings": torch.randn(40, 256)}, slots.positions, slots.segments, slots.origin)
    packed = pack(slots, list(range(40, 80)), dtype)
    assert packed.tensors["embeddings"].element_size() == size
    back, ids = unpack(packed)
    assert ids == list(range(40, 80)) and back.tensors.keys() == slots.tensors.keys()
    scale = slots.tensors["embeddings"].abs().amax()
    assert (back.tensors["embeddings"].float() - slots.tensors["embeddings"]).abs().max() <= error * scale


def test_int8_rounds_to_half_a_step_of_its_channel():
    values = torch.randn(50, 8) * torch.logspace(-3, 3, 8)
    slots = MemorySlots({"embeddings": values}, torch.arange(50), (Segment(50, 50, 50),), Fake().origin)
    packed = pack(slots, [1] * 50, "int8")
    assert packed.tensors["embeddings"].dtype == torch.int8 and packed.tensors["embeddings.scale"].shape == (1, 8)
    step = values.abs().amax(0) / 127
    assert ((packed.tensors["embeddings"] * packed.tensors["embeddings.scale"] - values).abs() <= 0.5001 * step).all()


def test_numbers_too_large_for_a_dtype_are_refused():
    slots = MemorySlots({"embeddings": torch.full((1, 2), 1e5)}, torch.arange(1), (Segment(2, 1, 2),), Fake().origin)
    with pytest.raises(ICAEError) as error:
        pack(slots, [1, 2], "float16")
    one_line(error.value, "bfloat16")
    assert unpack(pack(slots, [1, 2], "bfloat16"))[0].count == 1


# ---- other places ----


def test_blobs_behind_an_fsspec_url(tmp_path):
    store = SlotStore(tmp_path, blobs="memory://slots")
    store.add(Fake(), text_of(0), "a")
    assert not (tmp_path / "blobs").exists()
    again = SlotStore(tmp_path)
    assert again.load("a").tokens == 300 and again.verify() == []
    assert list(again.blobs.old(-60)) and not list(again.blobs.old(60))
    again.remove("a")
    assert list(again.blobs.old(-60)) == []
    with pytest.raises(ICAEError) as error:
        SlotStore(tmp_path, blobs="memory://elsewhere")
    one_line(error.value, "memory://slots", "memory://elsewhere")
    with pytest.raises(ICAEError) as error:
        open_blobs("nosuchscheme://x")
    one_line(error.value, "nosuchscheme")


def test_export_and_import_carry_contexts(store, tmp_path):
    fake = Fake()
    for i in range(3):
        store.add(fake, text_of(i), f"t{i}", source=f"s{i}")
    store.add(fake, text_of(0), "same")
    assert archive.export(store, tmp_path / "all.zip") == 4
    other = SlotStore(tmp_path / "other")
    other.add(fake, text_of(1), "mine")
    assert archive.import_(other, tmp_path / "all.zip") == ["same", "t0", "t1", "t2"]
    for e in store.entries():
        got = other.entry(e.name)
        assert (got.entry, got.source, got.about) == (e.entry, e.source, e.about)
        assert torch.equal(other.load(e.name).tensors["embeddings"], store.load(e.name).tensors["embeddings"])
    assert other.verify() == [] and other.add(fake, text_of(2), "t2").fresh == 0


@pytest.mark.parametrize("name", ["x.zip", "x.safetensors"])
def test_nothing_but_an_export_is_written_over(store, tmp_path, name):
    store.add(Fake(), text_of(0), "a")
    (path := tmp_path / name).write_text("of another kind")
    at = ["--store", store.folder]
    one_line(run("export", path, "a", *at), name, "another file")
    assert path.read_text() == "of another kind"
    for before in (b"", None):  # an empty file, then what was exported
        path.write_bytes(before) if before is not None else None
        assert "1 contexts" in run("export", path, "a", *at)


def rewrite(path, change):
    """Write an archive anew with `change(name, bytes) -> bytes`."""
    with zipfile.ZipFile(path) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)


def test_archives_that_lie_are_refused(store, tmp_path):
    store.add(Fake(), text_of(0), "a")
    path = tmp_path / "a.zip"
    keys = store.catalogue.parts(store.entry("a").entry)

    def lie(change):
        archive.export(store, path)
        rewrite(path, change)
        with pytest.raises(ICAEError) as error:
            archive.import_(SlotStore(tmp_path / "other"), path)
        one_line(error.value, "a.zip", "export it again")
        assert SlotStore(tmp_path / "other").entries() == []

    lie(lambda name, data: data.replace(keys[0].encode(), b"../../../../etc/x".ljust(64, b"x")) if name.endswith("json") else data)
    lie(lambda name, data: data.replace(b"float16", b"float32") if name.endswith("json") else data)
    lie(lambda name, data: json.dumps([1]).encode() if name.endswith("json") else data)
    lie(lambda name, data: data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("safetensors") else data)
    with zipfile.ZipFile(path) as file:
        other = file.read(f"blobs/{keys[1]}.safetensors")
    lie(lambda name, data: other if keys[0] in name else data)
    lie(lambda name, data: data.replace(b'"name": "a"', b'"name": "a\\u001b]0;x"') if name.endswith("json") else data)
    lie(lambda name, data: data.replace(b'"dtype"', b'"type"') if name.endswith("json") else data)
    archive.export(store, path)
    rewrite(path, lambda name, data: data.replace(b"float16", b"float32").replace(b'"a"', b'"b"') if name.endswith("json") else data)
    with pytest.raises(ICAEError):
        archive.import_(store, path)  # where the blobs are known already
    assert [e.name for e in store.entries()] == ["a"]
    archive.export(store, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    packed = bytearray((tmp_path / "b.zip").read_bytes())
    encrypted = bytearray(path.read_bytes())
    for at in (m.start() for m in re.finditer(b"PK\x03\x04", encrypted)):
        encrypted[at + 6] |= 1
    for at in (m.start() for m in re.finditer(b"PK\x01\x02", encrypted)):
        encrypted[at + 8] |= 1
    begin = packed.index(b".safetensors") + 40
    packed[begin : begin + 400] = b"\xff" * 400
    for bad in (packed, encrypted):
        path.write_bytes(bad)
        with pytest.raises(ICAEError) as error:
            archive.import_(SlotStore(tmp_path / "other"), path)
        one_line(error.value, "a.zip", "export it again")
    path.write_bytes(b"PK no zip")
    with pytest.raises(ICAEError):
        archive.import_(store, path)


# ---- several processes ----

FORK = multiprocessing.get_context("fork")


def write_until_killed(folder, log, seed, started):
    """Add, replace, remove and collect for ever; every finished deed goes to the log."""
    chance, fake, store = random.Random(seed), Fake(16), SlotStore(folder)
    done = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    started.set()
    shared = text_of(0, 80)
    for i in range(10_000):
        name = f"{seed}-{i}"
        store.add(fake, shared + text_of(seed * 10_000 + i, 100), name)
        os.write(done, f"+{name}\n".encode())
        if i and chance.random() < 0.4:
            victim = f"{seed}-{i - 1}"
            os.write(done, f"?{victim}\n".encode())
            store.remove(victim)
            os.write(done, f"-{victim}\n".encode())
        if chance.random() < 0.1:
            store.gc()


def states(log):
    """What the log says of each name: listed (+), being removed (?), removed (-)."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {line[1:]: line[0] for line in lines}


def test_kill_9_at_any_moment_loses_nothing_and_lists_nothing_unfinished(tmp_path):
    torch.set_num_threads(1)
    chance, folder, log, checked = random.Random(0), tmp_path / "store", tmp_path / "log", set()
    for kill in range(0, 200, 2):
        started = FORK.Event()
        writers = [FORK.Process(target=write_until_killed, args=(folder, log, kill + i, started)) for i in range(2)]
        for writer in writers:
            writer.start()
        if kill % 20:  # every tenth pair is killed while it opens the store
            started.wait(10)
        for writer in writers:
            time.sleep(chance.uniform(0, 0.05))
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        store = SlotStore(folder)
        listed = {e.name for e in store.entries()}
        said = states(log)
        assert {name for name, state in said.items() if state == "+"} <= listed
        assert not {name for name, state in said.items() if state == "-"} & listed
        for name in listed - checked:
            assert store.load(name).tokens == 180
        checked |= listed
    assert len(states(log)) > 30  # the writers did write
    assert store.verify() == []
    for key in store.blobs.old(-60):  # what dead writers left is cleared away once it is old
        os.utime(folder / "blobs" / key[:2] / f"{key}.safetensors", (0, 0))
    store.gc()
    assert set(blob_files(store)) == {b.key for b in store.catalogue.blobs()}
    assert store.verify() == []


def write_some(folder, seed):
    fake, store = Fake(), SlotStore(folder)
    for i in range(8):
        store.add(fake, text_of(i, 200), f"same-{i}")
        store.add(fake, text_of(0, 100) + text_of(seed * 100 + i, 100), f"own-{seed}-{i}")
        store.remove(f"own-{seed}-{i}") if i % 2 else store.load(f"own-{seed}-{i}")
        store.gc()


def test_writers_and_readers_in_several_processes(tmp_path):
    writers = [FORK.Process(target=write_some, args=(tmp_path, seed)) for seed in range(4)]
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        store = SlotStore(tmp_path)
        for e in store.entries():
            if e.name.startswith("same"):
                assert store.load(e.name).tokens == 200
    assert [w.exitcode for w in writers] == [0] * 4
    assert len(store.entries()) == 8 + 4 * 4 and store.verify() == []
    assert set(blob_files(store)) == {b.key for b in store.catalogue.blobs()}


# ---- command line ----


@pytest.fixture
def checkpoint(base, base_folder, tmp_path):
    folder = tmp_path / "checkpoint"
    make_icae(base, stirred=0.05).save_pretrained(folder)
    return folder


def run(*arguments, code=0, **kw):
    result = CliRunner().invoke(app, [str(a) for a in arguments], **kw)
    if isinstance(result.exception, ICAEError):
        return result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_the_commands(checkpoint, tmp_path):
    texts, at = tmp_path / "texts", ["--store", tmp_path / "store", "--json"]
    (texts / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.txt", "deep/b.md"]):
        (texts / name).write_text(" ".join(LINES[i:]) * 3)
    (texts / "c.bin").write_bytes(b"\0")
    one_line(run("ls", *at), "no store", "icae store add")
    rows = json.loads(run("add", texts, "--model", checkpoint, *at))
    a, b = (str(texts / n) for n in ("a.txt", "deep/b.md"))
    assert [r["name"] for r in rows] == [a, b] and rows[0]["fresh"] > 0
    assert [r["fresh"] for r in json.loads(run("add", texts, "--model", checkpoint, *at))] == [0, 0]
    (row,) = json.loads(run("add", "-", "--name", "piped", "--model", checkpoint, *at, input=" ".join(LINES) * 3))
    assert row["name"] == "piped" and row["fresh"] == 0
    assert [r["name"] for r in json.loads(run("ls", *at))] == sorted([a, b, "piped"])
    store = SlotStore(at[1])
    store.add(Fake(), text_of(3), "report[final].txt"), store.add(Fake(), text_of(3), "a[/b].txt")
    assert "report[final].txt" in run("ls", *at[:2]) and "a[/b].txt" in run("ls", *at[:2])
    store.remove("report[final].txt"), store.remove("a[/b].txt")
    assert "piped" in run("ls", *at[:2]) and "fingerprint" in run("show", "piped", *at[:2])
    assert json.loads(run("show", "piped", *at))["about"]["kind"] == "kv"
    assert json.loads(run("verify", *at)) == {"damaged": [], "dropped": False}
    assert json.loads(run("export", tmp_path / "x.zip", *at))["contexts"] == 3
    assert json.loads(run("export", tmp_path / "x.safetensors", "piped", *at))["contexts"] == 1
    assert MemorySlots.load(tmp_path / "x.safetensors").tokens == row["tokens"]
    assert json.loads(run("rm", "piped", b, *at))["removed"] == ["piped", b]
    one_line(run("show", "piped", *at), "piped")
    assert len(json.loads(run("import", tmp_path / "x.zip", *at))["imported"]) == 3
    damage(SlotStore(tmp_path / "store"), SlotStore(tmp_path / "store").catalogue.parts(row["entry"])[0])
    assert len(json.loads(run("verify", *at, code=1))["damaged"]) == 1
    assert json.loads(run("verify", "--drop", *at))["dropped"]
    assert json.loads(run("gc", "--max-bytes", "0", *at))["bytes"] == 0


def test_the_commands_reach_the_contexts_of_a_key(checkpoint, tmp_path):
    at = ["--store", tmp_path / "store", "--json"]
    (tmp_path / "a.txt").write_text(" ".join(LINES))
    run("add", tmp_path / "a.txt", "--name", "mine", "--key", "ada", "--model", checkpoint, *at)
    assert [e.namespace for e in SlotStore(tmp_path / "store").entries(None)] == [namespace_of("ada")]
    assert json.loads(run("ls", *at)) == [] and [r["name"] for r in json.loads(run("ls", "--key", "ada", *at))] == ["mine"]
    one_line(run("show", "mine", *at), "mine")
    one_line(run("show", "yours", "--key", "ada", *at), "yours", "icae store ls --key ada")
    one_line(run("add", tmp_path / "a.txt", "--key", "icae_secret", *at), "not the key itself")
    warned = CliRunner().invoke(app, [str(a) for a in ["import", tmp_path / "none.zip", "--key", "ada", *at]])
    assert "icae serve --add-key ada" in warned.stderr
    Keyring(tmp_path / "store" / KEYS).add("ada")
    assert "add-key" not in CliRunner().invoke(app, [str(a) for a in ["import", tmp_path / "none.zip", "--key", "ada", *at]]).stderr
    assert json.loads(run("show", "mine", "--key", "ada", *at))["name"] == "mine"
    assert json.loads(run("export", tmp_path / "x.zip", "--key", "ada", *at))["contexts"] == 1
    assert json.loads(run("import", tmp_path / "x.zip", "--key", "bob", *at))["imported"] == ["mine"]
    one_line(run("rm", "mine", *at), "mine")
    run("rm", "mine", "--key", "ada", *at)
    assert [e.namespace for e in SlotStore(tmp_path / "store").entries(None)] == [namespace_of("bob")]


def test_a_writer_lets_other_work_go_on_while_another_process_holds_the_lock(store):
    held = sqlite3.connect(store.catalogue.path, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    steps, waited = store.adding(Fake(), [1, 2, 3, 4, 5], "a"), 0
    for _ in steps:
        waited += 1
        if waited == 4:
            held.rollback()
    assert waited >= 4 and [e.name for e in store.entries()] == ["a"]
    held.execute("BEGIN IMMEDIATE")
    store.catalogue.wait = 0.1
    with pytest.raises(StorageError, match="another process holds"):
        store.add(Fake(), "others", "b")
    assert [e.name for e in store.entries()] == ["a"] and store.catalogue.setting("blobs", "x") == "blobs"  # reading needs no lock
    held.close()


def test_a_damaged_catalogue_is_one_line(tmp_path):
    path = tmp_path / "catalogue.sqlite"
    Catalogue(path)
    data = bytearray(path.read_bytes())
    data[4096:] = b"x" * (len(data) - 4096)
    path.write_bytes(data)
    one_line(run("ls", "--store", tmp_path), "catalogue.sqlite")


def test_what_would_take_too_much_changes_nothing(store):
    kept = store.add(Fake(), "a small one", "a").entry
    with pytest.raises(ICAEError, match="store_bytes"):
        finished(store.adding(Fake(), list(range(300)), "a", most=kept.bytes))
    assert store.entries() == [store.entry("a")] and store.entry("a").id == kept.id and len(blob_files(store)) == 1


def test_what_is_no_text_in_a_folder_is_told_and_left_out(checkpoint, tmp_path):
    texts, at = tmp_path / "texts", ["--model", checkpoint, "--store", tmp_path / "store"]
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"\xff\xfe\xff")
    (texts / "b.txt").write_text(" \n")
    (texts / "c.txt").write_text("a")
    (texts / "c\n.txt").write_text(" ".join(LINES))
    one_line(run("add", texts, *at), "nothing in", "texts")
    (texts / "d.txt").write_text(" ".join(LINES))
    result = CliRunner().invoke(app, [str(a) for a in ["add", texts, *at]])
    assert result.exit_code == 0 and [e.name for e in SlotStore(tmp_path / "store").entries()] == [str(texts / "d.txt")]
    for name, why in (("a.txt", "UTF-8"), ("b.txt", "is empty"), ("c.txt", "two tokens"), ("c\\n.txt", "printable")):
        assert any(name in line and why in line and "left out" in line for line in result.stderr.splitlines())
    one_line(run("add", texts / "a.txt", *at), "UTF-8")  # named itself, it is a mistake


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["add", "nosuch.txt"], "nosuch.txt"),
        (["add", "."], "no texts"),
        (["add", ""], "a source is empty"),
        (["rm", "x"], "no context 'x'"),
        (["gc", "--max-bytes", "-1"], "max_bytes"),
        (["import", "nosuch.zip"], "nosuch.zip"),
        (["export", "x.safetensors"], "one context"),
        (["export", "notes.txt"], "must end in .zip"),
    ],
)
def test_mistakes_are_one_line(store, arguments, part, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    one_line(run(*arguments, "--store", store.folder), part)
