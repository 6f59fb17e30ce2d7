"""A frozen linear layer with a low-rank update, forward and backward, in the fewest passes.

`y = x W' + b + s (x A') B'` (Hu et al. 2021, arXiv:2106.09685, eq. 3). Written out in torch, the
update makes a tensor of y's size and adds it, and its backward pass does the same at x's size; here
both are accumulated by the small matrix product itself.

A and B may be float32 beside a base in half precision: the products are then in the base's
precision, accumulated in float32 inside (as under torch's autocast), and their gradients float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tinyft.kernels.fused import apply_fused, with_lead


def lora_linear_ref(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """`lora_linear` in plain torch, A and B in their own precision."""
    update = linear(linear(x.to(A.dtype), A), B) * scale
    return linear(x, weight, bias) + update.to(x.dtype)


def lora_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """`x W' + b + scale (x A') B'`.

    Args:
        x: (..., in).
        weight: (out, in), dtype of x; gets no gradient.
        A: (rank, in), floating. B: (out, rank).
        bias: (out,) or None; gets no gradient.

    Returns:
        (..., out), dtype of x, or under autocast its own. Differentiable once in x, A and B.
    """
    return apply_fused(_LoRALinear, x, weight, bias, None, A, B, scale)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`y + scale (x A') B'`: for a y (..., out) that another kind of layer made of x."""
    return apply_fused(_LoRALinear, x, None, None, y, A, B, scale, dtype=y.dtype)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ A.to(x.dtype).t()
        B_t = B.to(x.dtype).t()
        if y is None:
            y = linear(rows, weight, None if bias is None else bias.to(x.dtype))
            y.addmm_(inner, B_t, alpha=scale)
        else:
            y = y.reshape(-1, y.shape[-1]).addmm(inner, B_t, alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, weight, A, B, inner)
        return with_lead(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, inner = ctx.saved_tensors
        need_x, _, _, need_y, need_A, need_B, _ = ctx.needs_input_grad
        grad = grad_y.reshape(-1, grad_y.shape[-1])
        grad_x = grad_A = grad_B = None
        if need_x or need_A:
            grad_inner = (grad @ B.to(grad.dtype)) * ctx.scale
        if need_x:
            if weight is None:
                grad_x = grad_inner @ A.to(grad.dtype)
            else:
                grad_x = grad @ weight
                grad_x.addmm_(grad_inner, A.to(grad.dtype))
            grad_x = grad_x.view(x.shape)
        if need_A:
            grad_A = (grad_inner.t() @ x.reshape(-1, x.shape[-1])).to(A.dtype)
        if need_B:
            # Few rows, not few columns: libraries are made for those (MKL: a seventh of the time).
            grad_B = (inner.t() @ grad).t().to(B.dtype).mul_(ctx.scale)
        return grad_x, None, None, grad_y if need_y else None, grad_A, grad_B, None
