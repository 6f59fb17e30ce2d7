"""`tinyft plan` and planned runs, on models small enough to run what was planned."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

import tinyft
from tinyft import machine, planning
from tinyft.budget import Budget
from tinyft.cli import main
from tinyft.config import TrainConfig, as_flags
from tinyft.errors import BudgetError, InputError, TinyFTError
from tinyft.planning import make_plan

ROOMY = Budget(memory_bytes=1 << 40)


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_tokenizer):
    """A model of 4 million parameters and rows of about 50 tokens."""
    folder = tmp_path_factory.mktemp("job")
    model = save_tiny_model(
        folder / "model",
        "llama",
        tiny_tokenizer,
        **{"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5, "head_dim": 64},
    )
    rows = [
        {"prompt": "The film was great. " * 3, "completion": f" It was a great film, {i % 7}."}
        for i in range(24)
    ]
    for name, part in (("train", rows[:16]), ("dev", rows[16:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines)
    return {
        "model": str(model),
        "data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "dev.jsonl"),
    }


CELLS = [
    {"method": "lora", "dtype": "float32"},
    {"method": "full", "dtype": "bfloat16", "optimizer": "adamw", "checkpointing": "selective"},
    {"method": "mezo", "trainable": "all", "dtype": "float32"},
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell["method"])
def test_predictions_are_what_the_system_measures(job, tmp_path, cell):
    """A part of bench/plan_accuracy.py: peak memory of a process of its own, and its FLOPs."""
    values = {**job, **cell, "steps": 3, "batch_size": 8}

    def tinyft_(command: str, *flags: str) -> str:
        words = [sys.executable, "-m", "tinyft.cli", command, *as_flags(values), *flags]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    predicted = json.loads(tinyft_("plan", "--memory=1024GiB", "--json"))["candidates"][0][
        "predicted"
    ]
    tinyft_("train", f"--output={tmp_path / 'out'}")
    measured = json.loads((tmp_path / "out" / "report.json").read_text())["measured"]
    peak = max(measured["peak_memory_bytes"], measured["eval_peak_memory_bytes"])
    assert 0.98 * peak <= predicted["peak_memory_bytes"] <= 1.08 * peak
    flops = measured["flops"] / measured["steps"]
    assert predicted["flops_per_step"] == pytest.approx(flops, rel=0.01)


def test_a_job_goes_when_nobody_needs_it(job):
    """What it holds would hide what the next one takes."""
    from tinyft.planning import _first_valid, _job

    gc.disable()
    try:
        found = _job(_first_valid({**job, "method": "lora"}, str), {})
        assert len(found.batches(8, 0)) == 2
        gone = weakref.ref(found)
        del found
        assert gone() is None
    finally:
        gc.enable()


def test_environments_are_measured_apart(monkeypatch):
    here = machine._fingerprint()
    assert machine._fingerprint() == here
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    assert machine._fingerprint() != here


@pytest.mark.parametrize(
    "code, said, reason",
    [(-9, "", "a signal ended it"), (1, "line 1\nOSError: no\n", "OSError: no.")],
)
def test_a_machine_that_cannot_be_measured(code, said, reason, monkeypatch, tmp_path):
    done = subprocess.CompletedProcess([], code, stdout="", stderr=said)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(TinyFTError, match=reason):
        machine.this_machine()


class Drawing:
    """A meter of energy that shows 50 J whenever it is asked."""

    def joules(self):
        return 50.0


def test_what_this_machine_draws_is_measured(job, monkeypatch):
    """And so energy can be limited; a file of before counters could be read does not stand."""
    from tinyft.guard import EnergyMeter
    from tinyft.kernels import cpu_products

    monkeypatch.setattr(EnergyMeter, "where_readable", lambda: None)
    without = machine._fingerprint()
    monkeypatch.setattr(EnergyMeter, "where_readable", Drawing)
    assert machine._fingerprint() != without
    monkeypatch.setattr(machine, "import_libraries", lambda: None)
    try:
        found = machine._measure()
    finally:
        cpu_products.remove()
    assert found.power_w > 0
    here = dataclasses.replace(found, memory_bytes=1 << 40, startup_s=0.0, power_w=10.0)
    monkeypatch.setattr(planning, "this_machine", lambda: here)
    values = {**job, "method": "lora", "dtype": "float32", "base_bits": 16, "epochs": 1000}
    (free,) = make_plan(values, ROOMY).plan.verdicts
    limit = free.totals["energy_j"] / 2
    assert limit == pytest.approx(5 * free.totals["time_s"])
    (held,) = make_plan({**values, "energy": f"{limit}J"}).plan.verdicts
    assert held.fits and held.totals["energy_j"] <= limit
    assert held.steps == pytest.approx(free.steps / 2, rel=0.05)


def test_programs_of_compiled_products_are_in_the_price(job, monkeypatch):
    """Of dtypes that this machine's oneDNN multiplies, and of no others."""
    values = {**job, "method": "lora", "dtype": "float32", "base_bits": 16}
    for name, n_bytes in (("_SCRATCH_BYTES", 0), ("_COMPILED_BYTES", 1000)):
        monkeypatch.setattr(planning, name, n_bytes)  # the model is small
    monkeypatch.setattr(planning, "anonymous_bytes", lambda: 0)  # of rows, never twice the same

    def peak_bytes(*dtypes):
        here = dataclasses.replace(machine.this_machine(), compiled_dtypes=dtypes)
        monkeypatch.setattr(planning, "this_machine", lambda: here)
        (verdict,) = make_plan(values, ROOMY).plan.verdicts
        return verdict.cost.peak_memory_bytes

    assert peak_bytes("bfloat16") == peak_bytes() == peak_bytes("float32") - 1000


