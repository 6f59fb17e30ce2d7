"""MeZO against an independent transcription of the published procedure, and its own promises."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_losses import f1_by_hand
from test_zeroth import tiny_model
from tiny_models import CONFIGS
from torch import nn

import tinyft
from tinyft.batches import Batch
from tinyft.errors import InputError
from tinyft.losses import objective
from tinyft.zeroth.directions import FAMILIES
from tinyft.zeroth.estimators import ESTIMATORS
from tinyft.zeroth.seed_log import SeedLog, fingerprint


def batch_of(seed: int, rows: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 300, (rows, width), generator=generator)}


def per_example(model):
    """Mean token cross-entropy of each row: `(B,)`."""

    def losses(batch):
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        token = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return token.mean(1)

    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


class Published:
    """Algorithm 1 of the MeZO paper as its authors run it, written from the description alone."""

    def __init__(self, model, lr, eps, weight_decay):
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.lr, self.eps, self.weight_decay = lr, eps, weight_decay

    def perturb(self, seed, scale):
        torch.manual_seed(seed)
        for _, p in self.named:
            z = torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype)
            p.data = p.data + scale * z * self.eps

    def step(self, loss, seed):
        self.perturb(seed, 1)
        plus = loss()
        self.perturb(seed, -2)
        minus = loss()
        gradient = ((plus - minus) / (2 * self.eps)).item()
        self.perturb(seed, 1)
        torch.manual_seed(seed)
        for name, p in self.named:
            z = torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype)
            if "bias" in name or "layer_norm" in name or "layernorm" in name or "norm" in name:
                p.data = p.data - self.lr * (gradient * z)
            else:
                p.data = p.data - self.lr * (gradient * z + self.weight_decay * p.data)
        return gradient


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_exact_mode_equals_the_published_procedure_bit_for_bit(architecture, tmp_path):
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    optimizer = tinyft.MeZO(ours, lr=1e-3, eps=1e-3, exact=True, weight_decay=0.1, seed=3)
    optimizer.open_log(tmp_path / "log", resume=False)
    published = Published(theirs, lr=float(np.float32(1e-3)), eps=1e-3, weight_decay=0.1)
    for step in range(10):
        batch = batch_of(step)
        with torch.no_grad():
            expected = published.step(
                lambda b=batch: per_example(theirs)(b).mean(), optimizer.step_seed(step)
            )
        optimizer.step(lambda b=batch: per_example(ours)(b).mean())
        *_, (_, (found,)) = SeedLog.open(tmp_path / "log").records()
        assert found == np.float32(expected)
        assert equal(weights(ours), weights(theirs)), step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", [("two-sided", 1), ("two-sided", 2), ("one-sided", 3)])
def test_batched_copies_give_the_same_step_as_one_call_a_sign(family, estimator):
    kind, probes = estimator
    results = []
    for batched in (True, False):
        model = tiny_model("llama").double()
        optimizer = tinyft.MeZO(
            model, lr=1e-3, directions=family, estimator=kind, probes=probes, seed=1
        )
        batch, losses = batch_of(0), per_example(model)
        if batched:
            loss = optimizer.step(losses, batch)
        else:
            loss = optimizer.step(lambda b=batch, f=losses: f(b).mean())
        results.append((loss, weights(model)))
    (loss, ours), (expected_loss, expected) = results
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("family", FAMILIES)
def test_projected_gradient_tends_to_the_forward_mode_derivative(family, tmp_path):
    model = tiny_model("gpt2").double()  # Llama's norm computes in float32
    options = {"estimator": "two-sided", "directions": family, "eps": 1e-5}
    optimizer = tinyft.MeZO(model, lr=0.0, **options, seed=5)
    optimizer.open_log(tmp_path / "log", resume=False)
    batch = batch_of(1)
    names = optimizer.names
    draw = optimizer.directions.draw(0, 0)
    primals = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: draw.dense(t).view(primals[n].shape) for t, n in enumerate(names)}

    def loss(parameters):
        ids = batch["input_ids"]
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": ids}).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.func.jvp(loss, (primals,), (tangents,))
    optimizer.step(per_example(model), batch)
    ((_, (found,)),) = SeedLog.open(tmp_path / "log").records()
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_what_rounding_hides_from_the_loss_is_left_as_it_is(caplog):
    """Norm scales of 1 in bfloat16, whose spacing is 8 times eps; others, and all in float32, are
    trained."""
    with caplog.at_level("INFO", logger="tinyft"):
        model = tiny_model("llama").bfloat16()
        with torch.no_grad():
            model.model.norm.weight.fill_(0.1)
        before = weights(model)
        optimizer = tinyft.MeZO(model, lr=1e-2)
        for seed in range(3):
            optimizer.step(per_example(model), batch_of(seed))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name, _ in model.named_parameters()} - moved
    assert "model.norm.weight" in moved and len(still) == 4
    assert all(name.endswith("layernorm.weight") for name in still)
    assert "lost in the rounding of 4 vectors" in caplog.text
    whole = tinyft.MeZO(tiny_model("llama"), lr=1e-2)
    assert len(whole.parameters) == len(optimizer.parameters) + 4
    model.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    with pytest.raises(InputError, match="nothing else is to be trained"):
        tinyft.MeZO(model)
    assert tinyft.MeZO(model, exact=True).parameters  # as published


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_learning_rate_leaves_every_bit(family, dtype):
    model = tiny_model("gpt2").to(dtype)
    before = weights(model)
    optimizer = tinyft.MeZO(model, lr=0.0, directions=family)
    for step in range(3):
        optimizer.step(per_example(model), batch_of(step))
    assert equal(before, weights(model))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "one-sided", "probes": 3, "directions": "rademacher"},
        {"momentum": 0.8, "weight_decay": 0.1},
        {"exact": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_log_replays_to_the_same_bits(options, dtype, tmp_path):
    path = tmp_path / "steps.seedlog"
    model = tiny_model("llama").to(dtype)
    optimizer = tinyft.MeZO(model, lr=1e-2, seed=9, **options)
    optimizer.open_log(path, resume=False)
    halfway = None
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        optimizer.step(per_example(model), batch_of(step))
        halfway = path.read_bytes() if step == 5 else halfway
    final = weights(model)

    fresh = tiny_model("llama").to(dtype)
    assert not equal(weights(fresh), final)
    again = tinyft.MeZO(fresh, lr=1e-2, seed=9, **options)
    assert again.open_log(path, resume=True) == 12
    assert equal(weights(fresh), final)
    assert fingerprint(*zip(*weights(fresh).items(), strict=True)) == fingerprint(
        *zip(*final.items(), strict=True)
    )

    path.write_bytes(halfway)
    resumed = tiny_model("llama").to(dtype)
    going_on = tinyft.MeZO(resumed, lr=1e-2, seed=9, **options)
    assert going_on.open_log(path, resume=True) == 6
    for step in range(6, 12):
        going_on.param_groups[0]["lr"] = 1e-2 / (1 + step)
        going_on.step(per_example(resumed), batch_of(step))
    assert equal(weights(resumed), final)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_thousand_steps_fit_in_16_kib(tmp_path, estimator):
    model = tiny_model("llama")
    optimizer = tinyft.MeZO(model, lr=1e-4, estimator=estimator)
    optimizer.open_log(tmp_path / "log", resume=False)
    for step in range(1000):
        optimizer._apply(1e-4, [math.sin(step + p) for p in range(optimizer.options.probes)])
    assert (tmp_path / "log").stat().st_size <= 16 * 1024


def test_a_log_of_another_run_is_refused(tmp_path):
    optimizer = tinyft.MeZO(tiny_model("llama"), seed=1)
    optimizer.open_log(tmp_path / "log", resume=False)
    optimizer.step(per_example(optimizer.model), batch_of(0))
    with pytest.raises(InputError, match="seed: 1 there, 2 now"):
        tinyft.MeZO(tiny_model("llama"), seed=2).open_log(tmp_path / "log", resume=True)
    other = tiny_model("llama")
    other.model.norm.weight.data[0] += 1
    with pytest.raises(InputError, match="base"):
        tinyft.MeZO(other, seed=1).open_log(tmp_path / "log", resume=True)


def test_objectives_without_a_gradient_train():
    """Accuracy has gradient zero almost everywhere; its difference over eps has not."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = (x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) > 0).long()
    model = nn.Linear(4, 2)

    def error(batch):  # a scalar: one evaluation a sign
        return (model(batch["x"]).argmax(1) != batch["y"]).float().mean()

    batch = {"x": x, "y": y}
    optimizer = tinyft.MeZO(model, lr=0.05, eps=0.1, directions="gaussian", probes=2)
    before = error(batch).item()
    for _ in range(150):
        optimizer.step(error, batch)
    assert error(batch).item() < min(0.1, before)


