import pytest
import torch
from tiny import make_icae, random_ids

from icae.probe import Change, Probe

N, RATIO = 22, 4


def probe(model, ids, wanted, depth=None):
    return Probe(model.eval().encoder, ids, wanted.tensors, RATIO, depth)


@pytest.mark.parametrize("memory", ["pooled", "shared", "learned"])
def test_the_text_itself_has_no_distance_and_another_has(base, kind, layout, memory):
    model = make_icae(base, kind=kind, layout=layout, memory=memory, stirred=0.1, segment_length=N + 2)
    (ids, other) = random_ids(N, N)
    (slots,) = model.compress_segments([ids])
    assert probe(model, ids, slots).distances.max() < 1e-9
    assert probe(model, other, slots).distances.min() > 1e-4


@pytest.mark.parametrize("memory", ["pooled", "shared", "learned"])
def test_of_two_layers_keys_a_change_that_reaches_to_the_end_is_told_exactly(base, layout, memory):
    model = make_icae(base, kind="kv", layout=layout, memory=memory, stirred=0.1, segment_length=N + 2)
    (ids, other, third) = random_ids(N, N, N)
    (slots,) = model.compress_segments([ids])
    here = probe(model, other, slots)
    changes = [Change(block, tuple(third[block * RATIO :])) for block in range(6)]
    told = here.ask(changes)
    for change, distance in zip(changes, told, strict=True):
        there = probe(model, other[: change.block * RATIO] + third[change.block * RATIO :], slots)
        torch.testing.assert_close(distance, there.distances[change.block], atol=1e-6, rtol=1e-4)


def test_the_right_block_is_told_from_wrong_ones_though_later_tokens_are_stale(base, kind):
    model = make_icae(base, kind=kind, stirred=0.1, segment_length=N + 2)
    (ids, other) = random_ids(N, N)
    (slots,) = model.compress_segments([ids])
    wrong = ids[:8] + other[8:12] + ids[12:]
    right, worse = probe(model, wrong, slots).ask([Change(2, tuple(ids[8:12])), Change(2, tuple(other[12:16]))])
    assert right < 0.1 * worse


def test_fewer_layers_compare_fewer_layers(base):
    model = make_icae(base, kind="kv", stirred=0.1, segment_length=N + 2)
    (ids, other) = random_ids(N, N)
    (slots,) = model.compress_segments([ids])
    first = probe(model, other, slots, depth=1)
    assert len(first.layers.layers) == 1 and len(model.encoder.peft.get_base_model().get_decoder().layers) == 2
    assert first.distances.shape == (6,) and not torch.equal(first.distances, probe(model, other, slots).distances)


def test_nothing_asked_is_nothing_told(base):
    model = make_icae(base, kind="kv", segment_length=N + 2)
    (ids,) = random_ids(N)
    (slots,) = model.compress_segments([ids])
    assert probe(model, ids, slots).ask([]).shape == (0,)
