"""The perturbed product and the update against matrices that are formed, in float64 and in torch.

Z is formed by `tinyft.zeroth`, so that both are held to one direction.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, IMPLS, assert_as_good_as, random
from torch import Tensor
from torch.nn.functional import linear

from tinyft.kernels.int4_linear import pack_int4
from tinyft.kernels.packed import pack_int8, rows_of
from tinyft.kernels.perturbed_linear import (
    KINDS,
    STRUCTURED,
    Direction,
    perturbed_linear,
    perturbed_linear_ref,
    subtract_directions_,
)
from tinyft.rounding import NOISE_SIZE, rounding_noise
from tinyft.zeroth.directions import make_directions
from tinyft.zeroth.update import update_

SEED, STEP, PROBE, T = 2**63 + 11, 5, 3, 2


def draw(kind: str, rows: int, cols: int, step: int = STEP, probe: int = PROBE):
    return make_directions(kind, [(1, 1)] * T + [(rows, cols)], SEED, DEVICE).draw(step, probe)


def direction(kind: str, step: int = STEP, probe: int = PROBE) -> Direction:
    return Direction(kind, SEED, T, step, probe)


def formed(x: Tensor, w: Tensor, z: Tensor, scales: tuple[float, ...], b: Tensor | None) -> Tensor:
    """Every copy's product with its own weights, all in the dtype of x."""
    parts = zip(x.chunk(len(scales)), scales, strict=True)
    return torch.cat([linear(part, w + s * z.to(w.dtype), b) for part, s in parts])


def apart(x: Tensor, w: Tensor, z: Tensor, scales: tuple[float, ...], b: Tensor | None) -> Tensor:
    """The same with the weights as they are: `x W' + b + s x Z'`, by way of u and v if Z = u v'."""
    factors = [z.to(w.dtype)]
    if torch.equal(z, z[:, :1] * z[:1] * z[0, 0]):
        factors = [(z[:1] * z[0, 0]).to(w.dtype), z[:, :1].to(w.dtype)]
    parts = []
    for part, s in zip(x.chunk(len(scales)), scales, strict=True):
        change = part
        for factor in factors:
            change = linear(change, factor)
        parts.append(linear(part, w, b) + s * change)
    return torch.cat(parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "out", "cols", "scales"),
    [
        ((2, 25), 1, 1, (0.05, -0.05)),
        ((4, 5), 33, 129, (0.05, -0.05)),
        ((2, 19), 70, 200, (0.05, -0.03)),
        ((3, 7), 35, 96, (-0.05,)),
    ],
)
def test_product(impl, dtype, kind, batch, out, cols, scales):
    x = random(*batch, cols, seed=1).to(dtype)
    w = random(out, cols, seed=2, scale=cols**-0.5).to(dtype)
    z = draw(kind, out, cols).dense(T)
    in_torch = apart if kind in STRUCTURED else formed
    for b in (random(out, seed=3).to(dtype), None):
        exact = formed(
            x.double(), w.double(), z.double(), scales, None if b is None else b.double()
        )
        found = perturbed_linear(x, w, direction(kind), scales, bias=b, impl=impl)
        assert_as_good_as(found, in_torch(x, w, z, scales, b), exact, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "cols"), [(8, 67), (4, 67), (4, 160)])
def test_product_with_a_packed_weight(impl, dtype, kind, bits, cols):
    x, out = random(4, 5, cols, seed=1).to(dtype), 33
    w = random(out, cols, seed=2, scale=cols**-0.5)
    packed = pack_int8(w) if bits == 8 else pack_int4(w, 32)
    w, z = rows_of(packed, slice(None), torch.float64), draw(kind, out, cols).dense(T)
    scales, b = (0.05, -0.03), random(out, seed=3).to(dtype)
    exact = formed(x.double(), w, z.double(), scales, b.double())
    in_torch = (apart if kind in STRUCTURED else formed)(x, w.to(dtype), z, scales, b)
    found = perturbed_linear(x, packed, direction(kind), scales, bias=b, impl=impl)
    assert_as_good_as(found, in_torch, exact, atol=1e-6)