def test_a_rate_is_that_of_the_steps_that_are_planned(job):
    """Of MeZO, whose rate falls with their root; and one that was given stays."""
    values = {**job, "method": "mezo", "trainable": "all", "dtype": "float32", "steps": 3200}
    (free,) = make_plan(values, ROOMY).plan.verdicts
    (held,) = make_plan({**values, "flops": f"{free.totals['flops'] / 4}"}).plan.verdicts
    assert held.steps == pytest.approx(free.steps / 4, rel=0.01)
    rates = [verdict.setting.config["lr"] for verdict in (free, held)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)  # two digits
    (given,) = make_plan({**values, "lr": 1e-3}, ROOMY).plan.verdicts
    assert given.setting.config["lr"] == 1e-3


def test_memory_is_that_of_the_container(tmp_path):
    """Version 2, with groups above; version 1, and a path that the container does not see."""
    for folder, limit in (("", "max"), ("a", "3000"), ("a/b", "2000"), ("other", "10")):
        (tmp_path / "v2" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "v2" / folder / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "v1/memory").mkdir(parents=True)
    (tmp_path / "v1/memory/memory.limit_in_bytes").write_text("1500\n")
    own = tmp_path / "own"
    for text, version, limits in (
        ("0::/a/b\n", "v2", [2000, 3000]),
        ("0::/\n", "v2", []),
        ("3:cpu:/x\n2:memory:/docker/x\n0::/docker/x\n", "v1", [1500]),
    ):
        own.write_text(text)
        assert [*machine._group_limits(tmp_path / version, own)] == limits
    assert [*machine._group_limits(tmp_path, tmp_path / "none")] == []


