"""The low-rank linear layer against autograd in float64, at odd shapes."""

import pytest
import torch

from tinyft.kernels.lora_linear import add_low_rank, lora_linear, lora_linear_ref

SHAPES = [((1,), 1, 1, 1), ((7, 5), 11, 3, 2), ((2, 3, 33), 65, 129, 4)]  # lead, in, out, rank


def make(lead, n_in, n_out, rank, dtype=torch.float64):
    gen = torch.Generator().manual_seed(n_in)
    shapes = (*lead, n_in), (n_out, n_in), (rank, n_in), (n_out, rank), (n_out,)
    drawn = [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.requires_grad_(i in (0, 2, 3)) for i, t in enumerate(drawn)]


def gradients(fn, x, w, a, b, bias):
    y = fn(x, w, a, b, 0.7, bias=bias)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), (x, a, b))]


def on_another_layer(x, w, a, b, scale, *, bias=None):
    return add_low_rank(torch.nn.functional.linear(x, w, bias), x, a, b, scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ours", [lora_linear, on_another_layer])
def test_equals_autograd(shape, bias, ours):
    *tensors, offset = make(*shape)
    offset = offset if bias else None
    want = gradients(lora_linear_ref, *tensors, offset)
    for got, true in zip(gradients(ours, *tensors, offset), want, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ours", [lora_linear, on_another_layer])
def test_gradcheck(ours):
    x, w, a, b, bias = make((3,), 4, 5, 2)
    assert torch.autograd.gradcheck(lambda *t: ours(t[0], w, *t[1:], 0.7, bias=bias), (x, a, b))


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
@pytest.mark.parametrize("ours", [lora_linear, on_another_layer])
def test_a_model_may_write_into_the_result(ours, lead):
    """As those do that add a residual in place."""
    *tensors, bias = make(lead, 4, 5, 2)
    x, w, a, b = tensors

    def run(function, *, in_place):
        y = function(x, w, a, b, 0.7, bias=bias)
        y = y.mul_(y.detach().sin()) if in_place else y * y.detach().sin()
        return torch.autograd.grad(y.sum(), (x, a, b))

    for got, true in zip(
        run(ours, in_place=True), run(lora_linear_ref, in_place=False), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


def test_inputs_that_need_no_gradient_get_none():
    x, w, a, b, _ = make((3,), 4, 5, 2)
    lora_linear(x.detach(), w, a, b.detach(), 1.0).sum().backward()
    assert a.grad is not None and x.grad is None and b.grad is None


@pytest.mark.parametrize("ours", [lora_linear, on_another_layer])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
def test_error_within_twice_that_of_the_bases_precision(ours, dtypes):
    base, adapter = dtypes
    x, w, a, b, bias = (t.detach() for t in make((2, 3, 33), 65, 129, 4, base))

    def run(fn, base, adapter):
        tensors = [x.to(base), w.to(base), a.to(adapter), b.to(adapter)]
        tensors = [t.clone().requires_grad_(i != 1) for i, t in enumerate(tensors)]
        return gradients(fn, *tensors, bias.to(base))

    exact = run(lora_linear_ref, torch.float64, torch.float64)
    plain = run(lora_linear_ref, base, base)  # all in the base's precision
    for got, theirs, true in zip(run(ours, base, adapter), plain, exact, strict=True):
        error = (got.double() - true).norm()
        assert error <= 2 * (theirs.double() - true).norm() + 1e-7 * true.norm()
    assert [t.dtype for t in run(ours, base, adapter)] == [base, base, adapter, adapter]
