"""A run held to its budget: where it ends, what it leaves, and how it takes less memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from test_train import configured, one_thread, rows, write  # noqa: F401

import tinyft
from tinyft import guard as guards
from tinyft import train as loop
from tinyft.budget import Budget
from tinyft.cli import main
from tinyft.data import Batches, encode, pad_id, read_examples
from tinyft.errors import BudgetError, InputError
from tinyft.guard import EnergyMeter, Guard
from tinyft.losses import objective
from tinyft.memory import PeakMeter
from tinyft.models import load
from tinyft.optim import METHODS
from tinyft.progress import Reporter

ARTEFACTS = {
    "lora": "adapter_model.safetensors",
    "sparse_lora": "adapter_model.safetensors",
    "full": "model.safetensors",
    "mezo": "steps.seedlog",
    "green_trainer": "model.safetensors",
}


@pytest.fixture
def clock(monkeypatch):
    """The guard's clock, which the test moves."""
    now = [1000.0]
    monkeypatch.setattr(guards, "monotonic", lambda: now[0])
    return now


class Slow(Reporter):
    """Every step takes 10 seconds of a clock, an evaluation 20; keeps what is said."""

    def __init__(self, clock=None):
        self.clock, self.said = clock, []

    def info(self, text):
        self.said.append(text)

    def step(self, step):
        if self.clock:
            self.clock[0] += 10.0

    def evaluation(self, when, metrics):
        if self.clock:
            self.clock[0] += 20.0


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" not in line]


def artefact(folder, method):
    return (folder / ARTEFACTS[method]).read_bytes()


# The guard alone.


def test_flops_end_within_one_step_of_the_limit():
    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.randint(1, 100) for _ in range(30)]
        limit = rng.randint(1, 2000)
        guard, total, taken = Guard(Budget(flops=limit)), 0, []
        for cost in costs:
            if guard.over():
                break
            taken.append(cost)
            total += cost
            guard.count(total)
        assert total <= limit or total - taken[-1] <= limit  # by one step at most
        if taken and taken[0] == max(costs):  # as `Batches` has it
            assert total <= max(limit, taken[0])
        if len(taken) < len(costs):
            assert total + max(taken) > limit


def test_a_renewal_is_set_aside_for_steps_that_have_one():
    def taken(limit, renewal_flops=(200, 0, 0, 150, 0, 0), step_flops=(10, 8, 9, 10, 7, 10)):
        guard, total = Guard(Budget(flops=limit)), 0
        for done, (renewal, step) in enumerate(zip(renewal_flops, step_flops, strict=True)):
            if guard.over(renews=renewal > 0):
                return done
            total += renewal + step
            guard.count(total, renewal)
        return len(step_flops)

    assert [taken(limit) for limit in (1, 219, 220, 227, 228)] == [1, 1, 2, 2, 3]
    # The fourth would renew, for which 210 are set aside, and took 160.
    assert [taken(limit) for limit in (227 + 209, 227 + 210)] == [3, 6]


def test_time_sets_aside_what_the_end_takes(clock):
    guard = Guard(Budget(time_s=100.0))
    guard.saving_bytes = 500
    guard.wrote(1000, 10.0)  # 100 bytes a second
    with guard.evaluating():
        clock[0] += 20.0
    done = 0
    while not guard.over():
        with guard.step():
            clock[0] += 7.0
        done += 1
    assert guard.finish_s == pytest.approx(20 + 5 + 2)
    # 20 at first, 27 for the end: 53 are left, 7 for each step.
    assert done == 7
    guard = Guard(Budget(time_s=100.0))
    guard.go_on([{"seconds": 1.0, "flops": 5, "wall_s": 9.0, "elapsed_s": 97.0}])
    assert guard.used() == {"elapsed_s": 97.0} and guard.over() is None
    clock[0] += 1.5
    assert guard.over() == "time"


def test_a_due_evaluation_is_no_reason_to_be_late(clock):
    guard = Guard(Budget(time_s=50.0))
    with guard.evaluating():
        clock[0] += 20.0
    assert guard.over() is None
    assert guard.over(evaluation_first=True) == "time"


