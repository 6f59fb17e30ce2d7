"""Triton twin of `tinyft.kernels.int4_linear`. GPU speed unmeasured.

A byte holds two columns that are half a group apart, so that a group is two tiles of W, each beside
contiguous columns of x: nothing is interleaved, and every row has one scale. With activations in 8
bits a group's products are summed as integers and scaled once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels.dispatch import launch
from tinyft.kernels.gpu.common import cast, dot, nearest

if TYPE_CHECKING:
    from tinyft.kernels.int4_linear import Int4Weight


@triton.jit
def weight_tiles(
    packed, scales, at_n, n, groups, step, HALF: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Tiles `(len(at_n), K)` of both halves of a group, 0 beyond row n.

    `step` counts tiles along a row, `HALF / K` a group.
    """
    group, offset = step * K // HALF, step * K % HALF
    live = at_n < n
    row = at_n.to(tl.int64) * groups + group
    scale = tl.load(scales + row, live, 0.0).to(tl.float32)[:, None]
    columns = offset + tl.arange(0, K)[None, :]
    both = tl.load(packed + row[:, None] * HALF + columns, live[:, None], 0).to(tl.int32)
    low = ((both & 15) - 8).to(tl.float32) * scale
    high = ((both >> 4) - 8).to(tl.float32) * scale
    return cast(low, DTYPE), cast(high, DTYPE)


