"""Triton twin of `tinyft.kernels.sparse_linear`: rows are gathered as they are loaded. GPU speed
unmeasured."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels.dispatch import launch
from tinyft.kernels.gpu.common import cast, dot, operands, weight_tile
from tinyft.kernels.packed import Weight

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
CODES = {"silu": SILU.value, "gelu": GELU.value, "gelu_tanh": GELU_TANH.value, "relu": 3}


@triton.jit
def rows_of(blocks, at, n, SIZE: tl.constexpr):
    """Which rows of the weight the selected rows number `at` are; row 0 beyond the last."""
    return tl.load(blocks + at // SIZE, at < n, 0) * SIZE + tl.where(at < n, at % SIZE, 0)


@triton.jit
def activation(a, KIND: tl.constexpr):
    """f(a) and f'(a)."""
    if KIND == SILU:
        s = 1 / (1 + tl.exp(-a))
        return a * s, s * (1 + a * (1 - s))
    elif KIND == GELU:
        below = 0.5 * (1 + tl.erf(a * 0.7071067811865476))
        return a * below, below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    elif KIND == GELU_TANH:
        u = 0.7978845608028654 * a * (1 + 0.044715 * a * a)
        e = tl.exp(-2 * tl.abs(u))  # at most 1
        tanh = tl.where(u < 0, (e - 1) / (1 + e), (1 - e) / (1 + e))
        slope = 0.7978845608028654 * (1 + 0.134145 * a * a)
        return 0.5 * a * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * a * (1 - tanh * tanh) * slope
    else:
        return tl.maximum(a, 0.0), tl.where(a > 0, 1.0, 0.0)


@triton.jit(do_not_specialize=["m"])
def sparse_product_kernel(
    x, weight, scales, blocks, y, m, n, k,
    SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = x W[R]'; x `(m, k)`, n selected rows, y `(m, n)`."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    at_n = tl.program_id(0) // tiles_m * N + tl.arange(0, N)
    live_m = (at_m < m)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    x_rows = x + at_m[:, None].to(tl.int64) * k
    w_rows = rows_of(blocks, at_n, n, SIZE)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, k, K):
        at_k = (first + tl.arange(0, K))[None, :]
        xs = tl.load(x_rows + at_k, live_m & (at_k < k), 0.0)
        w = weight_tile(weight, scales, w_rows, at_n < n, first, k, K, BITS, HALF, dtype)
        sums = dot(xs, tl.trans(w), sums)
    out = y + at_m[:, None].to(tl.int64) * n + at_n[None, :]
    tl.store(out, cast(sums, dtype), live_m & (at_n < n)[None, :])


@triton.jit(do_not_specialize=["m"])
def sparse_transposed_kernel(
    x, weight, scales, blocks, y, m, n, k,
    SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = x W[R]; x `(m, n)`, n selected rows, y `(m, k)`, summed over tiles of K rows."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    first_k = tl.program_id(0) // tiles_m * N
    live_m = (at_m < m)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    x_rows = x + at_m[:, None].to(tl.int64) * n
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, n, K):
        at_n = first + tl.arange(0, K)
        w_rows = rows_of(blocks, at_n, n, SIZE)
        xs = tl.load(x_rows + at_n[None, :], live_m & (at_n < n)[None, :], 0.0)
        w = weight_tile(weight, scales, w_rows, at_n < n, first_k, k, N, BITS, HALF, dtype)
        sums = dot(xs, w, sums)
    columns = (first_k + tl.arange(0, N))[None, :]
    out = y + at_m[:, None].to(tl.int64) * k + columns
    tl.store(out, cast(sums, dtype), live_m & (columns < k))