@pytest.fixture
def powercap(tmp_path):
    """Two packages, a part of one, the whole machine, and how to set what they show."""

    def show(*energies_uj):
        zones = {"0": "package-0", "1": "package-1", "0:0": "core", "2": "psys"}
        rest = (10**9, sum(energies_uj))
        for (zone, name), energy in zip(zones.items(), (*energies_uj, *rest), strict=True):
            folder = tmp_path / f"intel-rapl:{zone}"
            folder.mkdir(exist_ok=True)
            (folder / "name").write_text(f"{name}\n")
            (folder / "max_energy_range_uj").write_text("999999\n")
            (folder / "energy_uj").write_text(f"{energy}\n")

    show(900_000, 0)
    return tmp_path, show


def test_energy_from_counters_that_wrap_around(powercap):
    root, show = powercap
    meter = EnergyMeter(root)
    show(950_000, 100)
    assert meter.joules() == pytest.approx(0.0501)
    show(150_000, 100)  # past 999,999
    assert meter.joules() == pytest.approx(0.2501)


def test_energy_that_may_not_be_read(powercap):
    root, _ = powercap
    (root / "intel-rapl:1" / "energy_uj").unlink()  # a root's tests may read everything
    with pytest.raises(InputError, match=r"needs to read .*intel-rapl:1/energy_uj.*chmod"):
        EnergyMeter(root)


def test_energy_ends_a_run(configured, powercap, monkeypatch, clock):  # noqa: F811
    root, show = powercap
    monkeypatch.setattr(guards, "_POWERCAP", root)
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (root,))
    energy = [0]

    class Drawing(Slow):
        def step(self, step):
            super().step(step)
            energy[0] += 400_000
            show(energy[0] % 1_000_000, 0)

    show(0, 0)
    report = loop.run(configured("lora", steps=9, energy="1.9J", eval_data=None), Drawing(clock))
    found = report.report
    assert found["stopped_by"] == "energy"
    # 0.04 W, and 2 s for the end: 0.08 J are set aside.
    assert found["measured"]["steps"] == 4 and found["measured"]["energy_j"] == pytest.approx(1.6)


