"""Exports in environments of their own, as on a device: runtime, numpy and tokenizers, no torch."""

import json
import shutil
import subprocess
import sys
from functools import cache

import pytest
from tiny_models import save_tiny_model

from tinyft.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of torch's exporter
]
STEPS = 6
RUNTIMES = {
    "newest": ["onnxruntime"],
    "training": ["onnxruntime-training-cpu==1.19.2", "onnx"],
}
ROWS = [
    {"prompt": f"Film {i}: it was", "completion": f" {w}"}
    for i, w in enumerate(["great", "terrible", "a bore", "great and a bore"] * 3)
]
FLAGS = {
    "mezo": ["--method", "mezo", "--lr", "1e-4"],
    "lora": ["--method", "lora", "--rank", "2", "--lr", "1e-3"],
    "full": ["--method", "full", "--lr", "1e-3", "--weight-decay", "0.1"],
}


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """The interpreter of a new environment with a runtime; skips where the index has none."""

    @cache
    def find(runtime):
        folder = tmp_path_factory.mktemp(runtime)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        python = folder / "bin" / "python"
        words = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        words += [*RUNTIMES[runtime], "numpy", "tokenizers"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {RUNTIMES[runtime]}: {done.stderr.strip()[-300:]}")
        assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
        return python

    return find


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder / "model", "llama", tiny_tokenizer, num_hidden_layers=1)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def words(command, base, method, output):
    files = ["--model", str(base / "model"), "--data", str(base / "data.jsonl")]
    return [command, *files, *FLAGS[method], "--batch-size", "4", "--output", str(output)]


def on_device(python, folder, data, kill_at=None):
    """`{step: loss}` that `train.py` prints; it is killed when it has printed `kill_at` steps."""
    command = [python, folder / "train.py", "--data", data, "--steps", str(STEPS)]
    found = {}
    with subprocess.Popen(
        [*command, "--save-every", "1"], stdout=subprocess.PIPE, text=True, env={}
    ) as process:
        for line in process.stdout:
            if line.startswith("step "):
                _, step, _, loss = line.split()
                found[int(step)] = float(loss)
            if len(found) == kill_at:
                process.kill()
    assert kill_at or process.returncode == 0
    return found


@pytest.fixture(scope="module")
def exported(base):
    """The folder of a method's export; of onnxruntime-training's artefacts if that is given."""

    @cache
    def find(method, training_python):
        output = base / f"exported-{method}-{bool(training_python)}"
        more = ["--training-python", training_python] if training_python else []
        words_ = [*words("export", base, method, output), "--target", "rtx-3060", *more]
        assert main(words_) == 0
        return output

    return find


@pytest.fixture(scope="module")
def wanted(base):
    """Losses of torch's steps, by method."""

    @cache
    def find(method):
        output = base / f"torch-{method}"
        assert main([*words("train", base, method, output), "--steps", str(STEPS)]) == 0
        return json.loads((output / "report.json").read_text())["train"]["loss"]

    return find


@pytest.mark.parametrize(
    "runtime, method, artefacts",
    [
        ("newest", "mezo", False),
        ("newest", "lora", False),
        ("training", "mezo", False),
        ("training", "full", True),
    ],
)
def test_trains_as_torch_does(
    runtime, method, artefacts, interpreter, exported, base, wanted, tmp_path
):
    python = interpreter(runtime)
    output = shutil.copytree(exported(method, str(python) if artefacts else None), tmp_path / "out")
    killed = on_device(python, output, base / "data.jsonl", kill_at=2)
    resumed = on_device(python, output, base / "data.jsonl")
    assert 1 not in resumed
    got = killed | resumed
    assert [got[step + 1] for step in range(STEPS)] == pytest.approx(wanted(method), rel=1e-5)
