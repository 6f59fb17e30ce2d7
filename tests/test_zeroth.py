"""Directions, perturbed forward passes and updates against dense linear algebra and statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from tiny_models import CONFIGS, config_of
from torch import nn
from torch.func import functional_call

from tinyft.errors import InputError
from tinyft.zeroth.directions import FAMILIES, make_directions
from tinyft.zeroth.estimators import (
    ESTIMATORS,
    STORED_AS,
    evaluation_points,
    projected_gradients,
)
from tinyft.zeroth.forward import PerturbedForward
from tinyft.zeroth.seed_log import SeedLog
from tinyft.zeroth.update import update_


def tiny_model(architecture, **changes):
    """A random model whose every parameter matters, in eval mode."""
    auto = transformers.AutoModelForCausalLM
    if architecture == "bert":
        auto = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config_of(architecture, **changes)).eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_draws_are_pure_functions_of_their_counter(family):
    shapes = [(70, 130), (9,), (5, 3, 2)]
    one = make_directions(family, shapes, seed=5)
    two = make_directions(family, shapes, seed=5)
    for t, (rows, cols) in enumerate(one.shapes):
        z = one.draw(3, 1).dense(t)
        assert z.shape == (rows, cols)
        two.draw(7, 0)
        assert torch.equal(z, two.draw(3, 1).dense(t))
        index = torch.tensor([rows - 1, 0])
        assert torch.equal(two.draw(3, 1).rows(t, index), z[index])
        for other in (
            one.draw(3, 0),
            one.draw(4, 1),
            make_directions(family, shapes, 6).draw(3, 1),
        ):
            assert not torch.equal(other.dense(t), z) or cols < 8


@families
def test_second_moment_is_the_identity(family):
    """E[z z'] = I: over n draws each entry of the mean of z z' is within 6 standard errors."""
    n, shapes = 4000, [(3, 5), (4,)]
    directions = make_directions(family, shapes, seed=1)
    draws = (directions.draw(step, 0) for step in range(n))
    z = torch.stack([torch.cat([d.dense(t).flatten() for t in range(2)]) for d in draws]).double()
    deviation = (z.T @ z / n - torch.eye(z.shape[1])).abs()
    kurtosis_bound = math.sqrt(2) if family == "gaussian" else 1.0
    assert deviation.max() < 6 * kurtosis_bound / math.sqrt(n)


@families
def test_estimate_is_unbiased_and_its_second_moment_is_the_theory_s(family):
    """g_hat = (z'g) z: mean g; E||g_hat||^2 = (d + 2)||g||^2 (Gaussian) or d ||g||^2 (signs)."""
    n, shape = 6000, (6, 10)
    d = math.prod(shape)
    g = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    directions = make_directions(family, [shape], seed=3)
    z = torch.stack([directions.draw(step, 0).dense(0) for step in range(n)]).double()
    g_hat = (z * g).sum((1, 2), keepdim=True) * z
    error = (g_hat.mean(0) - g).norm() / g.norm()
    assert error < 3 * math.sqrt(d / n)  # ||error||^2 has mean (d - 1) / n
    norms = g_hat.square().sum((1, 2)) / g.square().sum()
    expected = d + 2 if family == "gaussian" else d
    assert abs(norms.mean() - expected) < 5 * norms.std() / math.sqrt(n)


@families
@pytest.mark.parametrize("architecture", CONFIGS)
def test_forward_equals_materialised_weights(family, architecture):
    """Every copy in one batch against torch.func.functional_call with theta + s eps z, float64."""
    model = tiny_model(architecture).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    directions = make_directions(family, [p.shape for p in parameters], 7, dtype=torch.float64)
    draws = [directions.draw(2, probe) for probe in (0, 1)]
    groups = [(None, 0.0), (draws[0], 0.01), (draws[0], -0.01), (draws[1], 0.01)]
    ids = torch.randint(3, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    before = [p.clone() for p in parameters]
    with torch.no_grad(), PerturbedForward(model, parameters)(groups, rows=8):
        got = model(input_ids=ids.repeat(4, 1), attention_mask=mask.repeat(4, 1)).logits
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    for copy, (draw, scale) in zip(got.chunk(4), groups, strict=True):
        weights = {
            name: p if draw is None else p + scale * draw.dense(t).view(p.shape)
            for t, (name, p) in enumerate(zip(names, parameters, strict=True))
        }
        with torch.no_grad():
            expected = functional_call(
                model, weights, kwargs={"input_ids": ids, "attention_mask": mask}
            ).logits
        torch.testing.assert_close(copy, expected, rtol=1e-9, atol=1e-9)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_parameter_beside_submodules_is_refused_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.inner = nn.Linear(2, 2)

    model = Odd()
    with pytest.raises(InputError, match="gain"):
        PerturbedForward(model, list(model.parameters()))


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_update_subtracts_the_direction(family, dtype):
    shapes = [(300, 70), (70,), (4, 3, 5)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    directions = make_directions(family, shapes, seed=1)
    draws = [directions.draw(0, 0), directions.draw(0, 1)]
    terms = [(draws[0], 0.01), (draws[1], -0.02)]
    expected = [
        w.double() * (0.9 if w.dim() > 1 else 1)
        - sum(c * z.dense(t).double().view(w.shape) for z, c in terms)
        for t, w in enumerate(tensors)
    ]
    update_(tensors, terms, decay=0.1)
    for w, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(dtype):
    """A step of 1/20 of the spacing between neighbours moves the mean, and only it."""
    spacing = torch.finfo(dtype).eps
    c = spacing / 20
    w = torch.ones(256, 1024, dtype=dtype) * 1.5
    directions = make_directions("sign-rank1", [w.shape], seed=0, dtype=dtype)
    draw = directions.draw(0, 0)
    z = draw.dense(0).float()
    stochastic, nearest = w.clone(), w.clone()
    update_([stochastic], [(draw, c)])
    update_([nearest], [(draw, c)], rounding="nearest")
    assert torch.equal(nearest, w)
    moved = stochastic.float() - 1.5
    assert set((moved / spacing).unique().tolist()) == {-1.0, 0.0, 1.0}
    mean = -(moved * z).mean().item()
    standard_error = math.sqrt(spacing * c / w.numel())
    assert abs(mean - c) < 6 * standard_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_step_changes_no_bit(dtype):
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[0, :4] = torch.tensor([0.0, -0.0, 1e-7, -6e-8])
    before = w.clone()
    for family in FAMILIES:
        directions = make_directions(family, [w.shape], seed=0, dtype=dtype)
        update_([w], [(directions.draw(0, 0), 0.0)])
        assert torch.equal(w.view(torch.uint8), before.view(torch.uint8)), family


def test_two_sided_is_exact_on_a_quadratic_for_any_eps():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    x, z = torch.randn(2, 6, dtype=torch.float64, generator=generator)

    def loss(v):
        return float(v @ (a + a.T) @ v / 2 + v.sum())

    directional = float(z @ ((a + a.T) @ x + 1))
    for eps in (1e-3, 0.1, 10.0):
        losses = [loss(x + sign * eps * z) for _, sign in evaluation_points("two-sided", 1)]
        _, (g,) = projected_gradients("two-sided", losses, eps)
        assert g == pytest.approx(directional, rel=1e-5)


def test_one_sided_is_free_of_the_losses_scale():
    losses = [1.0, 1.3, 0.8, 1.1]
    _, small = projected_gradients("one-sided", losses, 1e-3)
    _, large = projected_gradients("one-sided", [100 * v for v in losses], 1e-3)
    assert small == pytest.approx(large, rel=1e-6)
    assert projected_gradients("one-sided", [1.0, 1.0, 1.0], 1e-3)[1] == [0.0, 0.0]
    # All far from theta and hardly different from one another: finite.
    assert projected_gradients("one-sided", [1.0, 2.0, 2.0 + 1e-9], 1e-3)[1] == [65504.0, 65504.0]


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_several_draws_in_one_go(transposed):
    """As z itself would give them, in float64; bfloat16 rounds the products alone."""
    family = make_directions("sign-rank1", [(7, 7), (24, 16)], 3, dtype=torch.bfloat16)
    draws = [family.draw(step=2, probe=p) for p in range(3)]
    rows, cols = (16, 24) if transposed else (24, 16)
    x = torch.randn(6, cols).bfloat16()
    y, scale = torch.randn(6, rows).bfloat16(), torch.full((6, 1), 0.5, dtype=torch.bfloat16)
    wanted = y.double()
    for copy, draw in enumerate(draws):
        z = draw.dense(1).double()
        own = slice(2 * copy, 2 * copy + 2)
        wanted[own] += 0.5 * x[own].double() @ (z if transposed else z.t())
    family.add_products_(draws, 1, x, y, scale, transposed)
    torch.testing.assert_close(y.double(), wanted, rtol=2e-2, atol=0.1)


def test_centred_is_free_of_what_all_probes_share():
    """Of curvature, say, which one-sided takes for a slope along every one of them."""
    probes = np.array([1.0, 1.3, 0.8, 1.1])
    loss, g = projected_gradients("centred", probes.tolist(), 1e-3)
    assert loss == pytest.approx(probes.mean()) and sum(g) == pytest.approx(0, abs=1e-3)
    assert g == pytest.approx((probes - probes.mean()) / probes.std(ddof=1), rel=1e-3)
    assert projected_gradients("centred", (probes + 40).tolist(), 1e-3)[1] == pytest.approx(g)
    _, one_sided = projected_gradients("one-sided", [1.0, *(probes + 40)], 1e-3)
    assert min(one_sided) > 100


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_used_is_what_is_stored(estimator, tmp_path):
    points = evaluation_points(estimator, 3)
    losses = np.random.default_rng(0).normal(2, 0.1, len(points))
    _, used = projected_gradients(estimator, losses.tolist(), 1e-3)
    header = {"probes": 3, "stored_as": STORED_AS[estimator]}
    SeedLog.create(tmp_path / "log", header).append(0.5, used)
    assert list(SeedLog.open(tmp_path / "log").records()) == [(0.5, used)]


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_seed_log_drops_a_torn_record_and_goes_on(tmp_path, stored):
    path = tmp_path / "steps.seedlog"
    log = SeedLog.create(path, {"probes": 2, "seed": 1, "stored_as": stored})
    for step in range(3):
        log.append(0.5, [step, -step])
    path.write_bytes(path.read_bytes()[:-5])
    log = SeedLog.open(path)
    assert log.steps == 2
    log.append(0.25, [9, 9])
    assert list(SeedLog.open(path).records()) == [
        (0.5, [0, 0]),
        (0.5, [1, -1]),
        (0.25, [9, 9]),
    ]


ODD = b'{"format": "tinyft-seed-log-2", "probes": 1, "stored_as": "object"}\n'


@pytest.mark.parametrize("content", [b"", b"{}\n", b"not json\n", b'{"format": "other"}\n', ODD])
def test_other_files_are_no_seed_logs(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a seed log"):
        SeedLog.open(path)
    with pytest.raises(InputError, match="no seed log"):
        SeedLog.open(tmp_path / "missing")
