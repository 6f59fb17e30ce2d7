"""Dry runs against the same steps run for real: torch's profiler sees every allocation, and its
FLOP counter every product."""

from __future__ import annotations

import pytest
import torch
from tiny_models import config_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tinyft
from tinyft.data import Batch
from tinyft.dry_run import DryRun, alike
from tinyft.losses import assume_head, check_head, objective
from tinyft.updates import update_rule

WIDE = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},
    "qwen2": {"hidden_size": 128, "intermediate_size": 256},
    "gpt2": {"n_embd": 128},
    "opt": {"hidden_size": 128, "ffn_dim": 512, "word_embed_proj_dim": 128},
    "bert": {"hidden_size": 128, "intermediate_size": 512},
}
METHODS = {
    "lora": lambda model: tinyft.LoRA(model),
    "full": lambda model: tinyft.Full(model),
    "mezo": lambda model: tinyft.MeZO(model),
}


# What torch's counter leaves out: products that write in place, and outer ones.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.addr_: lambda y, a, b, **_: 2 * a[0] * b[0],
    torch.ops.aten.mv: lambda a, b, **_: 2 * a[0] * a[1],
}


def build(family: str, attention: str = "sdpa") -> nn.Module:
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    config = config_of(family, num_hidden_layers=4, **WIDE[family])
    return kind.from_config(config, attn_implementation=attention)


def a_batch(family: str) -> Batch:
    ids = torch.randint(3, 300, (8, 96), generator=torch.Generator().manual_seed(0))
    if family == "bert":
        classes = torch.arange(8) % 2
        return Batch(ids, torch.ones_like(ids), labels=None, answers=classes)
    labels = ids.clone().index_fill(1, torch.arange(48), -100)
    return Batch(ids, torch.ones_like(ids), labels, tokens_per_example=48.0)


def allocated_peak(function) -> int:
    """The most that torch's allocator held beyond what it held before, from its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def step_of(family: str, method: str, model: nn.Module):
    optimizer, batch = METHODS[method](model), a_batch(family)
    loss = objective("class" if family == "bert" else "lm")
    model.train(method != "mezo")
    return lambda: optimizer.step(lambda part: loss(model, part), batch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", WIDE)
def test_peak_is_what_the_allocator_holds(family, method):
    model = build(family)
    step = step_of(family, method, model)
    if family != "bert":
        check_head(model)
    step()
    real = allocated_peak(step)
    with DryRun() as run:
        model = build(family)
        step = step_of(family, method, model)
        if family != "bert":
            assume_head(model)
        step()
        before = run.live_bytes
        run.reset()
        step()
        predicted = run.peak_bytes - before
    assert predicted == pytest.approx(real, rel=0.03, abs=200_000)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", WIDE)
def test_flops_are_torchs_own(family, method):
    model = build(family, "eager")  # whose attention torch counts on the CPU
    step = step_of(family, method, model)
    if family != "bert":
        check_head(model)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    with DryRun() as run:
        model = build(family, "eager")
        step = step_of(family, method, model)
        if family != "bert":
            assume_head(model)
        run.reset()
        step()
    assert run.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_weights_that_no_memory_would_hold():
    with DryRun() as run:
        layer = nn.Linear(1 << 16, 1 << 16)  # 16 GiB
        y = layer(torch.empty(4, 1 << 16))
    assert isinstance(y, Tensor)
    assert y.shape == (4, 1 << 16)
    assert run.flops == 2 * 4 * (1 << 32)
    assert run.live_bytes >= 4 << 32


def test_what_has_no_memory_takes_none():
    with DryRun() as run:
        weight = torch.empty(1 << 20)
        like = torch.empty_like(weight, device="meta")
        moments = torch.zeros_like(like) + torch.empty(1 << 20, device="meta")
    assert moments.is_meta
    assert run.peak_bytes == 4 << 20


def test_what_is_freed_makes_room():
    with DryRun() as run:
        one = torch.empty(1 << 20)
        two = one + 1
        del two
        three = one * 2
        assert run.live_bytes == 8 << 20
        del one, three
    assert run.live_bytes == 0
    assert run.peak_bytes == 8 << 20


def test_a_loop_is_its_first_round_so_often():
    def loop():
        done = []
        weight = torch.empty(256, 256)
        for rows in alike([300] * 7):
            for half in alike(range(2)):
                weight @ weight[: rows // 2].t()
                done.append((rows, half))
        return done

    with DryRun() as run:
        assert loop() == [(300, 0)]
    assert loop() == [(300, half) for _ in range(7) for half in range(2)]
    with FlopCounterMode(display=False) as counter:
        loop()
    assert run.flops == counter.get_total_flops()
    with DryRun() as run:
        for _ in alike(iter([1, 2, 3]), 2.5):
            _ = torch.empty(256, 256) @ torch.empty(256, 256)
        _ = torch.empty(256, 256) @ torch.empty(256, 256)
    assert run.flops == 3.5 * 2 * 256**3


def test_an_update_in_pieces_is_counted_whole():
    def counted():
        rule, weight = update_rule("adamw"), torch.zeros(1 << 20, dtype=torch.bfloat16)
        state, grad = rule.start(weight), torch.zeros_like(weight)
        group = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
        with DryRun() as run:
            weight, grad = torch.zeros_like(weight), torch.zeros_like(grad)
            state = {name: torch.zeros_like(t) for name, t in state.items()}
            run.reset()
            rule.step(weight, grad, state, group)
        return run.moved_bytes, run.peak_bytes - run.live_bytes

    once = counted()
    with pytest.MonkeyPatch.context() as patch:  # every piece for itself
        patch.setattr("tinyft.updates.alike", lambda items, rounds: items)
        assert counted() == pytest.approx(once, rel=0.02)
