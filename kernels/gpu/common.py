"""What every kernel needs: products and casts that are the same in Triton's interpreter, and tiles
of weights in any format."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels.int4_linear import Int4Weight
from tinyft.kernels.packed import Weight

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """`acc + a b` in float32. Float32 operands are multiplied as such: TF32 keeps 10 bits, which
    would round away perturbations of 1e-3."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16; the products are the same
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 `x` as `dtype`, rounded to nearest even (the interpreter truncates to bfloat16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def nearest(x):
    """Rounded to the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, where float32 has no fraction


@triton.jit
def weight_tile(
    weight, scales, rows, live, first, k, WIDTH: tl.constexpr, BITS: tl.constexpr,
    HALF: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`W[rows, first : first + WIDTH]` as DTYPE, 0 where not live and beyond column k.

    rows `(n,)` int64 and `live` of that shape; `operands` makes the rest. Of a weight in 4 bits
    WIDTH and `first` keep the tile in one group; a byte that both of its halves need is read twice,
    the second time from the cache.
    """
    columns = (first + tl.arange(0, WIDTH))[None, :]
    inside = live[:, None] & (columns < k)
    if BITS == 4:
        groups = tl.cdiv(k, 2 * HALF)
        group = first // (2 * HALF)
        at = columns - group * 2 * HALF
        scale = tl.load(scales + rows * groups + group, live, 0.0).to(tl.float32)[:, None]
        packed = weight + rows[:, None] * groups * HALF + group * HALF + at % HALF
        q = (tl.load(packed, inside, 0).to(tl.int32) >> (at // HALF * 4)) & 15
        return cast(tl.where(inside, (q - 8).to(tl.float32) * scale, 0.0), DTYPE)
    elif BITS == 8:
        q = tl.load(weight + rows[:, None] * k + columns, inside, 0).to(tl.float32)
        return cast(q * tl.load(scales + rows, live, 0.0)[:, None], DTYPE)
    else:
        return tl.load(weight + rows[:, None] * k + columns, inside, 0.0)


def operands(weight: Weight) -> tuple[tuple[Tensor, Tensor], dict[str, int]]:
    """A weight as kernels take it: its numbers and scales, and the constants BITS and HALF."""
    if isinstance(weight, Tensor):
        weight = weight.contiguous()
        return (weight, weight), {"BITS": 16, "HALF": 16}
    four = isinstance(weight, Int4Weight)
    constants = {"BITS": 4 if four else 8, "HALF": weight.group // 2 if four else 16}
    return (weight.packed, weight.scales), constants
