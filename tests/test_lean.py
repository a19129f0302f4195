"""Training on CPUs with bfloat16 units: the same loss and gradients from fewer products, and from trees of texts."""

from dataclasses import replace

import pytest
import tiny
import torch

from icae.base import load_base
from icae.config import ICAEConfig, TrainConfig
from icae.decoder import Decoder
from icae.errors import ICAEError
from icae.lean import LeanLlama, is_plain_llama
from icae.objectives import Example, Marker, collate, pieces
from icae.reader import Reader
from icae.train import build
from icae.trees import forest, plant, spots

CONTEXTS = [list(range(20, 45)), list(range(40, 51))]
PROMPT = [3, 4, 5, 6]
"""What all prompts begin with."""


@pytest.fixture
def base(tmp_path):
    return load_base(str(tiny.save_base(tmp_path / "base")))


def examples(segment=12):
    def asked(n, prompt, response, **more):
        return Example(pieces(CONTEXTS[n], segment, 4), Marker.FT, PROMPT + prompt, response, **more)

    return [
        asked(0, [7, 8], [9, 10, 1], first=3.0),
        asked(0, [7], [11, 1]),
        asked(1, [9, 9, 9], [30, 31]),
        asked(0, [], [12]),
        Example(pieces(CONTEXTS[1], segment, 4), Marker.AE, [], [*CONTEXTS[1], 1], first=8.0),
        Example(pieces(CONTEXTS[1], segment, 4), Marker.LM, [21], [22, 23, 24, 25], unscored=2),
    ]


@pytest.mark.parametrize(("layout", "compiled"), [("spread", False), ("appended", False), ("spread", True)])
def test_loss_and_gradients_are_those_of_the_llms_own_layers(base, layout, compiled):
    model = tiny.make_icae(base, kind="kv", layout=layout, segment_length=12, marker_length=2, stirred=0.1).train()
    assert_the_same(model, collate(examples()), LeanLlama(base, compiled=compiled, dtype=torch.float32))


def assert_the_same(model, batch, lean):
    """Assert that lean training has the loss and the gradients of training by the LLM's own layers."""
    found = []
    for way in (None, lean):
        model.zero_grad()
        model.encoder.lean = way
        loss = model(**batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.adapter_tensors().items() if p.grad is not None}))
    (plain, grads), (lean_loss, lean_grads) = found
    torch.testing.assert_close(lean_loss, plain, atol=1e-5, rtol=1e-5)
    assert any("lora_A" in n and g.abs().max() > 0 for n, g in grads.items())
    for name, grad in grads.items():  # the last layer's products behind keys and values are not even computed
        torch.testing.assert_close(lean_grads.get(name, torch.zeros_like(grad)), grad, atol=1e-5, rtol=1e-3)


def taught(**more):
    """The first four of `examples`, taught: the second by the base as published, the last by states alone."""
    asks = [[7, 8], [7], [9, 9, 9], []]
    about = [dict(by_tutor=True, distil=0.5, align=3.0), dict(distil=0.7, align=1.0), dict(by_tutor=True, distil=0.4), dict(align=2.0)]
    rows = [
        replace(e, teacher=[3, *CONTEXTS[n], *PROMPT[2:], *ask], **kinds)
        for e, n, ask, kinds in zip(examples()[:4], (0, 0, 1, 0), asks, about, strict=True)
    ]
    return [replace(e, **more) for e in rows] + examples()[4:]


@pytest.mark.parametrize("alone", [{}, {"align": 0.0}, {"distil": 0.0}])
@pytest.mark.parametrize("tutored", [True, False])
def test_a_teacher_reads_the_full_text_in_trees_of_its_own(base, alone, tutored, tmp_path):
    model = tiny.make_icae(base, kind="kv", segment_length=12, marker_length=2, stirred=0.1).train()
    other = load_base(str(tiny.save_base(tmp_path / "other", seed=5)))
    if tutored:
        model.tutor = Reader(Decoder(other), model.config, model.markers)
        model.lean_tutor = LeanLlama(other, dtype=torch.float32)
    assert_the_same(model, collate(taught(**alone)), LeanLlama(base, dtype=torch.float32))