@triton.jit
def columns_of(step, HALF: tl.constexpr, K: tl.constexpr):
    """Columns `(1, K)` of the tile in the first half; the other tile is `HALF` columns on."""
    return (step * K // HALF * 2 * HALF + step * K % HALF + tl.arange(0, K))[None, :]


@triton.jit
def int4_product_kernel(
    x, packed, scales, bias, y, m, n, k, groups,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = x W' + b; x `(m, k)`, W `(n, k)`, y `(m, n)`."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    at_n = tl.program_id(0) // tiles_m * N + tl.arange(0, N)
    live_m = (at_m < m)[:, None]
    x_rows = x + at_m[:, None].to(tl.int64) * k
    sums = tl.zeros((M, N), tl.float32)
    for step in range(0, groups * (HALF // K)):
        low, high = weight_tiles(packed, scales, at_n, n, groups, step, HALF, K, x.dtype.element_ty)
        at_k = columns_of(step, HALF, K)
        x_low = tl.load(x_rows + at_k, live_m & (at_k < k), 0.0)
        x_high = tl.load(x_rows + at_k + HALF, live_m & (at_k + HALF < k), 0.0)
        sums = dot(x_low, tl.trans(low), sums)
        sums = dot(x_high, tl.trans(high), sums)
    if bias is not None:
        sums += tl.load(bias + at_n, at_n < n, 0.0).to(tl.float32)[None, :]
    out = y + at_m[:, None].to(tl.int64) * n + at_n[None, :]
    tl.store(out, cast(sums, y.dtype.element_ty), live_m & (at_n < n)[None, :])


@triton.jit
def int4_transposed_kernel(
    grad_y, packed, scales, grad_x, m, n, k, groups,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """dx = dy W in K columns of either half of a group, summed over tiles of N rows of W."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    step = tl.program_id(0) // tiles_m
    live_m = (at_m < m)[:, None]
    grad_rows = grad_y + at_m[:, None].to(tl.int64) * n
    sum_low = tl.zeros((M, K), tl.float32)
    sum_high = tl.zeros((M, K), tl.float32)
    dtype: tl.constexpr = grad_x.dtype.element_ty
    for first in range(0, n, N):
        at_n = first + tl.arange(0, N)
        low, high = weight_tiles(packed, scales, at_n, n, groups, step, HALF, K, dtype)
        grad = tl.load(grad_rows + at_n[None, :], live_m & (at_n < n)[None, :], 0.0)
        sum_low = dot(grad, low, sum_low)
        sum_high = dot(grad, high, sum_high)
    at_k = columns_of(step, HALF, K)
    out = grad_x + at_m[:, None].to(tl.int64) * k + at_k
    tl.store(out, cast(sum_low, dtype), live_m & (at_k < k))
    tl.store(out + HALF, cast(sum_high, dtype), live_m & (at_k + HALF < k))


@triton.jit
def rows_in_8_bits_kernel(x, q, scales, k, BLOCK: tl.constexpr):
    """q, int8, and scales so that x is about scales q; a row a program."""
    row = tl.program_id(0).to(tl.int64) * k
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, k, BLOCK):
        at = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + row + at, at < k, 0.0).to(tl.float32)))
    s = tl.div_rn(tl.max(largest, 0), 127.0)
    tl.store(scales + tl.program_id(0), s)
    s = tl.where(s == 0, 1.0, s)
    for first in range(0, k, BLOCK):
        at = first + tl.arange(0, BLOCK)
        v = tl.load(x + row + at, at < k, 0.0).to(tl.float32)
        tl.store(q + row + at, nearest(tl.div_rn(v, tl.zeros_like(v) + s)).to(tl.int8), at < k)


@triton.jit
def int4_int8_product_kernel(
    q, q_scales, packed, scales, bias, y, m, n, k, groups,
    M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = q_scales q W' + b; q `(m, k)` int8, W `(n, k)`, y `(m, n)`."""
    HALF: tl.constexpr = GROUP // 2
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    at_n = tl.program_id(0) // tiles_m * N + tl.arange(0, N)
    live_m, live_n = (at_m < m)[:, None], at_n < n
    q_rows = q + at_m[:, None].to(tl.int64) * k
    sums = tl.zeros((M, N), tl.float32)
    for group in range(0, groups):
        row = at_n.to(tl.int64) * groups + group
        whole = tl.zeros((M, N), tl.int32)
        for part in tl.static_range(GROUP // 32):  # an integer product has at least 32 terms
            inside = part * 32 + tl.arange(0, 32)[None, :]
            at_k = group * GROUP + inside
            byte = tl.load(packed + row[:, None] * HALF + inside % HALF, live_n[:, None], 0)
            w = ((byte.to(tl.int32) >> (inside // HALF * 4)) & 15) - 8
            xs = tl.load(q_rows + at_k, live_m & (at_k < k), 0)
            whole = tl.dot(xs, tl.trans(w.to(tl.int8)), whole, out_dtype=tl.int32)
        sums += whole.to(tl.float32) * tl.load(scales + row, live_n, 0.0).to(tl.float32)[None, :]
    sums *= tl.load(q_scales + at_m, at_m < m, 0.0)[:, None]
    if bias is not None:
        sums += tl.load(bias + at_n, live_n, 0.0).to(tl.float32)[None, :]
    out = y + at_m[:, None].to(tl.int64) * n + at_n[None, :]
    tl.store(out, cast(sums, y.dtype.element_ty), live_m & live_n[None, :])


def product(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """`x W' + b` for x `(m, in)`."""
    m, (n, k) = x.shape[0], weight.shape
    y = x.new_empty(m, n)
    size = tiles(m, weight.group // 2, x.dtype)
    launch(
        int4_product_kernel,
        (triton.cdiv(m, size["M"]) * triton.cdiv(n, size["N"]),),
        *(x.contiguous(), weight.packed, weight.scales, bias, y, m, n, k, weight.scales.shape[1]),
        **{"HALF": weight.group // 2, **size},
    )
    return y


def product_in_8_bits(x: Tensor, weight: Int4Weight, bias: Tensor | None) -> Tensor:
    """`x W' + b` for x `(m, in)`, its rows quantised first."""
    m, (n, k) = x.shape[0], weight.shape
    q, q_scales = x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    launch(rows_in_8_bits_kernel, (m,), x.contiguous(), q, q_scales, k, BLOCK=1024, num_warps=4)
    y = x.new_empty(m, n)
    M, N, num_warps = (16, 32, 4) if m <= 16 else (64, 64, 8)
    launch(
        int4_int8_product_kernel,
        (triton.cdiv(m, M) * triton.cdiv(n, N),),
        *(q, q_scales, weight.packed, weight.scales, bias, y, m, n, k, weight.scales.shape[1]),
        **{"M": M, "N": N, "GROUP": weight.group},
        num_warps=num_warps,
        num_stages=2,
    )
    return y


def transposed_product(grad_y: Tensor, weight: Int4Weight) -> Tensor:
    """`dy W` for dy `(m, out)`."""
    m, (n, k), groups = grad_y.shape[0], weight.shape, weight.scales.shape[1]
    grad_x = grad_y.new_empty(m, k)
    size = tiles(m, weight.group // 2, grad_y.dtype)
    launch(
        int4_transposed_kernel,
        (triton.cdiv(m, size["M"]) * groups * (weight.group // 2 // size["K"]),),
        *(grad_y.contiguous(), weight.packed, weight.scales, grad_x, m, n, k, groups),
        **{"HALF": weight.group // 2, **size},
    )
    return grad_x


def tiles(m: int, half: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes of a product with `m` rows: the largest that no target spills registers at."""
    if dtype == torch.float32:
        M, N, K, num_warps = (16, 32, 16, 4) if m <= 16 else (32, 32, 16, 8)
    else:
        M, N, K, num_warps = (16, 32, 32, 4) if m <= 16 else (64, 32, 32, 8)
    return {"M": M, "N": N, "K": min(K, half), "num_warps": num_warps, "num_stages": 2}
