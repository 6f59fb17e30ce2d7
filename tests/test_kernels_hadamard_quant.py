"""Rotation against the dense matrix, quantisation against plain arithmetic, gradients of both."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, IMPLS, assert_as_good_as, needs_triton, random

from tinyft.dry_run import DryRun
from tinyft.kernels.hadamard import hadamard_matrix, paley_matrix, split_size
from tinyft.kernels.hadamard_quant import (
    factors,
    hadamard_quant,
    hadamard_quant_ref,
    quantize_ref,
    rotate_ref,
)

SIZES = (1, 2, 12, 24, 36, 64, 576, 1536)


def matrix(n):
    """R in float64, formed."""
    m, power = split_size(n)
    h = paley_matrix(m, torch.float64) if m > 1 else torch.ones(1, 1, dtype=torch.float64)
    return torch.kron(h, hadamard_matrix(power, torch.float64)) * n**-0.5


@pytest.mark.parametrize("n", SIZES)
def test_rotation(n):
    x, r = random(2, 3, n, seed=n).cpu(), matrix(n)
    torch.testing.assert_close(rotate_ref(x), x @ r, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_ref(x, transposed=True), x @ r.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rotate_ref(rotate_ref(x), transposed=True), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_quantiser_by_hand(bits, clip, shift):
    row = (random(23, seed=bits).cpu() + shift).tolist()
    top = 2**bits - 1
    low, high = clip * min(*row, 0.0), clip * max(*row, 0.0)
    s = (high - low) / top
    z = round(-low / s)
    expected = [s * (min(max(round(v / s) + z, 0), top) - z) for v in row]
    found = quantize_ref(torch.tensor([row], dtype=torch.float64), bits, clip)[0]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert 0 <= z <= top and len(set(found.tolist())) <= top + 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("bits", "clip"), [(4, 0.95), (8, 1.0)])
def test_forward_and_backward(impl, dtype, n, bits, clip):
    """Against float64. No number of these lies so close between two levels that float32 errs."""
    x, pull = random(3, 2, n, seed=n).to(dtype), random(3, 2, n, seed=n + 1).to(dtype)

    def run(function, cast=dtype, **options):
        leaf = x.to(cast).requires_grad_()
        y = function(leaf, bits, clip=clip, **options)
        return y.detach(), torch.autograd.grad(y, leaf, pull.to(cast))[0]

    exact, in_torch = run(hadamard_quant_ref, torch.float64), run(hadamard_quant_ref)
    torch.testing.assert_close(exact[1].cpu(), pull.double().cpu() @ matrix(n).T)
    for found, same_dtype, truth in zip(
        run(hadamard_quant, impl=impl), in_torch, exact, strict=True
    ):
        assert_as_good_as(found, same_dtype, truth, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_stay_zero(impl):
    x = torch.zeros(2, 24, device=random(1).device)
    x[1, 3] = 1.0
    found = hadamard_quant(x, 4, impl=impl)
    assert (found[0] == 0).all() and found[1].abs().min() > 0


def test_gradcheck():
    """Of the rotation; the quantiser's gradient is the identity by definition."""
    x = random(2, 24, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(rotate_ref, x)
    assert torch.autograd.gradcheck(lambda x: rotate_ref(x, transposed=True), x)


def test_what_evaluation_made_first_can_be_trained_with():
    for made in (factors, hadamard_matrix, paley_matrix):
        made.cache_clear()
    x = random(2, 24, seed=1).cpu()
    with torch.inference_mode():
        hadamard_quant(x.float(), 4)
        hadamard_quant(x, 4)
    leaf, pull = x.clone().requires_grad_(), random(2, 24, seed=2).cpu()
    (grad,) = torch.autograd.grad(rotate_ref(leaf), leaf, pull)
    torch.testing.assert_close(grad, pull @ matrix(24).T)


def test_beside_16_bits_no_more_is_wide_than_rotating_takes():
    with DryRun() as trace:
        x = torch.empty(1024, 1024, dtype=torch.bfloat16)
        hadamard_quant(x, 4)
    wide_bytes = 2 * x.nbytes
    assert trace.peak_bytes <= x.nbytes + 3 * wide_bytes + (1 << 16)  # x, Y = X B, (A x) Y


def test_what_is_refused():
    with pytest.raises(ValueError, match="2 to 8 bits; found 16"):
        hadamard_quant(torch.ones(2, 8), 16)
    with pytest.raises(ValueError, match="No Hadamard matrix of size 7"):
        hadamard_quant(torch.ones(2, 7), 4)


@needs_triton
def test_rows_beyond_the_registers_are_refused_in_triton():
    x = torch.ones(1, 4864, device=random(1).device)
    with pytest.raises(ValueError, match="4864 = 76 x 64 numbers do not fit the registers"):
        hadamard_quant(x, 4, impl="triton")
    assert hadamard_quant(x, 4).shape == x.shape
