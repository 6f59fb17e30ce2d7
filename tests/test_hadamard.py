"""The transform against the definition, `H[i, j] = (-1)^popcount(i & j)`."""

from __future__ import annotations

import pytest
import torch

from tinyft.kernels.hadamard import (
    fwht_ref,
    hadamard_matrix,
    hadamard_product,
    hadamard_rows,
    paley_matrix,
    split_size,
)


def definition(n):
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("n", [1, 2, 4, 64, 128, 512])
def test_matrix_and_transform(n):
    h = definition(n).double()
    assert torch.equal(hadamard_matrix(n, torch.float64), h)
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(3, 5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fwht_ref(x), x @ h, rtol=0, atol=1e-10 * n)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (100, 70), (70, 200), (256, 256)])
def test_rows_of_a_part(rows, cols):
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    n = 1 << (max(rows, cols) - 1).bit_length()
    assert torch.equal(hadamard_rows(index, cols), definition(n)[index, :cols])


@pytest.mark.parametrize(("cols", "out"), [(1, 1), (1, 5), (5, 3), (100, 70), (70, 200), (9, 256)])
def test_product_with_a_part(cols, out):
    x = torch.randn(2, 3, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = definition(1 << (max(cols, out) - 1).bit_length()).double()
    torch.testing.assert_close(hadamard_product(x, out), x @ h[:cols, :out], rtol=0, atol=1e-11)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="found 12"):
        fwht_ref(torch.zeros(12))


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (64, 1), (12, 12), (40, 20), (576, 36), (960, 60), (14336, 28), (4864, 76)]
)
def test_dense_factors(n, m):
    """Of both of Paley's kinds, and the smallest that there is."""
    assert split_size(n) == (m, n // m)
    if m > 1:
        h = paley_matrix(m, torch.float64)
        assert torch.equal(h.abs(), torch.ones_like(h))
        assert torch.equal(h @ h.T, m * torch.eye(m, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4, 6, 15, 172, 11008])
def test_sizes_without_a_dense_factor_are_refused(n):
    with pytest.raises(ValueError, match=f"size {n} is known"):
        split_size(n)