@triton.jit(do_not_specialize=["m"])
def gate_up_kernel(
    x, gate, gate_scales, up, up_scales, blocks, h, a, b, m, n, k,
    SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """h = f(a) b with a = x G[R]' and b = x U[R]', `(m, n)`; a and b are stored if wanted."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    at_n = tl.program_id(0) // tiles_m * N + tl.arange(0, N)
    live_m = (at_m < m)[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    x_rows = x + at_m[:, None].to(tl.int64) * k
    w_rows = rows_of(blocks, at_n, n, SIZE)
    sum_a = tl.zeros((M, N), tl.float32)
    sum_b = tl.zeros((M, N), tl.float32)
    for first in range(0, k, K):
        at_k = (first + tl.arange(0, K))[None, :]
        xs = tl.load(x_rows + at_k, live_m & (at_k < k), 0.0)
        g = weight_tile(gate, gate_scales, w_rows, at_n < n, first, k, K, BITS, HALF, dtype)
        sum_a = dot(xs, tl.trans(g), sum_a)
        u = weight_tile(up, up_scales, w_rows, at_n < n, first, k, K, BITS, HALF, dtype)
        sum_b = dot(xs, tl.trans(u), sum_b)
    at = at_m[:, None].to(tl.int64) * n + at_n[None, :]
    live = live_m & (at_n < n)[None, :]
    f, _ = activation(sum_a, KIND)
    tl.store(h + at, cast(f * sum_b, dtype), live)
    if a is not None:
        tl.store(a + at, cast(sum_a, dtype), live)
        tl.store(b + at, cast(sum_b, dtype), live)


@triton.jit(do_not_specialize=["m"])
def gate_up_backward_kernel(
    grad_h, a, b, gate, gate_scales, up, up_scales, blocks, grad_x, m, n, k,
    SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """dx = (dh b f'(a)) G[R] + (dh f(a)) U[R], the factors made where they are multiplied."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    first_k = tl.program_id(0) // tiles_m * N
    live_m = (at_m < m)[:, None]
    dtype: tl.constexpr = grad_h.dtype.element_ty
    sums = tl.zeros((M, N), tl.float32)
    for first in range(0, n, K):
        at_n = first + tl.arange(0, K)
        w_rows = rows_of(blocks, at_n, n, SIZE)
        at = at_m[:, None].to(tl.int64) * n + at_n[None, :]
        live = live_m & (at_n < n)[None, :]
        grad = tl.load(grad_h + at, live, 0.0).to(tl.float32)
        f, slope = activation(tl.load(a + at, live, 0.0).to(tl.float32), KIND)
        bs = tl.load(b + at, live, 0.0).to(tl.float32)
        g = weight_tile(gate, gate_scales, w_rows, at_n < n, first_k, k, N, BITS, HALF, dtype)
        sums = dot(cast(grad * bs * slope, dtype), g, sums)
        u = weight_tile(up, up_scales, w_rows, at_n < n, first_k, k, N, BITS, HALF, dtype)
        sums = dot(cast(grad * f, dtype), u, sums)
    columns = (first_k + tl.arange(0, N))[None, :]
    out = grad_x + at_m[:, None].to(tl.int64) * k + columns
    tl.store(out, cast(sums, dtype), live_m & (columns < k))


def product(x: Tensor, weight: Weight, blocks: Tensor, block_size: int) -> Tensor:
    """`x W[R]'` for x `(m, in)`."""
    numbers, constants = operands(weight)
    y = x.new_empty(x.shape[0], len(blocks) * block_size)
    _launch(
        sparse_product_kernel, y, (x, *numbers, blocks, y), weight, blocks, block_size, constants
    )
    return y


def transposed_product(x: Tensor, weight: Weight, blocks: Tensor, block_size: int) -> Tensor:
    """`x W[R]` for x `(m, selected)`."""
    numbers, constants = operands(weight)
    y = x.new_empty(x.shape[0], weight.shape[1])
    args = x, *numbers, blocks, y
    _launch(sparse_transposed_kernel, y, args, weight, blocks, block_size, constants)
    return y


def gate_up(
    x: Tensor,
    gate: Weight,
    up: Weight,
    blocks: Tensor,
    block_size: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """h, and a and b if they are to be kept, for x `(m, in)`."""
    (gates, constants), (ups, _) = operands(gate), operands(up)
    h = x.new_empty(x.shape[0], len(blocks) * block_size)
    a, b = (torch.empty_like(h), torch.empty_like(h)) if keep else (None, None)
    args = x, *gates, *ups, blocks, h, a, b
    constants["KIND"] = CODES[activation]
    _launch(gate_up_kernel, h, args, gate, blocks, block_size, constants)
    return h, a, b


def gate_up_backward(
    grad_h: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Weight,
    up: Weight,
    blocks: Tensor,
    block_size: int,
    activation: str,
) -> Tensor:
    """dx for dh, a and b `(m, selected)`."""
    (gates, constants), (ups, _) = operands(gate), operands(up)
    grad_x = grad_h.new_empty(grad_h.shape[0], gate.shape[1])
    args = grad_h, a, b, *gates, *ups, blocks, grad_x
    constants["KIND"] = CODES[activation]
    # With 32 rows of both weights at a time gfx1100 spills.
    _launch(gate_up_backward_kernel, grad_x, args, gate, blocks, block_size, constants, K=16)
    return grad_x


def _launch(
    kernel: triton.JITFunction,
    y: Tensor,
    args: tuple,
    weight: Weight,
    blocks: Tensor,
    block_size: int,
    constants: dict[str, Any],
    K: int = 32,
) -> None:
    """A program a tile of y."""
    m, n, k = y.shape[0], len(blocks) * block_size, weight.shape[1]
    if y.dtype == torch.float32:
        M, N, num_warps = (16, 32, 4) if m <= 16 else (32, 32, 8)
    else:
        M, N, num_warps = (16, 64, 4) if m <= 16 else (64, 64, 8)
    if constants["BITS"] == 4:
        N = 32  # columns of a tile are of one group
    launch(
        kernel,
        (triton.cdiv(m, M) * triton.cdiv(y.shape[1], N),),
        *(*args, m, n, k),
        **{"SIZE": block_size, "M": M, "N": N, "K": K, **constants},
        num_warps=num_warps,
        num_stages=2,
    )