@pytest.mark.parametrize("estimator, probes", [("two-sided", 1), ("one-sided", 4)])
def test_f1_is_that_of_the_whole_batch_at_every_point(estimator, probes):
    """Parts of it have other F1s."""
    model = tiny_model("bert", num_labels=3)
    ids = batch_of(3, rows=9)["input_ids"]
    batch = Batch(ids, torch.ones_like(ids), answers=torch.arange(9) % 3)
    options = {"estimator": estimator, "probes": probes, "directions": "gaussian"}
    optimizer = tinyft.MeZO(model, lr=0.0, eps=0.5, **options)
    with torch.no_grad():
        losses = optimizer._losses(lambda b: objective("f1")(model, b), batch, optimizer._groups())
    for loss, (draw, scale) in zip(losses.tolist(), optimizer._groups(), strict=True):
        theirs = tiny_model("bert", num_labels=3)
        with torch.no_grad():
            for t, p in enumerate(theirs.parameters() if draw else ()):
                p += scale * draw.dense(t).view(p.shape)
            guesses = theirs(input_ids=ids).logits.argmax(1).tolist()
        assert loss == pytest.approx(1 - f1_by_hand(guesses, batch.answers.tolist()))
    assert len(optimizer.settings(9)) == 1  # smaller parts would have other F1s


