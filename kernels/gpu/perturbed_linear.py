"""Triton twin of `tinyft.kernels.perturbed_linear`. GPU speed unmeasured.

A program makes one tile of y for both signs: W's tile is loaded and Z's drawn once, and two
products follow. Programs that share a tile of W are neighbours, so that it comes from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels import philox
from tinyft.kernels.dispatch import launch, signed
from tinyft.kernels.gpu.common import cast, dot, operands, weight_tile
from tinyft.kernels.gpu.philox import (
    GAUSSIANS,
    SCALARS,
    SIGNS,
    blocks,
    pick,
    sign_vector,
    spread_signs,
    tile,
)

if TYPE_CHECKING:
    from tinyft.kernels.packed import Weight
    from tinyft.kernels.perturbed_linear import Direction, Terms

RANK1 = tl.constexpr(2)
HADAMARD = tl.constexpr(3)
CODES = {
    "rademacher": SIGNS.value,
    "gaussian": GAUSSIANS.value,
    "sign-rank1": RANK1.value,
    "hadamard": HADAMARD.value,
}


@triton.jit
def sign_columns(rows, first, blocks_per_row, key0, key1, tensor, step, stream):
    """Signs `(len(rows), 32)` of columns `first ... first + 31`, a multiple of 32: one word a row.

    The block's other words are drawn again for the next columns. That is 2.5 integer operations an
    element; holding them would unroll the caller's loop four times, which spills on gfx1100.
    """
    index = rows.to(tl.int64) * blocks_per_row + first // 128
    w0, w1, w2, w3 = blocks(index, key0, key1, tensor, step, stream)
    word = pick(first % 128 // 32, w0, w1, w2, w3)
    return spread_signs(word[:, None], tl.arange(0, 32)[None, :])


@triton.jit
def hadamard_sign(i):
    """`(-1)^popcount(i)` in float32 for int32 i of 0 or more."""
    i ^= i >> 16
    i ^= i >> 8
    i ^= i >> 4
    i ^= i >> 2
    i ^= i >> 1
    return (((i & 1) << 31) | 0x3F800000).to(tl.float32, bitcast=True)


# A single row a copy would make a Python integer of m.
@triton.jit(do_not_specialize=["m", *SCALARS])
def dense_kernel(
    x, weight, w_scales, bias, y, table, m, n, k, blocks_per_row, scale0, scale1,
    key0, key1, tensor, step, stream,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, COPIES: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y_g = x_g (W + scale_g Z)' + b; x `(COPIES * m, k)`, W `(n, k)`, y `(COPIES * m, n)`."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    at_n = tl.program_id(0) // tiles_m * N + tl.arange(0, N)
    live_m, w_rows = (at_m < m)[:, None], at_n.to(tl.int64)
    x_rows = x + at_m[:, None].to(tl.int64) * k
    sum0 = tl.zeros((M, N), tl.float32)
    sum1 = tl.zeros((M, N), tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty
    for first in range(0, k, K):
        if KIND == SIGNS:
            z = sign_columns(at_n, first, blocks_per_row, key0, key1, tensor, step, stream)
        else:
            z = tile(
                at_n, first, blocks_per_row, table, key0, key1, tensor, step, stream, K, KIND
            )  # fmt: skip
            z = cast(z, dtype).to(tl.float32)  # as the reference has it
        at_k = (first + tl.arange(0, K))[None, :]
        live_k = at_k < k
        # Beyond column k, Z is not zero but x is.
        w = weight_tile(weight, w_scales, w_rows, at_n < n, first, k, K, BITS, HALF, dtype)
        w = w.to(tl.float32)
        x0 = tl.load(x_rows + at_k, live_m & live_k, 0.0)
        sum0 = dot(x0, tl.trans(cast(w + scale0 * z, dtype)), sum0)
        if COPIES == 2:
            x1 = tl.load(x_rows + m.to(tl.int64) * k + at_k, live_m & live_k, 0.0)
            sum1 = dot(x1, tl.trans(cast(w + scale1 * z, dtype)), sum1)
    if bias is not None:
        b = tl.load(bias + at_n, at_n < n, 0.0).to(tl.float32)[None, :]
        sum0 += b
        sum1 += b
    out = y + at_m[:, None].to(tl.int64) * n + at_n[None, :]
    live = live_m & (at_n < n)[None, :]
    tl.store(out, cast(sum0, y.dtype.element_ty), live)
    if COPIES == 2:
        tl.store(out + m.to(tl.int64) * n, cast(sum1, y.dtype.element_ty), live)


@triton.jit(do_not_specialize=[*SCALARS[:-1], "left", "right"])
def structured_kernel(
    x, weight, w_scales, bias, y, m, n, k, per_copy, scale0, scale1,
    key0, key1, tensor, step, left, right,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """y = x W' + s x Z' + b, s by the row: scale0 before row `per_copy`, scale1 from there."""
    tiles_m = tl.cdiv(m, M)
    at_m = tl.program_id(0) % tiles_m * M + tl.arange(0, M)
    first_n = tl.program_id(0) // tiles_m * N
    at_n = first_n + tl.arange(0, N)
    live_m, w_rows = (at_m < m)[:, None], at_n.to(tl.int64)
    x_rows = x + at_m[:, None].to(tl.int64) * k
    dtype: tl.constexpr = x.dtype.element_ty
    u = sign_vector(first_n, key0, key1, tensor, step, left, N)
    scale = tl.where(at_m < per_copy, scale0, scale1)[:, None]
    row = tl.arange(0, 1)
    sums = tl.zeros((M, N), tl.float32)
    inner = tl.zeros((M,), tl.float32)
    if KIND == HADAMARD:
        # Z first, so that its sum can be scaled: x is read twice, W once. H[i, first + j] is
        # H[i, first] H[i, j] for j < 32, since `first` is a multiple of it.
        low = hadamard_sign(at_n[:, None] & tl.arange(0, K)[None, :])
        for first in range(0, k, K):
            at_k = (first + tl.arange(0, K))[None, :]
            xs = tl.load(x_rows + at_k, live_m & (at_k < k), 0.0)
            v = sign_columns(row, first, 0, key0, key1, tensor, step, right)
            z = low * (u * hadamard_sign(at_n & first))[:, None] * v
            sums = dot(xs, tl.trans(cast(z, dtype)), sums)
        sums *= scale
    for first in range(0, k, K):
        at_k = (first + tl.arange(0, K))[None, :]
        w = weight_tile(weight, w_scales, w_rows, at_n < n, first, k, K, BITS, HALF, dtype)
        xs = tl.load(x_rows + at_k, live_m & (at_k < k), 0.0)
        sums = dot(xs, tl.trans(w), sums)
        if KIND == RANK1:
            v = sign_columns(row, first, 0, key0, key1, tensor, step, right)
            inner += tl.sum(xs.to(tl.float32) * v, 1)
    if KIND == RANK1:
        sums += scale * inner[:, None] * u[None, :]
    if bias is not None:
        sums += tl.load(bias + at_n, at_n < n, 0.0).to(tl.float32)[None, :]
    out = y + at_m[:, None].to(tl.int64) * n + at_n[None, :]
    tl.store(out, cast(sums, y.dtype.element_ty), live_m & (at_n < n)[None, :])


@triton.jit(do_not_specialize=[*SCALARS, "left", "right", "start", "offset"])
def subtract_kernel(
    w, dither, table, counters, factors, count, n, cols, start, blocks_per_row, shrink, offset,
    key0, key1, tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """w = shrink w - sum_k c_k Z_k[start:], `(n, cols)`; see `subtract_directions_` for the
    rounding. `counters` `(count, 4)` int32: step and streams of each Z; `factors` `(count,)`: c."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    live = (at < n)[:, None] & (column < cols)[None, :]
    linear = at[:, None].to(tl.int64) * cols + column[None, :]
    wide = tl.load(w + linear, live, 0.0).to(tl.float32) * shrink
    for k in range(count):
        step = tl.load(counters + 4 * k)
        if KIND == RANK1 or KIND == HADAMARD:
            left, right = tl.load(counters + 4 * k + 2), tl.load(counters + 4 * k + 3)
            u = sign_vector(start + tl.program_id(0) * ROWS, key0, key1, tensor, step, left, ROWS)
            z = u[:, None] * sign_vector(first, key0, key1, tensor, step, right, COLUMNS)[None, :]
            if KIND == HADAMARD:
                z *= hadamard_sign((start + at)[:, None] & column[None, :])
        else:
            stream = tl.load(counters + 4 * k + 1)
            z = tile(
                start + at, first, blocks_per_row, table, key0, key1, tensor, step, stream,
                COLUMNS, KIND,
            )  # fmt: skip
        wide -= tl.load(factors + k) * z
    if dither is not None:
        noise = tl.load(dither + ((linear + offset) & 0xFFFF), live, 0)
        if w.dtype.element_ty == tl.bfloat16:  # a bfloat16 is the upper half of a float32
            bits = (wide.to(tl.int32, bitcast=True) + noise) >> 16
            tl.store(w + linear, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), live)
            return
        bits = (wide.to(tl.int32, bitcast=True) + (noise & 0x1FFF)) & ~0x1FFF
        wide = bits.to(tl.float32, bitcast=True)
    tl.store(w + linear, cast(wide, w.dtype.element_ty), live)


