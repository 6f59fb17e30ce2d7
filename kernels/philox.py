"""Philox4x32-10: random bits as a pure function of (key, counter), the same on every backend.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Integer arithmetic only, so
torch on any device, Triton and an ONNX graph can produce the very same bits, in any order.

The contract that every implementation keeps:

* key: `(seed & 0xffffffff, seed >> 32)`, one 64-bit seed a run.
* counter: `(block, tensor, step, stream)`, four 32-bit words. `block` counts 128-bit outputs inside
  a tensor, `tensor` is the tensor's index, `step` the optimizer step, `stream` what the bits are
  for.
* a block's output is words `w0 w1 w2 w3`; its 128 bits are numbered little-endian: bit `i` is bit
  `i % 32` of word `i // 32`, and half-word `h` is bits `16 h ... 16 h + 15`.
* `signs`: bit 0 -> +1, bit 1 -> -1.
* `gaussians`: half-word `k` -> `gaussian_table()[k]`, the standard normal's 65,536 mid-quantiles
  scaled to unit variance. A table is the same everywhere, which no `log` or `cos` is; its largest
  value is 4.32.
* matrices: each row starts a new block, so that rows can be drawn on their own (`matrix_counters`).
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
SIGNS_PER_BLOCK = 128
GAUSSIANS_PER_BLOCK = 8


def philox(counter: Tensor, seed: int, rounds: int = 10) -> Tensor:
    """The 128 bits at each counter.

    Args:
        counter: `(4, N)` int64, words in `[0, 2**32)`.
        seed: the key, `0 <= seed < 2**64`.
        rounds: 10 is the published strength.

    Returns:
        `(N, 4)` int32: the words' bits. (int64 products wrap modulo 2**64, which leaves the bits of
        the 32 x 32 -> 64 bit product exact.)
    """
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(rounds):
        p0, p1 = c0 * _M0, c2 * _M1
        high0, high1 = p0.bitwise_right_shift(32), p1.bitwise_right_shift(32)
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK), p1.bitwise_and_(_MASK)
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    # The cast keeps the low 32 bits: what the caller wants is bits, not numbers.
    return torch.stack((c0, c1, c2, c3), dim=1).to(torch.int32)


def matrix_counters(
    rows: Tensor, blocks_per_row: int, tensor: int, step: int, stream: int
) -> Tensor:
    """Counters `(4, len(rows) * blocks_per_row)` of the given rows (int64) of one matrix."""
    first = rows.unsqueeze(1) * blocks_per_row
    block = (first + torch.arange(blocks_per_row, device=rows.device)).flatten()
    counter = torch.empty(4, block.numel(), dtype=torch.int64, device=rows.device)
    counter[0], counter[1], counter[2], counter[3] = block, tensor, step, stream
    return counter


def signs(words: Tensor) -> Tensor:
    """`(N, 4)` int32 words -> `(N, 128)` float32 of +1 and -1."""
    # Move each bit to the sign bit of 1.0f: three passes, and three times faster than a lookup.
    shifts = 31 - torch.arange(32, dtype=torch.int32, device=words.device)
    bits = words.unsqueeze(-1).bitwise_left_shift(shifts)
    ones = bits.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000).view(torch.float32)
    return ones.view(words.shape[0], SIGNS_PER_BLOCK)


def gaussians(words: Tensor) -> Tensor:
    """`(N, 4)` int32 words -> `(N, 8)` float32 standard normals (65,536 levels, variance 1)."""
    assert sys.byteorder == "little", "half-words are read in little-endian order"
    half_words = words.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    table = gaussian_table(words.device)
    return table.index_select(0, half_words.flatten()).view(words.shape[0], GAUSSIANS_PER_BLOCK)


@lru_cache(maxsize=4)
def gaussian_table(device: torch.device | str = "cpu") -> Tensor:
    """The 65,536 mid-quantiles `ndtri((k + 1/2) / 65536)` scaled to variance 1, float32."""
    half = torch.special.ndtri((torch.arange(32768, dtype=torch.float64) + 0.5) / 65536)
    quantiles = torch.cat((half, -half.flip(0)))  # exactly antisymmetric: the mean is exactly 0
    return (quantiles / quantiles.square().mean().sqrt()).float().to(device)
