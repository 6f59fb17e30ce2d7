"""Rows of activations taken apart and put together, and outputs that are zero but for some rows.

What SparseLoRA (Khaki et al. 2025, arXiv:2506.16500) does around its products: tokens of the
context leave for the sparse path and come back, and sparse attention fills some channels alone.
Gradients are exact; frozen weights get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tinyft.kernels.fused import apply_fused


def split(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`x[first], x[second]` of x (N, D), where `first` and `second` share out 0..N-1."""
    return _Split.apply(x, first, second)


def join(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Inverse of `split`: the (N, D) tensor whose rows `first` are a and whose `second` are b."""
    return _Join.apply(a, b, first, second)


def rows_linear_ref(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    n_out: int,
    *,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """`rows_linear` in plain torch."""
    whole = weight.new_zeros(n_out, weight.shape[1]).index_copy(0, rows, weight)
    return _whole_ref(x, whole, bias, A, B, scale, exact)


def columns_linear_ref(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    *,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """`columns_linear` in plain torch."""
    whole = weight.new_zeros(x.shape[1], weight.shape[1]).index_copy(0, columns, weight)
    return _whole_ref(x, whole.t(), bias, A, B, scale, exact)


def _whole_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    exact: bool,
) -> Tensor:
    y = linear(x if exact else x.detach(), weight, bias)
    return y if A is None or B is None else y + linear(linear(x, A), B) * scale


def rows_linear(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    n_out: int,
    *,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """`x W' + b + scale (x A') B'` for a W (n_out, in) that is zero but for its `rows`.

    Args:
        x: (N, in).
        weight: (k, in), those rows of W, dtype of x; gets no gradient.
        rows: (k,) int64, distinct.
        bias: (n_out,) or None; gets no gradient.
        A, B: (rank, in) and (n_out, rank), floating, or None: an update of all outputs.
        exact: False: no gradient for x through W.

    Returns:
        (N, n_out), dtype of x, or under autocast its own. Differentiable once in x, A and B.
    """
    return apply_fused(_SomeLinear, x, weight, rows, n_out, bias, A, B, scale, exact)


def columns_linear(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    *,
    bias: Tensor | None = None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scale: float = 1.0,
    exact: bool = True,
) -> Tensor:
    """`x W' + b + scale (x A') B'` for a W (out, in) that is zero but for its `columns`.

    As `rows_linear`, but `weight` (k, out) holds those columns of W as rows.
    """
    return apply_fused(_SomeLinear, x, weight, columns, None, bias, A, B, scale, exact)


class _SomeLinear(torch.autograd.Function):
    """Rows of W where `n_out` is given, else columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        index: Tensor,
        n_out: int | None,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        scale: float,
        exact: bool,
    ) -> Tensor:
        by_rows = n_out is not None
        inner = None if A is None else (x @ A.to(x.dtype).t()).mul_(scale)
        if by_rows:
            y = x.new_zeros(len(x), n_out) if inner is None else inner @ B.to(x.dtype).t()
            y.index_add_(1, index, x @ weight.t())
        else:
            y = x.index_select(1, index) @ weight
            if inner is not None:
                y.addmm_(inner, B.to(x.dtype).t())
        if bias is not None:
            y += bias.to(x.dtype)
        ctx.options = by_rows, scale, exact
        # Of x itself only an adapter's gradient makes use.
        ctx.save_for_backward(x if inner is not None else None, weight, index, A, B, inner)
        ctx.n_in = x.shape[1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, index, A, B, inner = ctx.saved_tensors
        by_rows, scale, exact = ctx.options
        grad_x = grad_A = grad_B = grad_inner = None
        if inner is not None:
            grad_inner = (grad @ B.to(grad.dtype)).mul_(scale)
            grad_A = (grad_inner.t() @ x).to(A.dtype) if ctx.needs_input_grad[5] else None
            grad_B = (inner.t() @ grad).t().to(B.dtype) if ctx.needs_input_grad[6] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, grad_A, grad_B, None, None
        if by_rows and exact:
            grad_x = grad.index_select(1, index) @ weight
            if grad_inner is not None:
                grad_x.addmm_(grad_inner, A.to(grad.dtype))
            return grad_x, None, None, None, None, grad_A, grad_B, None, None
        if grad_inner is None:
            grad_x = grad.new_zeros(len(grad), ctx.n_in)
        else:
            grad_x = grad_inner @ A.to(grad.dtype)
        if exact:
            grad_x.index_add_(1, index, grad @ weight.t())
        return grad_x, None, None, None, None, grad_A, grad_B, None, None


def _put(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    out = a.new_empty(len(a) + len(b), *a.shape[1:])
    return out.index_copy_(0, first, a).index_copy_(0, second, b)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, second)
        return x.index_select(0, first), x.index_select(0, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        return _put(grad_a, grad_b, *ctx.saved_tensors), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return _put(a, b, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        return grad.index_select(0, first), grad.index_select(0, second), None, None
