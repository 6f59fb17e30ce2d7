"""The loop: what it computes, what it writes, what it refuses."""

from __future__ import annotations

import errno
import json
import math
import random
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import tinyft
from tinyft import train as loop
from tinyft.checkpoint import RunState
from tinyft.config import TrainConfig
from tinyft.cost import FlopCounter, FlopMeter
from tinyft.data import Batches, encode, pad_id, read_examples
from tinyft.errors import BudgetError, InputError
from tinyft.evaluate import evaluate
from tinyft.models import load
from tinyft.optim import METHODS as EVERY_METHOD
from tinyft.plots import smooth
from tinyft.progress import Reporter
from tinyft.schedule import SavingClock, learning_rate, step_seed

METHODS = ("lora", "full", "mezo")
MEASURED = (
    *("peak_memory_bytes", "loaded_memory_bytes", "flops", "wall_s", "steps"),
    *("step_s_median", "tokens_per_s"),
)
PNG = b"\x89PNG"


def rows(n):
    return [
        {
            "prompt": f"The film was {'great' if i % 2 else 'a bore'} {'x' * (i % 5)}. It was",
            "choices": [" terrible", " great"],
            "answer": i % 2,
        }
        for i in range(n)
    ]


def write(path, items):
    path.write_text("".join(json.dumps(row) + "\n" for row in items))
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share between threads
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configured(tiny_model_dir, tmp_path):
    """`configured(method, **fields)` -> a TrainConfig of a small run, its files made."""
    base = str(tiny_model_dir("llama"))

    def make(method="full", **fields):
        values = {
            "model": base,
            "data": write(tmp_path / "train.jsonl", rows(24)),
            "eval_data": write(tmp_path / "dev.jsonl", rows(6)),
            "method": method,
            "output": str(tmp_path / "out"),
            "steps": 4,
            "batch_size": 4,
            "lr": 1e-3,
            **fields,
        }
        return TrainConfig.build(values)

    return make


class Notes(Reporter):
    def __init__(self):
        self.steps, self.scores, self.ended = [], [], 0
        self.lines = []

    def info(self, text):
        self.lines.append(text)

    def step(self, step):
        self.steps.append(step)

    def evaluation(self, when, metrics):
        self.scores.append(when)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.pictures
def test_a_run_leaves_a_model_a_report_and_a_plot(configured, tmp_path, method):
    # Of one direction a step, which all kernels of zeroth order know.
    one = {"estimator": "two-sided"} if method == "mezo" else {}
    config, notes = configured(method, eval_every=2, **one), Notes()
    result = loop.run(config, notes)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert all(report["measured"][name] > 0 for name in MEASURED), report["measured"]
    assert report["measured"]["steps"] == 4 == len(report["train"]["loss"])
    peak, loaded_bytes = (report["measured"][name] for name in MEASURED[:2])
    assert peak >= 0.98 * loaded_bytes  # the rest of the test process may give memory back
    assert all(math.isfinite(loss) for loss in report["train"]["loss"])
    assert report["eval"]["between"].keys() == {"2"}
    assert notes.scores == ["before", "step 2", "after"] and notes.ended == 1
    said = [line for line in notes.lines if line.startswith("kernels: ")]
    ran = "; ".join(f"{op} in {what}" for op, what in sorted(report["kernels"].items()))
    assert said == ([f"kernels: {ran}"] if ran else [])
    if method == "mezo":
        assert {"perturbed_linear", "subtract_directions_"} <= report["kernels"].keys()
    assert [step.step for step in notes.steps] == [1, 2, 3, 4]
    assert (out / "loss.png").read_bytes().startswith(PNG)
    assert TrainConfig.build(tinyft.config.read_yaml(out / "config.yaml")).flat() == {
        **config.flat(),
        "output": None,
    }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4]
    assert not {"run.json", "checkpoint"} & {path.name for path in out.iterdir()}
    # What was scored after training is what anybody loads from the folder.
    loaded = load(out)
    held_out = encode(read_examples(config.eval_data), loaded.tokenizer, max_length=512)
    scored = evaluate(loaded.model, loaded.tokenizer, held_out, batch_size=4)
    assert scored["loss"] == pytest.approx(report["eval"]["after"]["loss"], abs=1e-5)
    assert result.report["eval"]["after"] != result.report["eval"]["before"]


