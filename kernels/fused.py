"""What the autograd functions of this package share: how they are called, and what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply_fused(
    function: type[torch.autograd.Function],
    x: Tensor,
    weight: Tensor | None,
    *rest: Any,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`function.apply(x, weight, *rest)`; under autocast with x and weight in `dtype`, its own if
    None: of what is fused it would cast some products and not those in place."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # which it leaves alone
        return function.apply(x, weight, *rest)
    dtype = dtype or torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function.apply(x.to(dtype), None if weight is None else weight.to(dtype), *rest)


def with_lead(y: Tensor, x: Tensor) -> Tensor:
    """y (N, n) with the leading dimensions of x, for an autograd function's `forward` to return: as
    no view, for autograd lets nobody write into a view that was made in there, and models do."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
