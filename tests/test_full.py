"""The gradient engine through `Full`: closures, batches, clipping, freeing, state."""

import copy

import pytest
import torch
from test_losses import build
from torch import nn

import tinyft
from tinyft.errors import InputError

IDS = torch.randint(3, 400, (4, 9), generator=torch.Generator().manual_seed(0))
QUIET = {"rtol": 1e-5, "atol": 1e-6}


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def per_example(model, ids):
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


def same(a, b, **tolerance):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_ways_to_call_a_step_agree():
    """A closure, a closure and a batch of any kind, a closure that goes backward, gradients."""

    def closure_alone(model, optimizer):
        return optimizer.step(lambda: loss_of(model))

    def tensor(model, optimizer):
        return optimizer.step(lambda ids: per_example(model, ids), IDS)

    def mapping(model, optimizer):
        return optimizer.step(lambda batch: per_example(model, batch["ids"]), {"ids": IDS})

    def pair(model, optimizer):
        return optimizer.step(lambda batch: per_example(model, batch[0]), (IDS, IDS))

    def noted(model, optimizer):
        batch = {"ids": IDS, "note": None}
        return optimizer.step(lambda batch: per_example(model, batch["ids"]), batch)

    def torchs_closure(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss.detach()

        return optimizer.step(closure)

    def gradients(model, optimizer):
        loss = loss_of(model)
        loss.backward()
        assert optimizer.step() is None
        return loss

    reference = build("llama")
    torchs = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    want = loss_of(reference)
    want.backward()
    torchs.step()
    for way in (closure_alone, tensor, mapping, pair, noted, torchs_closure, gradients):
        for parts in (1, 3):
            model = build("llama")
            optimizer = tinyft.Full(model, lr=1e-3, weight_decay=0.1, grad_accumulation=parts)
            got = way(model, optimizer)
            torch.testing.assert_close(got.detach(), want.detach(), **QUIET)
            assert not got.requires_grad or way is gradients
            # Where a gradient is near 0, AdamW's first step is its sign: hence the tolerance.
            same(model, reference, rtol=1e-3, atol=2e-4)
            assert all(p.grad is None for p in model.parameters())


def test_clipping_is_torchs():
    model, reference = build("llama"), build("llama")
    optimizer = tinyft.Full(model, lr=0.1, optimizer="sgd", grad_clip=0.5)
    optimizer.step(lambda: loss_of(model))
    loss_of(reference).backward()
    assert nn.utils.clip_grad_norm_(reference.parameters(), 0.5) > 0.5
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    same(model, reference, **QUIET)


def test_gradients_are_never_all_alive():
    model = build("llama", num_hidden_layers=6)
    optimizer = tinyft.Full(model, lr=1e-3)
    alive, use = [], optimizer._use

    def use_and_count(parameter, group):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        use(parameter, group)

    optimizer._use = use_and_count
    optimizer.step(lambda: loss_of(model))
    assert len(alive) == len(list(model.parameters())) and max(alive) <= 2


def test_nothing_is_updated_by_a_loss_that_is_not_finite():
    model, twin = build("llama"), build("llama")
    optimizer = tinyft.Full(model, grad_accumulation=2)
    scale = iter([1.0, float("nan")])
    with pytest.raises(InputError, match="loss at step 1 is nan"):
        optimizer.step(lambda ids: per_example(model, ids) * next(scale), IDS)
    same(model, twin, rtol=0, atol=0)


def test_a_loss_without_gradient_says_so():
    model = build("llama")
    with pytest.raises(InputError, match="zeroth-order"):
        tinyft.Full(model).step(lambda: loss_of(model).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd", "adamw8bit"])
def test_state_dict_round_trip(rule, dtype):
    def advance(model, optimizer):
        return [optimizer.step(lambda: loss_of(model)) for _ in range(2)]

    model = build("llama").to(dtype)
    optimizer = tinyft.Full(model, lr=1e-3, optimizer=rule)
    advance(model, optimizer)
    twin = copy.deepcopy(model)
    resumed = tinyft.Full(twin, lr=5.0, optimizer=rule)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.steps == 2 and resumed.param_groups[0]["lr"] == 1e-3
    advance(model, optimizer)
    advance(twin, resumed)
    same(model, twin, rtol=0, atol=0)
    if rule == "adamw8bit":
        assert {t.dtype for s in resumed.state.values() for t in s.values()} >= {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["adamw", "sgd", "adamw8bit"])
def test_16_bit_weights_move_as_float32_ones_do(rule, dtype):
    """On average; torch's own 16-bit step rounds to the nearest, which loses steps this small."""

    def moved(optimizer, model):
        start = model.weight.detach().clone()
        for _ in range(30):
            loss = (model.weight.float() * slopes).sum()
            if isinstance(optimizer, tinyft.optim.base.Optimizer):
                optimizer.step(lambda loss=loss: loss)
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return (model.weight.detach() - start).float()

    def layer(dtype):
        model = nn.Linear(512, 128, bias=False)
        nn.init.uniform_(model.weight, 0.5, 2.0, generator=torch.Generator().manual_seed(1))
        return model.to(dtype)

    slopes = torch.where(
        torch.rand(128, 512, generator=torch.Generator().manual_seed(2)) < 0.5, -1, 1
    )
    lr = 2e-4 if dtype == torch.bfloat16 else 2e-5  # a tenth of a step between neighbours, or less
    torchs = torch.optim.SGD if rule == "sgd" else torch.optim.AdamW
    exact, nearest = layer(torch.float32), layer(dtype)
    decay = {"weight_decay": 0.0}
    want = moved(torchs(exact.parameters(), lr=lr, **decay), exact)
    lost = moved(torchs(nearest.parameters(), lr=lr, **decay), nearest)
    model = layer(dtype)
    got = moved(tinyft.Full(model, lr=lr, optimizer=rule), model)
    along = want.sign()
    assert (lost * along).mean() < 0.5 * (want * along).mean()
    assert float((got * along).mean() / (want * along).mean()) == pytest.approx(1, abs=0.02)
    assert len(got.unique()) > 2 and abs(float(got.mean())) < 0.05 * float((want * along).mean())


@pytest.mark.parametrize("size", [1e-3, 1e-6])
@pytest.mark.parametrize("rule", ["adamw", "adamw8bit"])
def test_small_gradients_move_float16_weights_no_farther(rule, size):
    """Their squares are below float16's range. As far as torch's float32 AdamW on average, while
    gradients last and after them."""
    signs = torch.where(torch.arange(4000) % 3 == 0, -1.0, 1.0)  # small enough for whole moments
    start = torch.linspace(0.02, 0.06, 4000)
    exact, half = nn.Parameter(start.clone()), nn.Parameter(start.half())
    theirs = torch.optim.AdamW([exact], lr=2e-5, weight_decay=0.0)
    model = nn.ParameterList([half])
    ours = tinyft.Full(model, lr=2e-5, optimizer=rule)
    slopes = (size * signs).half()
    for step in range(40):
        along = slopes * (step < 30)
        exact.grad = along.float()
        theirs.step()
        ours.step(lambda along=along: (half * along).sum())
    want, got = (
        (w.detach().float() - s) for w, s in ((exact, start), (half, start.half().float()))
    )
    assert float((got * signs).mean() / (want * signs).mean()) == pytest.approx(1, abs=0.05)


def test_eight_bit_adamw_is_bitsandbytes():
    import bitsandbytes

    model, reference = build("llama"), build("llama")
    optimizer = tinyft.Full(model, lr=1e-3, optimizer="adamw8bit", weight_decay=0.1)
    theirs = bitsandbytes.optim.AdamW8bit(reference.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(4):
        optimizer.step(lambda: loss_of(model))
        loss_of(reference).backward()
        theirs.step()
        theirs.zero_grad()
    same(model, reference, rtol=1e-4, atol=1e-5)


def test_learning_rate_schedulers_work():
    model = build("llama")
    optimizer = tinyft.Full(model, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(lambda: loss_of(model))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


def test_unknown_choices():
    for wrong in ({"optimizer": "lion"}, {"checkpointing": "some"}):
        with pytest.raises(InputError, match="Choose from"):
            tinyft.Full(build("llama"), **wrong)
