"""kill -9 at any moment, resume, and the result is the undisturbed run's, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import yaml
from killed_run import child
from safetensors import safe_open

ROWS = [
    {
        "prompt": f"The film was {'great' if i % 2 else 'a bore'} {'x' * (i % 7)}. It was",
        "choices": [" terrible", " great"],
        "answer": i % 2,
    }
    for i in range(24)
]
METHODS = {
    "lora": {"lr": 1e-2, "dropout": 0.1},
    "full": {"lr": 1e-3},
    "mezo": {"lr": 1e-4, "momentum": 0.5},
    "green_trainer": {"lr": 1e-3, "rho": 1.0, "reselect": 3},
    "sparse_lora": {"lr": 1e-2, "flops_share": 0.9, "start_step": 2, "rank": 2},
    "roste": {"lr": 1e-3},
    "roste_mezo": {"lr": 1e-4},
}
ARTEFACTS = {
    "lora": ["adapter_model.safetensors", "adapter_config.json"],
    "full": ["model.safetensors", "config.json"],
    "mezo": ["steps.seedlog"],
    "green_trainer": ["model.safetensors", "selection.png"],
    "sparse_lora": ["adapter_model.safetensors", "sparsity.yaml"],
    "roste": ["packed.safetensors", "packed.json", "rotations.png"],
    "roste_mezo": ["packed.safetensors", "steps.seedlog"],
}


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_run"])
    with pytest.MonkeyPatch.context() as patch:
        # Before Python 3.13 the server does not get our path: it would import nothing beforehand.
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), *sys.path]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def runs(server, tiny_model_dir, tmp_path):
    """`run(name, method, ...)` trains in a process, and returns its exit code."""
    base = tiny_model_dir("llama", num_hidden_layers=1)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))

    def run(name, method, *, at_operation=None, after_s=None, **fields):
        values = {
            "model": str(base),
            "data": str(tmp_path / "train.jsonl"),
            "eval_data": str(tmp_path / "dev.jsonl"),
            "method": method,
            "output": str(tmp_path / name),
            "steps": 6,
            "batch_size": 4,
            "eval_every": 3,
            "checkpoint_every": 2,
            "resume": True,
            **METHODS[method],
            **fields,
        }
        process = server.Process(target=child, args=(values, at_operation, after_s))
        process.start()
        process.join()
        return process.exitcode

    return run


def check_whole(folder: Path) -> None:
    """Every file that bears its final name can be read to its end."""
    for path in folder.rglob("*") if folder.exists() else ():
        if not path.is_file() or ".partial" in str(path) or ".old" in str(path):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())
        elif path.suffix == ".yaml":
            assert yaml.safe_load(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert [file.get_tensor(name) for name in file.keys()]
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def check_same(one: Path, other: Path, method: str) -> None:
    for name in ARTEFACTS[method]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    mine, its = (json.loads((folder / "report.json").read_text()) for folder in (one, other))
    assert mine["eval"] == its["eval"]
    known = [(a, b) for a, b in zip(*(r["train"]["loss"] for r in (mine, its)), strict=True)]
    if "mezo" in method:  # a kill between its log and our metrics loses a loss, never a step
        known = [(a, b) for a, b in known if None not in (a, b)]
        assert len(known) >= 4
    assert all(a == b for a, b in known)
    assert mine["measured"]["steps"] == its["measured"]["steps"] == 6
    left = {path.name for path in other.iterdir()}
    assert left == {path.name for path in one.iterdir()}
    assert not left & {"checkpoint", "run.json"}


@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again(runs, tmp_path, method):
    """Four kills in one run, each at a random file operation of what was left to do."""
    assert runs("whole", method) == 0
    operations = int((tmp_path / "whole.operations").read_text())
    assert operations > 20
    rng = random.Random(METHODS[method]["lr"])
    deaths = 0
    for _ in range(4):
        code = runs("killed", method, at_operation=rng.randint(1, operations // 2))
        check_whole(tmp_path / "killed")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert runs("killed", method) == 0
    assert deaths >= 2
    check_whole(tmp_path / "killed")
    check_same(tmp_path / "whole", tmp_path / "killed", method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "mezo"])  # a checkpoint, and a log
def test_ten_runs_killed_at_ten_moments(runs, tmp_path, method):
    """Ten runs: half die at a file operation, half at a random time, and each resumes alone."""
    assert runs("whole", method) == 0
    operations = int((tmp_path / "whole.operations").read_text())
    rng = random.Random(method)
    for i in range(10):
        moment = (
            {"at_operation": 1 + rng.randrange(operations)}
            if i % 2
            else {"after_s": rng.uniform(0.05, 1.0)}
        )
        code = runs(f"killed-{i}", method, **moment)
        assert code == -signal.SIGKILL or (code == 0 and "after_s" in moment)
        check_whole(tmp_path / f"killed-{i}")
        assert runs(f"killed-{i}", method) == 0
        check_same(tmp_path / "whole", tmp_path / f"killed-{i}", method)