def test_energy_that_cannot_be_measured_is_refused(configured, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(EnergyMeter.__init__, "__defaults__", (tmp_path / "powercap",))
    with pytest.raises(InputError, match=r"needs counters .*RAPL.* none in .*powercap.*--time"):
        loop.run(configured(energy="50Wh"))
    assert not (tmp_path / "out").exists()


# Runs that end early.


@pytest.mark.parametrize("method", ["lora", "mezo", "green_trainer"])
def test_flops_end_a_run_that_is_whole(configured, tmp_path, method):  # noqa: F811
    fields = {"steps": 8, "schedule": "cosine"}
    if method == "green_trainer":
        fields |= {"rho": 1.0, "reselect": 3}
    whole = loop.run(configured(method, output=str(tmp_path / "whole"), **fields)).report
    assert whole["stopped_by"] is None
    costs = [line["flops"] for line in lines_of(tmp_path / "whole")]
    largest = max(b - a for a, b in zip([0, *costs], costs, strict=False))
    limit = costs[4] + 1
    said = Slow()
    found = loop.run(configured(method, flops=str(limit), **fields), said).report
    assert limit - largest < found["measured"]["flops"] <= limit
    assert found["stopped_by"] == "flops" and 0 < found["measured"]["steps"] < 8
    assert any("--flops" in text and "ends the run after step" in text for text in said.said)
    assert found["eval"]["after"] != found["eval"]["before"]
    assert load(tmp_path / "out").model is not None
    rates = [line["lr"] for line in lines_of(tmp_path / "out")]
    # The cosine has come down, as in the whole run, although it ends sooner.
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.5e-3
    assert loop.run(configured(method, flops=str(limit), resume=True, **fields)).report == found


def test_flops_end_green_trainer_within_a_usual_step(configured, tmp_path):  # noqa: F811
    fields = {"rho": 1.0, "reselect": 3, "steps": 6}
    whole = tmp_path / "whole"
    loop.run(configured("green_trainer", output=str(whole), **fields))
    lines = lines_of(whole)
    assert [line["step"] for line in lines if line.get("renewal_flops")] == [1, 4]
    first = lines[0]["flops"] - lines[0]["renewal_flops"]  # the longest batch's step
    assert 0 < first < lines[0]["renewal_flops"]
    # In the whole run the second step needs no more than this.
    limit = lines[0]["flops"] + first
    report = loop.run(configured("green_trainer", flops=str(limit), **fields)).report
    assert report["measured"]["steps"] >= 2 and report["measured"]["flops"] <= limit


def test_a_limit_below_one_step_takes_one(configured):  # noqa: F811
    report = loop.run(configured("lora", flops="1")).report
    assert report["measured"]["steps"] == 1 and report["stopped_by"] == "flops"


def break_off(monkeypatch, name, when):
    """Break off, as a kill would, in the first call of a method of the session for which
    `when(session, arguments)` holds."""
    original = getattr(loop._Session, name)

    def breaking(self, *args, **kwargs):
        if when(self, *args):
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(loop._Session, name, breaking)


@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_time_ends_a_run_and_a_kill_thereafter_changes_nothing(
    configured,  # noqa: F811
    clock,
    monkeypatch,
    tmp_path,
    method,
):
    fields = {"steps": 20, "time": "95s", "schedule": "cosine", "checkpoint_every": 2}
    began, said = clock[0], Slow(clock)
    whole = loop.run(configured(method, output=str(tmp_path / "whole"), **fields), said).report
    # 20 s before, 22 s for the end; 53 are left for steps of 10.
    assert whole["stopped_by"] == "time" and whole["measured"]["steps"] == 5
    assert 85 < whole["measured"]["elapsed_s"] <= 95 and clock[0] - began <= 95
    assert any("--time 95s ends the run after step 5 of 20" in text for text in said.said)
    assert whole["eval"]["after"] != whole["eval"]["before"]
    with monkeypatch.context() as patched:
        break_off(patched, "score", lambda self, when: when == "after")
        with pytest.raises(KeyboardInterrupt):
            loop.run(configured(method, **fields), Slow(clock))
    # Now nothing takes any time: there would be room for more steps.
    found = loop.run(configured(method, resume=True, **fields), Slow()).report
    assert found["stopped_by"] == "time" and found["train"] == whole["train"]
    assert found["eval"] == whole["eval"]
    assert artefact(tmp_path / "out", method) == artefact(tmp_path / "whole", method)


def test_time_that_is_over_before_the_first_step(configured, clock):  # noqa: F811
    with pytest.raises(BudgetError, match=r"--time 30s is over before the first step.*took 20\.0"):
        loop.run(configured(time="30s"), Slow(clock))
    report = loop.run(configured(time="2min", resume=True), Slow(clock)).report
    assert report["measured"]["steps"] == 4 and report["stopped_by"] is None


@pytest.mark.parametrize("method", ["lora", "mezo", "green_trainer", "sparse_lora"])
def test_flops_go_on_being_counted_after_a_kill(configured, monkeypatch, tmp_path, method):  # noqa: F811
    fields = {"steps": 8, "schedule": "cosine", "checkpoint_every": 2}
    if method == "green_trainer":
        fields |= {"rho": 1.0, "reselect": 3}
    if method == "sparse_lora":
        (tmp_path / "s.yaml").write_text("ffn: {0: 0.5, 1: 0.5}")
        fields |= {"sparsity": str(tmp_path / "s.yaml"), "start_step": 0}
        fields |= {"sparse_tokens": "all"}  # or so small a model is dense
    if method == "mezo":
        fields |= {"momentum": 0.5}
    loop.run(configured(method, output=str(tmp_path / "all"), **fields))
    fields["flops"] = str(lines_of(tmp_path / "all")[5]["flops"])
    whole = loop.run(configured(method, output=str(tmp_path / "whole"), **fields)).report
    for at in (3, 4):  # MeZO's step is in its log by then, and no line tells what it cost
        with monkeypatch.context() as patched:
            break_off(patched, "record", lambda self, line, at=at: line["step"] == at)
            with pytest.raises(KeyboardInterrupt):
                loop.run(configured(method, resume=at == 4, **fields))
    found = loop.run(configured(method, resume=True, **fields)).report
    assert found["train"] == whole["train"] and found["eval"] == whole["eval"]
    assert found["measured"]["flops"] == whole["measured"]["flops"]
    assert artefact(tmp_path / "out", method) == artefact(tmp_path / "whole", method)


def test_limits_that_a_resumed_run_may_change(configured, clock, monkeypatch, tmp_path):  # noqa: F811
    constant = {"steps": 8, "schedule": "constant"}
    whole = loop.run(configured("lora", output=str(tmp_path / "whole"), **constant)).report
    with monkeypatch.context() as patched:
        break_off(patched, "score", lambda self, when: when == "after")
        with pytest.raises(KeyboardInterrupt):
            loop.run(configured("lora", time="85s", **constant), Slow(clock))
    found = loop.run(configured("lora", time="1h", resume=True, **constant), Slow(clock)).report
    assert found["train"] == whole["train"] and found["stopped_by"] is None
    # A finished run goes on where its method can, and a longer time alone is no reason.
    with pytest.raises(InputError, match="is finished, and the state"):
        loop.run(configured("lora", resume=True, **{**constant, "steps": 9}))
    first = {"method": "mezo", "output": str(tmp_path / "mezo"), **constant}
    short = loop.run(configured(flops="1", **first)).report
    assert short["measured"]["steps"] == 1
    longer = loop.run(configured(flops="none", resume=True, **first)).report
    assert longer["measured"]["steps"] == 8 and longer["stopped_by"] is None
    assert loop.run(configured(time="1h", resume=True, **first)).report == longer


def test_a_cosine_follows_the_flops_which_therefore_stay(configured):  # noqa: F811
    loop.run(configured("lora", flops="1"))
    with pytest.raises(InputError, match=r"flops was 1, is 2 \(on which a cosine schedule depends"):
        loop.run(configured("lora", flops="2", resume=True))


# Memory.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{}, {"accumulation": 3}, {"clip": 0.1}])
def test_a_probe_leaves_every_bit(configured, method, fields):  # noqa: F811
    uses_gradients = METHODS[method].uses_gradients
    if fields and not uses_gradients:
        pytest.skip("belongs to gradients")
    more = {"rho": 1.0, "reselect": 3} if method == "green_trainer" else {}
    if "accumulation" in fields:
        more["grad_accumulation"] = fields["accumulation"]
    if "clip" in fields:
        more["grad_clip"] = fields["clip"]
    if method == "lora":
        more["dropout"] = 0.2
    config = configured(method, **more)

    def trained(*, probing):
        loaded = load(config.model)
        encoded = encode(read_examples(config.data), loaded.tokenizer, max_length=512)
        batches = Batches(encoded, 6, seed=0, pad_id=pad_id(loaded.tokenizer))
        optimizer = METHODS[method].attach(loaded.model, config)
        loaded.model.train(uses_gradients)
        loss = lambda part: objective(encoded.kind)(loaded.model, part)  # noqa: E731
        torch.manual_seed(1)
        losses, took = [], []
        for step in range(3):
            if probing:
                took.append(optimizer.probe(loss, batches[0]))
                assert all(p.grad is None for p in loaded.model.parameters())
            losses.append(float(optimizer.step(loss, batches[step])))
        weights = [p.detach().clone() for p in loaded.model.parameters()]
        state = optimizer.state_tensors() if uses_gradients else {}
        if probing and uses_gradients:
            moments = sum(
                t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values()
            )
            # Promised before the first step, and nothing once it is there.
            assert took[0] == moments and took[1] == 0
        return losses, weights, state, torch.get_rng_state()

    plain, probed = trained(probing=False), trained(probing=True)
    assert plain[0] == probed[0]
    assert all(map(torch.equal, plain[1], probed[1]))
    assert plain[2].keys() == probed[2].keys()
    assert all(torch.equal(plain[2][name], probed[2][name]) for name in plain[2])
    assert torch.equal(plain[3], probed[3])


@pytest.fixture
def metered(monkeypatch):
    """A meter for which every row of a forward pass takes 1 MB, half of that where blocks are
    recomputed, on top of 10 MB; and what else a test wants it to show."""
    seen = {"rows": 0, "extra": lambda: 0, "fails": lambda n_rows: None}

    class Meter(PeakMeter):
        def __init__(self, device="cpu"):
            super().__init__(device)
            self.source = "test"

        def now_bytes(self):
            return 10_000_000

        def _high_water_bytes(self):
            return 10_000_000 + int(seen["rows"] * 1e6) + seen["extra"]()

        def _reset(self):
            seen["rows"] = 0

    original, keeping = tinyft.losses.objective, tinyft.optim.gradient.GradientOptimizer.keeping
    share = [1.0]

    def counted(name):
        def losses(model, batch):
            n_rows = batch.input_ids.shape[0]
            seen["rows"] = max(seen["rows"], n_rows * share[0])
            seen["fails"](n_rows)
            return original(name)(model, batch)

        return losses

    def noted(self, **options):
        share[0] = 0.5 if self.checkpointing == "full" else 1.0
        return keeping(self, **options)

    monkeypatch.setattr(loop, "PeakMeter", Meter)
    monkeypatch.setattr(tinyft.losses, "objective", counted)
    monkeypatch.setattr(tinyft.optim.gradient.GradientOptimizer, "keeping", noted)
    return seen


@pytest.mark.parametrize(
    ("limit", "parts", "mode"),
    [
        *(("18MB", 1, "selective"), ("12MB", 4, "selective"), ("10.5MB", 8, "full")),
    ],
)
def test_the_longest_batch_finds_the_quickest_way(configured, metered, limit, parts, mode):  # noqa: F811
    plain = loop.run(configured("lora", batch_size=8, optimizer="sgd", output=None)).report
    said = Slow()
    config = configured("lora", batch_size=8, optimizer="sgd", memory=limit)
    report = loop.run(config, said).report
    expected = {"step": 0, "checkpointing": mode, "grad_accumulation": parts}
    assert report["guard"]["settings"] == [expected]
    assert report["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-4)
    assert report["eval"]["after"]["loss"] == pytest.approx(plain["eval"]["after"]["loss"], 1e-4)
    assert any("a step would take" in text for text in said.said) == (parts > 1)
    assert report["config"]["grad_accumulation"] == 1  # as it was asked for


def test_moments_still_to_come_count(configured, metered):  # noqa: F811
    """14 MB hold the first step of a batch in two parts, and AdamW's moments as well; 1 byte less
    do not."""
    config = configured("full", batch_size=8)
    weights = sum(p.numel() for p in load(config.model).model.parameters())
    n_tensors = len(list(load(config.model).model.parameters()))
    moments = 8 * weights + 4 * n_tensors
    for spare, parts in ((0, 2), (-1, 4)):
        limit = 14_000_000 + moments + spare
        fields = {"batch_size": 8, "memory": str(limit), "overwrite": True}
        settings = loop.run(configured("full", **fields)).report["guard"]["settings"]
        assert settings[0]["grad_accumulation"] == parts


def test_mezo_splits_its_forward_passes(configured, metered):  # noqa: F811
    plain = loop.run(configured("mezo", batch_size=8, output=None)).report
    report = loop.run(configured("mezo", batch_size=8, memory="14MB")).report  # 2 x 4 rows at first
    assert report["guard"]["settings"] == [{"step": 0, "splits": 2}]
    assert report["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-4)


def test_what_does_not_fit_at_all(configured, metered, tmp_path):  # noqa: F811
    with pytest.raises(BudgetError) as caught:
        loop.run(configured("lora", batch_size=8, memory="10.4MB"))
    for part in ("--memory 10.4MB is too small for a step", "needs 10 MiB", "--base-bits 4"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 3
    # More lets it go on.
    report = loop.run(configured("lora", batch_size=8, memory="1GB", resume=True)).report
    assert report["guard"]["settings"][0]["grad_accumulation"] == 1


def growing(metered, from_step):
    """Some other part of the process takes 3 MB more from a step on, for one step."""
    calls = []
    metered["extra"] = lambda: 3_000_000 if len(calls) == from_step else 0

    class Notes(Slow):
        def step(self, step):
            calls.append(step)

    return Notes()


@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_pressure_on_the_way_is_answered_and_resumed_alike(
    configured,  # noqa: F811
    metered,
    monkeypatch,
    tmp_path,
    method,
):
    fields = {"steps": 6, "batch_size": 8, "memory": "20MB", "checkpoint_every": 1}
    said = growing(metered, 3)
    whole = loop.run(configured(method, output=str(tmp_path / "whole"), **fields), said).report
    settings = whole["guard"]["settings"]
    assert [entry["step"] for entry in settings] == [0, 3]
    assert any("step 3 took" in text and "from here" in text for text in said.said)
    with monkeypatch.context() as patched:
        break_off(patched, "step", lambda self, optimizer, flops, step: step == 4)
        with pytest.raises(KeyboardInterrupt):
            loop.run(configured(method, **fields), growing(metered, 3))
    metered["extra"] = lambda: 0
    found = loop.run(configured(method, resume=True, **fields)).report
    assert found["guard"]["settings"] == settings
    assert found["train"] == whole["train"] and found["eval"] == whole["eval"]
    assert artefact(tmp_path / "out", method) == artefact(tmp_path / "whole", method)


def test_pressure_without_a_leaner_way_saves_and_says_so(configured, metered):  # noqa: F811
    fields = {"steps": 6, "batch_size": 1, "checkpointing": "full"}
    plain = loop.run(configured("lora", output=None, **fields)).report
    with pytest.raises(BudgetError) as caught:
        loop.run(configured("lora", memory="11.5MB", **fields), growing(metered, 3))
    assert "no leaner way. The checkpoint of step 3 is intact" in str(caught.value)
    metered["extra"] = lambda: 0
    found = loop.run(configured("lora", memory="1GB", resume=True, **fields)).report
    assert found["train"] == plain["train"]


def test_another_limit_is_fitted_even_after_a_kill(configured, metered, monkeypatch):  # noqa: F811
    """15 MB hold half of the 8 rows that 20 MB held."""
    fields = {"steps": 4, "batch_size": 8, "checkpoint_every": 1}
    for limit, name in (("20MB", "watch_memory"), ("15MB", "fit_memory")):
        with monkeypatch.context() as patched:
            break_off(patched, name, lambda self, *_: True)
            with pytest.raises(KeyboardInterrupt):
                loop.run(configured("lora", memory=limit, resume=limit == "15MB", **fields))
    report = loop.run(configured("lora", memory="15MB", resume=True, **fields)).report
    parts = [entry["grad_accumulation"] for entry in report["guard"]["settings"]]
    assert parts[-1] == 2


@pytest.mark.parametrize(
    "method, own, n_allowed",
    [
        ("lora", {}, 3),
        ("mezo", {}, 3),
        ("green_trainer", {"rho": 1.0, "reselect": 3}, 3),
        ("green_trainer", {"rho": 1.0, "reselect": 2}, 1),  # in the third step's selection
    ],
)
def test_a_step_that_ran_out_of_memory_is_taken_again(
    configured,  # noqa: F811
    metered,
    method,
    own,
    n_allowed,
):
    """After the second step no more than so many rows can be allocated."""
    fields = {"steps": 3, "batch_size": 8, **own}
    plain = loop.run(configured(method, output=None, **fields)).report
    said = Slow()

    def fails(n_rows):
        if n_rows > n_allowed and said.steps > 1:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate ...")

    said.steps = 0
    said.step = lambda step: setattr(said, "steps", said.steps + 1)
    metered["fails"] = fails
    report = loop.run(configured(method, memory="1GB", **fields), said).report
    settings = report["guard"]["settings"]
    assert len(settings) >= 3 and {entry["step"] for entry in settings} == {0, 2}
    assert report["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-3)
    assert sum("memory ran out in step 3" in text for text in said.said) == len(settings) - 1


def test_memory_that_runs_out_amid_an_update(configured, metered, monkeypatch):  # noqa: F811
    fields = {"batch_size": 8, "checkpoint_every": 1, "memory": "1GB"}
    use, calls = tinyft.optim.gradient.GradientOptimizer._use, []

    def failing(self, parameter, group):
        calls.append(1)
        use(self, parameter, group)
        if len(calls) == 40:
            raise MemoryError

    n_tensors = len(list(load(configured("full").model).model.parameters()))
    assert n_tensors < 40 <= 2 * n_tensors
    with monkeypatch.context() as patched:
        patched.setattr(tinyft.optim.gradient.GradientOptimizer, "_use", failing)
        with pytest.raises(BudgetError) as caught:
            loop.run(configured("full", **fields))
    assert "in the middle of an update" in str(caught.value)
    assert "checkpoint of step 1 is intact" in str(caught.value)
    report = loop.run(configured("full", resume=True, **fields)).report
    plain = loop.run(configured("full", batch_size=8, output=None)).report
    # Not in parts, which would keep the gradients of all weights.
    recomputed = {"checkpointing": "full", "grad_accumulation": 1}
    assert report["guard"]["settings"][1:] == [{"step": 1, **recomputed}]
    assert report["train"]["loss"] == pytest.approx(plain["train"]["loss"], rel=1e-4)


REAL = """
import json, sys
import tinyft
from tiny_models import config_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
import torch

torch.set_num_threads(1)
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
config = config_of("llama", hidden_size=128, intermediate_size=512)
rows = [{"text": "The film was great and the actors were great. " * 16} for _ in range(16)]

def peak(**fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    fields = {"batch_size": 16, "steps": 2, "quiet": True, "optimizer": "adamw", **fields}
    report = tinyft.fit((model, tokenizer), rows, method="full", **fields).report
    return report["measured"]["peak_memory_bytes"], report["guard"], report["train"]["loss"]

large = peak()
small = peak(batch_size=2, grad_accumulation=8)
limit = (2 * small[0] + large[0]) // 3
print(json.dumps([large, small, limit, peak(memory=limit)]))
"""


def test_a_real_process_stays_within_its_limit(tiny_model_dir, tmp_path):
    if PeakMeter().source != "VmHWM":
        pytest.skip("no peak of memory from this system")
    (tmp_path / "real.py").write_text(REAL)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(__file__)]),
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "real.py", str(tiny_model_dir("llama"))],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    large, small, limit, within = json.loads(done.stdout.splitlines()[-1])
    print([n >> 20 for n in (large[0], small[0], limit, within[0])], within[1])
    assert large[0] > limit > small[0]  # or this would show nothing
    assert within[0] <= limit
    assert within[1]["settings"][0]["grad_accumulation"] > 1
    assert within[2] == pytest.approx(large[2], rel=1e-4)


# On the command line.


def test_the_command_line(configured, tmp_path, capsys):  # noqa: F811
    config = configured("lora")
    fields = ("model", "data", "method", "steps", "output")
    flags = [word for name in fields for word in (f"--{name}", str(getattr(config, name)))]
    assert main(["train", *flags, "--memory", "12 parsecs", "--time", "90", "--flops=-1"]) == 2
    error = capsys.readouterr().err
    for part in (
        "--memory 12 parsecs: parsecs is no unit",
        "--time 90: needs a",
        "--flops -1: must",
    ):
        assert part in error
    assert not (tmp_path / "out").exists()
    assert main(["train", *flags, "--memory", "1MiB"]) == 3
    assert "Nothing fits the budget" in capsys.readouterr().err
    assert main(["train", *flags, "--flops", "1"]) == 3
    assert "FLOPs more than the 1 FLOPs given" in capsys.readouterr().err
