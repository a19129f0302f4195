"""Fewer, larger kernels: the same slots, gradients and norms."""

import pytest
import tiny
import torch

from icae.fused import effective_weights, fuse_norms
from icae.objectives import padded

ROWS = [list(range(20, 36)), list(range(40, 51))]


@pytest.fixture
def base(tmp_path):
    from icae.base import load_base

    return load_base(str(tiny.save_base(tmp_path / "base")))


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_slots_and_gradients_are_those_of_lora_beside_the_weights(base, kind):
    model = tiny.make_icae(base, kind=kind, lora_targets=["q_proj", "v_proj", "down_proj"], stirred=0.1).train()
    found = []
    for fused in (False, True):
        model.zero_grad()
        model.encoder.fused = fused
        batch = model.encoder(padded(ROWS), [len(r) for r in ROWS])
        sum(t.pow(2).sum() for t in batch.tensors.values()).backward()
        found.append((batch.tensors, {n: p.grad.clone() for n, p in model.adapter_tensors().items() if p.grad is not None}))
    (plain, grads), (fused, fused_grads) = found
    assert any("lora_A" in n and g.abs().max() > 0 for n, g in grads.items())
    assert not any(fused_grads[n].any() for n in fused_grads.keys() - grads.keys())  # what no slot is read from
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], atol=1e-5, rtol=1e-4)
    for name in grads:
        torch.testing.assert_close(fused_grads[name], grads[name], atol=1e-4, rtol=1e-3)


def test_only_layers_with_lora_get_other_weights(base):
    model = tiny.make_icae(base, lora_targets=["q_proj"], stirred=0.1)
    made = effective_weights(model.encoder.peft.get_base_model().get_decoder())
    plain = dict(base.model.get_decoder().named_parameters())
    assert sorted(made) == [f"layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    assert all(w.shape == plain[n].shape and (w - plain[n]).abs().max() > 1e-3 for n, w in made.items())


def test_fused_norms_are_the_bases_own(base):
    ids = padded(ROWS[:1])
    before = base.model(ids).logits
    fuse_norms(base.model)
    assert all("forward" in vars(m) for m in base.model.modules() if type(m).__name__ == "LlamaRMSNorm")
    torch.testing.assert_close(base.model(ids).logits, before, atol=1e-4, rtol=1e-4)
