"""Hadamard matrices, and the fast Walsh-Hadamard transform along the last dimension, sizes 2^k.

`H[i, j] = (-1)^popcount(i & j)` (Sylvester's order), so H = H' and H H = n I. The reference splits
H_n = H_a (x) H_b with a, b of about sqrt(n) and multiplies by the two factors (`kron_product`): two
passes over the data in optimised products, where the textbook butterfly makes log2(n) elementwise
passes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

_FACTOR = 64
_LARGEST = 256  # of the dense factors: their cost is m a number


def fwht_ref(x: Tensor) -> Tensor:
    """Unnormalised `x @ H_n`, a new tensor of the shape and dtype of `x`, `(..., n)`.

    Raises:
        ValueError: n is not a power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"The Walsh-Hadamard transform needs a size 2^k; found {n}.")
    return hadamard_product(x, n)


def hadamard_product(x: Tensor, out: int) -> Tensor:
    """`x @ H[:in, :out]` for x `(..., in)` of any sizes, a new tensor `(..., out)` of its dtype.

    As the transform of the padded x, less what the padding and the surplus would take.
    """
    n = 1 << (max(x.shape[-1], out) - 1).bit_length()
    b = 1 << (n.bit_length() // 2)
    a = hadamard_matrix(n // b, x.dtype, x.device)
    padded = pad(x, (0, -x.shape[-1] % b))
    y = kron_product(
        padded, a[: -(-out // b), : padded.shape[-1] // b], hadamard_matrix(b, x.dtype, x.device)
    )
    return y[..., :out]


def kron_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`x (a' (x) b)`, a new tensor; x `(..., in n)`, a `(out, in)`, b `(n, n)`: `(..., out n)`.

    One product of all rows by b, then one of each row, as `(in, n)`, by a.
    """
    y = (x.reshape(-1, len(b)) @ b).view(-1, a.shape[1], len(b))
    if a.numel() > 1:
        y = torch.bmm(a.expand(len(y), *a.shape), y)
    return y.view(*x.shape[:-1], len(a) * len(b))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # or what evaluation made first no training could use
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


def split_size(n: int) -> tuple[int, int]:
    """`(m, 2^k)` with m 2^k = n and a Hadamard matrix of size m from `paley_matrix`; m as small as
    can be, 1 for a power of two.

    Raises:
        ValueError: there is none.
    """
    power = n & -n
    m = n // power if n > 0 else 0
    while m > 1 and power > 1 and not _paley_prime(m):
        m, power = 2 * m, power // 2
    if m < 1 or m > _LARGEST or (m > 1 and not _paley_prime(m)):
        raise ValueError(
            f"No Hadamard matrix of size {n} is known here: it needs m 2^k with m - 1, or "
            f"m / 2 - 1, a prime of the right remainder (m = 12, 20, 28, 36, 44, 60, ..., 252)."
        )
    return m, power


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # or what evaluation made first no training could use
def paley_matrix(
    m: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """`(m, m)` of +1 and -1 with H H' = m I, from the squares modulo a prime q.

    Paley, "On Orthogonal Matrices" (1933): m = q + 1 for q = 3 mod 4, m = 2 (q + 1) for q = 1
    mod 4.
    """
    q = _paley_prime(m)
    assert q, "m comes from split_size"
    squares = torch.zeros(q, dtype=torch.bool)
    squares[torch.arange(1, q).square() % q] = True
    character = torch.where(squares, 1.0, -1.0)
    character[0] = 0
    index = torch.arange(q)
    bordered = torch.ones(q + 1, q + 1)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(index.unsqueeze(1) - index) % q]
    one = torch.eye(q + 1)
    if q % 4 == 3:
        bordered[1:, 0] = -1
        h = one + bordered
    else:
        h = torch.kron(bordered, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        h += torch.kron(one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]))
    return h.to(device, dtype)


def _paley_prime(m: int) -> int:
    """The prime that `paley_matrix` builds size m from, 0 if there is none."""
    for q, remainder in ((m - 1, 3), (m // 2 - 1, 1)):
        if (
            m % 4 == 0
            and q > 2
            and q % 4 == remainder
            and all(q % d for d in range(2, int(q**0.5) + 1))
        ):
            return q
    return 0
