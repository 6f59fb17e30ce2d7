"""Products with selected rows against a mask over all of them, in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, IMPLS, assert_as_good_as, random

from tinyft.kernels.int4_linear import pack_int4
from tinyft.kernels.packed import pack_int8, rows_of
from tinyft.kernels.sparse_linear import (
    ACTIVATIONS,
    sparse_gate_up,
    sparse_gate_up_ref,
    sparse_linear,
    sparse_linear_ref,
)

# (batch, blocks in all, block size, in, blocks taken)
SHAPES = [
    ((40,), 3, 1, 1, [2]),
    ((2, 9), 7, 5, 67, [6, 0, 3]),
    ((3, 11), 9, 32, 130, [1, 2, 7, 8]),
    ((5, 3), 4, 48, 96, [3, 0]),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_and_backward(impl, dtype, shape, transposed):
    batch, count, size, cols, taken = shape
    blocks = torch.tensor(taken, device=DEVICE)
    weight = random(count * size, cols, seed=1, scale=cols**-0.5).to(dtype)
    selected = len(taken) * size
    wide_in, wide_out = (selected, cols) if transposed else (cols, selected)
    x, pull = random(*batch, wide_in, seed=2).to(dtype), random(*batch, wide_out, seed=3).to(dtype)

    def run(function, cast=dtype, **options):
        leaf = x.to(cast).requires_grad_()
        y = function(leaf, weight.to(cast), blocks, size, transposed=transposed, **options)
        return y.detach(), torch.autograd.grad(y, leaf, pull.to(cast))[0]

    def by_hand():
        """Row by row, the whole weight zero but for what is selected."""
        rows = torch.tensor([b * size + i for b in taken for i in range(size)], device=DEVICE)
        places = torch.zeros(selected, count * size, dtype=torch.float64, device=DEVICE)
        places[torch.arange(selected), rows] = 1
        w = places @ weight.double()
        w = w if transposed else w.T
        return x.double() @ w, pull.double() @ w.T

    for found, in_torch, exact in zip(
        run(sparse_linear, impl=impl), run(sparse_linear_ref), by_hand(), strict=True
    ):
        assert_as_good_as(found, in_torch, exact, atol=1e-6)


def packed(weight, bits):
    return pack_int8(weight) if bits == 8 else pack_int4(weight, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights(impl, dtype, bits, transposed):
    blocks, size, cols = torch.tensor([2, 0], device=DEVICE), 11, 75
    weight = packed(random(4 * size, cols, seed=1, scale=cols**-0.5), bits)
    w = rows_of(weight, slice(None), torch.float64)
    x, pull = random(18, 2 * size if transposed else cols, seed=2), random(18, 1, seed=3)

    def run(function, weight, cast=dtype, **options):
        leaf = x.to(dtype).to(cast).requires_grad_()
        y = function(leaf, weight, blocks, size, transposed=transposed, **options)
        pulls = pull.to(dtype).to(cast).expand_as(y)
        return y.detach(), torch.autograd.grad(y, leaf, pulls)[0]

    for found, in_torch, exact in zip(
        run(sparse_linear, weight, impl=impl),
        run(sparse_linear_ref, w.to(dtype)),
        run(sparse_linear_ref, w, torch.float64),
        strict=True,
    ):
        assert_as_good_as(found, in_torch, exact, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("activation", "bits", "shape"),
    [
        *((name, 16, ((2, 9), 13, 67)) for name in ACTIVATIONS),
        *(("silu", bits, ((7,), 32, 96)) for bits in (16, 8, 4)),
    ],
)
def test_gate_and_up(impl, dtype, activation, bits, shape):
    """Against autograd through the three steps, on the whole weights but for the rows not taken."""
    batch, size, cols = shape
    blocks = torch.tensor([3, 0, 1], device=DEVICE)[::2]
    weights = [random(4 * size, cols, seed=s, scale=cols**-0.5) for s in (1, 2)]
    if bits == 16:
        given = [w.to(dtype) for w in weights]
        weights = [w.double() for w in given]
    else:
        given = [packed(w, bits) for w in weights]
        weights = [rows_of(w, slice(None), torch.float64) for w in given]
    x, pull = random(*batch, cols, seed=3).to(dtype), random(*batch, 2 * size, seed=4).to(dtype)

    def run(function, weights, cast=dtype, **options):
        leaf = x.to(cast).requires_grad_()
        h = function(leaf, *weights, blocks, size, activation=activation, **options)
        return h.detach(), torch.autograd.grad(h, leaf, pull.to(cast))[0]

    exact = run(sparse_gate_up_ref, weights, torch.float64)
    in_torch = run(sparse_gate_up_ref, [w.to(dtype) for w in weights])
    found = run(sparse_gate_up, given, impl=impl)
    for one, same_dtype, truth in zip(found, in_torch, exact, strict=True):
        assert_as_good_as(one, same_dtype, truth, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_gradcheck(activation):
    gate, up = random(12, 7, seed=1), random(12, 7, seed=2)
    blocks, x = torch.tensor([2, 0], device=DEVICE), random(3, 7, seed=3).requires_grad_()
    for function in (sparse_gate_up, sparse_gate_up_ref):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, gate, up, blocks, 4, activation=activation), x
        )


def test_gate_and_up_by_hand():
    """Every block of a small layer, with torch's own functions named here again."""
    gate, up, x = random(8, 5, seed=1), random(8, 5, seed=2), random(3, 5, seed=3)
    functions = {
        "silu": lambda a: a / (1 + torch.exp(-a)),
        "gelu": lambda a: a * torch.special.ndtr(a),
        "gelu_tanh": lambda a: (
            a / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3)))
        ),
        "relu": lambda a: a.clamp(min=0),
    }
    assert set(functions) == set(ACTIVATIONS)
    for name, f in functions.items():
        found = sparse_gate_up(x, gate, up, torch.arange(2, device=DEVICE), 4, activation=name)
        torch.testing.assert_close(found, f(x @ gate.T) * (x @ up.T))


def test_all_blocks_make_the_plain_layer():
    x, weight = random(4, 30, seed=1), random(24, 30, seed=2)
    every = torch.arange(3, device=DEVICE)
    torch.testing.assert_close(sparse_linear(x, weight, every, 8), x @ weight.T)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed):
    weight, blocks = random(12, 7, seed=1), torch.tensor([2, 0], device=DEVICE)
    x = random(3, 8 if transposed else 7, seed=2).requires_grad_()
    for function in (sparse_linear, sparse_linear_ref):
        assert torch.autograd.gradcheck(
            lambda x, f=function: f(x, weight, blocks, 4, transposed=transposed), x
        )


def test_what_is_refused():
    weight, blocks = torch.ones(12, 7), torch.tensor([0])
    with pytest.raises(ValueError, match="12 rows has no whole number of blocks of 5"):
        sparse_linear(torch.ones(2, 7), weight, blocks, 5)
    with pytest.raises(ValueError, match=r"width 7; found \(2, 4\)"):
        sparse_linear(torch.ones(2, 4), weight, blocks, 4)
    with pytest.raises(ValueError, match="silu, gelu, gelu_tanh, relu; found 'tanh'"):
        sparse_gate_up(torch.ones(2, 7), weight, weight, blocks, 4, activation="tanh")
    with pytest.raises(ValueError, match=r"one shape and format; found Tensor \(12, 7\)"):
        sparse_gate_up(torch.ones(2, 7), weight, pack_int8(weight), blocks, 4)
