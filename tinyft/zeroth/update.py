"""theta <- (1 - decay) theta - sum_k c_k z_k, in place, a cache-sized block of rows at a time.

float32: every term is rounded once, one term after the other, so that with +-1 directions the bits
do not depend on the device. bfloat16 and float16: the block is updated in float32 and rounded
stochastically with bits of the same counter-based generator. Rounding to nearest would lose most
of zeroth order's updates (at lr 1e-7 98.8% of bfloat16 weights do not move at all); stochastic
rounding keeps them on average, needs no second copy of the weights, and replays to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinyft.kernels.dispatch import choose
from tinyft.kernels.perturbed_linear import subtract_directions_triton_
from tinyft.rounding import NOISE_SIZE, offset_of, rounding_noise, store
from tinyft.zeroth.directions import Draw, matrix_shape

# Elements of a block: 1 MB in float32, so that its passes stay in the second-level cache. Smaller
# blocks pay more for the calls (2 cores: 94 ms at 2^18, 120 ms at 2^16, 135 M bfloat16 weights).
BLOCK_ELEMENTS = 1 << 18


def update_(
    tensors: Sequence[Tensor],
    terms: Sequence[tuple[Draw, float]],
    *,
    decay: float = 0.0,
    rounding: str = "stochastic",
) -> None:
    """Apply `w = w (1 - decay) - sum_k c_k z_k` to every tensor in place.

    Args:
        tensors: contiguous float tensors, in the order that the directions were made for.
        terms: `(draw, c)`; all draws come from one family. The noise of the rounding is that of the
            last term's step.
        decay: decoupled weight decay, lr * wd. Skips vectors (biases and norm scales).
        rounding: of 16-bit tensors, `"stochastic"` or `"nearest"`.
    """
    family, last_step = terms[-1][0].family, terms[-1][0].step
    terms = [(draw, c) for draw, c in terms if c != 0]  # -0.0 - 0.0 would already change a bit
    if not terms and decay == 0:
        return
    noise = None
    if rounding == "stochastic" and any(w.dtype.itemsize == 2 for w in tensors):
        noise = rounding_noise(family.seed, last_step, family.device)
        noise = noise.repeat(-(-BLOCK_ELEMENTS // len(noise)))  # once, not for every block
    for t, tensor in enumerate(tensors):
        rows, cols = matrix_shape(tensor.shape)
        matrix = tensor.detach().view(rows, cols)
        shrink = 1.0 - decay if tensor.dim() > 1 else 1.0
        # One float32 term is a single pass however large the block is: then take the whole matrix.
        single = len(terms) == 1 and family.structured and tensor.dtype == torch.float32
        step = rows if single and shrink == 1.0 else max(1, BLOCK_ELEMENTS // cols)
        named = [(draw.direction(t), c) for draw, c in terms]
        fused = bool(named) and all(z is not None for z, _ in named)
        fused = fused and choose("subtract_directions_", "auto", matrix) == "triton"
        for start in range(0, rows, step):
            block = matrix[start : start + step]
            if fused:
                offset = _offset(t, start, block.numel())
                options = {"decay": 1.0 - shrink, "start": start, "dither": noise, "offset": offset}
                subtract_directions_triton_(block, named, **options)
                continue
            w = block if block.dtype.itemsize >= 4 else block.float()
            if shrink != 1.0:
                w.mul_(shrink)
            for draw, c in terms:
                draw.subtract_from_(t, w, start, c)
            if noise is not None and w is not block:
                store(w, block, noise, _offset(t, start, w.numel()))
            elif w is not block:
                block.copy_(w)


def _offset(t: int, start: int, n: int) -> int:
    """Where in the step's noise a block of n weights begins."""
    return 0 if n > NOISE_SIZE else offset_of(t, start)
