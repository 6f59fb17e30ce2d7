"""Products with some rows of a weight, and tokens taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from tinyft.kernels.rows import (
    columns_linear,
    columns_linear_ref,
    join,
    rows_linear,
    rows_linear_ref,
    split,
)

N, N_IN, N_OUT, ROWS = 7, 5, 9, torch.tensor([0, 3, 4, 8])


def operands(bias, adapted, n_in, n_out, weight_columns):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {}
    if adapted:
        factors = {"A": random(2, n_in).requires_grad_(), "B": random(n_out, 2).requires_grad_()}
        factors["scale"] = 0.5
    x, weight = random(N, n_in).requires_grad_(), random(len(ROWS), weight_columns)
    return x, weight, {"bias": random(n_out) if bias else None, **factors}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by", ["rows", "columns"])
def test_some_rows_or_columns_are_those_of_a_masked_weight(by, bias, adapted, exact):
    if by == "rows":
        x, weight, options = operands(bias, adapted, N_IN, N_OUT, N_IN)
        ours, reference, where = rows_linear, rows_linear_ref, (ROWS, N_OUT)
    else:
        x, weight, options = operands(bias, adapted, N_OUT, N_IN, N_IN)
        ours, reference, where = columns_linear, columns_linear_ref, (ROWS,)
    leaves = [x, *(t for n, t in options.items() if n in ("A", "B"))]
    got = ours(x, weight, *where, exact=exact, **options)
    want = reference(x, weight, *where, exact=exact, **options)
    torch.testing.assert_close(got, want)
    if not want.requires_grad:  # nothing left that could have a gradient
        assert not adapted and not exact
        return
    pull = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, pull),
        torch.autograd.grad(want, leaves, pull),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    if exact:
        rest = {n: v for n, v in options.items() if n not in ("A", "B")}

        def function(x, *factors):
            named = dict(zip("AB", factors, strict=False))
            return ours(x, weight, *where, **rest, **named)

        assert gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_and_join_are_each_other_s_inverse_to_the_bit(dtype):
    x = torch.randn(N, N_IN, generator=torch.Generator().manual_seed(0)).to(dtype)
    first, second = torch.tensor([1, 2, 6]), torch.tensor([0, 3, 4, 5])
    a, b = split(x, first, second)
    assert torch.equal(a, x[first]) and torch.equal(b, x[second])
    assert torch.equal(join(a, b, first, second), x)


def test_gradients_of_split_and_join():
    x = torch.randn(N, N_IN, dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([1, 2, 6]), torch.tensor([0, 3, 4, 5])
    assert gradcheck(lambda x: split(x, first, second), x)

    def function(x):
        a, b = split(x, first, second)
        return join(a * 2, b.square(), first, second)

    assert gradcheck(function, x)
