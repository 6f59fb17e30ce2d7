"""The generator against published vectors, an independent implementation, and its own contract."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from tinyft.kernels import philox

# Known answers that Random123 publishes for philox4x32-10: counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox.philox(torch.tensor(counter).unsqueeze(1), key[1] << 32 | key[0])
    assert [int(w) & 0xFFFFFFFF for w in words[0]] == expected


def by_hand(counter, seed):
    """Philox4x32-10 in Python's unbounded integers."""
    c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_equals_unbounded_integers_on_random_counters():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, size=(4, 50))
    seed = int(rng.integers(0, 2**63)) * 2 + 1
    words = philox.philox(torch.from_numpy(counters), seed)
    for i in range(50):
        expected = by_hand([int(c) for c in counters[:, i]], seed)
        assert [int(w) & 0xFFFFFFFF for w in words[i]] == expected


def test_signs_follow_the_bit_numbering_of_the_contract():
    words = torch.tensor([[1, 0, -(2**31), -1]], dtype=torch.int32)
    bits = [1, *[0] * 31, *[0] * 32, *[0] * 31, 1, *[1] * 32]
    assert philox.signs(words)[0].tolist() == [1.0 - 2 * b for b in bits]


@pytest.mark.parametrize(("kind", "n"), [("levels", 16), ("gaussians", 65536)])
def test_tables_hold_the_normal_quantiles(kind, n):
    table, normal = philox.table(kind).double(), NormalDist()
    quantiles = [normal.inv_cdf((k + 0.5) / n) for k in range(n)]
    scale = (sum(q * q for q in quantiles) / n) ** 0.5
    for k in (0, 1, n // 3, n // 2 - 1, n // 2, n - 1):
        assert table[k].item() == pytest.approx(quantiles[k] / scale, rel=1e-6)
    assert table.square().mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(table, -table.flip(0))


def test_gaussians_read_half_words_little_endian():
    words = torch.tensor([[0x00010002, 0, 0, -1]], dtype=torch.int32)
    table = philox.table("gaussians")
    expected = table[torch.tensor([2, 1, 0, 0, 0, 0, 65535, 65535])]
    assert torch.equal(philox.gaussians(words)[0], expected)


def test_levels_read_nibbles_from_the_lowest():
    words = torch.tensor([[0x76543210, 0, -1, -(2**31)]], dtype=torch.int32)
    index = [*range(8), *[0] * 8, *[15] * 8, *[0] * 7, 8]
    assert torch.equal(philox.levels(words)[0], philox.table("levels")[torch.tensor(index)])


def test_rows_can_be_drawn_alone():
    rows = torch.tensor([7, 2])
    some = philox.philox(philox.matrix_counters(rows, 3, 5, 11, 4), 99).view(2, -1)
    every = philox.philox(philox.matrix_counters(torch.arange(9), 3, 5, 11, 4), 99).view(9, -1)
    assert torch.equal(some, every[rows])
