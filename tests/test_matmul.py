import pytest
import torch
from torch import nn

import icae.matmul
from icae.matmul import fast_linear, numpy_is_faster, product


@pytest.fixture(params=[True, False], ids=["numpy", "torch"])
def numpy_side(request, monkeypatch):
    """Both outcomes of the timing, whatever this machine's is."""
    monkeypatch.setattr(icae.matmul, "numpy_is_faster", lambda: request.param)
    return request.param


def gradients(linear, x):
    """Output and gradients (to x, weight, bias, where wanted) of a linear layer, under an arbitrary loss."""
    y = linear(x)
    leaves = [t for t in (x, linear.weight, linear.bias) if t is not None and t.requires_grad]
    return y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaves)


@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 24), (3, 24), (24,), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_outputs_and_gradients_are_torchs_own(numpy_side, shape, bias, trained):
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias=bias).requires_grad_(trained)
    x = torch.randn(shape, requires_grad=True)
    own = gradients(linear, x)
    with fast_linear() as numpy_on:
        assert numpy_on is numpy_side
        lent = gradients(linear, x)
    assert len(own) == 2 + trained * (1 + bias)
    for a, b in zip(own, lent, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_no_gradient_is_made_for_an_input_that_wants_none(numpy_side):
    linear, x = nn.Linear(24, 16), torch.randn(40, 24)
    with fast_linear():
        linear(x).sum().backward()
    assert x.grad is None and linear.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_autocast_are_left_to_torch(numpy_side, dtype):
    linear, x = nn.Linear(24, 16).to(dtype), torch.randn(40, 24, dtype=dtype)
    own = linear(x)
    with fast_linear():
        assert torch.equal(linear(x), own) and own.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.Linear(24, 16)(torch.randn(40, 24)).dtype == torch.bfloat16


def test_torchs_product_is_back_afterwards_even_after_an_error(numpy_side):
    original = nn.functional.linear
    with pytest.raises(ZeroDivisionError), fast_linear():
        assert (nn.functional.linear is original) is not numpy_side
        raise ZeroDivisionError
    assert nn.functional.linear is original


def test_torch_has_one_thread_while_numpy_has_the_products(numpy_side):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with fast_linear():
            assert torch.get_num_threads() == (1 if numpy_side else 3)
        assert torch.get_num_threads() == 3
        numpy_is_faster.__wrapped__()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_threads_that_overlap_leave_nothing_behind(monkeypatch):
    """Who came first may go first: `model.compress` in a pool of threads."""
    monkeypatch.setattr(icae.matmul, "numpy_is_faster", lambda: True)
    original, threads = nn.functional.linear, torch.get_num_threads()
    linear, x = nn.Linear(24, 16), torch.randn(40, 24)
    own = linear(x)
    first, second = fast_linear(), fast_linear()
    try:
        torch.set_num_threads(3)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert nn.functional.linear is not original and torch.get_num_threads() == 1
        torch.testing.assert_close(linear(x), own)
        second.__exit__(None, None, None)
        assert nn.functional.linear is original and torch.get_num_threads() == 3
    finally:
        nn.functional.linear = original
        torch.set_num_threads(threads)


def test_numpys_product_is_the_product():
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    torch.testing.assert_close(product(a, b.t()), a @ b.t(), atol=1e-5, rtol=1e-5)


def test_bfloat16_keeps_its_threads(monkeypatch):
    """Nothing of it is lent to numpy, for whose sake torch would have one."""
    monkeypatch.setattr("icae.matmul.numpy_is_faster", lambda: True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with fast_linear(torch.bfloat16) as on:
            assert not on and torch.get_num_threads() == 2
        with fast_linear() as on:
            assert on and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