def test_int8_is_within_half_a_step():
    w = random(5, 40, seed=1)
    w[2] = 0
    packed = pack_int8(w)
    found = rows_of(packed, slice(None), torch.float64)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((found - w).abs() <= 0.5001 * step).all() and packed.packed.abs().max() == 127


@pytest.mark.parametrize("kind", KINDS)
def test_reference_in_float64_is_exact(kind):
    x, w = random(4, 50, seed=1), random(20, 50, seed=2)
    z = draw(kind, 20, 50).dense(T).double()
    found = perturbed_linear_ref(x, w, direction(kind), (0.5, -0.5))
    exact = formed(x, w, z, (0.5, -0.5), None)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_scale_is_the_plain_product(impl, kind):
    """To the last bit of float32's dot products, which may sum in another order."""
    x, w = random(6, 77, seed=1).float(), random(40, 77, seed=2, scale=0.1).float()
    found = perturbed_linear(x, w, direction(kind), (0.0, 0.0), impl=impl)
    torch.testing.assert_close(found, linear(x, w), rtol=1e-6, atol=1e-6)


def test_scales_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"3 scales and x of shape \(6, 4\)"):
        perturbed_linear(torch.ones(6, 4), torch.ones(2, 4), direction("gaussian"), (1.0,) * 3)
    with pytest.raises(ValueError, match=r"2 scales and x of shape \(5, 4\)"):
        perturbed_linear(torch.ones(5, 4), torch.ones(2, 4), direction("gaussian"), (1.0, -1.0))


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ValueError, match="one of rademacher, gaussian, sign-rank1, hadamard; found"
    ):
        direction("uniform")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("factors", [(3e-3,), (3e-3, -1e-3, 5e-2)], ids=len)
def test_update(impl, dtype, kind, rounding, factors):
    """The bits of MeZO's own update, decay included; a Gaussian's product may be fused there."""
    rows, cols, start, decay = 29, 131, 7, 1e-2
    names = [(STEP - 1, PROBE + 2), (STEP - 1, PROBE), (STEP, PROBE)][-len(factors) :]
    terms = [(direction(kind, *name), c) for name, c in zip(names, factors, strict=True)]
    expected = random(rows, cols, seed=4).to(dtype)
    w = expected[start:].clone()
    skipped = [torch.zeros(1, 1, dtype=dtype, device=DEVICE)] * T
    whole = [(draw(kind, rows, cols, *name), c) for name, c in zip(names, factors, strict=True)]
    update_([*skipped, expected], whole, decay=decay, rounding=rounding)
    dither = rounding_noise(SEED, STEP, DEVICE) if rounding == "stochastic" else None
    offset = (T * 40503 + start * cols) % NOISE_SIZE
    options = dict(decay=decay, start=start, dither=dither, offset=offset)
    assert subtract_directions_(w, terms, impl=impl, **options) is w
    if kind != "gaussian":
        assert torch.equal(w, expected[start:])
    else:
        # Each term may be rounded another way; a sum on the way is larger by what follows it.
        later = [c * drawn.dense(T)[start:] for drawn, c in whole[1:]]
        largest = expected[start:].abs() + sum(z.abs() for z in later)
        step = len(factors) * torch.finfo(dtype).eps * largest
        assert ((w.float() - expected[start:].float()).abs() <= step).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_update_steps_by_c_in_float32(impl):
    """Against float64: one rounding of each term, none elsewhere."""
    w = random(40, 300, seed=5).float()
    z = draw("gaussian", 40, 300).dense(T).double()
    exact = w.double() - 0.01 * z
    found = subtract_directions_(w.clone(), [(direction("gaussian"), 0.01)], impl=impl)
    assert_as_good_as(found, w - 0.01 * z.float(), exact, atol=0)
