"""Graphs for devices against the engine itself: gradients, directions and updated weights."""

from contextlib import nullcontext

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from test_losses import build, lm_batch

import tinyft
from tinyft import adapters
from tinyft.losses import check_head, objective
from tinyft.targets import graphs
from tinyft.targets.gate import OPERATORS, optimised
from tinyft.targets.zeroth_graph import Plan, zeroth_forward, zeroth_update
from tinyft.zeroth.estimators import evaluation_points, projected_gradients
from tinyft.zeroth.update import update_

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch's exporter
SEED, STEP = 2**40 + 77, 5


def make(family, trainable):
    model = build(family)
    model.set_attn_implementation("eager")
    if trainable == "lora":
        adapters.inject(model, rank=3)
        for layer in adapters.adapters(model).values():  # at B = 0 the gradient of A is 0
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    check_head(model)
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def runner(graph, path):
    """`run(tensors) -> outputs by name`, in the stock runtime."""
    assert {node.op_type for node in graph.graph} <= OPERATORS
    onnx_ir.save(graph, path / "graph.onnx")
    session = onnxruntime.InferenceSession(path / "graph.onnx")
    inputs = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]

    def run(tensors):
        found = session.run(None, {name: tensors[name].numpy() for name in inputs})
        return {n: torch.from_numpy(t) for n, t in zip(outputs, found, strict=True)}

    return run


@pytest.mark.parametrize(
    "family, trainable, twice", [("gpt2", "all", False), ("qwen2", "lora", True)]
)
def test_gradient_step(family, trainable, twice, tmp_path):
    model, parameters = make(family, trainable)
    batch, names = lm_batch(3, 11), list(parameters)
    arguments = {name: p.detach() for name, p in parameters.items()} | graphs.moments(parameters)
    arguments |= graphs.frozen_of(model, names) | graphs.batch_inputs(batch)
    arguments |= {"lr": torch.tensor(1e-3), "step": torch.tensor(0)}
    step = graphs.gradient_step(model, names, graphs.Adam((0.9, 0.999), 1e-8), 0.1)
    with graphs.blocks_twice(model) if twice else nullcontext():
        run = runner(graphs.trace(step, graphs.constants_of(model), arguments), tmp_path)
    if twice:  # the second run of both blocks outlives the runtime's optimiser
        nodes = [node.op_type for node in optimised(tmp_path / "graph.onnx").node]
        assert nodes.count("Softmax") == 2 * 2

    state = {k: v.clone() for k, v in arguments.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.1)
    for i in range(20):
        batch = lm_batch(2 + i % 3, 9 + i % 5)  # other sizes than the graph was made with
        optimizer.zero_grad()
        loss = objective("lm")(model, batch).mean()
        loss.backward()
        found = run(state | graphs.batch_inputs(batch) | {"step": torch.tensor(i)})
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=0)
        if i == 0:
            largest = max(float(p.grad.abs().max()) for p in parameters.values())
            for name, p in parameters.items():
                scale = max(float(p.grad.abs().max()), 1e-3 * largest)
                error = (found[name + graphs.GRADIENT] - p.grad).abs().max()
                assert error <= 1e-5 * scale, name
        state |= {n.removesuffix(graphs.NEXT): v for n, v in found.items() if "/next" in n}
        optimizer.step()


@pytest.mark.parametrize("sure", [0.1, 1, 3, 6])
def test_cross_entropy_keeps_its_digits(sure):
    """Over a real vocabulary, loss and pull at the hidden state, from likely to certain labels."""
    torch.manual_seed(0)
    head = torch.randn(49152, 64) / 4
    logits = sure * torch.randn(8, 64) @ head.t()
    labels = logits.topk(2).indices[torch.arange(8), torch.arange(8) % 2]  # the best, or the next

    def found(loss, logits):
        logits = logits.clone().requires_grad_()
        losses = loss(logits, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return losses.detach().double(), gradient.double() @ head.double()

    plain = torch.nn.CrossEntropyLoss(reduction="none")
    losses, pulls = found(plain, logits.double())
    ours, our_pulls = found(graphs._CrossEntropy.apply, logits)
    torch.testing.assert_close(ours, losses, rtol=2e-7, atol=1e-30)
    assert ((our_pulls - pulls).norm(dim=1) <= 1e-6 * pulls.norm(dim=1)).all()


@pytest.mark.parametrize(
    "family, trainable, directions, estimator, probes",
    [
        ("llama", "all", "rademacher", "centred", 2),
        ("gpt2", "lora", "sign-rank1", "two-sided", 1),
        ("opt", "all", "sign-rank1", "one-sided", 3),
    ],
)
def test_zeroth_step(family, trainable, directions, estimator, probes, tmp_path):
    model, parameters = make(family, trainable)
    arguments = {name: p.detach().clone() for name, p in parameters.items()}
    arguments |= graphs.frozen_of(model, list(parameters))
    arguments |= graphs.batch_inputs(lm_batch(3, 11))
    arguments |= {"step": torch.tensor(STEP), "seed": torch.tensor(SEED)}
    plan = Plan(directions, [p.shape for p in parameters.values()])
    constants, drawn = graphs.constants_of(model), {"probe": torch.tensor(0)}
    counters, number = {"counters": plan.counters}, torch.tensor(1e-3)

    def runs(function, constants, name):
        graph = graphs.trace(function, constants | counters, arguments | drawn | {name: number})
        assert {node.domain for node in graph.graph} == {""}
        run = runner(graph, tmp_path)

        def at(probe, value, **tensors):
            given = {"probe": torch.tensor(probe), name: torch.tensor(value)}
            return run(arguments | given | tensors)

        return at

    forward = runs(zeroth_forward(model, list(parameters), plan), constants, "scale")
    points = evaluation_points(estimator, probes)
    losses = [float(forward(probe or 0, sign * 1e-3)["loss"]) for probe, sign in points]
    wanted_loss, got = projected_gradients(estimator, losses, 1e-3)

    optimizer = tinyft.MeZO(
        model, lr=1e-3, directions=directions, estimator=estimator, probes=probes, seed=SEED
    )
    optimizer.steps_taken = STEP
    steps = []
    optimizer._update = lambda lr, g: steps.append((lr, g))
    loss = optimizer.step(lambda b: objective("lm")(model, b), lm_batch(3, 11))
    assert wanted_loss == pytest.approx(float(loss), rel=1e-6)
    ((lr, wanted),) = steps
    rounding = 2e-6 * float(loss)  # of two losses, over what their difference is divided by
    probed = losses[estimator == "one-sided" :]
    unit = 2 * 1e-3 if estimator == "two-sided" else np.std(probed, ddof=1) / 2
    assert np.abs(np.subtract(got, wanted)).max() <= rounding / unit + 2e-3 * np.abs(got).max()
    # The same bits of every weight once the same numbers are used: the directions are the same.
    c = [float(np.float32(lr * g / probes)) for g in got]
    update = runs(zeroth_update(list(parameters), plan), {}, "c")
    moved: dict[str, torch.Tensor] = {}
    for probe in range(probes):
        found = update(probe, c[probe], **moved)
        moved = {name: found[name + graphs.NEXT] for name in parameters}
    draws = [optimizer.directions.draw(STEP, probe) for probe in range(probes)]
    update_(optimizer.parameters, list(zip(draws, c, strict=True)))
    for name, parameter in zip(optimizer.names, optimizer.parameters, strict=True):
        assert torch.equal(moved[name], parameter), name