def tiles(m: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes of a product with `m` rows: the largest that no target spills registers at."""
    large = (32, 32, 8) if dtype == torch.float32 else (64, 64, 8)
    size = (16, 32, 4) if m <= 16 else large
    return dict(zip(("M", "N", "num_warps"), size, strict=True), K=32, num_stages=2)


def dense(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], bias: Tensor | None
) -> Tensor:
    copies, (n, k) = len(scales), weight.shape
    m = x.shape[0] // copies
    y = x.new_empty(x.shape[0], n)
    gaussian = z.kind == "gaussian"
    size, (numbers, constants) = tiles(m, x.dtype), operands(weight)
    launch(
        dense_kernel,
        (triton.cdiv(m, size["M"]) * triton.cdiv(n, size["N"]),),
        *(x, *numbers, bias, y, philox.table("gaussians", x.device) if gaussian else y),
        *(m, n, k, -(-k // (8 if gaussian else 128)), float(scales[0]), float(scales[-1])),
        *(*_key(z), signed(z.stream(philox.DENSE))),
        **{"KIND": CODES[z.kind], "COPIES": copies, **constants, **size},
    )
    return y


def structured(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], bias: Tensor | None
) -> Tensor:
    m, (n, k) = x.shape[0], weight.shape
    y = x.new_empty(m, n)
    size, (numbers, constants) = tiles(m, x.dtype), operands(weight)
    launch(
        structured_kernel,
        (triton.cdiv(m, size["M"]) * triton.cdiv(n, size["N"]),),
        *(x, *numbers, bias, y, m, n, k, m // len(scales), float(scales[0]), float(scales[-1])),
        *(*_key(z), signed(z.stream(philox.LEFT)), signed(z.stream(philox.RIGHT))),
        **{"KIND": CODES[z.kind], **constants, **size},
    )
    return y


def subtract_(
    w: Tensor, terms: Terms, shrink: float, start: int, dither: Tensor | None, offset: int
) -> Tensor:
    (n, cols), z = w.shape, terms[0][0]
    table = philox.table("gaussians", w.device) if z.kind == "gaussian" else w
    counters, factors = _on(w.device, tuple((d.step, d.stream(0), float(c)) for d, c in terms))
    launch(
        subtract_kernel,
        (triton.cdiv(n, 16), triton.cdiv(cols, 128)),
        *(w, dither if w.dtype.itemsize == 2 else None, table, counters, factors, len(terms)),
        *(n, cols, start, -(-cols // (8 if z.kind == "gaussian" else 128)), float(shrink), offset),
        *_key(z)[:3],
        **{"ROWS": 16, "COLUMNS": 128, "KIND": CODES[z.kind]},
        num_warps=4,
        enable_fp_fusion=False,  # each term is rounded once, as torch does
    )
    return w


@lru_cache(maxsize=1)  # the tensors of a model take the same terms, one after the other
def _on(device: torch.device, terms: tuple[tuple[int, int, float], ...]) -> tuple[Tensor, Tensor]:
    """Counters and factors for `subtract_kernel`, of (step, stream of role 0, c)."""
    roles = (philox.DENSE, philox.LEFT, philox.RIGHT)
    counters = [[signed(step), *(signed(s | role) for role in roles)] for step, s, _ in terms]
    factors = [c for _, _, c in terms]
    return (
        torch.tensor(counters, dtype=torch.int32, device=device),
        torch.tensor(factors, dtype=torch.float32, device=device),
    )


def _key(z: Direction) -> tuple[int, ...]:
    """Key and counter, the stream apart."""
    return signed(z.seed), signed(z.seed >> 32), signed(z.tensor), signed(z.step)
