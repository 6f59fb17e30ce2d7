"""`tinyft bench` on a tiny model: what is run, what is not run twice, and what the rows say."""

from __future__ import annotations

import csv
import errno
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from tinyft.benchmark import command, grid, peers, runner, tasks
from tinyft.benchmark.runner import Bench
from tinyft.cli import main
from tinyft.config import TrainConfig
from tinyft.errors import BudgetError, InputError, TransientError
from tinyft.guard import EnergyMeter
from tinyft.optim import METHODS
from tinyft.output import OutputFolder
from tinyft.report import versions


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_tokenizer):
    """Models, and rows whose answer stands in the prompt."""
    folder = tmp_path_factory.mktemp("job")
    for name in ("llama", "bert"):
        save_tiny_model(folder / name, name, tiny_tokenizer)
    rows = [
        {
            "prompt": f"The film was {'great' if i % 2 else 'a bore'} {'x' * (i % 7)} {i}. It was",
            "choices": [" terrible", " great"],
            "answer": i % 2,
        }
        for i in range(60)
    ]
    (folder / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": f"The film was great, and the actors were great, {i}."} for i in range(30)]
    (folder / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Runs happen here, which is quick; returns the list of what was run."""
    ran = []

    def process(self, words, log, lock):
        assert lock >= 0
        ran.append(words)
        with monkeypatch.context() as patch, log.open("a") as out:
            patch.chdir(self.store.directory)
            patch.setattr(sys, "stderr", out)
            is_peer = words[0] == "tinyft.benchmark.peers"
            return peers.main(words[1:]) if is_peer else main(words[1:])

    monkeypatch.setattr(Bench, "process", process)
    return ran


def flags(job, out, *more, model="llama", data=("films",)):
    files = [str(job / f"{name}.jsonl") for name in data]
    return [
        *("bench", "--model", str(job / model), "--data", *files, "--output", str(out)),
        *("--batch-size", "4", "--threads", "1", "--dtype", "float32", *more),
    ]


def table(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def runs(out, **wanted):
    return [
        row
        for row in table(out)
        if row["stage"] == "run" and all(row[k] == v for k, v in wanted.items())
    ]


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.pictures
def test_a_grid_from_end_to_end(job, tmp_path, in_process):
    out = tmp_path / "out"
    more = ["--flops", "6e8", "--lr-search", "1", "10", "--methods"]
    assert main(flags(job, out, *more, "peft", "torch-full")) == 0
    assert {row["status"] for row in table(out)} == {"done"}
    done = {row["method"]: row for row in runs(out)}
    ours = {"lora:base_bits=16", "full"}
    assert set(done) == ours | {"peft", "torch-full"}
    for label, row in done.items():
        folder = out / "runs/films/6e08" / label.replace(":", "-").replace("=", "-")
        report = json.loads((folder / "seed-0/run/report.json").read_text())
        assert float(row["after"]) == report["eval"]["after"]["accuracy"]
        assert float(row["flops"]) == report["measured"]["flops"]
        if row["energy_source"].startswith("estimate"):
            joules = 12 * report["measured"]["elapsed_s"]
            assert float(row["energy_j"]) == pytest.approx(joules, abs=0.1)
        co2_g = float(row["energy_j"]) / 3.6e6 * 436
        assert float(row["co2_g"]) == pytest.approx(co2_g, abs=1e-3)
        assert f"torch={versions()['torch']}" in row["versions"]
        assert not list(folder.glob("*/run/*.safetensors"))
        if label in ours:
            assert 0.5 * 6e8 < float(row["flops"]) <= 6e8
            trials = [r for r in table(out) if (r["stage"], r["method"]) == ("search", label)]
            best = min(trials, key=lambda r: float(r["loss_after"]))
            assert len(trials) == 2 and row["lr"] == best["lr"]
            spent = [float(r["flops"]) for r in trials]
            assert float(row["search_flops"]) == sum(spent)
    # Peers do what ours did; adapters begin from other random numbers, all weights from the same.
    for peer, label, within in (("peft", "lora:base_bits=16", 0.5), ("torch-full", "full", 0.02)):
        theirs, mine = done[peer], done[label]
        assert [theirs[k] for k in ("lr", "steps", "dtype")] == [
            mine[k] for k in ("lr", "steps", "dtype")
        ]
        before = float(mine["loss_before"])
        assert float(theirs["loss_before"]) == pytest.approx(before, rel=1e-6)
        learned = [before - float(row["loss_after"]) for row in (mine, theirs)]
        assert learned[0] > 0.05 and learned[1] == pytest.approx(learned[0], rel=within)
    assert "peft" in (out / "report.html").read_text() and (out / "quality.png").is_file()
    with (out / "planner.csv").open() as file:
        assert [row["task"] for row in csv.DictReader(file)] == ["films"]
    # The same again, and with one more seed: only what is new is run.
    before = len(in_process)
    assert main(flags(job, out, *more, "peft", "torch-full")) == 0
    assert len(in_process) == before
    assert main(flags(job, out, *more, "full", "--seeds", "2")) == 0
    assert len(in_process) == before + 1


def test_prose_and_two_budgets(job, tmp_path, in_process):
    """Texts are scored by perplexity; more FLOPs are more steps."""
    out = tmp_path / "out"
    more = ["--flops", "4e7", "1e8", "--lr-search", "2", "--methods", "full", "torch-full"]
    assert main(flags(job, out, *more, data=("prose",))) == 0
    small, large = (
        {row["method"]: row for row in runs(out, budget=f"{budget} FLOPs")}
        for budget in ("4e07", "1e08")
    )
    for found in (small, large):
        ours, theirs = found["full"], found["torch-full"]
        assert ours["metric"] == "perplexity" and not ours["search_flops"].strip("0")
        assert float(theirs["after"]) == pytest.approx(float(ours["after"]), rel=0.02)
    assert int(large["full"]["steps"]) > int(small["full"]["steps"])
    assert float(large["full"]["after"]) < float(small["full"]["after"])


def test_what_is_not_run_has_a_reason(job, tmp_path, in_process):
    """A method that is not for the model, one that is not there, a run that breaks off."""
    out = tmp_path / "out"
    more = ["--flops", "2e7", "--methods", "full:lr=1e30", "sparse_lora", "mezo-exact"]
    assert main(flags(job, out, *more, "--lr-search", "1", model="bert")) == 0
    (full,) = runs(out, method="full:lr=1e30")
    assert full["status"] == "failed" and "loss" in full["reason"] and not full["after"]
    (sparse,) = runs(out, method="sparse_lora")
    assert sparse["status"] == "left out" and "BertForSequenceClassification" in sparse["reason"]
    assert [row["method"] for row in runs(out, status="done")] == ["mezo-exact"]
    page = (out / "report.html").read_text()
    assert "BertForSequenceClassification" in page


def test_a_limit_that_changes_nothing_repeats_nothing(job, tmp_path, in_process):
    """One run stands in both budgets, the peer's too, and says so; commands do it again."""
    out = tmp_path / "out"
    more = ["--flops", "4e7", "--lr-search", "1", "10", "--methods", "full", "torch-full"]
    assert main(flags(job, out, *more, "--memory", "6GiB", "8GiB")) == 0
    assert len(in_process) == 4  # two rates, the run and the peer's
    for method in ("full", "torch-full"):
        tight, roomy = runs(out, method=method)
        assert [row["memory_limit_bytes"] for row in (tight, roomy)] == [
            str(n * 2**30) for n in (6, 8)
        ]
        assert (tight["same_run_as"], roomy["same_run_as"]) == ("", tight["budget"])
        assert tight["loss_after"] == roomy["loss_after"]
    (command,) = {row["command"] for row in runs(out, method="torch-full")}
    again = shlex.split(command)
    assert again[:4] == ["python", "-m", "tinyft.benchmark.peers", "torch-full"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        assert peers.main(again[3:]) == 0
    report = json.loads((out / "OUTPUT/report.json").read_text())
    assert report["eval"]["after"]["loss"] == float(tight["loss_after"])
    assert main(flags(job, out, *more, "--memory", "16MiB", "6GiB")) == 0
    assert {row["status"] for row in runs(out, memory_limit_bytes=str(2**24))} == {"left out"}


def test_a_peer_says_what_is_wrong(capsys):
    for words, said in (
        ([], "'' is no peer; there are peft, torch-full"),
        (["torch-full", "model"], "'model' is no flag; write --NAME=VALUE"),
        (["torch-full", "--model=m", "--lrr=1"], "lrr"),
    ):
        assert peers.main(words) == 2
        assert said in capsys.readouterr().err


def test_what_does_not_fit_is_a_row(job, tmp_path, in_process, monkeypatch):
    def full(values, **_):
        raise BudgetError(f"Nothing fits {values['memory']}.")

    monkeypatch.setattr(runner, "make_plan", full)
    tight = ["--memory", "200MiB", "1GiB", "--methods", "full", "torch-full"]
    assert main(flags(job, tmp_path / "out", *tight)) == 0
    assert not in_process and not (tmp_path / "out/report.html").exists()
    found = {(row["budget"], row["method"]): row for row in runs(tmp_path / "out")}
    for budget in ("200MiB", "1GiB"):
        row = found[budget, "full"]
        assert (row["status"], row["reason"]) == ("left out", f"Nothing fits {budget}.")
        assert "no run to repeat: Nothing fits" in found[budget, "torch-full"]["reason"]


def test_what_a_peer_lacks(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "peft" else name)
    assert peers.missing("peft") == "not installed: pip install peft"
    assert peers.missing("torch-full") is None


@pytest.mark.parametrize("when", ["planning", "running"])
def test_what_the_disk_or_the_network_failed_is_done_again(
    job, tmp_path, in_process, monkeypatch, when
):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_hub(*_, **__):
        raise TransientError("No hub answers.")

    words = flags(job, tmp_path / "out", "--flops", "2e7", "--methods", "full", "--lr-search", "1")
    with monkeypatch.context() as patch:
        if when == "planning":
            patch.setattr(runner, "make_plan", no_hub)
        else:
            patch.setattr(OutputFolder, "save_report", no_room)
        assert main(words) == 1
    assert not table(tmp_path / "out")
    assert main(words) == 0
    assert [row["status"] for row in runs(tmp_path / "out")] == ["done"]


def test_a_peer_s_time_is_that_of_its_steps(job, monkeypatch):
    """Not of what its library does before; and counters of energy are asked in every step."""
    now, asked = [100.0], []

    def train(model, config, stream, loss_of):
        now[0] += 50  # imports
        for _ in stream():
            now[0] += 2
        return model

    class Energy:
        def joules(self):
            asked.append(now[0])
            return 7.0

    monkeypatch.setattr(peers, "perf_counter", lambda: now[0])
    monkeypatch.setitem(peers._TRAIN, "torch-full", train)
    monkeypatch.setattr(EnergyMeter, "where_readable", Energy)
    films = str(job / "films.jsonl")
    values = {"model": str(job / "llama"), "data": films, "eval_data": films, "method": "full"}
    config = TrainConfig.build({**values, "steps": 3, "lr": 1e-3})
    found = peers.repeat("torch-full", config)["measured"]
    assert (found["wall_s"], found["elapsed_s"], found["energy_j"]) == (6.0, 56.0, 7.0)
    assert asked == [150.0, 152.0, 154.0, 156.0]


def test_interrupted_and_shared(job, tmp_path, monkeypatch):
    """Stopped amid a run; then two processes go on at once, and nothing is done twice."""
    out = tmp_path / "out"
    metrics = out / "runs/films/no-limit/full/seed-0/run/metrics.jsonl"
    more = ["--epochs", "12", "--methods", "full", "--lr-search", "1", "--seeds", "2"]
    words = flags(job, out, *more)

    def stop(self, text):
        if metrics.is_file() and metrics.read_text().count("\n") > 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_WAIT_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(command._Live, "show", stop)
        assert main(words) == 128 + signal.SIGINT
    assert not (out / "runs/films/no-limit/full/seed-0/row.json").exists()
    other = subprocess.Popen(
        [sys.executable, "-m", "tinyft.cli", *words], stdout=subprocess.PIPE, text=True
    )
    assert main(words) == 0
    assert other.wait() == 0, other.stdout.read()
    other.stdout.close()
    assert {row["seed"] for row in runs(out, status="done")} == {"0", "1"}
    for n in (0, 1):
        folder = out / f"runs/films/no-limit/full/seed-{n}"
        log = (folder / "log.txt").read_text()
        assert log.count("resuming after step") == (1 if n == 0 else 0)
        assert log.count("step 1/108 ") == 1 and log.count("step 108/108 ") == 1
        lines = (folder / "run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 109))


def test_a_folder_of_another_benchmark(job, tmp_path, in_process, capsys):
    more = ["--flops", "2e7", "--methods", "lora", "--lr-search", "1"]
    assert main(flags(job, tmp_path / "out", *more)) == 0
    assert main(flags(job, tmp_path / "out", *more, "--max-length", "64")) == 2
    assert "max_length" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    assert main(flags(job, tmp_path / "full", *more)) == 2
    assert "not empty" in capsys.readouterr().err


# The grid.


def test_methods():
    found = {m.label: m for m in grid.parse_methods(["all", "peers"], list(METHODS))}
    assert set(METHODS) | {"peft", "torch-full", "mezo-exact", "lora:base_bits=16"} == set(found)
    order = list(found)
    for peer, ours in grid.COUNTERPARTS.items():
        assert order.index(ours) < order.index(peer) and found[peer].counterpart == ours
    assert found["mezo-exact"].fields == {"trainable": "all", "exact": True}
    assert grid.parse_methods(["lora:rank=4,dtype=float32"], ["lora"])[0].fields == {
        "rank": "4",
        "dtype": "float32",
    }
    for words, said in ((["lroa"], "lroa: unknown; there are all"), (["lora:x"], "x has no value")):
        with pytest.raises(InputError, match=said):
            grid.parse_methods(words, list(METHODS))


def test_units_wait_for_nothing_that_comes_later():
    methods = grid.parse_methods(["all", "peers"], list(METHODS))
    limits = grid.budgets(["1e13", "1e12"], ["2GiB", "1GiB"])
    assert [one.slug for one in limits] == ["1e12-1GiB", "1e12-2GiB", "1e13-1GiB", "1e13-2GiB"]
    found = grid.units(["a", "b"], limits, methods, seeds=3)
    labels = len(methods)
    assert len(set(found)) == len(found) == 4 * 2 * (labels * 3 + labels - 2)
    at = {unit: i for i, unit in enumerate(found)}
    for unit, i in at.items():
        if isinstance(unit, grid.Run):
            ours = unit.search.method.counterpart or unit.search.method.label
            method = next(m for m in methods if m.label == ours)
            search = grid.Search(unit.search.task, unit.search.limits, method)
            assert at[search] < i
            if unit.search.method.counterpart:
                assert at[grid.Run(search, unit.seed)] < i
    assert [str(one) for one in grid.budgets([], ["1GiB"])] == ["1GiB"]
    with pytest.raises(InputError, match="flops 3 parsecs"):
        grid.budgets(["3 parsecs"], [])


def test_rates():
    assert grid.rates(2e-5, [16, 1, 4]) == [2e-5, 8e-5, 3.2e-4]


def test_rows_are_those_of_the_same_file(tmp_path):
    """Whatever its name; and a line ends where a line of the file ends."""
    rows = [json.dumps({"text": f"{i}\u2028and\x85on"}, ensure_ascii=False) for i in range(20)]
    for folder, text in (("v1", rows), ("v2", rows[1:]), ("v3", rows)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.jsonl").write_bytes("\r\n".join(text).encode())
    out = tmp_path / "data"
    found = tasks.make("t", str(tmp_path / "v1/t.jsonl"), out, 3)
    parts = [path.read_bytes().split(b"\n")[:-1] for path in (found.train, found.test)]
    assert [len(part) for part in parts] == [14, 3]
    assert {line.decode() for part in parts for line in part} < set(rows)
    assert tasks.make("t", str(tmp_path / "v3/t.jsonl"), out, 3) == found
    with pytest.raises(InputError, match=r"v2/t\.jsonl is not what .* were taken from .*v1/t"):
        tasks.make("t", str(tmp_path / "v2/t.jsonl"), out, 3)
    (out / "t/source.json").unlink()  # as folders were before
    assert tasks.make("t", str(tmp_path / "v2/t.jsonl"), out, 3) == found


def test_rows_to_tune_on_are_not_those_scored(tmp_path):
    rows = [{"prompt": f"q{i % 70}", "completion": f" {i}"} for i in range(100)]
    text = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(text))
    found = tasks.make("t", str(tmp_path / "t.jsonl"), tmp_path / "data", 500)
    parts = [
        set(path.read_text().splitlines(keepends=True))
        for path in (found.train, found.validation, found.test)
    ]
    assert len(parts[1]) == len(parts[2]) and sum(map(len, parts)) <= 100
    prompts = [{json.loads(line)["prompt"] for line in part} for part in parts]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert set.union(*parts) <= set(text)
    before = found.train.read_text()
    again = tasks.make("t", str(tmp_path / "t.jsonl"), tmp_path / "other", 500)
    assert again.train.read_text() == before  # the same whoever makes them
    with pytest.raises(InputError, match="too few rows"):
        (tmp_path / "one.jsonl").write_text(text[0])
        tasks.make("one", str(tmp_path / "one.jsonl"), tmp_path / "data", 500)
    with pytest.raises(InputError, match="both be called t"):
        tasks.names([str(tmp_path / "t.jsonl"), str(Path("other") / "t.jsonl")])
