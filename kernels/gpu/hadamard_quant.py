"""Triton twin of `tinyft.kernels.hadamard_quant`. GPU speed unmeasured.

A program holds one row as (m, 2^k), m padded by zeros to a power of two: one small product by H_m,
k butterflies, the row's range and its quantisation, all between one read and one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels.dispatch import launch
from tinyft.kernels.gpu.common import cast, dot, nearest
from tinyft.kernels.hadamard import paley_matrix, split_size


@triton.jit
def butterflies(x, M: tl.constexpr, LOG: tl.constexpr):
    """`x H` for x `(M, 2^LOG)`."""
    for level in tl.static_range(LOG):
        pairs = tl.reshape(x, (M << (LOG - 1 - level), 2, 1 << level))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (M, 1 << LOG))
    return x


@triton.jit
def hadamard_kernel(
    x, h, y, n, m, norm, clip, top, M: tl.constexpr, LOG: tl.constexpr, QUANTIZE: tl.constexpr
):
    """y = x (h' (x) H_2^LOG) norm, a row a program; quantised to 0 ... top and back."""
    POWER: tl.constexpr = 1 << LOG
    i = tl.arange(0, M)
    at = tl.program_id(0).to(tl.int64) * n + i[:, None] * POWER + tl.arange(0, POWER)[None, :]
    live = (i < m)[:, None]
    v = tl.load(x + at, live, 0.0).to(tl.float32)
    if M > 1:
        square = tl.load(h + i[:, None] * m + i[None, :], live & (i < m)[None, :], 0.0)
        v = dot(square, v, tl.zeros((M, POWER), tl.float32))
    v = butterflies(v, M, LOG) * norm
    if QUANTIZE:  # the padding is 0 and so is within every range
        low = clip * tl.minimum(tl.min(tl.min(v, 1), 0), 0.0)
        high = clip * tl.maximum(tl.max(tl.max(v, 1), 0), 0.0)
        s = tl.div_rn(high - low, top)
        s = tl.where(s == 0, 1.0, s)
        z = nearest(tl.div_rn(-low, s))
        q = nearest(tl.div_rn(v, tl.zeros_like(v) + s)) + z
        v = (tl.minimum(tl.maximum(q, 0.0), top) - z) * s
    tl.store(y + at, cast(v, y.dtype.element_ty), live)


def rotate(x: Tensor, *, transposed: bool = False, bits: int = 0, clip: float = 1.0) -> Tensor:
    """`x R` (`x R'` if transposed) over the last dimension, quantised if `bits` are given."""
    n = x.shape[-1]
    m, power = split_size(n)
    h = paley_matrix(m, device=x.device) if m > 1 else torch.ones(1, 1, device=x.device)
    h = h if transposed else h.T.contiguous()
    rows = x.reshape(-1, n).contiguous()
    y = torch.empty_like(rows)
    # A product has at least 16 terms.
    padded = max(16, 1 << (m - 1).bit_length()) if m > 1 else 1
    launch(
        hadamard_kernel,
        (rows.shape[0],),
        *(rows, h, y, n, m, float(n**-0.5), float(clip), float(2**bits - 1)),
        **{"M": padded, "LOG": power.bit_length() - 1, "QUANTIZE": bits > 0},
        num_warps=min(32, max(1, padded * max(padded, power) // 512)),
    )
    return y.view(x.shape)
