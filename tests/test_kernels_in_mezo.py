"""MeZO with its fused kernels, as it runs on a GPU, against MeZO in torch."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, needs_triton, random
from torch import nn

from tinyft.kernels import dispatch
from tinyft.kernels.perturbed_linear import KINDS
from tinyft.zeroth import forward, update
from tinyft.zeroth.directions import make_directions

pytestmark = needs_triton
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def choose(monkeypatch):
    """`choose("triton")`: from here on MeZO asks for that implementation."""
    monkeypatch.setattr(dispatch, "ran", {})

    def ask(impl: str) -> None:
        def chosen(op, auto, *tensors, **options):
            return dispatch.choose(op, impl, *tensors, **options)

        monkeypatch.setattr(forward, "choose", chosen)
        monkeypatch.setattr(update, "choose", chosen)

    return ask


@kinds
@pytest.mark.parametrize("scales", [(0.1, -0.1), (0.1,)])
@torch.no_grad()
def test_forward(kind, scales, choose):
    model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 70, bias=False))
    model.load_state_dict(
        {name: 0.2 * random(*p.shape, seed=9).float() for name, p in model.named_parameters()}
    )
    parameters = list(model.to(DEVICE).parameters())
    draw = make_directions(kind, [p.shape for p in parameters], 3, DEVICE).draw(1, 0)
    perturbed = forward.PerturbedForward(model, parameters)
    x = random(len(scales) * 2, 3, 40, seed=1).float()
    found = {}
    for impl in ("torch", "triton"):
        choose(impl)
        with perturbed([(draw, scale) for scale in scales], rows=len(x)):
            found[impl] = model(x)
        assert dispatch.ran["perturbed_linear"] == f"{impl} (asked for)"
    assert not torch.equal(found["torch"], model(x))
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_has_no_kernel_stays_in_torch(choose):
    """Several probes, and unperturbed copies."""
    choose("triton")
    model = nn.Linear(8, 6, device=DEVICE)
    parameters = list(model.parameters())
    perturbed = forward.PerturbedForward(model, parameters)
    shapes = [p.shape for p in parameters]
    signs = make_directions("rademacher", shapes, 3, DEVICE)
    for groups in (
        [(signs.draw(0, 0), 0.1), (signs.draw(0, 1), 0.1)],
        [(None, 0.0), (signs.draw(0, 0), 0.1)],
    ):
        with perturbed(groups, rows=4):
            model(torch.ones(4, 8, device=DEVICE))
    assert "perturbed_linear" not in dispatch.ran


def updated(shape, kind, dtype, choose, probes=1):
    """What torch's and Triton's update make of one tensor among others."""
    shapes = [(3, 2), (9,), shape]
    family = make_directions(kind, shapes, 3, DEVICE)
    terms = [(family.draw(2, probe), 1e-3 * probe) for probe in range(1, 1 + probes)]
    for impl in ("torch", "triton"):
        choose(impl)
        tensors = [random(*s, seed=t).to(dtype) for t, s in enumerate(shapes)]
        update.update_(tensors, terms, decay=1e-2)
        assert dispatch.ran["subtract_directions_"] == f"{impl} (asked for)"
        yield tensors[-1]


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_in_blocks(kind, dtype, choose, monkeypatch):
    """The same bits, so that a log replays alike; a Gaussian's product may be fused in torch."""
    monkeypatch.setattr(update, "BLOCK_ELEMENTS", 2000)
    expected, found = updated((29, 190), kind, dtype, choose)
    if kind != "gaussian":
        assert torch.equal(found, expected)
    else:
        ulp = torch.finfo(dtype).eps * expected.float().abs() + 1e-9
        assert ((found.float() - expected.float()).abs() <= ulp).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sign-rank1", "rademacher"])
def test_update_of_several_probes(kind, dtype, choose):
    """In one kernel, rounded once: the bits of one after the other in float32."""
    assert torch.equal(*updated((29, 190), kind, dtype, choose, probes=3))


def test_update_of_a_block_larger_than_the_noise(choose):
    expected, found = updated((300, 230), "rademacher", torch.bfloat16, choose)
    assert torch.equal(found, expected)
