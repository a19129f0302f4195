import pytest
import torch
from tiny import make_icae, random_ids

from icae import polish as room
from icae.config import POLISH_RATES
from icae.errors import ICAEError
from icae.objectives import Example, Marker
from icae.polish import polishing
from icae.refine import POLISHED, TOLERANCE
from icae.stepwise import finished


def losses(model, slots, texts):
    """Of reading each text back from its slots."""
    return [float(s.nll.mean()) for s in model.score(slots, [Example([], Marker.AE, [], ids) for ids in texts])]


@pytest.fixture
def model(base, kind):
    return make_icae(base, kind=kind, stirred=0.05)


def test_each_step_lowers_the_loss_of_every_text_and_changes_slots_alone(model):
    texts = random_ids(16, 9, 12, 2, 1)
    before = {name: t.clone() for name, t in [*model.named_parameters(), *model.base.model.named_parameters()]}
    found = [losses(model, model.compress_segments(texts, polish=steps), texts) for steps in (0, 1, 3)]
    assert all(a > b > c for a, b, c in zip(*found, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in [*model.named_parameters(), *model.base.model.named_parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_families_polish(family_base):
    for kind in ("kv", "embedding"):
        model, texts = make_icae(family_base, kind=kind, stirred=0.05), random_ids(16, 11)
        plain, better = (losses(model, model.compress_segments(texts, polish=steps), texts) for steps in (0, 1))
        assert all(a > b for a, b in zip(plain, better, strict=True))


def test_slots_keep_their_form_and_tell_their_steps(model):
    (ids,) = random_ids(40)
    plain, done = (model.compress_ids([ids], polish=steps)[0] for steps in (0, 2))
    assert plain.origin.polish == 0 and done.origin.polish == 2 and torch.equal(done.positions, plain.positions)
    for name, tensor in plain.tensors.items():
        assert done.tensors[name].shape == tensor.shape and done.tensors[name].dtype == tensor.dtype
    assert finished(polishing(model.reader, [plain], [ids], 0)) == [plain]
    half = plain.split()[0].to(torch.float16)
    assert {t.dtype for t in finished(polishing(model.reader, [half], [ids[: half.tokens]], 1))[0].tensors.values()} == {torch.float16}


def test_other_work_may_go_between_its_steps(model):
    texts, others = random_ids(16, 9, 12), random_ids(11, 14)
    expected = [*model.compress_segments(texts, polish=2, batch_size=1), *model.compress_segments(others, polish=2, batch_size=1)]
    works, said, made = [model.compressing(rows, polish=2, batch_size=1) for rows in (texts, others)], [], {}
    while len(made) < 2:
        for n, work in enumerate(works):
            if n not in made:
                try:
                    said.append((n, next(work)))
                except StopIteration as end:
                    made[n] = end.value
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                with torch.inference_mode():  # as the server's steps are
                    model.score([expected[0]], [Example([], Marker.AE, [], texts[0])])
    assert [done for n, done in said if n == 0] == [0, 0, 1, 1, 1, 2, 2, 2, 3]  # each segment: written, a step, another
    for slots, same in zip([*made[0], *made[1]], expected, strict=True):
        assert all(torch.equal(t, same.tensors[name]) and not t.requires_grad for name, t in slots.tensors.items())


def test_inference_mode_is_no_obstacle(model):
    texts = random_ids(16)
    with torch.inference_mode():
        (inside,) = model.compress_segments(texts, polish=2)
    (outside,) = model.compress_segments(texts, polish=2)
    assert all(torch.equal(t, outside.tensors[name]) for name, t in inside.tensors.items())


def test_a_number_moves_no_further_than_its_rate(model):
    texts = random_ids(16)
    (plain,), (done,) = (model.compress_segments(texts, polish=steps) for steps in (0, 1))
    for name, tensor in plain.tensors.items():
        layers = [tensor[:, i] for i in range(tensor.shape[1])] if tensor.ndim > 2 else [tensor]
        moved = [done.tensors[name][:, i] for i in range(tensor.shape[1])] if tensor.ndim > 2 else [done.tensors[name]]
        for a, b in zip(layers, moved, strict=True):
            assert 0 < float((a - b).abs().max()) <= 1.001 * POLISH_RATES[name] * float(a.pow(2).mean().sqrt())


def test_a_segment_s_slots_do_not_depend_on_its_neighbours(model, monkeypatch):
    texts = random_ids(16, 5, 11, 16)
    together = model.compress_segments(texts, polish=2)
    monkeypatch.setattr(room, "TOKENS_AT_ONCE", 1)
    for slots, ids in zip(together, texts, strict=True):
        (alone,) = model.compress_segments([ids], polish=2)
        for name, tensor in slots.tensors.items():
            torch.testing.assert_close(tensor, alone.tensors[name], atol=1e-4, rtol=0)


def test_the_checkpoint_s_own_steps_are_taken_unless_told_otherwise(base):
    model = make_icae(base, stirred=0.05, polish=1)
    (ids,) = random_ids(20)
    assert model.origin.polish == 1 and model.compress_ids([ids])[0].origin.polish == 1
    assert model.compress_ids([ids], polish=0)[0].origin.polish == 0
    model = make_icae(base, stirred=0.05, polish=None)
    assert [model.compress_ids([ids], ratio=r)[0].origin.polish for r in (None, 2, 8, 16)] == [2, 2, 3, 5]
    assert model.origin_at(8) == model.compress_ids([ids], ratio=8)[0].origin
    with pytest.raises(ICAEError, match="polish must be at least 0"):
        model.compress_ids([ids], polish=-1)
    with pytest.raises(ICAEError, match="polish must be at least 0"):
        make_icae(base, polish=-1)


def test_polished_slots_are_those_of_their_text_still(base):
    model = make_icae(base, kind="kv", stirred=0.05, segment_length=24)
    (ids,) = random_ids(40)
    wrong = [ids[0], ids[2], ids[1], *ids[3:]]
    moved = (POLISH_RATES["keys"] ** 2 + POLISH_RATES["values"] ** 2) / 2
    (slots,) = model.compress_ids([ids], polish=1)
    first, second = (s.tokens for s in slots.segments)
    (refined,) = model.refine_ids([slots], [[ids[:first], ids[first:]]])
    assert refined.verified and refined.ids == ids and max(refined.mismatches) < 1.2 * moved
    assert refined.tolerances == [pytest.approx(TOLERANCE + POLISHED * moved)] * 2
    (mended,) = model.refine_ids([slots], [[wrong[:first], wrong[first:]]])
    assert mended.ids == ids and second == 40 - first
