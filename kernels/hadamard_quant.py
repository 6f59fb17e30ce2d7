"""Rotate by a Hadamard matrix and quantise each token, with a straight-through gradient.

`x R` with `R = (H_m (x) H_2^k) / sqrt(n)`, n = m 2^k, spreads outliers over all channels, so that a
few bits a number suffice (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456). Each row of the result
is quantised by its own range, asymmetrically, as RoSTE trains (Wei et al. 2025, arXiv:2502.09003):

    s = c (max - min) / (2^b - 1)
    z = round(-c min / s)
    q = clamp(round(x / s) + z, 0, 2^b - 1)

and what comes out is `s (q - z)`. Deviations: the range is extended to include 0, so that z fits in
b bits, and a row of zeros stays zero. Gradients pass the quantiser as if it were not there, clipped
numbers too: `dx = dy R'`.

Everything is computed in float32 (float64 for float64) and rounded once to the type of x.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyft.kernels.dispatch import choose
from tinyft.kernels.fused import with_lead
from tinyft.kernels.hadamard import hadamard_matrix, kron_product, paley_matrix, split_size
from tinyft.kernels.quantize import round_rows_

# A program of the Triton kernel holds a row, m padded to a power of two, and H_m in registers. What
# is larger spills: m = 76 (4,864 numbers) 1 KB a thread.
TRITON_ELEMENTS, TRITON_M = 1 << 14, 64


def rotate_ref(x: Tensor, *, transposed: bool = False) -> Tensor:
    """`x R` (`x R'` if transposed), R orthogonal; x is `(..., n)`, a new tensor of its dtype.

    Raises:
        ValueError: no Hadamard matrix of that size is known here.
    """
    return kron_product(x, *factors(x.shape[-1], transposed, x.dtype, x.device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # or what evaluation made first no training could use
def factors(
    n: int, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """a, b so that R (or R') is their `kron_product`, of sizes that multiply fastest."""
    m, power = split_size(n)
    b = 1
    while 2 * b <= power and 2 * b + n // (2 * b) < b + n // b:
        b *= 2
    a = hadamard_matrix(power // b, torch.float64)
    if m > 1:
        h = paley_matrix(m, torch.float64)
        a = torch.kron((h if transposed else h.T).contiguous(), a)
    b = hadamard_matrix(b, torch.float64) * n**-0.5
    return a.to(device, dtype), b.to(device, dtype)


def quantize_ref(x: Tensor, bits: int, clip: float) -> Tensor:
    """`s (q - z)` of each row of x `(..., n)`, in its dtype."""
    top = 2**bits - 1
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    low, high = clip * low.clamp(max=0), clip * high.clamp(min=0)
    s = (high - low) / top
    s = s.where(s != 0, 1)
    z = (-low / s).round()
    return (x / s).round_().add_(z).clamp_(0, top).sub_(z).mul_(s)


def hadamard_quant_ref(x: Tensor, bits: int, *, clip: float = 1.0) -> Tensor:
    """`hadamard_quant` in plain torch, by autograd."""
    rotated = rotate_ref(x.to(torch.promote_types(x.dtype, torch.float32)))
    quantized = quantize_ref(rotated.detach(), bits, clip)
    return (rotated + (quantized - rotated).detach()).to(x.dtype)


def hadamard_quant(x: Tensor, bits: int, *, clip: float = 1.0, impl: str = "auto") -> Tensor:
    """Rotated, quantised and dequantised x.

    Args:
        x: `(..., n)`, floating, n = m 2^k (see `hadamard.split_size`).
        bits: 2 to 8.
        clip: c above; RoSTE trains with 0.95.
        impl: see `dispatch`.

    Returns:
        `(..., n)`, dtype of x. Differentiable once in x, straight through the quantiser.

    Raises:
        ValueError: other bits, or no Hadamard matrix of size n is known here.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"hadamard_quant takes 2 to 8 bits; found {bits}.")
    n = x.shape[-1]
    m, power = split_size(n)
    fits = m <= TRITON_M and (1 << (m - 1).bit_length()) * power <= TRITON_ELEMENTS
    obstacle = "" if fits else f"rows of {n} = {m} x {power} numbers do not fit the registers"
    chosen = choose("hadamard_quant", impl, x, obstacle=obstacle)
    return _HadamardQuant.apply(x, bits, clip, chosen == "triton")


class _HadamardQuant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, clip: float, in_triton: bool) -> Tensor:
        ctx.in_triton = in_triton
        if in_triton:
            from tinyft.kernels.gpu import hadamard_quant as gpu

            return gpu.rotate(x, bits=bits, clip=clip)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rotated = rotate_ref(wide).view(-1, x.shape[-1])
        out = torch.empty(rotated.shape, dtype=x.dtype, device=x.device)
        round_rows_(rotated, out, bits, clip, False)
        return with_lead(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_triton:
            from tinyft.kernels.gpu import hadamard_quant as gpu

            return gpu.rotate(grad, transposed=True), None, None, None
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return rotate_ref(wide, transposed=True).to(grad.dtype), None, None, None
