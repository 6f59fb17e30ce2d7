"""GreenTrainer: what is planned is what happens, evaluations leave no trace, and it resumes."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from test_gradient_methods import batch_of
from test_zeroth import tiny_model
from torch import nn

import tinyft
from tinyft.activations import keeping
from tinyft.adapters import adapters, inject
from tinyft.backward_cost import trace
from tinyft.cost import FlopCounter
from tinyft.errors import InputError
from tinyft.heap import HeapWatch
from tinyft.importance import first_order, published
from tinyft.losses import check_head, objective
from tinyft.selection import saved_flops
from tinyft.train import run

DECODERS = ("llama", "gpt2", "opt", "qwen2", "gpt_neox", "gemma")


def t5():
    config = transformers.T5Config(
        **{"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2},
        **{"num_heads": 4, "decoder_start_token_id": 0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config)


def model_and_loss(architecture):
    """A model in training mode, and its loss on one batch as a closure."""
    batch = batch_of(0)
    if architecture == "t5":
        model, labels = t5(), batch.input_ids[:, :7].contiguous()
        return model.train(), lambda: model(input_ids=batch.input_ids, labels=labels).loss
    model = tiny_model(architecture).train()
    if architecture == "bert":
        labels = torch.tensor([0, 1, 1, 0])
        return model, lambda: model(input_ids=batch.input_ids, labels=labels).loss
    check_head(model)
    return model, lambda: objective("lm")(model, batch).mean()


def mean_loss(model, batch):
    return objective("lm")(model, batch).mean()


def double_loss(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:])


def counted(model, parameters, mask, loss, mode):
    """FLOPs of a real step's forward and backward that train `mask`, counted."""
    for parameter, chosen in zip(parameters, mask, strict=True):
        parameter.requires_grad_(bool(chosen))
    with FlopCounter() as counter:
        with keeping(model, mode, HeapWatch()):
            value = loss()
        value.backward()
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    return counter.flops


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("architecture", [*DECODERS, "bert", "t5"])
def test_planned_flops_are_the_counted_ones(architecture, trainable):
    model, loss = model_and_loss(architecture)
    if trainable == "lora":
        inject(model, rank=2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mode = "none" if architecture == "opt" else "selective"
    with keeping(model, mode, HeapWatch()):
        cost = trace(loss, parameters, model)
    assert all(p.grad is None for p in parameters)
    rng = np.random.default_rng(0)
    everything = np.ones(len(parameters), dtype=bool)
    assert cost.step_flops() == counted(model, parameters, everything, loss, mode)
    shares = set()
    for depth in np.linspace(2, len(parameters), 8).astype(int):
        mask = np.zeros_like(everything)
        mask[cost.order[:depth]] = rng.random(depth) < rng.choice([0.2, 0.6])
        mask[cost.order[depth - 1]] = True
        planned, real = cost.step_flops(mask), counted(model, parameters, mask, loss, mode)
        assert real <= planned <= 1.01 * real
        shares.add(round(real / cost.step_flops(), 2))
        # The chain that the selection goes by may charge parallel branches twice, never less.
        chain = cost.own(cost.flops)[mask[cost.order]].sum() + cost.way(cost.flops)[:depth].sum()
        assert planned <= cost.forward_flops + chain <= 1.15 * planned
    assert len(shares) > 4


def test_the_head_alone_is_charged_a_little_too_much():
    model, loss = model_and_loss("qwen2")
    parameters = list(model.parameters())
    cost = trace(loss, parameters, model)
    mask = np.array([p is model.lm_head.weight for p in parameters])
    real = counted(model, parameters, mask, loss, "none")
    assert real < cost.step_flops(mask) < 1.25 * real


def saved_bytes(model, parameters, mask, loss):
    """What autograd holds after the forward pass of a step that trains `mask`."""
    held, resident = {}, {p.untyped_storage()._cdata for p in model.parameters()}
    resident |= {b.untyped_storage()._cdata for b in model.buffers()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            held[storage._cdata] = storage
        return tensor

    for parameter, chosen in zip(parameters, mask, strict=True):
        parameter.requires_grad_(bool(chosen))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    for parameter in parameters:
        parameter.requires_grad_(True)
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "bert", "t5"])
def test_saved_activations_fall_with_the_depth_and_as_planned(architecture):
    model, loss = model_and_loss(architecture)
    parameters = list(model.parameters())
    cost = trace(loss, parameters, model)
    full = saved_bytes(model, parameters, np.ones(len(parameters), bool), loss)
    assert cost.activation_bytes() == full
    rng, deep = np.random.default_rng(0), full
    for depth in range(len(parameters) - 1, 1, -3):
        mask = np.zeros(len(parameters), dtype=bool)
        mask[cost.order[:depth]] = True
        real = saved_bytes(model, parameters, mask, loss)
        assert real <= deep and real <= cost.activation_bytes(mask) <= 1.13 * real
        deep = real
        mask &= rng.random(len(mask)) < 0.5  # some on the way are frozen
        real = saved_bytes(model, parameters, mask, loss)
        assert real <= cost.activation_bytes(mask) <= 1.2 * real + 4096
    assert deep < 0.35 * full


