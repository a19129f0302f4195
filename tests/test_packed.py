import gc

import pytest
import torch
from torch import nn

import icae.packed
from icae.packed import PATIENCE, Packed, packed_linear, packing_is_faster

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def weights(monkeypatch):
    """Copies from the first use on, of weights of any size."""
    monkeypatch.setattr(icae.packed, "PATIENCE", 0)
    monkeypatch.setattr(icae.packed, "SMALLEST", 1)
    return Packed()


def plain(x, weight, bias=None):
    return x @ weight.t() + (0 if bias is None else bias)


@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 24), (3, 24), (24,), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_torchs_own(weights, shape, bias):
    x, w, b = torch.randn(shape), torch.randn(16, 24), torch.randn(16) if bias else None
    with torch.no_grad():
        y = weights.linear(None, x, w, b)
    torch.testing.assert_close(y, plain(x, w, b), atol=1e-4, rtol=1e-4)
    assert len(weights.copies) == 1


@pytest.mark.parametrize("case", ["gradient", "bfloat16", "autocast", "nothing"])
def test_what_is_not_for_it_is_left_to_torch(weights, case):
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    x, w = torch.randn(0 if case == "nothing" else 4, 24, dtype=dtype), torch.randn(16, 24, dtype=dtype)
    with torch.set_grad_enabled(case == "gradient"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert weights.linear(lambda *args: "torch's", x, w, None) == "torch's"
    assert not weights.copies


@torch.no_grad()
def test_a_weight_is_copied_when_it_was_used_often_and_not_when_it_is_small():
    weights, x, w, small = Packed(), torch.randn(2, 512), torch.randn(256, 512), torch.randn(8, 512)
    for _ in range(PATIENCE):
        weights.linear(plain, x, w, None)
        weights.linear(plain, x, small, None)
    assert not weights.copies
    for _ in range(2):
        weights.linear(plain, x, w, None)
        weights.linear(plain, x, small, None)
    assert [k is w for k in weights.copies] == [True]


@torch.no_grad()
def test_a_weight_that_was_written_to_is_copied_anew(weights):
    x, w = torch.randn(2, 24), torch.randn(16, 24)
    weights.linear(plain, x, w, None)
    w.mul_(2)
    torch.testing.assert_close(weights.linear(plain, x, w, None), plain(x, w), atol=1e-4, rtol=1e-4)
    assert len(weights.copies) == 1


@torch.no_grad()
def test_a_copy_goes_with_its_weight(weights):
    w = torch.randn(16, 24)
    weights.linear(plain, torch.randn(2, 24), w, None)
    del w
    gc.collect()
    assert not weights.copies and not weights.used


@pytest.mark.parametrize("faster", [True, False])
def test_torchs_product_is_back_afterwards_even_after_an_error(monkeypatch, faster):
    monkeypatch.setattr(icae.packed, "packing_is_faster", lambda: faster)
    original = nn.functional.linear
    with pytest.raises(ZeroDivisionError), packed_linear() as on:
        assert on is faster and (nn.functional.linear is original) is not faster
        with torch.no_grad():
            assert nn.Linear(24, 16)(torch.ones(3, 24)).shape == (3, 16)
        raise ZeroDivisionError
    assert nn.functional.linear is original


def test_without_the_operators_it_is_not_chosen(monkeypatch):
    def missing(*args):
        raise AttributeError("no such operator")

    monkeypatch.setattr(icae.packed, "_pack", missing)
    assert packing_is_faster.__wrapped__() is False