def test_full_equals_a_plain_torch_loop(configured):
    """Against torch's AdamW, transformers' own loss head, and a learning rate by hand."""
    result = loop.run(configured("full", warmup=1, weight_decay=0.1, output=None))
    config = configured("full", warmup=1, weight_decay=0.1, output=None)
    loaded = load(config.model)
    model = loaded.model.train()
    encoded = encode(read_examples(config.data), loaded.tokenizer, max_length=512)
    batches = Batches(encoded, 4, seed=0, pad_id=pad_id(loaded.tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step in range(4):
        batch = batches[step]
        optimizer.param_groups[0]["lr"] = [1e-3, 1e-3, 7.5e-4, 2.5e-4][step]
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        last = logits[torch.arange(4), batch.attention_mask.sum(1) - 1]
        loss = torch.nn.functional.cross_entropy(last.gather(1, batch.choice_ids), batch.answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.report["train"]["loss"] == pytest.approx(losses, rel=1e-4)


def test_learning_rate(configured):
    config = configured(lr=2.0, warmup=2, schedule="cosine")
    rates = [learning_rate(step, 6, config) for step in range(6)]
    cosine = [1 + math.cos(math.pi * k / 4) for k in range(4)]
    assert rates == pytest.approx([1.0, 2.0, *cosine])
    constant = configured(lr=2.0, warmup=2, schedule="constant")
    assert [learning_rate(step, 6, constant) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(100)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)


def test_saving_clock(monkeypatch):
    clock = SavingClock(3)
    assert [step for step in range(1, 10) if clock.due(step)] == [3, 6, 9]
    now = [0.0]
    monkeypatch.setattr("tinyft.schedule.monotonic", lambda: now[0])
    clock = SavingClock(None)
    now[0] = 19.0
    assert not clock.due(1)
    now[0] = 20.0
    assert clock.due(2)
    clock.saved(10.0)  # a slow disk: at most one part in twenty of the time
    now[0] = 219.0
    assert not clock.due(3)
    now[0] = 220.0
    assert clock.due(4)


def test_smooth_weighs_neighbours_by_a_triangle():
    losses = torch.rand(23, dtype=torch.float64).tolist()
    for half in (1, 2, 5, 30):
        expected = []
        for i in range(len(losses)):
            weights = [max(0, half - abs(i - j)) for j in range(len(losses))]
            sums = sum(w * x for w, x in zip(weights, losses, strict=True)), sum(weights)
            expected.append(sums[0] / sums[1])
        assert smooth(losses, 2 * half) == pytest.approx(expected)


def test_smooth_takes_long_runs():
    """Of a million steps, an eighth of them around each: one by one it would take hours."""
    found = smooth([2.0] * 1_000_000, 125_000)
    assert max(found) == pytest.approx(2.0) and min(found) == pytest.approx(2.0)


def test_smooth_keeps_constants_and_lines():
    assert smooth([2.0] * 9, 4) == pytest.approx([2.0] * 9)
    assert smooth([float(i) for i in range(9)], 4)[2:-2] == pytest.approx([2, 3, 4, 5, 6])


# Going on.


@pytest.mark.parametrize("method", METHODS)
def test_an_existing_run_is_neither_lost_nor_mixed(configured, tmp_path, method):
    report = loop.run(configured(method)).report
    with pytest.raises(InputError, match="finished run: --resume prints its report, --overwrite"):
        loop.run(configured(method))
    assert loop.run(configured(method, resume=True)).report["train"] == report["train"]
    with pytest.raises(InputError, match=r"lr was 0\.001, is 0\.5; seed was 0, is 3"):
        loop.run(configured(method, resume=True, lr=0.5, seed=3))
    again = loop.run(configured(method, overwrite=True, seed=3)).report
    assert again["train"] != report["train"]


def test_bad_input_with_overwrite_costs_nothing(configured, tmp_path):
    loop.run(configured())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"nothing\.jsonl does not exist"):
        loop.run(configured(overwrite=True, data=str(tmp_path / "nothing.jsonl")))
    with pytest.raises(InputError, match="There is no model"):
        loop.run(configured(overwrite=True, model=str(tmp_path / "no" / "such" / "model")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_somebody_elses_folder_is_left_alone(configured, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for fields in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match=r"not a run's \(thesis\.tex"):
            loop.run(configured(**fields))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        loop.run(configured(output=str(tmp_path / "file")))


def test_only_a_runs_own_leftovers_go(configured, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    theirs = [out / ".data.csv.partial", out / ".checkpoint.old" / "state.json"]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
        with pytest.raises(InputError, match="not a run's"):
            loop.run(configured(overwrite=True))
        assert path.read_text() == "years of work"
        path.unlink()
    (out / ".checkpoint.old").rmdir()
    (out / ".config.1234.partial.yaml").write_text("model:")  # of a run killed as it began
    loop.run(configured())
    theirs[0].write_text("years of work")
    (out / ".artefact.partial-abc").mkdir()
    loop.run(configured(overwrite=True))
    assert theirs[0].exists() and not list(out.glob(".[!d]*"))


def test_a_stop_while_a_run_is_discarded(configured, monkeypatch, tmp_path):
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        loop.run(configured("lora", checkpoint_every=1))
    monkeypatch.undo()

    def stopped(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tinyft.output.shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            tinyft.output.OutputFolder(tmp_path / "out").clear()
    assert (tmp_path / "out" / "checkpoint").is_dir()
    loop.run(configured("lora", overwrite=True))


def test_a_folder_that_cannot_be_written(configured, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    access = tinyft.output.os.access
    denied = lambda path, *how: path != tmp_path / "out" and access(path, *how)  # noqa: E731
    monkeypatch.setattr(tinyft.output.os, "access", denied)  # root may write everywhere
    monkeypatch.setattr(tinyft.models, "load", None)  # would fail if it were called
    with pytest.raises(InputError, match=r"--output .*out cannot be written to"):
        loop.run(configured())


def test_a_log_reaches_the_disk_before_the_manifest(configured, monkeypatch, tmp_path):
    synced, fsync = [], tinyft.output.fsync_path

    def noted(path):
        synced.append((path.name, (tmp_path / "out" / "tinyft.json").exists()))
        fsync(path)

    monkeypatch.setattr(tinyft.output, "fsync_path", noted)
    loop.run(configured("mezo"))
    assert ("steps.seedlog", False) in synced


def test_held_out_rows_of_which_only_some_have_choices(configured, tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", [*rows(2), {"text": "The film was great."}])
    report = loop.run(configured(objective="lm", eval_data=mixed)).report
    assert report["eval"]["after"].keys() >= {"loss", "perplexity"}
    with pytest.raises(InputError, match="needs rows of prompt, choices and answer"):
        loop.run(configured(eval_data=mixed, overwrite=True))


def test_overwrite_removes_the_run_and_nothing_else(configured, tmp_path):
    loop.run(configured("lora"))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    loop.run(configured("full", overwrite=True))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "model.safetensors"} <= names
    assert not {"adapter_model.safetensors", "steps.seedlog"} & names


def test_overwrite_spares_what_the_model_is_made_of(configured, tmp_path):
    loop.run(configured("full"))
    adapter = {"model": str(tmp_path / "out"), "output": str(tmp_path / "adapter")}
    loop.run(configured("lora", **adapter))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for model in (tmp_path / "out", tmp_path / "adapter"):
        with pytest.raises(InputError, match=r"--overwrite would discard .*name another folder"):
            loop.run(configured("lora", model=str(model), overwrite=True))
    with pytest.raises(InputError, match="--overwrite would discard"):
        loop.run(configured("lora", overwrite=True), loaded=load(tmp_path / "adapter"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    loop.run(configured("lora", **adapter, overwrite=True))  # a sibling's place is free


def test_one_writer_at_a_time(configured, tmp_path):
    folder = tinyft.output.OutputFolder(tmp_path / "out")
    folder.open(configured())
    with pytest.raises(InputError, match="Another process is writing"):
        loop.run(configured())
    folder.close()
    assert not (tmp_path / "out").exists()  # nothing was written, nothing is left
    loop.run(configured())


def test_changed_data_are_refused(configured, monkeypatch, tmp_path):
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        loop.run(configured("lora", checkpoint_every=1))
    monkeypatch.undo()
    config = configured("lora", checkpoint_every=1, resume=True)
    write(tmp_path / "dev.jsonl", rows(7))
    with pytest.raises(InputError, match=r"dev\.jsonl has changed since the run"):
        loop.run(config)


def stop_after(monkeypatch, steps):
    """Break off, as a kill would, at the start of a step."""
    step = loop._Session.step

    def stopping(self, optimizer, flops, number):
        if number == steps:
            raise KeyboardInterrupt
        return step(self, optimizer, flops, number)

    monkeypatch.setattr(loop._Session, "step", stopping)


@pytest.mark.parametrize("method", METHODS)
def test_books_add_up_over_a_resume(configured, monkeypatch, tmp_path, method):
    whole = loop.run(configured(method, output=str(tmp_path / "whole"))).report
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        loop.run(configured(method, checkpoint_every=2))
    monkeypatch.undo()
    report = loop.run(configured(method, checkpoint_every=2, resume=True)).report
    assert report["train"] == whole["train"]
    assert report["eval"] == whole["eval"]
    assert report["measured"]["flops"] == whole["measured"]["flops"]
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    walls = [json.loads(line)["wall_s"] for line in lines]
    assert walls == sorted(walls) and len(walls) == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_died_before_its_first_step(configured, monkeypatch, tmp_path, method):
    whole = loop.run(configured(method, output=str(tmp_path / "whole"))).report
    stop_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        loop.run(configured(method))
    monkeypatch.undo()
    report = loop.run(configured(method, resume=True)).report
    assert report["train"] == whole["train"] and report["eval"] == whole["eval"]


def test_a_longer_constant_run_goes_on(configured, tmp_path):
    whole = loop.run(
        configured("mezo", schedule="constant", steps=6, output=str(tmp_path / "whole"))
    )
    loop.run(configured("mezo", schedule="constant", steps=4))
    longer = loop.run(configured("mezo", schedule="constant", steps=6, resume=True))
    assert longer.report["train"] == whole.report["train"]
    log = [(tmp_path / name / "steps.seedlog").read_bytes() for name in ("whole", "out")]
    assert log[0] == log[1]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="already done 6 steps"):
        loop.run(configured("mezo", schedule="constant", steps=5, resume=True))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_fewer_steps_than_an_unfinished_run_has_done(configured, monkeypatch, tmp_path, method):
    fields = {"schedule": "constant", "checkpoint_every": 1, "steps": 6}
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            loop.run(configured(method, **fields))
    with pytest.raises(InputError, match="already done 3 steps, more than the 2 asked for"):
        loop.run(configured(method, resume=True, **{**fields, "steps": 2}))
    assert tinyft.config.read_yaml(tmp_path / "out" / "config.yaml")["steps"] == 6


def test_a_kill_as_a_run_begins_to_grow(configured, monkeypatch, tmp_path):
    """It is finished as it was, or asked for its length again; never is the old report new."""
    loop.run(configured("mezo", schedule="constant"))
    for name in ("unlink", "replace"):
        loop.run(configured("mezo", schedule="constant", overwrite=True))
        original = getattr(Path, name)

        def killed(self, *args, name=name, original=original, **kwargs):
            if {"report.json", "config.yaml"} & {Path(p).name for p in (self, *args)}:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(Path, name, killed)
            with pytest.raises(KeyboardInterrupt):
                loop.run(configured("mezo", schedule="constant", steps=6, resume=True))
        assert tinyft.config.read_yaml(tmp_path / "out" / "config.yaml")["steps"] == 4
        longer = loop.run(configured("mezo", schedule="constant", steps=6, resume=True)).report
        assert longer["measured"]["steps"] == 6


def test_a_longer_run_of_a_gradient_method(configured):
    loop.run(configured("lora", schedule="constant"))
    with pytest.raises(InputError, match="state of its optimizer is gone"):
        loop.run(configured("lora", schedule="constant", steps=6, resume=True))
    with pytest.raises(InputError, match="cosine schedule depends"):
        loop.run(configured("lora", schedule="cosine", steps=6, resume=True))


# What goes wrong.


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite(configured, monkeypatch, tmp_path, method):
    objective = tinyft.losses.objective

    def failing(name):
        calls = []

        def losses(model, batch):
            calls.append(1)
            found = objective(name)(model, batch)
            return found * float("nan") if len(calls) > 12 else found

        return losses

    monkeypatch.setattr(tinyft.losses, "objective", failing)
    config = configured(method, checkpoint_every=1, steps=50)
    with pytest.raises(InputError, match=r"loss at step .* is nan.* Lower --lr"):
        loop.run(config)
    out = tmp_path / "out"
    if method == "mezo":
        assert (out / "steps.seedlog").exists()
    else:
        state = RunState.load(out / "checkpoint")
        assert state.step >= 3
        assert all(tensor.isfinite().all() for tensor in state.weights.values())
    assert not (out / "report.json").exists()
    with pytest.raises(InputError, match="has not finished"):
        load(out)


def test_a_full_disk_keeps_the_checkpoint(configured, monkeypatch, tmp_path):
    whole = loop.run(configured("full", output=str(tmp_path / "whole")))
    save, saved = RunState.save, []

    def full(self, directory):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(self.step)
        save(self, directory)

    monkeypatch.setattr(RunState, "save", full)
    with pytest.raises(InputError) as caught:
        loop.run(configured("full", checkpoint_every=2))
    assert "no room" in str(caught.value) and "checkpoint of step 2 is intact" in str(caught.value)
    assert f"tinyft train --output {tmp_path / 'out'} --resume" in str(caught.value)
    monkeypatch.undo()
    resumed = loop.run(configured("full", checkpoint_every=2, resume=True))
    assert resumed.report["train"] == whole.report["train"]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")],
)
def test_out_of_memory_is_a_budget_error(configured, monkeypatch, error):
    def step(self, *a):
        raise error

    monkeypatch.setattr(loop._Session, "step", step)
    with pytest.raises(BudgetError, match=r"does not fit the memory.*--batch-size"):
        loop.run(configured())


def test_adapters_are_needed_for_a_packed_base(configured):
    with pytest.raises(InputError, match="keeps the base frozen"):
        configured("full", base_bits=4)


@pytest.mark.parametrize("trainable, positions", [("all", 128), ("prefix", 123)])
def test_rows_beyond_the_positions(tiny_model_dir, tiny_tokenizer, trainable, positions):
    def row(n_tokens):  # the last is the end's
        return {"text": tiny_tokenizer.decode([5] * (n_tokens - 1))}

    values = {"model": str(tiny_model_dir("gpt2")), "method": "mezo", "trainable": trainable}
    message = rf"line 2: {positions + 1} tokens, and the model has {positions} positions"
    fits, long = [row(9), row(positions)], [row(9), row(positions + 1)]
    tinyft.fit(**values, data=fits, eval_data=fits, steps=1, quiet=True)
    for data, eval_data in ((long, fits), (fits, long)):
        with pytest.raises(InputError, match=message):
            tinyft.fit(**values, data=data, eval_data=eval_data, steps=1, quiet=True)
        with pytest.raises(InputError, match=message):
            tinyft.plan(**values, data=data, eval_data=eval_data)
    if trainable == "all":
        with pytest.raises(InputError, match=message):
            tinyft.library.score(values["model"], long)


# As a library.


def test_fit_on_rows_and_a_model_in_memory(tiny_model_dir):
    loaded = load(tiny_model_dir("gpt2"))
    result = tinyft.fit(
        (loaded.model, loaded.tokenizer),
        rows(8),
        method="lora",
        eval_data=rows(4),
        steps=2,
        rank=2,
        quiet=True,
    )
    assert result.model is loaded.model and result.output is None
    assert not result.model.training
    assert len(result.report["train"]["loss"]) == 2
    with pytest.raises(InputError, match="give \\(model, tokenizer\\)"):
        tinyft.fit(loaded.model, rows(8), method="lora", quiet=True)


def test_fit_on_an_encoder(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("bert")
    out = tmp_path / "out"
    data = write(tmp_path / "train.jsonl", rows(8))
    result = tinyft.fit(folder, data, method="full", steps=2, quiet=True, output=out)
    assert load(out).model.config.id2label == {0: "terrible", 1: "great"}
    assert result.report["eval"]["before"] is None
    swapped = [
        {**row, "choices": row["choices"][::-1], "answer": 1 - row["answer"]} for row in rows(8)
    ]
    with pytest.raises(InputError, match="not the model's classes"):
        tinyft.fit(folder, data, method="full", eval_data=swapped, steps=2, quiet=True)


def test_an_encoders_adapter_keeps_the_names_of_its_classes(tiny_model_dir, tmp_path):
    fields = {"method": "lora", "steps": 1, "rank": 2, "quiet": True}
    tinyft.fit(tiny_model_dir("bert"), rows(8), output=tmp_path / "out", **fields)
    loaded = load(tmp_path / "out")
    assert loaded.model.config.id2label == {0: "terrible", 1: "great"}
    assert loaded.model.config.label2id == {"terrible": 0, "great": 1}
    # What is known by name is not scored as something else.
    for choices in ([" Great", " terrible"], [" terrible", " great", " fair"]):
        with pytest.raises(InputError, match=r"are \['terrible', 'great'\], in this order"):
            tinyft.library.score(loaded, [{**row, "choices": choices} for row in rows(4)])
    one, other = (
        tinyft.library.score(loaded, [{**row, "choices": choices} for row in rows(4)])
        for choices in ([" terrible", " great"], ["bad", "good"])
    )
    assert one == other


def test_fit_names_bad_arguments():
    with pytest.raises(InputError, match=r"batchsize is not known .did you mean batch_size"):
        tinyft.fit("m", "d.jsonl", batchsize=3)


def test_data_may_be_a_path_object(tiny_model_dir, tmp_path):
    write(tmp_path / "train.jsonl", rows(8))
    data = Path(tmp_path / "train.jsonl")
    assert tinyft.fit(tiny_model_dir("llama"), data, method="mezo", steps=1, quiet=True).report


def test_a_prefix_is_trained_on_and_nothing_beside_it(configured, tmp_path):
    loop.run(configured("mezo", trainable="prefix", steps=1, eval_data=None))
    again = {"model": str(tmp_path / "out"), "output": str(tmp_path / "again"), "eval_data": None}
    for method, trainable in (("full", "all"), ("mezo", "all"), ("roste", "lora")):
        with pytest.raises(InputError, match=r"has a prefix.*--trainable prefix"):
            loop.run(configured(method, trainable=trainable, steps=1, **again))
    report = loop.run(configured("mezo", trainable="prefix", steps=1, **again))
    weight = load(tmp_path / "again").model.prefix.weight
    assert torch.equal(weight, report.model.prefix.weight)


@pytest.mark.parametrize("fields", [{}, {"grad_accumulation": 3}], ids=["whole", "parts"])
@pytest.mark.parametrize("method", sorted(EVERY_METHOD))
def test_flops_are_those_of_what_ran(configured, tmp_path, monkeypatch, method, fields):
    """Whether the loop counts a step or works it out, for rows of all lengths."""
    if fields and not EVERY_METHOD[method].uses_gradients:
        fields = {"batch_size": 3}
    worked_out, really = [], 0

    class Checked(FlopMeter):
        def step(self, kind, sizes, function):
            nonlocal really
            with FlopCounter() as all_of_it:
                result = super().step(kind, sizes, lambda: (noting(), function())[1])
            really += all_of_it.flops
            return result

    def noting():
        active = _get_current_dispatch_mode_stack()
        worked_out.append(sum(isinstance(mode, FlopCounter) for mode in active) == 1)

    monkeypatch.setattr("tinyft.cost.FlopMeter", Checked)
    draw = random.Random(0)
    texts = [
        {"prompt": "film " * draw.randint(1, 30), "completion": " great" * draw.randint(1, 9)}
        for _ in range(160)
    ]
    data = write(tmp_path / "texts.jsonl", texts)
    options = {"flops_share": 0.9, "start_step": 4} if method == "sparse_lora" else {}
    config = configured(method, data=data, eval_data=None, steps=40, **options, **fields)
    measured = loop.run(config, Notes()).report["measured"]
    assert measured["flops"] == really > 0
    assert sum(worked_out) > 15
