"""The packed format, and products with it against its own numbers in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, IMPLS, assert_as_good_as, random

from tinyft.kernels import int4_linear as module
from tinyft.kernels.int4_linear import EVERY, int4_linear, int4_linear_ref, pack_int4


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("cols", [1, 100, 256])
def test_format(group, cols):
    """By hand, number by number: which bits are a column's, and how far it is from its weight."""
    w = random(3, cols, seed=cols).float()
    packed = pack_int4(w, group)
    assert packed.shape == (3, cols) and packed.group == group
    found = packed.dequantize(torch.float32, EVERY, EVERY)
    for row in range(3):
        for col in range(cols):
            inside = col % group
            byte = packed.packed[row, col // group * group // 2 + inside % (group // 2)].item()
            q = byte >> 4 if inside >= group // 2 else byte & 15
            scale = packed.scales[row, col // group].item()
            assert found[row, col].item() == pytest.approx(scale * (q - 8), rel=1e-6)
            worst = 1.01 if q == 15 else 0.51  # of a step; clipped on the far side
            assert abs(found[row, col] - w[row, col]) <= worst * abs(scale)


def test_the_largest_entry_survives_and_zero_groups_are_zero():
    w = torch.zeros(2, 64)
    w[0, 5], w[0, 6] = -3.0, 2.9
    found = pack_int4(w).dequantize(torch.float64, EVERY, EVERY)
    assert found[0, 5] == -3 and found[0, 6] == pytest.approx(3 * 7 / 8)
    assert (found[1] == 0).all() and (found[0, :5] == 0).all()


def test_only_some_groups():
    with pytest.raises(ValueError, match="32, 64, 128 columns; found 48"):
        pack_int4(torch.ones(2, 96), 48)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "out", "cols", "group"),
    [((30,), 1, 1, 32), ((2, 9), 33, 129, 32), ((70,), 70, 192, 64), ((3, 3, 3), 35, 200, 128)],
)
@pytest.mark.parametrize(("with_bias", "bits"), [(True, 16), (False, 16), (True, 8)])
def test_forward_and_backward(impl, dtype, batch, out, cols, group, with_bias, bits):
    """No number of these lies so close between two levels of 8 bits that float32 errs."""
    weight = pack_int4(random(out, cols, seed=1, scale=cols**-0.5), group)
    bias = random(out, seed=2).to(dtype) if with_bias else None
    x = random(*batch, cols, seed=3).to(dtype)
    pull = random(*batch, out, seed=4).to(dtype)

    def run(function, cast=dtype, **options):
        leaf = x.to(cast).requires_grad_()
        b = None if bias is None else bias.to(cast)
        y = function(leaf, weight, bias=b, activation_bits=bits, **options)
        (grad,) = torch.autograd.grad(y, leaf, pull.to(cast))
        return y.detach(), grad

    exact, in_torch = run(int4_linear_ref, torch.float64), run(int4_linear_ref)
    for found, same_dtype, truth in zip(run(int4_linear, impl=impl), in_torch, exact, strict=True):
        assert_as_good_as(found, same_dtype, truth, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_8_bit_activations_by_hand(impl):
    """The same integers, multiplied as integers by Python; a row of zeros stays zero."""
    weight = pack_int4(random(3, 50, seed=1), 32)
    x = random(4, 50, seed=2).float()
    x[2] = 0
    found = int4_linear(x, weight, activation_bits=8, impl=impl)
    for i, row in enumerate(x.tolist()):
        s = max(map(abs, row)) / 127
        q = [round(v / s) if s else 0 for v in row]
        for j in range(3):
            expected = 0.0
            for col in range(50):
                byte = int(weight.packed[j, col // 32 * 16 + col % 16])
                w = (byte >> 4 if col % 32 >= 16 else byte & 15) - 8
                expected += s * float(weight.scales[j, col // 32]) * (q[col] * w)
            assert found[i, j].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_blocks_make_the_whole(monkeypatch):
    """Rows forward and groups backward, taken a few at a time."""
    monkeypatch.setattr(module, "SCRATCH_ELEMENTS", 1000)
    weight = pack_int4(random(33, 300, seed=1), 32)
    x = random(4, 300, seed=2).requires_grad_()
    bias, pull = random(33, seed=3), random(4, 33, seed=4)
    y, whole = int4_linear(x, weight, bias=bias), int4_linear_ref(x, weight, bias=bias)
    torch.testing.assert_close(y, whole)
    grads = [torch.autograd.grad(one, x, pull)[0] for one in (y, whole)]
    torch.testing.assert_close(*grads)


def test_gradcheck():
    weight = pack_int4(random(5, 70, seed=1), 32)
    x = random(3, 70, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: int4_linear(x, weight, impl="torch"), x)


def test_a_model_may_write_into_the_result():
    """As those do that add a residual in place."""
    weight = pack_int4(random(5, 70, seed=1), 32)
    x = random(2, 3, 70, seed=2).requires_grad_()
    pull = random(2, 3, 5, seed=3)
    grads = [
        torch.autograd.grad(y, x, pull)[0]
        for y in (int4_linear(x, weight).mul_(pull), int4_linear_ref(x, weight) * pull)
    ]
    torch.testing.assert_close(*grads)


def test_what_is_refused():
    with pytest.raises(ValueError, match="activation_bits is 16 or 8; found 4"):
        int4_linear(torch.ones(1, 32), pack_int4(torch.ones(2, 32), 32), activation_bits=4)