def test_bfloat16_is_near(base):
    model = tiny.make_icae(base, kind="kv", segment_length=12, stirred=0.1).train()
    batch = collate(examples())
    plain = model(**batch)["loss"].item()
    model.encoder.lean = LeanLlama(base)
    rounded = model(**batch)["loss"].item()
    assert rounded != plain and rounded == pytest.approx(plain, rel=0.03)


def test_what_is_used_is_not_trained(base):
    """Slots that are written, not trained, come from the LLM's own layers."""
    model = tiny.make_icae(base, kind="kv", stirred=0.1)
    before = model.compress_ids([CONTEXTS[0]])[0].tensors
    model.encoder.lean = LeanLlama(base)
    after = model.compress_ids([CONTEXTS[0]])[0].tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize(("settings", "lean"), [({"bf16": True}, True), ({}, False)])
def test_a_run_on_a_cpu_is_lean_in_bfloat16_and_never_fused(tmp_path, device, settings, lean):
    """One of several processes calls its device cpu:0."""
    folder = str(tiny.save_base(tmp_path / "base"))
    model = build(TrainConfig(**settings), ICAEConfig(base=folder, kind="kv", lora_rank=4), device)
    assert (model.encoder.lean is not None) is lean and not model.encoder.fused
    assert build(TrainConfig(**settings), ICAEConfig(base=folder, kind="embedding", lora_rank=4), device).encoder.lean is None


def test_what_would_not_be_compiled_is_refused(tmp_path):
    folder = str(tiny.save_base(tmp_path / "base"))
    with pytest.raises(ICAEError) as error:
        build(TrainConfig(bf16=True, compile=True), ICAEConfig(base=folder, kind="embedding", lora_rank=4), "cpu")
    tiny.one_line(error.value, "compile")


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("qwen2", False), ("gemma2", False)])
def test_only_llamas_layers_are_computed(tmp_path, family, plain):
    assert is_plain_llama(load_base(str(tiny.save_base(tmp_path / family, family)))) is plain


def test_a_tree_reads_once_what_texts_begin_with():
    tree = plant([5, 9], [[3, 4, 7, 8, 9], [3, 4, 6, 1]], lead=2)
    assert tree.ids == [0, 0, 3, 4, 7, 8, 6] and tree.branches == [0, 0, 0, 0, 1, 1, 2]
    assert tree.depths == [0, 1, 2, 3, 4, 5, 4]
    assert tree.nodes == [[1, 2, 3, 4, 5], [1, 2, 3, 6]]  # the first one's 9 is predicted by 8, the second's 6 by 4


def test_a_text_of_its_own_is_a_tree_of_one_branch():
    tree = plant([0], [[3, 4, 5]], lead=1)
    assert tree.ids == [0, 3, 4] and tree.nodes == [[0, 1, 2]]


def test_trees_join_samples_of_the_same_context_and_marker():
    batch = collate(examples())
    kinds = [(marker, *group) for marker, group in zip(batch["markers"].tolist(), batch["groups"], strict=True)]
    together = list(forest(kinds, batch["text_ids"], batch["real"], lead=2))
    assert sorted(t.samples for trees in together for t in trees) == [[0, 1, 3], [2], [4], [5]]
    assert all(4 * len(t.ids) >= 3 * len(trees[0].ids) for trees in together for t in trees)


def test_a_token_is_read_one_input_behind_the_one_that_predicts_it():
    trees = [plant([0], [[3, 4, 5]], lead=1), plant([2, 1], [[6, 7, 8], [6, 9, 9, 9]], lead=1)]
    places = [[0, 1], [1, 2], [1]]
    read, predicted = spots(trees, places), spots(trees, places, predict=True)
    assert read.sample.tolist() == predicted.sample.tolist() == [0, 0, 2, 1, 1] and read.row.tolist() == [0, 0, 1, 1, 1]
    assert [trees[n].ids[at] for n, at in zip(read.row.tolist(), read.node.tolist(), strict=True)] == [3, 4, 7, 9, 9]
    assert [trees[n].ids[at] for n, at in zip(predicted.row.tolist(), predicted.node.tolist(), strict=True)] == [0, 3, 6, 6, 9]
