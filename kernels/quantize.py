"""Round each row of a matrix to a uniform grid of its own, asymmetric or symmetric.

The formulas are in `hadamard_quant.py`; symmetric: s = c max|x| / (2^(b - 1) - 1), z = 2^(b - 1).
On a CPU eight passes are made over some rows at a time, which stay in the cache meanwhile.

To autograd's dispatch modes the whole is one operation, `torch.ops.tinyft.round_rows`: they see no
piece of it (each would cost them more than the piece), and one that recomputes activations can.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCRATCH_ELEMENTS = 1 << 17  # rounded at a time


def grid(x: Tensor, bits: int, clip: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points `(rows, 1)` of `(rows, n)` floating, in its dtype."""
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    if symmetric:
        s = torch.maximum(-low, high).mul_(clip / (2 ** (bits - 1) - 1))
        return s.where(s != 0, 1), torch.full_like(s, 2 ** (bits - 1))
    low, high = low.clamp_(max=0).mul_(clip), high.clamp_(min=0).mul_(clip)
    s = (high - low).div_(2**bits - 1)
    s = s.where(s != 0, 1)
    return s, (-low / s).round_()


def pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and a copy of them in float32 (float64 for float64)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    step = max(1, SCRATCH_ELEMENTS // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        yield part, rows[part].to(wide, copy=True)


@torch.library.custom_op("tinyft::round_rows", mutates_args=())
def round_rows(x: Tensor, bits: int, clip: float, symmetric: bool) -> Tensor:
    """`s (q - z)` of each row of `(rows, n)`, contiguous, in the dtype of x. No gradient."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _round_into(x, out, bits, clip, symmetric)
    return out


@round_rows.register_fake
def _(x: Tensor, bits: int, clip: float, symmetric: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("tinyft::round_rows_", mutates_args=("out",))
def round_rows_(x: Tensor, out: Tensor, bits: int, clip: float, symmetric: bool) -> None:
    """`round_rows`, written to `out`, of the shape of x."""
    _round_into(x, out, bits, clip, symmetric)


@round_rows_.register_fake
def _(x: Tensor, out: Tensor, bits: int, clip: float, symmetric: bool) -> None:
    pass


def _round_into(x: Tensor, out: Tensor, bits: int, clip: float, symmetric: bool) -> None:
    top = 2**bits - 1
    for part, wide in pieces(x):
        s, z = grid(wide, bits, clip, symmetric)
        out[part] = wide.div_(s).round_().clamp_(-z, top - z).mul_(s)
