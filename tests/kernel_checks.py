"""What the tests of every kernel share: implementations, devices, and the bound on the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinyft.kernels.dispatch import has_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
IMPLS = ("torch", pytest.param("triton", marks=needs_triton))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers on the tests' device, the same on every one."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def assert_as_good_as(found: Tensor, torch_one: Tensor, exact: Tensor, atol: float) -> None:
    """The largest error against the float64 result is within twice that of plain torch + atol."""
    assert found.dtype == torch_one.dtype and found.shape == exact.shape
    error = (found.double() - exact).abs().max().item()
    allowed = 2 * (torch_one.double() - exact).abs().max().item() + atol
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
