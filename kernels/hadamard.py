"""Fast Walsh-Hadamard transform along the last dimension, sizes 2^k.

`H[i, j] = (-1)^popcount(i & j)` (Sylvester's order), so H = H' and H H = n I. The reference splits
H_n = H_a (x) H_b with a, b <= 64 and multiplies by the small factors: two or three passes over the
data in optimised products, where the textbook butterfly makes log2(n) elementwise passes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_FACTOR = 64


def fwht_ref(x: Tensor) -> Tensor:
    """Unnormalised `x @ H_n`, a new tensor of the shape and dtype of `x`, `(..., n)`.

    Raises:
        ValueError: n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"The Walsh-Hadamard transform needs a size 2^k; found {n}.")
    y, done = x.reshape(-1, n), 1
    while done < n:
        factor = min(_FACTOR, n // done)
        # Axis `factor` of n = (outer, factor, inner): H acts on it, whatever stands around it.
        y = y.reshape(-1, factor, done).transpose(1, 2) @ hadamard_matrix(factor, x.dtype, x.device)
        y = y.transpose(1, 2)
        done *= factor
    return y.reshape(x.shape)


@lru_cache(maxsize=32)
def hadamard_matrix(
    n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """`(n, n)` of +1 and -1 in Sylvester's order, n a power of two."""
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


def hadamard_rows(index: Tensor, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`H[index, :cols]` for any integer rows, `(len(index), cols)`, without the whole matrix.

    H_n = H_outer (x) H_64, so a row is the outer product of two short rows.
    """
    outer = 1 << max(0, (max(int(index.max()) + 1, cols) - 1).bit_length() - 6)
    high = hadamard_matrix(outer, dtype, index.device)[index.bitwise_right_shift(6)]
    low = hadamard_matrix(_FACTOR, dtype, index.device)[index.bitwise_and(_FACTOR - 1)]
    high = high[:, : -(-cols // _FACTOR)]
    return (high.unsqueeze(2) * low.unsqueeze(1)).flatten(1)[:, :cols]
