import pytest
from tiny import make_icae
from torch.utils.flop_counter import FlopCounterMode

from icae.cost import Shape, step
from icae.objectives import autoencoding, collate

ROTARY = 0.01
"""Share of rotary angles and of pooling, which the formula leaves out, at these tiny sizes; at SmolLM2's they are under a thousandth."""


def counted(model, length, *, plain=False):
    """Operations of one sample's forward and backward pass by torch's own counter."""
    trees = [model.base.model, model.encoder.peft.get_base_model()]
    before = [tree.config._attn_implementation for tree in trees]
    for tree in trees:
        tree.set_attn_implementation("eager")  # the counter knows no fused attention for CPUs
    batch = collate([autoencoding(list(range(5, 5 + length)), 64, 1)])
    for p in model.base.model.parameters():
        p.requires_grad_(plain)
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    for p in model.base.model.parameters():  # the tests share this base
        p.requires_grad_(False)
        p.grad = None
    for tree, name in zip(trees, before, strict=True):
        tree.set_attn_implementation(name)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["kv", "embedding"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "o_proj", "down_proj"]])
def test_the_formula_is_what_torch_counts(base, kind, plain, targets):
    model = make_icae(base, kind=kind, ratio=4, segment_length=64, lora_targets=targets)
    shape = Shape.of(base.model.config, model.config)
    mine = step(shape, 48, 4, 49, cached=kind == "kv", plain=plain)
    assert sum(mine.values()) == pytest.approx(counted(model, 48, plain=plain), rel=ROTARY)


def test_the_saved_path_of_the_embedded_base_costs_a_third_less():
    smol = Shape(30, 576, 576, 192, 1536, 49152, 64, ("q_proj", "k_proj", "v_proj", "o_proj"))
    saved, plain = (sum(step(smol, 128, 4, 129, plain=p).values()) / 128 for p in (False, True))
    assert saved < plain and 0.9e9 < saved < 1.4e9