def test_plan_is_json(job, capfd):
    assert main(["plan", *as_flags(job), "--memory", "100GiB", "--flops", "1e12", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["method"] in {c["method"] for c in found["candidates"] if c["fits"]}
    assert {"lora", "full", "mezo", "green_trainer"} <= {c["method"] for c in found["candidates"]}
    assert found["config"]["steps"] == found["predicted"]["steps"] > 0
    for candidate in found["candidates"]:
        predicted = candidate["predicted"]
        parts = sum(predicted["breakdown"].values())
        assert 0 < parts <= predicted["peak_memory_bytes"]
        total = predicted["steps"] * predicted["flops_per_step"]
        assert predicted["total_flops"] == pytest.approx(total)
        assert not candidate["fits"] or predicted["total_flops"] <= 1e12
        assert candidate["reason"]
    tinyft.TrainConfig.build(found["config"])  # as it stands


@pytest.mark.pictures
def test_nothing_fits(job, capfd, tmp_path):
    """Exit code 3, what it lacks, and which given value stands in the way."""
    needs = {}
    for bits in (16, 4):
        values = {**job, "method": "lora", "base_bits": bits, "dtype": "float32"}
        needs[bits] = make_plan(values, ROOMY).plan.verdicts[0].cost.peak_memory_bytes
    flags = [*as_flags(job), "--method=lora", "--base-bits=16", "--dtype=float32"]
    picture = tmp_path / "plan.png"
    limit = 200 << 20  # less than the libraries take
    assert main(["plan", *flags, "--memory", str(limit), "--plot", str(picture)]) == 3
    said = capfd.readouterr()
    assert "lora, fp32" in said.out
    assert "Nothing fits the budget. lora, fp32 needs" in said.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["train", *flags, "--memory", str(limit), "--output", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_way_is_named(job):
    """A budget between the most frugal way and the one that was asked for."""
    free = make_plan({**job, "method": "mezo", "dtype": "bfloat16"}, ROOMY).plan.verdicts
    least = min(v.cost.peak_memory_bytes for v in free)
    values = {**job, "method": "full", "dtype": "float32", "checkpointing": "none"}
    needs = make_plan(values, ROOMY).plan.verdicts[0].cost.peak_memory_bytes
    assert least < needs
    with pytest.raises(BudgetError, match=r"[Ww]ithout method full, .* fits"):
        _ = make_plan(values, Budget(memory_bytes=(least + needs) // 2 - (8 << 20))).config


def test_parts_of_a_batch_may_need_more_than_all_of_it(job, monkeypatch):
    """Since they keep the gradients of all weights. What each setting needs is asked by itself."""
    monkeypatch.setattr(planning, "anonymous_bytes", lambda: 0)  # of rows: differs a little
    values = {**job, "method": "full", "dtype": "float32", "batch_size": 2}
    values["optimizer"] = "adamw8bit"
    (refused,) = make_plan(values, Budget(memory_bytes=1)).plan.verdicts
    needs = {}
    for setting in (setting for group in refused.candidate.groups for setting in group):
        config = {k: v for k, v in setting.config.items() if k != "epochs"}
        way = config["checkpointing"], config["grad_accumulation"]
        (alone,) = make_plan(config, ROOMY).plan.verdicts
        needs[way] = alone.cost.peak_memory_bytes
    assert len(needs) == 4
    assert needs["full", 1] < needs["full", 2]  # or this shows nothing
    assert refused.least["memory_bytes"] == min(needs.values())
    for limit in sorted(needs.values()):
        config = make_plan(values, Budget(memory_bytes=limit)).config
        way = config["checkpointing"], config["grad_accumulation"]
        assert way == next(way for way, need in needs.items() if need <= limit)


def test_bad_budgets(job, capsys):
    flags = [*as_flags(job), "--memory", "0", "--time", "12 parsecs", "--flops", "nan"]
    assert main(["plan", *flags]) == 2
    said = capsys.readouterr().err
    assert "--memory 0" in said
    assert "parsecs" in said
    assert "--flops nan" in said


def test_a_target_is_another_machine(job):
    here = make_plan({**job, "method": "lora"}, ROOMY)
    there = make_plan({**job, "method": "lora"}, ROOMY, target="raspberry-pi-5")
    assert there.machine.name != here.machine.name
    one, other = (p.plan.verdicts[0].totals for p in (here, there))
    assert other["energy_j"] == pytest.approx(other["time_s"] * there.machine.power_w)
    assert "energy_j" not in one
    with pytest.raises(InputError, match="energy needs to know what the machine draws"):
        make_plan(job, Budget(energy_j=1e6))


def test_a_method_that_is_not_for_a_model_is_left_out(job):
    found = make_plan({**job, "trainable": "all"}, ROOMY)
    assert {"full", "mezo"} <= {v.candidate.method for v in found.plan.verdicts}
    assert "lora trains lora: trainable all does not go with it" in found.left_out["lora"]


def test_held_out_rows_of_which_only_some_have_choices(job, tmp_path):
    """Of a run with --objective lm they are planned for, as they are scored, by their loss."""
    rows = [{"prompt": "It was", "choices": [" bad", " good"], "answer": 1}, {"text": "A film."}]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**job, "method": "lora", "dtype": "float32", "base_bits": 16, "eval_data": str(mixed)}
    assert make_plan({**values, "objective": "lm"}, ROOMY).plan.chosen
    with pytest.raises(InputError, match="needs rows of prompt, choices and answer"):
        make_plan(values, ROOMY)


def test_weights_are_not_needed(job, tmp_path):
    for path in Path(job["model"]).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    values = {"method": "lora", "dtype": "float32", **job}
    whole = make_plan(values, ROOMY).plan.verdicts[0].cost
    bare = make_plan({**values, "model": str(tmp_path)}, ROOMY).plan.verdicts[0].cost
    assert bare.flops_per_step == whole.flops_per_step
    assert bare.breakdown["weights"] == whole.breakdown["weights"]


def test_a_planned_run_keeps_to_its_plan(job, tmp_path, capfd):
    out = tmp_path / "out"
    flags = [*as_flags(job), "--memory", "20GiB", "--flops", "2e11", "--output", str(out)]
    assert main(["train", *flags, "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    plan = next(line for line in lines if line["event"] == "plan")
    report = json.loads((out / "report.json").read_text())
    assert report["measured"]["steps"] == plan["config"]["steps"]
    assert report["measured"]["flops"] <= 2e11
    assert report["method"] == plan["method"]
    assert main(["train", "--output", str(out), "--resume"]) == 0  # without planning again


def test_as_a_function(job):
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    budget = tinyft.Budget.parse(memory="1TiB", flops=1e11, time="3600.5s")
    found = tinyft.plan(job["model"], rows, budget, method="lora", memory="1B")
    assert found.config["method"] == "lora" and "data" not in found.config
    assert found.plan.chosen.fits
    # It is held to those limits, and not to those that they replace.
    assert TrainConfig.build({**found.config, "data": "rows"}).budget == budget
    report = tinyft.fit(data=rows, **found.config, quiet=True).report
    assert report["guard"]["settings"] and report["measured"]["flops"] <= budget.flops
