"""Rounding to 16 bits by chance: up as often as the number lies far on its way up.

A step of training is mostly smaller than half the distance between two neighbouring 16-bit numbers
(of bfloat16: 1/256 to 1/512 of the number), and rounded to the nearest it would be lost. Rounded by
chance it is kept on average, without a second copy of the weights. The random bits are those of the
counter-based generator (`kernels/philox.py`), so that a step taken again comes to the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinyft.kernels import philox

NOISE_SIZE = 1 << 16
_LOST = {torch.bfloat16: 0xFFFF, torch.float16: 0x1FFF}  # bits of a float32 that fall away


def rounding_noise(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """65,536 uniform 16-bit integers as int32, twice over, so that any window is one slice."""
    row = torch.zeros(1, dtype=torch.int64, device=device)
    words = philox.philox(
        philox.matrix_counters(row, NOISE_SIZE // 8, 0, step, philox.ROUNDING), seed
    )
    half_words = words.view(torch.int16).flatten().to(torch.int32).bitwise_and_(0xFFFF)
    return half_words.repeat(2)


def offset_of(tensor: int, block: int) -> int:
    """Where in a step's noise a block of a tensor begins: others elsewhere."""
    return (tensor * 40503 + block * 9973) % NOISE_SIZE


def store(wide: Tensor, out: Tensor, noise: Tensor, offset: int = 0) -> None:
    """Round `wide` into `out`.

    A float's bits order as integers. With uniform bits added below the last one that is kept, the
    carry moves to the next number with a probability equal to the fraction that is cut off. One
    window of the noise serves every block: each number's rounding is unbiased, which is what
    matters.

    Args:
        wide: float32, contiguous; overwritten.
        out: bfloat16 or float16 of the same shape. float16 below 2^-14 is rounded to nearest.
        noise: from `rounding_noise`.
        offset: where in the noise the window begins, below `NOISE_SIZE`.
    """
    n, lost = wide.numel(), _LOST[out.dtype]
    if offset + n > len(noise):
        noise = noise.repeat(-(-(offset + n) // len(noise)))
    window = noise[offset : offset + n]
    if lost != 0xFFFF:
        window = window & lost
    bits = wide.view(torch.int32)
    bits.add_(window.view(bits.shape)).bitwise_and_(~lost)
    out.copy_(wide)
