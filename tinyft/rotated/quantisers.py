"""Uniform quantisers with dynamic ranges, and gradients straight through them.

Rows are the last dimension: an output row of a weight, a token of activations, a token of one head
of K or V; or groups of consecutive numbers within a row. RoSTE's asymmetric quantiser (Wei et al.
2025, arXiv:2502.09003) for b bits, with clip c:

    s = c (max - min) / (2^b - 1)
    z = round(-c min / s)
    q = clamp(round(x / s) + z, 0, 2^b - 1)

where the range is extended to include 0, so that z fits in b bits, and a row of zeros stays zero.
Symmetric: s = c max|x| / (2^(b - 1) - 1), z = 2^(b - 1). A number comes back as `s (q - z)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyft.dry_run import alike
from tinyft.kernels.int4_linear import EVERY, pack_int4
from tinyft.kernels.quantize import grid, pieces, round_rows, round_rows_

CLIPS = (1.0, 0.95, 0.9, 0.85)  # what a search tries


@dataclass(frozen=True)
class Quantiser:
    """How numbers are rounded.

    Attributes:
        bits: 2 to 8.
        clip: c above, at most 1.
        symmetric: see the module.
        group: numbers of a row that share a range; 0 for whole rows. It divides the row.
        clipped: gradients stop at numbers beyond the (clipped) range. Else they pass everywhere.

    Example:
        >>> Quantiser(bits=2)(torch.tensor([[0.0, 1.0, 2.2, 3.0]]))
        tensor([[0., 1., 2., 3.]])
    """

    bits: int
    clip: float = 1.0
    symmetric: bool = False
    group: int = 0
    clipped: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points `(rows, 1)` of `(rows, n)` floating, in its dtype."""
        return grid(x, self.bits, self.clip, self.symmetric)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`q` uint8 of the shape of `x`, and `s` (float32 or 64) and `z` (uint8), a row's in a row:
        `(..., groups)`."""
        q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        rows = self._rows(x)
        s = rows.new_empty((len(rows), 1), dtype=torch.promote_types(x.dtype, torch.float32))
        z = torch.empty((len(rows), 1), dtype=torch.uint8, device=x.device)
        for part, wide in pieces(rows):
            s[part], zero = self.grid(wide)
            z[part] = zero
            wide.div_(s[part]).round_().add_(zero).clamp_(0, self.top)
            self._rows(q)[part] = wide.to(torch.uint8)
        return q, s.view(*x.shape[:-1], -1), z.view(*x.shape[:-1], -1)

    def round(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`s (q - z)`, in the dtype of x, contiguous; written to `out` where given. No gradient."""
        how = self.bits, self.clip, self.symmetric
        if out is None:
            return round_rows(self._rows(x), *how).view(x.shape)
        round_rows_(self._rows(x), self._rows(out), *how)
        return out

    def __call__(self, x: Tensor) -> Tensor:
        """`round`, with gradients straight through."""
        return _Straight.apply(x, self.round(x.detach()), self if self.clipped else None)

    def outside(self, x: Tensor) -> Tensor:
        """Where `x` lies beyond what the codes reach, by more than half a step: bool."""
        rows = self._rows(x)
        found = torch.empty(rows.shape, dtype=torch.bool, device=x.device)
        for part, wide in pieces(rows):
            s, z = self.grid(wide)
            q = wide.div_(s).round_().add_(z)
            found[part] = (q < 0) | (q > self.top)
        return found.view(x.shape)

    def error(self, x: Tensor) -> float:
        """Squared error over squared norm."""
        norm = x.float().square().sum().item()
        return (self.round(x.float()) - x).square().sum().item() / norm if norm else 0.0

    def best_clip(self, x: Tensor, clips: Sequence[float] = CLIPS) -> tuple[Quantiser, float]:
        """This quantiser with the clip of least error on `x`, and that error."""
        tried = [replace(self, clip=clip) for clip in clips]
        errors = [quantiser.error(x) for quantiser in alike(tried)]
        best = min(range(len(errors)), key=errors.__getitem__)
        return tried[best], errors[best]

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.group or x.shape[-1])


def straight(weight: Tensor, rounded: Tensor, quantiser: Quantiser | None = None) -> Tensor:
    """`rounded`, whose gradient goes to `weight`; with a quantiser, only within its range."""
    return _Straight.apply(weight, rounded, quantiser)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, quantiser: Quantiser | None) -> Tensor:
        ctx.quantiser = quantiser
        if quantiser is not None:
            ctx.save_for_backward(x)
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.quantiser is not None:
            (x,) = ctx.saved_tensors
            grad = grad.masked_fill(ctx.quantiser.outside(x), 0)
        return grad, None, None


# Storage.


@dataclass(frozen=True)
class PackedWeight:
    """A quantised weight `(out, in)`.

    Attributes:
        codes: uint8. Of up to 4 bits `(out, ceil(in / 2))`, the first half of a row's columns in
            the low bits and the second half in the high ones; else `(out, in)`.
        scales: `(out, groups)` float32.
        zeros: `(out, groups)` uint8.
        in_features: columns of the weight.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    in_features: int

    @classmethod
    def of(cls, weight: Tensor, quantiser: Quantiser) -> PackedWeight:
        """Quantise `(out, in)` floating."""
        q, s, z = quantiser.codes(weight)
        return cls(pack_codes(q, quantiser.bits), s, z, weight.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.codes.shape[0], self.in_features

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """`W[rows]` in that dtype: the very numbers that `Quantiser.round` makes."""
        q = unpack_codes(self.codes[rows], self.in_features).to(self.scales.dtype)
        q = q.view(len(q), self.scales.shape[1], -1)
        q.sub_(self.zeros[rows].unsqueeze(2)).mul_(self.scales[rows].unsqueeze(2))
        return q.flatten(1).to(dtype)


def pack_codes(q: Tensor, bits: int) -> Tensor:
    """Codes `(rows, n)` uint8, two in a byte if they have at most 4 bits."""
    if bits > 4:
        return q
    half = -(-q.shape[1] // 2)
    packed = q[:, :half].clone()
    packed[:, : q.shape[1] - half] |= q[:, half:] << 4
    return packed


def unpack_codes(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_codes`: `(rows, n)` uint8."""
    if packed.shape[1] == n and n > 1:
        return packed
    return torch.cat((packed & 15, packed >> 4), 1)[:, :n]


@dataclass(frozen=True)
class Int4Groups:
    """The format of `kernels/int4_linear.py` as a quantiser: symmetric, 4 bits, by group."""

    group: int = 64

    def error(self, w: Tensor) -> float:
        """Squared error over squared norm of `(out, in)`."""
        made = pack_int4(w, self.group).dequantize(torch.float32, EVERY, EVERY)
        norm = w.float().square().sum().item()
        return (made - w).square().sum().item() / norm if norm else 0.0

    def best_clip(self, w: Tensor) -> tuple[Int4Groups, float]:
        """It has no clip: itself, and its error."""
        return self, self.error(w)