class Placed(nn.Module):
    """Positions and a bias that are made once for all rows, as DeBERTa's and MPNet's are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(300, 8), nn.Embedding(6, 8)
        self.norm, self.mix, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 300)

    def forward(self, input_ids):
        place = self.mix(self.norm(self.places(torch.arange(input_ids.shape[1]))))
        return SimpleNamespace(logits=self.head(self.words(input_ids) + place))


def test_a_layer_whose_input_all_copies_share_is_perturbed_all_the_same(caplog):
    """Both signs in one batch would split the positions: the first three up, the others down."""
    results = []
    for batched in (True, False):
        model = Placed().double()
        optimizer = tinyft.MeZO(model, lr=1e-2, seed=1, probes=2)
        batch, losses = batch_of(0), per_example(model)
        if batched:
            optimizer.step(losses, batch)
        else:
            optimizer.step(lambda b=batch, f=losses: f(b).mean())
        results.append(weights(model))
    for ours, expected in zip(*(r.values() for r in results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    (record,) = caplog.records
    assert "places, norm, mix, of one input" in record.getMessage()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_copies_of_a_batch_have_inputs_of_their_own(architecture):
    model = tiny_model(architecture)
    optimizer = tinyft.MeZO(model, lr=0.0)
    optimizer.prepare(lambda b: model(**b).logits.float().flatten(1).mean(1), [batch_of(0)])
    assert optimizer._looked and not optimizer._apart and not optimizer._scalar_objective


def test_no_cache_of_keys_and_values_is_made():
    model = tiny_model("llama")
    caches = []

    def loss():
        out = model(**batch_of(0))
        caches.append(out.past_key_values)
        return out.logits.mean()

    for options in ({}, {"exact": True}):
        tinyft.MeZO(model, lr=0.0, **options).step(loss)
    assert caches == [None] * (5 + 2) and model.config.use_cache


@pytest.mark.parametrize("calls", [1, 2])
def test_an_error_in_the_published_procedure_leaves_the_weights_unperturbed(calls):
    model = nn.Linear(3, 2).double()
    before = weights(model)
    scores = iter([torch.zeros(())] * (calls - 1))
    with pytest.raises(StopIteration):
        tinyft.MeZO(model, exact=True, eps=0.1).step(lambda: next(scores))
    for name, was in before.items():
        torch.testing.assert_close(weights(model)[name], was, rtol=0, atol=1e-12)


def test_a_batch_is_a_tensor_or_holds_other_things_too():
    ids, results = batch_of(0)["input_ids"], []
    for batch, ids_of in (
        ({"input_ids": ids}, lambda b: b["input_ids"]),
        ({"input_ids": ids, "note": None}, lambda b: b["input_ids"]),
        ((ids, "note"), lambda b: b[0]),
        (ids, lambda b: b),
    ):
        model = tiny_model("llama")
        losses = per_example(model)
        tinyft.MeZO(model, lr=1e-2).step(
            lambda b, f=losses, ids_of=ids_of: f({"input_ids": ids_of(b)}), batch
        )
        results.append(weights(model))
    assert all(equal(results[0], other) for other in results[1:])


def test_state_dict_restores_momentum_and_step():
    def fresh():
        return tinyft.MeZO(tiny_model("llama"), lr=1e-2, momentum=0.9, seed=2)

    straight = fresh()
    for step in range(6):
        straight.step(per_example(straight.model), batch_of(step))
    first = fresh()
    for step in range(3):
        first.step(per_example(first.model), batch_of(step))
    second = fresh()
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        second.step(per_example(second.model), batch_of(step))
    assert equal(weights(straight.model), weights(second.model))


def test_dropout_is_off_during_the_step_and_back_on_after_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    modes = []
    optimizer = tinyft.MeZO(model, lr=0.0)
    optimizer.step(lambda: modes.append(model[1].training) or model(torch.ones(1, 4)).sum())
    assert modes == [False] * 5  # five probes
    assert model[1].training


def test_a_nan_loss_stops_before_the_weights():
    model = tiny_model("llama")
    before = weights(model)
    optimizer = tinyft.MeZO(model, lr=1.0)
    with pytest.raises(InputError, match="loss at step 0 is nan"):
        optimizer.step(lambda: torch.tensor(float("nan")))
    assert equal(before, weights(model))


def test_all_wrong_options_are_named_at_once():
    with pytest.raises(InputError) as error:
        tinyft.MeZO(nn.Linear(2, 2), eps=0, directions="up", probes=1, momentum=1.0)
    for word in ("eps", "directions", "probes", "momentum"):
        assert word in str(error.value)
    with pytest.raises(InputError, match="step\\(lambda"):
        tinyft.MeZO(nn.Linear(2, 2)).step()
    with pytest.raises(InputError, match="nothing to train"):
        tinyft.MeZO(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(InputError, match="one loss per example"):
        model = nn.Linear(2, 2)
        tinyft.MeZO(model).step(lambda b: model(b["x"]), {"x": torch.ones(3, 2)})
