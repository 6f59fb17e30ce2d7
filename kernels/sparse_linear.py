"""Products with selected blocks of a frozen weight's rows, forward and backward to the input.

What SparseLoRA multiplies (Khaki et al. 2025, arXiv:2506.16500): of W `(out, in)` only the rows of
the chosen channels R. Gate and up projections are `x W[R]'`; the down projection, whose channels
are columns, is stored transposed and is `x W[R]`. Each is the other's backward pass:

    y = x W[R]'    dx = dy W[R]
    y = x W[R]     dx = dy W[R]'

`sparse_gate_up` is the first half of a gated MLP in one pass over x, `f(x G[R]') (x U[R]')`.

Channels come in blocks of neighbours, so that rows are read in runs. In torch the rows are copied,
dequantised where the weight is packed, and multiplied; the copy is kept for the backward pass where
it is no larger than x, and else made again. The Triton kernels read, and dequantise in registers,
the rows where they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, relu, silu

from tinyft.kernels.dispatch import choose
from tinyft.kernels.fused import with_lead
from tinyft.kernels.packed import Weight, rows_of, tensors_of

aten = torch.ops.aten
# By name: f, and what f's argument gets of the gradient of its result.
ACTIVATIONS = {
    "silu": (silu, aten.silu_backward),
    "gelu": (gelu, aten.gelu_backward),
    "gelu_tanh": (
        partial(gelu, approximate="tanh"),
        partial(aten.gelu_backward, approximate="tanh"),
    ),
    "relu": (relu, partial(aten.threshold_backward, threshold=0)),
}


def sparse_linear_ref(
    x: Tensor, weight: Weight, blocks: Tensor, block_size: int, *, transposed: bool = False
) -> Tensor:
    """`sparse_linear` in plain torch, by autograd."""
    rows = _selected(weight, blocks, block_size, x.dtype)
    return x @ (rows if transposed else rows.T)


def sparse_linear(
    x: Tensor,
    weight: Weight,
    blocks: Tensor,
    block_size: int,
    *,
    transposed: bool = False,
    impl: str = "auto",
) -> Tensor:
    """`x W[R]'`, or `x W[R]` if transposed; R are the rows of `blocks`, in their order.

    Args:
        x: `(..., in)`, or `(..., len(blocks) * block_size)` if transposed; floating.
        weight: `(out, in)`, dtype of x, or packed (`pack_int4`, `pack_int8`); gets no gradient.
        blocks: `(k,)` int64, each in `0 ... out / block_size - 1`; not checked.
        block_size: rows of a block, a divisor of `out`.
        impl: see `dispatch`.

    Returns:
        `(..., len(blocks) * block_size)`, or `(..., in)` if transposed; dtype of x. Differentiable
        once in x.

    Raises:
        ValueError: `block_size` does not divide `out`, or x has another width.
    """
    _check("sparse_linear", x, weight, blocks, block_size, transposed)
    chosen = choose("sparse_linear", impl, x, *tensors_of(weight), blocks)
    return _SparseLinear.apply(x, weight, blocks, block_size, transposed, chosen == "triton")


def sparse_gate_up_ref(
    x: Tensor, gate: Weight, up: Weight, blocks: Tensor, block_size: int, *, activation: str
) -> Tensor:
    """`sparse_gate_up` in plain torch, by autograd."""
    a, b = (sparse_linear_ref(x, weight, blocks, block_size) for weight in (gate, up))
    return ACTIVATIONS[activation][0](a) * b


def sparse_gate_up(
    x: Tensor,
    gate: Weight,
    up: Weight,
    blocks: Tensor,
    block_size: int,
    *,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """`f(x gate[R]') (x up[R]')`: what the down projection of a gated MLP takes.

    Args:
        x, blocks, block_size, impl: as for `sparse_linear`.
        gate, up: as its `weight`, both of one shape and format.
        activation: f, one of `ACTIVATIONS`; `gelu_tanh` is GELU's usual approximation.

    Returns:
        `(..., len(blocks) * block_size)`, dtype of x. Differentiable once in x.

    Raises:
        ValueError: another activation, other shapes, or as for `sparse_linear`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; found {activation!r}.")
    if type(gate) is not type(up) or tuple(gate.shape) != tuple(up.shape):
        raise ValueError(
            f"gate and up are weights of one shape and format; found {type(gate).__name__} "
            f"{tuple(gate.shape)} and {type(up).__name__} {tuple(up.shape)}."
        )
    _check("sparse_gate_up", x, gate, blocks, block_size, transposed=False)
    tensors = x, *tensors_of(gate), *tensors_of(up), blocks
    in_triton = choose("sparse_gate_up", impl, *tensors) == "triton"
    return _SparseGateUp.apply(x, gate, up, blocks, block_size, activation, in_triton)


