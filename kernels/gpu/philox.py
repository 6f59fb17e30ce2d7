"""Triton twin of `tinyft.kernels.philox`: the same bits, a tile of a matrix at a time.

One call of the generator serves 128 signs, 32 levels or 8 Gaussians, so a tile is drawn a whole
block at a time and its bits are spread over the columns afterwards. GPU speed unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels import philox
from tinyft.kernels.dispatch import launch, signed

SIGNS = tl.constexpr(0)
GAUSSIANS = tl.constexpr(1)
LEVELS = tl.constexpr(4)
NUMBER = {"signs": SIGNS.value, "levels": LEVELS.value, "gaussians": GAUSSIANS.value}


@triton.jit
def philox4(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 tensors of one shape; the four words of each block."""
    for _ in tl.static_range(10):
        # 64-bit products of 32-bit numbers are one instruction and hold both halves.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def blocks(index, key0, key1, tensor, step, stream):
    """The words of blocks `index` (any shape, integer); the rest are scalars, int32."""
    c0 = index.to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0 = key0.to(tl.uint32, bitcast=True)
    k1 = key1.to(tl.uint32, bitcast=True)
    return philox4(
        c0,
        zero + tensor.to(tl.uint32, bitcast=True),
        zero + step.to(tl.uint32, bitcast=True),
        zero + stream.to(tl.uint32, bitcast=True),
        zero + k0,
        zero + k1,
    )


@triton.jit
def tile(
    rows, first, blocks_per_row, table, key0, key1, tensor, step, stream,
    COLUMNS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """float32 numbers `(len(rows), COLUMNS)` from column `first`, a multiple of a block's size."""
    PER: tl.constexpr = 128 if KIND == SIGNS else (32 if KIND == LEVELS else 8)
    block = first // PER + tl.arange(0, COLUMNS // PER)
    index = rows[:, None].to(tl.int64) * blocks_per_row + block[None, :]
    w0, w1, w2, w3 = blocks(index, key0, key1, tensor, step, stream)
    # (rows, blocks, 2, 2): word 2 j + i stands at [j, i].
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    if KIND == SIGNS:
        words = tl.reshape(words, (rows.shape[0], COLUMNS // 32, 1))
        signs = spread_signs(words, tl.arange(0, 32)[None, None, :])
        return tl.reshape(signs, (rows.shape[0], COLUMNS))
    elif KIND == LEVELS:
        words = tl.reshape(words, (rows.shape[0], COLUMNS // 8, 1))
        nibbles = (words >> (4 * tl.arange(0, 8)[None, None, :]).to(tl.uint32)) & 15
        return tl.load(table + tl.reshape(nibbles, (rows.shape[0], COLUMNS)))
    else:
        halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], COLUMNS))
        return gaussian(halves.to(tl.int32), table)


@triton.jit
def pick(which, w0, w1, w2, w3):
    """Word `which` (0 to 3) of a block."""
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def spread_signs(word, bit):
    """+1 or -1 in float32 by that bit (0 to 31) of each word: it becomes the sign of 1.0."""
    ones = ((word << (31 - bit).to(tl.uint32)) & 0x80000000) | 0x3F800000
    return ones.to(tl.float32, bitcast=True)


@triton.jit
def gaussian(half_word, table):
    """`table[half_word]`, from its lower half: the other is its mirror image."""
    mirrored = half_word > 32767
    value = tl.load(table + tl.where(mirrored, 65535 - half_word, half_word))
    return tl.where(mirrored, -value, value)


@triton.jit
def sign_vector(first, key0, key1, tensor, step, stream, LENGTH: tl.constexpr):
    """Signs `first ... first + LENGTH - 1` of a vector, float32, from any `first`.

    Every element draws its own block: 128 times the work, on the two edges of a tile only.
    """
    at = first + tl.arange(0, LENGTH)
    w0, w1, w2, w3 = blocks(at // 128, key0, key1, tensor, step, stream)
    return spread_signs(pick(at % 128 // 32, w0, w1, w2, w3), at % 32)


SCALARS = ["key0", "key1", "tensor", "step", "stream"]  # vary from call to call: no specialisation


@triton.jit(do_not_specialize=["key0", "key1"])
def words_kernel(counter, out, n, key0, key1, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    c0 = tl.load(counter + at, live, 0).to(tl.uint32)
    c1 = tl.load(counter + n + at, live, 0).to(tl.uint32)
    c2 = tl.load(counter + 2 * n + at, live, 0).to(tl.uint32)
    c3 = tl.load(counter + 3 * n + at, live, 0).to(tl.uint32)
    zero = tl.zeros_like(c0)
    k0 = zero + key0.to(tl.uint32, bitcast=True)
    k1 = zero + key1.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = philox4(c0, c1, c2, c3, k0, k1)
    tl.store(out + at * 4, w0.to(tl.int32, bitcast=True), live)
    tl.store(out + at * 4 + 1, w1.to(tl.int32, bitcast=True), live)
    tl.store(out + at * 4 + 2, w2.to(tl.int32, bitcast=True), live)
    tl.store(out + at * 4 + 3, w3.to(tl.int32, bitcast=True), live)


@triton.jit(do_not_specialize=SCALARS)
def matrix_kernel(
    index, table, out, n, cols, blocks_per_row, key0, key1, tensor, step, stream,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(index + at, at < n, 0)
    first = tl.program_id(1) * COLUMNS
    z = tile(
        rows, first, blocks_per_row, table, key0, key1, tensor, step, stream, COLUMNS, KIND
    )  # fmt: skip
    column = first + tl.arange(0, COLUMNS)
    live = (at < n)[:, None] & (column < cols)[None, :]
    tl.store(out + at[:, None].to(tl.int64) * cols + column[None, :], z, live)


def words(counter: Tensor, seed: int) -> Tensor:
    """`tinyft.kernels.philox.philox`."""
    counter = counter.contiguous()
    n = counter.shape[1]
    out = torch.empty(n, 4, dtype=torch.int32, device=counter.device)
    grid = (triton.cdiv(n, 256),)
    key = signed(seed), signed(seed >> 32)
    launch(words_kernel, grid, counter, out, n, *key, BLOCK=256, num_warps=4)
    return out


def matrix(
    kind: str, rows: Tensor, cols: int, seed: int, tensor: int, step: int, stream: int
) -> Tensor:
    """`tinyft.kernels.philox.matrix`."""
    rows = rows.contiguous()
    out = torch.empty(len(rows), cols, device=rows.device)
    numbers = out if kind == "signs" else philox.table(kind, rows.device)
    scalars = (signed(seed), signed(seed >> 32), signed(tensor), signed(step), signed(stream))
    launch(
        matrix_kernel,
        (triton.cdiv(len(rows), 16), triton.cdiv(cols, 128)),
        *(rows, numbers, out, len(rows), cols, -(-cols // philox.PER_BLOCK[kind]), *scalars),
        **{"ROWS": 16, "COLUMNS": 128, "KIND": NUMBER[kind]},
        num_warps=4,
    )
    return out