@pytest.mark.parametrize("memory", [None, 60_000])
@pytest.mark.parametrize("choose", ["importance", "random", "last"])
def test_a_step_costs_what_was_asked_for(choose, memory):
    """FLOPs over all steps, evaluations among them, and state of the selected alone."""
    model = tiny_model("llama", num_hidden_layers=6, hidden_size=64).train()
    check_head(model)
    options = {"rho": 0.7, "reselect": 20, "memory_bytes": memory, "choose": choose}
    optimizer = tinyft.GreenTrainer(model, lr=1e-3, **options)
    twin = copy.deepcopy(model)
    check_head(twin)
    full = tinyft.Full(twin, lr=1e-3)
    lm, total, most = objective("lm"), 0, 0
    for step in range(40):
        batch = batch_of(step)
        with FlopCounter() as counter:
            optimizer.step(lambda part: lm(model, part), batch)
        total += counter.flops
        mask = optimizer.history[-1].mask
        assert {id(p) for p in optimizer.state} == {
            id(p) for p, chosen in zip(optimizer.candidates, mask, strict=True) if chosen
        }
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        most = max(most, counter.flops)
    with FlopCounter() as counter:
        full.step(lambda part: lm(twin, part), batch)
    assert 0.9 * 0.7 < total / 40 / counter.flops <= 0.7 or memory
    assert total / 40 / counter.flops <= 0.7
    assert saved_flops(optimizer.history, 40)[1][-1] == pytest.approx(
        1 - total / 40 / counter.flops, abs=0.01
    )
    if memory:
        state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
        assert 0 < state + optimizer.cost.activation_bytes(mask) <= memory


def chosen_by(choose, steps=12):
    """The names that were trained from each selection to the next, and the optimizer."""
    model = tiny_model("llama", num_hidden_layers=6, tie_word_embeddings=False).train()
    check_head(model)
    optimizer = tinyft.GreenTrainer(model, lr=1e-3, rho=0.6, reselect=4, choose=choose)
    advance(optimizer, model, range(steps))
    names = np.array(optimizer.names)
    return [set(names[selection.mask]) for selection in optimizer.history], optimizer


def test_the_last_tensors_are_those_of_the_last_layers():
    (first, *others), optimizer = chosen_by("last")
    assert all(first <= names for names in others)  # which do not pay for the trace
    whole = [{name for name in optimizer.names if f"layers.{layer}." in name} for layer in range(6)]
    assert {"lm_head.weight", "model.norm.weight"} < first and whole[5] < first
    assert not whole[0] & first and not whole[1] & first