def _check(
    op: str, x: Tensor, weight: Weight, blocks: Tensor, block_size: int, transposed: bool
) -> None:
    if block_size < 1 or weight.shape[0] % block_size:
        raise ValueError(
            f"A weight of {weight.shape[0]} rows has no whole number of blocks of {block_size}."
        )
    width = len(blocks) * block_size if transposed else weight.shape[1]
    if x.shape[-1] != width:
        raise ValueError(f"{op} wants x of width {width}; found {tuple(x.shape)}.")


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        blocks: Tensor,
        block_size: int,
        transposed: bool,
        in_triton: bool,
    ) -> Tensor:
        ctx.arguments = weight, blocks.contiguous(), block_size
        ctx.transposed, ctx.in_triton = transposed, in_triton
        if in_triton:
            return _in_triton(x, *ctx.arguments, transposed)
        rows = _selected(*ctx.arguments, x.dtype)
        ctx.save_for_backward(_kept(rows, x, ctx.needs_input_grad[0]))
        return x @ (rows if transposed else rows.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_triton:
            grad_x = _in_triton(grad, *ctx.arguments, not ctx.transposed)
        else:
            (rows,) = ctx.saved_tensors
            rows = _selected(*ctx.arguments, grad.dtype) if rows is None else rows
            grad_x = grad @ (rows.T if ctx.transposed else rows)
        return grad_x, None, None, None, None, None


class _SparseGateUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Weight,
        up: Weight,
        blocks: Tensor,
        block_size: int,
        activation: str,
        in_triton: bool,
    ) -> Tensor:
        ctx.arguments = gate, up, blocks.contiguous(), block_size
        ctx.activation, ctx.in_triton = activation, in_triton
        rows = x.reshape(-1, x.shape[-1])
        if in_triton:
            from tinyft.kernels.gpu import sparse_linear as gpu

            keep = ctx.needs_input_grad[0]
            h, a, b = gpu.gate_up(rows.contiguous(), *ctx.arguments, activation, keep)
            weights = None, None
        else:
            weights = [_selected(w, blocks, block_size, x.dtype) for w in (gate, up)]
            a, b = (rows @ weight.T for weight in weights)
            h = ACTIVATIONS[activation][0](a).mul_(b)
            weights = [_kept(weight, x, ctx.needs_input_grad[0]) for weight in weights]
        ctx.save_for_backward(a, b, *weights)
        return with_lead(h, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *weights = ctx.saved_tensors
        gate, up, blocks, block_size = ctx.arguments
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.in_triton:
            from tinyft.kernels.gpu import sparse_linear as gpu

            grad_x = gpu.gate_up_backward(rows.contiguous(), a, b, *ctx.arguments, ctx.activation)
        else:
            f, f_backward = ACTIVATIONS[ctx.activation]
            gates, ups = (
                _selected(w, blocks, block_size, a.dtype) if kept is None else kept
                for w, kept in zip((gate, up), weights, strict=True)
            )
            grad_x = f_backward(rows * b, a) @ gates
            grad_x.addmm_(f(a).mul_(rows), ups)
        return grad_x.view(*grad.shape[:-1], gate.shape[1]), *[None] * 6


def _in_triton(
    x: Tensor, weight: Weight, blocks: Tensor, block_size: int, transposed: bool
) -> Tensor:
    from tinyft.kernels.gpu import sparse_linear as gpu

    run = gpu.transposed_product if transposed else gpu.product
    y = run(x.reshape(-1, x.shape[-1]).contiguous(), weight, blocks, block_size)
    return with_lead(y, x)


def _kept(rows: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
    """The copied rows, where a backward pass is to come and they are no larger than its x."""
    return rows if wanted and rows.numel() <= x.numel() else None


def _selected(weight: Weight, blocks: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """`W[R]`, a copy."""
    if isinstance(weight, Tensor):
        return weight.view(-1, block_size, weight.shape[1])[blocks].flatten(0, 1)
    inside = torch.arange(block_size, device=blocks.device)
    return rows_of(weight, (blocks.unsqueeze(1) * block_size + inside).flatten(), dtype)
