"""Weights of a frozen base, as they are or packed, by the same names: what kernels multiply.

Int8: `w = scale q`, q in -127 ... 127, one float32 scale a row (as bitsandbytes stores it, whose
scale is 127 times as large). Int4: see `int4_linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tinyft.kernels.int4_linear import EVERY, Int4Weight


@dataclass(frozen=True)
class Int8Weight:
    """A packed weight `(out, in)`.

    Attributes:
        packed: `(out, in)` int8.
        scales: `(out,)` float32.
    """

    packed: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], self.packed.shape[1]


Weight: TypeAlias = Tensor | Int4Weight | Int8Weight


def pack_int8(weight: Tensor) -> Int8Weight:
    """Quantise `(out, in)` floating, each row by its largest magnitude."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / 127
    q = wide / scales.where(scales != 0, 1).unsqueeze(1)
    return Int8Weight(q.round_().to(torch.int8), scales)


def tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    """What a weight is made of, for `dispatch.choose`."""
    return (weight,) if isinstance(weight, Tensor) else (weight.packed, weight.scales)


def rows_of(weight: Weight, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """`W[rows]` in the given dtype; a view where it can be."""
    if isinstance(weight, Tensor):
        return weight[rows].to(dtype)
    if isinstance(weight, Int4Weight):
        return weight.dequantize(dtype, rows, EVERY)
    scales = weight.scales[rows].to(torch.promote_types(dtype, torch.float32))
    return weight.packed[rows].to(scales.dtype).mul_(scales.unsqueeze(1)).to(dtype)
