import pytest
from tiny import make_icae, random_ids

from icae.blobs import pack, unpack
from icae.refine import TOLERANCE, Plan, Search, _reordered, refine, tolerance
from icae.slots import MemorySlots

N = 23


def case(base, ratio=4, **settings):
    """Return (encoder, slots of a text, the text)."""
    model = make_icae(base, ratio=ratio, stirred=0.1, segment_length=24, **settings).eval()
    (ids,) = random_ids(N)
    (slots,) = model.compress_segments([ids])
    return model.encoder, slots, ids


def knowing(ids):
    """A decoder whose last choice at every place is the right one."""
    return lambda found, count: [[*range(30, 29 + count), right] for right in ids]


def fail(found, count):
    raise AssertionError("asked the decoder")


def test_what_is_right_is_left_alone(base, kind):
    encoder, slots, ids = case(base, kind=kind)
    found, mismatch = refine(encoder, slots, ids, fail)
    assert found == ids and mismatch < 1e-6


@pytest.mark.parametrize("ratio", [1, 4, 8])
@pytest.mark.parametrize("at", [1, 9, 22])
def test_a_wrong_token_is_put_right(base, kind, ratio, at):
    encoder, slots, ids = case(base, ratio, kind=kind)
    wrong = [*ids[:at], 40, *ids[at + 1 :]]
    found, mismatch = refine(encoder, slots, wrong, knowing(ids))
    assert found == ids and mismatch < TOLERANCE


def test_an_order_is_put_right(base, kind):
    encoder, slots, ids = case(base, kind=kind)
    swapped = [*ids]
    swapped[17], swapped[18] = ids[18], ids[17]
    assert refine(encoder, slots, swapped, fail, Plan((4,), (Search(None, 6, True),)))[0] == ids


def test_tokens_in_each_other_s_blocks_are_exchanged(base):
    encoder, slots, ids = case(base, kind="kv")
    swapped = [*ids]
    swapped[15], swapped[16] = ids[16], ids[15]
    assert refine(encoder, slots, swapped, lambda found, count: [[]] * N)[0] == ids


def test_tokens_that_are_missing_at_the_end_come_back(base):
    encoder, slots, ids = case(base)
    assert refine(encoder, slots, ids[:-2], knowing(ids))[0] == ids


@pytest.mark.parametrize("readout", ["memory", "residual"])
@pytest.mark.parametrize("at", [1, 9, 22])
def test_slots_read_off_the_memory_token_are_put_right_without_the_llm(base, readout, at):
    encoder, slots, ids = case(base, kind="embedding", memory="mixed", readout=readout)
    wrong = [*ids[:at], 40, *ids[at + 1 :]]
    found, mismatch = refine(encoder, slots, wrong, knowing(ids))
    assert found == ids and mismatch < TOLERANCE


def test_what_cannot_be_found_is_said(base):
    encoder, slots, ids = case(base)
    wrong = [*ids]
    wrong[5] = 44
    found, mismatch = refine(encoder, slots, wrong, lambda found, count: [[]] * N)
    assert found != ids and mismatch > TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounding_does_not_hide_the_right_text(base, dtype):
    encoder, slots, ids = case(base)
    kept, _ = unpack(pack(slots, ids, dtype))
    assert 0 < refine(encoder, kept, ids, fail)[1] < TOLERANCE / 5


def test_the_text_of_several_segments_is_put_right_segment_by_segment(base, monkeypatch):
    model = make_icae(base, stirred=0.1, segment_length=12).eval()
    (ids,) = random_ids(30)
    (slots,) = model.compress_ids([ids])
    read = [ids[:8], ids[8:20], ids[20:]]
    assert [len(row) for row in read] == [part.tokens for part in slots.split()]
    read[0], read[2] = read[0][:-1], [*read[2][:5], 41, *read[2][6:]]  # the first ended early
    ticks = []
    monkeypatch.setattr(model.reader, "choices", lambda part, found, count: [[*ids]] * len(found))
    (refined,) = model.refine_ids([slots], [read], progress=lambda *at: ticks.append(at))
    assert refined.ids == ids and refined.verified and len(refined.mismatches) == 3
    assert ticks == [(1, 3), (2, 3), (3, 3)]


def test_reconstruct_refines_kv_slots_unless_told_not_to(base, monkeypatch):
    model = make_icae(base, kind="kv", stirred=0.1, segment_length=24)
    (ids,) = random_ids(N)
    (slots,) = model.compress_ids([ids])
    monkeypatch.setattr(model, "read_segments", lambda slots, batch_size: [[ids[1:2] + ids[:1] + ids[2:]]])
    assert model.reconstruct(slots) == model.base.decode(ids)
    assert model.reconstruct(slots, refine=False) != model.base.decode(ids)
    assert not make_icae(base, kind="embedding").refines()
    assert make_icae(base, kind="embedding", memory="mixed", readout="residual").refines()


def test_slots_of_several_ratios_and_polish_are_put_right_each_by_its_own(base, tmp_path):
    model = make_icae(base, kind="kv", stirred=0.1, segment_length=24).eval()
    how, texts = [(4, 0), (8, 0), (4, 1), (4, 0)], [*random_ids(16), *random_ids(4), *random_ids(16), *random_ids(12)]
    alone = [model.compress_ids([ids], ratio=r, polish=p)[0] for ids, (r, p) in zip(texts, how, strict=True)]
    inner = MemorySlots.concatenate(alone[1:3])
    MemorySlots.concatenate([alone[0], inner, alone[3]]).save(tmp_path / "mixed.safetensors")
    both = MemorySlots.load(tmp_path / "mixed.safetensors")
    assert [(part.origin.ratio, part.origin.polish) for part in both.split()] == how
    assert [(s.ratio, s.polish) for s in both.segments] == [(None, None), (8, None), (None, 1), (None, None)]
    wrong = texts[3][1::-1] + texts[3][2:]
    (refined,) = model.refine_ids([both], [[*texts[:3], wrong]])
    assert refined.ids == [i for ids in texts for i in ids] and refined.verified
    assert refined.tolerances == [tolerance(part) for part in alone] and len(set(refined.tolerances)) == 2


def test_long_blocks_are_reordered_by_one_move_or_one_exchange():
    assert len(_reordered((1, 2, 3, 4))) == 24
    orders = _reordered((1, 2, 3, 4, 5))
    assert (2, 3, 4, 5, 1) in orders and (5, 2, 3, 4, 1) in orders and (2, 1, 4, 3, 5) not in orders
    assert all(sorted(order) == [1, 2, 3, 4, 5] for order in orders)
