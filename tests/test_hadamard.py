"""The transform against the definition, `H[i, j] = (-1)^popcount(i & j)`."""

from __future__ import annotations

import pytest
import torch

from tinyft.kernels.hadamard import fwht_ref, hadamard_matrix, hadamard_rows


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


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="found 12"):
        fwht_ref(torch.zeros(12))
