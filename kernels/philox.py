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
* `gaussians`: half-word `k` -> `table("gaussians")[k]`, the standard normal's 65,536 mid-quantiles
  scaled to unit variance. A table is the same everywhere, which no `log` or `cos` is; its largest
  value is 4.32.
* `levels`: nibble `k` (bits `4 k ... 4 k + 3`) likewise, of 16 mid-quantiles, the largest 1.93:
  four bits a number.
* matrices: each row starts a new block, so that rows can be drawn on their own (`matrix_counters`);
  a matrix has at most 2**32 blocks.
* `stream`: `DENSE`, `LEFT`, `RIGHT` or `ROUNDING` in the low three bits, the probe above them.
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from tinyft.kernels.dispatch import choose

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
PER_BLOCK = {"signs": 128, "levels": 32, "gaussians": 8}  # numbers that a block's 128 bits make
SIGNS_PER_BLOCK = PER_BLOCK["signs"]
# Entries of a matrix; the sign vectors left and right of one; noise for stochastic rounding.
DENSE, LEFT, RIGHT, ROUNDING = range(4)


def philox_ref(counter: Tensor, seed: int) -> Tensor:
    """`philox` in plain torch.

    int64 products wrap modulo 2**64, which leaves the bits of the 32 x 32 -> 64 bit product exact.
    """
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        high0, high1 = p0.bitwise_right_shift(32), p1.bitwise_right_shift(32)
        # What is multiplied next has to be 32 bits wide; c1 and c3 need not.
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK), p1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK), p0
        k0, k1 = k0 + _W0 & _MASK, k1 + _W1 & _MASK
    # The cast keeps the low 32 bits: what the caller wants is bits, not numbers.
    return torch.stack((c0, c1, c2, c3), dim=1).to(torch.int32)


def philox_triton(counter: Tensor, seed: int) -> Tensor:
    """`philox` as one Triton kernel."""
    from tinyft.kernels.gpu import philox as gpu

    return gpu.words(counter, seed)


def philox(counter: Tensor, seed: int, *, impl: str = "auto") -> Tensor:
    """The 128 bits at each counter.

    Args:
        counter: `(4, N)` int64, words in `[0, 2**32)`.
        seed: the key, `0 <= seed < 2**64`.
        impl: see `dispatch`.

    Returns:
        `(N, 4)` int32: the words' bits.
    """
    run = philox_triton if choose("philox", impl, counter) == "triton" else philox_ref
    return run(counter, seed)


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


def levels(words: Tensor, numbers: Tensor | None = None) -> Tensor:
    """`(N, 4)` int32 words -> `(N, 32)` float32 of 16 levels, mean 0 and variance 1; `numbers` is
    their table, given where it is an input (of a graph)."""
    return _looked_up(words, 4, table("levels", words.device) if numbers is None else numbers)


def gaussians(words: Tensor, numbers: Tensor | None = None) -> Tensor:
    """`(N, 4)` int32 words -> `(N, 8)` float32 standard normals (65,536 levels, variance 1);
    `numbers` as for `levels`."""
    if numbers is not None:
        return _looked_up(words, 16, numbers)
    assert sys.byteorder == "little", "half-words are read in little-endian order"
    index = words.view(torch.uint16).to(torch.int32).flatten()  # a third faster than by shifts
    return table("gaussians", words.device).index_select(0, index).view(words.shape[0], -1)


def _looked_up(words: Tensor, bits: int, numbers: Tensor) -> Tensor:
    """The numbers that each `bits` bits of the words index, `(N, 128 / bits)`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    index = words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
    return numbers.index_select(0, index.flatten()).view(words.shape[0], -1)


@lru_cache(maxsize=8)
def table(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """The standard normal's mid-quantiles `ndtri((k + 1/2) / n)` scaled to variance 1, float32;
    n = 16 for `levels` and 65,536 for `gaussians`."""
    n = 16 if kind == "levels" else 65536
    half = torch.special.ndtri((torch.arange(n // 2, dtype=torch.float64) + 0.5) / n)
    quantiles = torch.cat((half, -half.flip(0)))  # exactly antisymmetric: the mean is exactly 0
    return (quantiles / quantiles.square().mean().sqrt()).float().to(device)


def matrix_ref(
    kind: str, rows: Tensor, cols: int, *, seed: int, tensor: int, step: int, stream: int
) -> Tensor:
    """`matrix` in plain torch."""
    counters = matrix_counters(rows, -(-cols // PER_BLOCK[kind]), tensor, step, stream)
    words = philox_ref(counters, seed)
    numbers = {"signs": signs, "levels": levels, "gaussians": gaussians}[kind](words)
    return numbers.view(len(rows), -1)[:, :cols]


def matrix_triton(
    kind: str, rows: Tensor, cols: int, *, seed: int, tensor: int, step: int, stream: int
) -> Tensor:
    """`matrix` as one Triton kernel, the bits never in memory."""
    from tinyft.kernels.gpu import philox as gpu

    return gpu.matrix(kind, rows, cols, seed, tensor, step, stream)


def matrix(
    kind: str,
    rows: Tensor,
    cols: int,
    *,
    seed: int,
    tensor: int,
    step: int,
    stream: int = DENSE,
    impl: str = "auto",
) -> Tensor:
    """Rows of a random matrix, the same on every backend.

    Args:
        kind: `"signs"`, `"levels"` or `"gaussians"`.
        rows: `(n,)` int64, the wanted rows, in any order.
        cols: columns of the matrix.
        seed, tensor, step, stream: key and counter; see the module's docstring.
        impl: see `dispatch`.

    Returns:
        `(n, cols)` float32.
    """
    if kind not in PER_BLOCK:
        raise ValueError(f"kind is one of {', '.join(PER_BLOCK)}; found {kind!r}.")
    run = matrix_triton if choose("philox.matrix", impl, rows) == "triton" else matrix_ref
    return run(kind, rows, cols, seed=seed, tensor=tensor, step=step, stream=stream)
