"""A frozen linear layer whose weight is packed to 4 bits, forward and backward to the input.

Symmetric quantisation in groups along the input: `w = scale (q - 8)`, q in 0 ... 15, one scale a
group of a row. The entry of a group that is largest in magnitude becomes q = 0, whatever its sign,
so that all 16 levels serve (the scale may be negative); an entry as large on the other side is
clipped to 7/8 of it. At 64 columns a group a weight takes 4.25 bits.

What training on such a base needs is `y = x W'` and `dx = dy W` (Dettmers et al. 2023,
arXiv:2305.14314, eq. 5 and 6, with another data type); W gets no gradient. W is dequantised to the
type of x and multiplied a block at a time, in registers by the Triton kernels: it is never whole.

With activations in 8 bits each row of x is quantised by its largest magnitude, `x = s q`, q in
-127 ... 127, and y is s times the products of integers, whose gradient passes straight through:
dx = dy W. In Triton they are multiplied as integers; a CPU has no product of 8 with 4 bits that
would gain on a product of 16 with 16, so torch multiplies `s q` in the type of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from tinyft.kernels.dispatch import choose
from tinyft.kernels.fused import with_lead

GROUPS = (32, 64, 128)
SCRATCH_ELEMENTS = 1 << 20  # of the weight, dequantised at a time


@dataclass(frozen=True)
class Int4Weight:
    """A packed weight `(out, in)`.

    Attributes:
        packed: `(out, groups * group / 2)` uint8. A group's first half is in the low four bits of
            its bytes and its second half in the high ones: columns of either are neighbours.
        scales: `(out, groups)` float16.
        in_features: columns of the weight; what the last group has beyond them is unused.
    """

    packed: Tensor
    scales: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], self.in_features

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return 2 * self.packed.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype, rows: slice | Tensor, groups: slice) -> Tensor:
        """`W[rows]` in the columns of `groups`, at most `(rows, groups * group)`, of that dtype."""
        half = self.group // 2
        scales = self.scales[rows, groups].to(torch.promote_types(dtype, torch.float32))
        packed = self.packed[rows].view(-1, self.scales.shape[1], half)[:, groups]
        q = torch.cat((packed & 15, packed >> 4), dim=2).view(torch.int8).sub_(8)
        w = q.to(scales.dtype).mul_(scales.unsqueeze(2)).to(dtype).flatten(1)
        return w[:, : self.in_features - (groups.start or 0) * self.group]


EVERY = slice(None)


def pack_int4(weight: Tensor, group: int = 64) -> Int4Weight:
    """Quantise `(out, in)` floating, `group` columns a scale.

    Raises:
        ValueError: `group` is none of `GROUPS`.
    """
    if group not in GROUPS:
        raise ValueError(f"Groups have {', '.join(map(str, GROUPS))} columns; found {group}.")
    out, cols = weight.shape
    w = pad(weight.detach().float(), (0, -cols % group)).view(out, -1, group)
    largest = w.gather(2, w.abs().argmax(2, keepdim=True))
    scales = (largest / -8).half()
    step = scales.float()
    q = (w / step.where(step != 0, 1)).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    low, high = q.chunk(2, dim=2)
    return Int4Weight((low | high << 4).flatten(1), scales.squeeze(2), cols)


def int4_linear_ref(
    x: Tensor, weight: Int4Weight, *, bias: Tensor | None = None, activation_bits: int = 16
) -> Tensor:
    """`int4_linear` in plain torch, the weight dequantised whole."""
    if activation_bits == 8:
        x = x + (in_8_bits(x.detach()) - x).detach()
    return linear(x, weight.dequantize(x.dtype, EVERY, EVERY), bias)


def in_8_bits(x: Tensor) -> Tensor:
    """`s q` of each row of x, in its dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    s = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / s.where(s != 0, 1)).round_().mul_(s).to(x.dtype)


def int4_linear(
    x: Tensor,
    weight: Int4Weight,
    *,
    bias: Tensor | None = None,
    activation_bits: int = 16,
    impl: str = "auto",
) -> Tensor:
    """`x W' + b`.

    Args:
        x: `(..., in)`, floating.
        weight: `(out, in)`, from `pack_int4`.
        bias: `(out,)`, dtype of x, or None; gets no gradient.
        activation_bits: 16 multiplies x as it is (whatever its dtype), 8 quantises each row first.
        impl: see `dispatch`.

    Returns:
        `(..., out)`, dtype of x. Differentiable once in x.

    Raises:
        ValueError: other `activation_bits`.
    """
    if activation_bits not in (16, 8):
        raise ValueError(f"activation_bits is 16 or 8; found {activation_bits}.")
    chosen = choose("int4_linear", impl, x, weight.packed, weight.scales, bias)
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    run = _Int4Linear.apply if wants_gradient else _forward
    return run(x, weight, bias, activation_bits, chosen == "triton")


def _forward(
    x: Tensor, weight: Int4Weight, bias: Tensor | None, activation_bits: int, in_triton: bool
) -> Tensor:
    rows = x.reshape(-1, weight.in_features)
    if in_triton:
        from tinyft.kernels.gpu import int4_linear as gpu

        run = gpu.product_in_8_bits if activation_bits == 8 else gpu.product
        y = run(rows, weight, bias)
    else:
        y = _product(in_8_bits(rows) if activation_bits == 8 else rows, weight, bias)
    return with_lead(y, x)


class _Int4Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Int4Weight,
        bias: Tensor | None,
        activation_bits: int,
        in_triton: bool,
    ) -> Tensor:
        ctx.weight, ctx.in_triton = weight, in_triton
        return _forward(x, weight, bias, activation_bits, in_triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows = ctx.weight, grad_y.reshape(-1, ctx.weight.shape[0])
        if ctx.in_triton:
            from tinyft.kernels.gpu import int4_linear as gpu

            grad_x = gpu.transposed_product(rows, weight)
        else:
            grad_x = _transposed_product(rows, weight)
        return grad_x.view(*grad_y.shape[:-1], weight.in_features), *[None] * 4


def _product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """`x W' + b`, a block of rows of W at a time."""
    if weight.shape[0] * weight.in_features <= SCRATCH_ELEMENTS:
        return linear(x, weight.dequantize(x.dtype, EVERY, EVERY), bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in _slices(weight.shape[0], weight.in_features):
        w = weight.dequantize(x.dtype, rows, EVERY)
        product_into(y[:, rows], x, w, None if bias is None else bias[rows])
    return y


def product_into(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """`y = x w' + b`, rounded once, where y `(m, n)` may be some columns of a wider matrix."""
    if bias is None:
        torch.mm(x, w.t(), out=y)
    else:
        torch.addmm(bias, x, w.t(), out=y)


def _transposed_product(grad_y: Tensor, weight: Int4Weight) -> Tensor:
    """`dy W`, a block of columns of W at a time: every result is summed by one product."""
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.in_features)
    group = weight.group
    for groups in _slices(weight.scales.shape[1], group * weight.shape[0]):
        w = weight.dequantize(grad_y.dtype, EVERY, groups)
        torch.mm(grad_y, w, out=grad_x[:, groups.start * group : groups.stop * group])
    return grad_x


def _slices(count: int, elements: int) -> Iterator[slice]:
    """`0 ... count - 1` in slices of `SCRATCH_ELEMENTS`, at `elements` each."""
    step = max(1, SCRATCH_ELEMENTS // elements)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