def test_random_tensors_are_others_each_time_and_leave_no_trace():
    several, optimizer = chosen_by("random")
    assert len(set(map(frozenset, several))) == len(several) == 3
    assert len(set.union(*several)) > 1.3 * len(several[0])
    again, _ = chosen_by("random")  # the same seeds
    assert again == several
    model = optimizer.model
    torch.manual_seed(5)
    before = torch.get_rng_state()
    optimizer._reselect(lambda part: objective("lm")(model, part), batch_of(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_of_the_selected_are_those_of_full_fine_tuning():
    model = tiny_model("llama").double().train()
    optimizer = tinyft.GreenTrainer(model, lr=0.1, rho=0.75, optimizer="sgd")
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: objective("lm")(model, batch_of(0)).mean())
    objective("lm")(twin, batch_of(0)).mean().backward()
    mask = optimizer.history[-1].mask
    assert 2 < mask.sum() < len(mask)
    for new, old, p, chosen in zip(
        model.parameters(), before, twin.parameters(), mask, strict=True
    ):
        if chosen:
            torch.testing.assert_close((old - new) / 0.1, p.grad, rtol=1e-6, atol=1e-12)
        else:
            assert torch.equal(old, new)


class Noisy(nn.Module):
    """Dropout, running statistics, and a buffer that every forward pass changes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 16), nn.Linear(16, 1), nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        x = self.norm(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.b(self.drop(torch.tanh(x)))


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("importance", ["published", "first-order"])
def test_an_evaluation_leaves_no_trace(importance, rule):
    torch.manual_seed(0)
    model = Noisy()
    x, y = torch.randn(8, 5, 6), torch.randn(8, 5, 1)
    optimizer = tinyft.GreenTrainer(
        model, lr=1e-2, rho=0.9, importance=importance, optimizer=rule, weight_decay=0.1
    )
    batch = {"x": x, "y": y}

    def closure(part):
        return (model(part["x"]) - part["y"]).square().mean((1, 2))

    for _ in range(3):
        optimizer.step(closure, batch)

    def everything():
        return [
            *(t.clone() for t in model.state_dict().values()),
            *(t.clone() for t in optimizer.state_tensors().values()),
            torch.get_rng_state(),
            torch.tensor([module.training for module in model.modules()]),
            torch.tensor([p in optimizer.state for p in optimizer.candidates]),
        ]

    before = everything()
    mask = optimizer.history[-1].mask
    gains = optimizer._rated(closure, batch, mask)
    optimizer._trace(closure, batch)
    assert (gains > 0).any()
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters())
    # Without dropout, hence the same again, although random numbers have moved on.
    torch.rand(1)
    assert (optimizer._rated(closure, batch, mask) == gains).all()


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("way", ["published", "first-order"])
def test_importance_is_the_loss_regained_by_a_tensors_update(way, rule):
    """Against undoing each tensor's update in turn: the error falls with the learning rate."""
    errors = []
    for lr in (1e-3, 1e-4, 1e-5):
        model = tiny_model("gpt2").double()  # whose norms do not fall back to float32
        loss = partial(double_loss, model, batch_of(0).input_ids)
        optimizer = tinyft.Full(
            model, lr=lr, optimizer=rule, weight_decay=0.1, eps=1e-4, checkpointing="none"
        )
        gains = (
            published(optimizer, loss)
            if way == "published"
            else first_order(optimizer, [(1.0, loss)])
        )
        old = [p.detach().clone() for p in model.parameters()]
        optimizer.step(loss)
        true = []
        with torch.no_grad():
            trained = loss()
            for parameter, value in zip(model.parameters(), old, strict=True):
                new = parameter.clone()
                parameter.copy_(value)
                true.append(float(loss() - trained))
                parameter.copy_(new)
        errors.append(np.abs(gains - true).max() / np.abs(true).max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_a_schedule_that_begins_at_nothing_keeps_the_first_importances():
    """They are those at any rate, since only their ratios count."""
    found = []
    for lr in (0.0, 1e-3):
        model = tiny_model("llama").train()
        optimizer = tinyft.GreenTrainer(model, lr=lr, rho=0.6, weight_decay=0.1)
        optimizer.step(partial(mean_loss, model, batch_of(0)))
        found.append(optimizer.history[0])
    np.testing.assert_allclose(found[0].importance, found[1].importance)
    assert (found[0].mask == found[1].mask).all() and not np.allclose(found[0].importance, 1)


def test_first_order_importance_in_parts_is_their_average():
    model = tiny_model("llama")
    optimizer = tinyft.Full(model, lr=1e-3)
    whole, one, other = (partial(mean_loss, model, b) for b in (batch_of(0), *batch_of(0).split(2)))
    apart = [first_order(optimizer, [(1.0, loss)]) for loss in (one, other)]
    together = first_order(optimizer, [(0.25, one), (0.75, other)])
    np.testing.assert_allclose(together, 0.25 * apart[0] + 0.75 * apart[1], rtol=1e-6)
    assert not np.allclose(together, first_order(optimizer, [(1.0, whole)]), rtol=1e-3)


def test_an_evaluation_takes_no_more_activations_than_training():
    model = tiny_model("llama", num_hidden_layers=6).train()
    lm, batch = objective("lm"), batch_of(0, rows=8)
    optimizer = tinyft.GreenTrainer(model, rho=0.6, reselect=100)
    rows = []

    def closure(part):
        rows.append((len(part.input_ids), all(p.requires_grad for p in model.parameters())))
        return lm(model, part)

    optimizer.step(closure, batch)
    *evaluation, (trained_rows, _) = rows
    assert trained_rows == 8 and all(whole for _, whole in evaluation)
    cost, mask = optimizer.cost, optimizer.history[-1].mask
    per_row = cost.activation_bytes() / 8
    assert max(n for n, _ in evaluation) * per_row <= 1.1 * cost.activation_bytes(mask)


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_it_learns(trainable):
    model = tiny_model("llama", num_hidden_layers=3).train()
    if trainable == "lora":
        inject(model, rank=4)
    lm, batch = objective("lm"), batch_of(0)
    optimizer = tinyft.GreenTrainer(model, lr=1e-2, rho=0.85, reselect=25)
    losses = [float(optimizer.step(lambda part: lm(model, part), batch)) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.5
    assert len(optimizer.history) == 3


def test_a_tensor_that_leaves_loses_its_moments_and_begins_anew(monkeypatch):
    model = tiny_model("llama").train()
    lm, batch = objective("lm"), batch_of(0)
    optimizer = tinyft.GreenTrainer(model, lr=1e-3, rho=1.0, reselect=5, smoothing=0.0)
    one, other = 8, 12
    wanted = iter([one, other, one])
    monkeypatch.setattr(optimizer, "_rated", lambda *_: np.eye(len(optimizer.names))[next(wanted)])
    for steps, chosen in ((5, one), (5, other), (1, one)):
        before = [p.detach().clone() for p in optimizer.candidates]
        for _ in range(steps):
            optimizer.step(lambda part: lm(model, part), batch)
        assert {id(p) for p in optimizer.state} == {id(optimizer.candidates[chosen])}
        assert optimizer.state[optimizer.candidates[chosen]]["step"] == steps
        for k, (old, new) in enumerate(zip(before, optimizer.candidates, strict=True)):
            assert torch.equal(old, new) == (k != chosen)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("importance", ["first-order", "published"])
def test_clipping_and_accumulation(rule, importance):
    """Gradients are then kept until the end, and count."""
    model = tiny_model("llama", hidden_size=64, num_hidden_layers=3).train()
    lm, batch = objective("lm"), batch_of(0)
    free = tinyft.GreenTrainer(model, optimizer=rule)
    optimizer = tinyft.GreenTrainer(
        model,
        lr=1e-2,
        **{"rho": 0.8, "importance": importance, "optimizer": rule},
        **{"grad_clip": 1.0, "grad_accumulation": 2, "checkpointing": "full"},
    )
    for parameter in optimizer.candidates:
        kept = optimizer._state_bytes(parameter) - free._state_bytes(parameter)
        assert kept == parameter.numel() * parameter.element_size()
        state = optimizer.rule.start(parameter)
        assert free._state_bytes(parameter) == sum(t.nbytes for t in state.values())
    losses = [float(optimizer.step(lambda part: lm(model, part), batch)) for _ in range(15)]
    assert losses[-1] < losses[0]


def advance(optimizer, model, steps):
    lm = objective("lm")
    for step in steps:
        torch.manual_seed(step)
        optimizer.step(lambda part: lm(model, part), batch_of(step))


@pytest.mark.parametrize("stop", [4, 5, 6])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_state_resumes_to_the_same_bits(stop, trainable):
    """Stopped within an interval, before an evaluation, and after one; selections move."""

    def fresh():
        model = tiny_model("llama", num_hidden_layers=3).train()
        if trainable == "lora":
            inject(model, rank=2, dropout=0.2)
        return model, tinyft.GreenTrainer(model, lr=3e-2, rho=0.98, reselect=5, smoothing=0.2)

    model, optimizer = fresh()
    advance(optimizer, model, range(12))
    masks = [selection.mask for selection in optimizer.history]
    assert len(masks) == 3 and any((masks[0] != mask).any() for mask in masks)
    first, stopped = fresh()
    advance(stopped, first, range(stop))
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    if stop == 6:  # torch's own way
        resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    else:
        resumed.load_state_tensors(copy.deepcopy(stopped.state_tensors()))
    advance(resumed, second, range(stop, 12))
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.history, resumed.history, strict=True):
        assert (a.mask == b.mask).all() and (a.importance == b.importance).all()
        assert (a.step, a.share, a.overhead) == (b.step, b.share, b.overhead)


@pytest.mark.pictures
def test_a_run_leaves_a_picture_and_counts_each_kind_of_step(tiny_model_dir, tmp_path):
    rows = [
        {"prompt": f"The film was great {'x' * (i % 5)}. It was", "completion": " great"}
        for i in range(16)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        **{"model": str(tiny_model_dir("llama")), "data": str(tmp_path / "train.jsonl")},
        **{"method": "green_trainer", "rho": 0.9, "reselect": 4, "steps": 8, "batch_size": 4},
        **{"output": tmp_path / "out", "device": "cpu"},
    }
    report = run(tinyft.TrainConfig.build(values)).report
    assert report["config"]["rho"] == 0.9
    assert (tmp_path / "out" / "selection.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    flops = np.diff([0] + [line["flops"] for line in lines])
    assert flops[4] > 1.3 * flops[5]  # the step that selects
    # A new run in its place leaves nothing of the old one.
    values |= {"overwrite": True, "method": "full"}
    del values["rho"], values["reselect"]
    run(tinyft.TrainConfig.build(values))
    assert not (tmp_path / "out" / "selection.png").exists()


def test_a_run_of_uneven_batches_keeps_to_its_objective(tiny_model_dir, tmp_path):
    """The first batch is the longest; evaluations by it would take more than their share."""
    rows = [
        {"prompt": f"The film was great {'great ' * (60 if i < 8 else 5)}. It was", "completion": w}
        for i, w in enumerate([" great", " bad"] * 40)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        **{"model": str(tiny_model_dir("llama")), "data": str(tmp_path / "train.jsonl")},
        **{"steps": 14, "batch_size": 8, "device": "cpu"},
    }
    flops = {}
    for name, more in {
        "full": {"method": "full"},
        "green": {"method": "green_trainer", "rho": 0.7, "reselect": 10},
    }.items():
        report = run(tinyft.TrainConfig.build(values | more)).report
        flops[name] = report["measured"]["flops"]
    assert 0.6 < flops["green"] / flops["full"] < 0.705


@pytest.mark.parametrize("steps, selections", [(3, [0]), (5, [0]), (6, [0, 4]), (9, [0, 4])])
def test_a_selection_that_would_serve_few_steps_is_left_out(steps, selections):
    model = tiny_model("llama")
    optimizer = tinyft.GreenTrainer(model, rho=0.9, reselect=4)
    optimizer.total = steps
    for _ in range(steps):
        optimizer.step(lambda part: objective("lm")(model, part), batch_of(0))
    assert [found.step for found in optimizer.history] == selections
    assert optimizer.period == -(-steps // len(selections))


def test_adapters_come_by_attaching(tiny_model_dir, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    values = {
        **{"model": str(tiny_model_dir("gpt2")), "data": str(tmp_path / "train.jsonl")},
        **{"method": "green_trainer", "rho": 0.9, "steps": 2, "batch_size": 2, "rank": 2},
        **{"trainable": "lora", "output": tmp_path / "out", "device": "cpu"},
    }
    result = run(tinyft.TrainConfig.build(values))
    assert adapters(result.model) and result.report["config"]["lr"] == 8e-4
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"rho": 0.0}, "rho must be above 0 and at most 1; found 0.0"),
        ({"rho": 1.5}, "rho must be above 0"),
        ({"reselect": 0}, "reselect must be at least 1"),
        ({"memory_bytes": -1}, "memory_bytes must be positive"),
        ({"choose": "magic"}, "choose must be one of importance, random, last; found 'magic'"),
        ({"importance": "magic"}, "importance must be one of first-order, published"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ({"rho": 2.0, "reselect": 0}, "rho must.*reselect must"),
    ],
)
def test_options_out_of_range(wrong, said):
    with pytest.raises(InputError, match=said):
        tinyft.GreenTrainer(tiny_model("llama"), **wrong)


def test_what_cannot_be_done_says_so():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="call step"):
        tinyft.GreenTrainer(model).step()
    with pytest.raises(InputError, match="nothing to train"):
        tinyft.GreenTrainer(tiny_model("llama").requires_grad_(False))
    closure = partial(objective("lm"), model)
    with pytest.raises(
        InputError, match=r"within rho 0.2: .*at least rho 0\.\d+ .*larger reselect"
    ):
        tinyft.GreenTrainer(model, rho=0.2).step(closure, batch_of(0))
    with pytest.raises(InputError, match=r"memory_bytes 10: .* [\d,]+ bytes\. Ask"):
        tinyft.GreenTrainer(model, memory_bytes=10, rho=0.9).step(closure, batch_of(0))
    with pytest.raises(InputError, match="loss at step 1 is nan"):
        tinyft.GreenTrainer(model, rho=0.9).step(lambda: closure(batch_of(0)).mean() * torch.nan)
    optimizer = tinyft.GreenTrainer(model, rho=0.9)
    optimizer.step(closure, batch_of(0))
    other = tiny_model("llama")
    inject(other)
    with pytest.raises(InputError, match="Resume with the --trainable it began with"):
        tinyft.GreenTrainer(other).load_state_tensors(optimizer.state_tensors())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gpt_neox"])
def test_importances_that_prices_assume_go_with_measured_ones(architecture):
    model, loss = model_and_loss(architecture)
    optimizer = tinyft.GreenTrainer(model, lr=1e-4, rho=0.6, reselect=20)
    optimizer.step(loss)
    measured = optimizer.history[-1].importance
    assumed = optimizer._usual_importance()
    some = measured > 0
    assert np.corrcoef(np.log(measured[some]), np.log(assumed[some]))[0, 1] > 0.7
    optimizer = tinyft.GreenTrainer(model, lr=1e-4, rho=0.6, reselect=20)
    optimizer.assume()
    optimizer.step(loss)
    found = optimizer.history[-1]
    assert np.allclose(found.importance, assumed / assumed.max())
    assert found.share <= 0.6
