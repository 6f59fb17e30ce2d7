"""The command line: exit codes, one-paragraph errors, output for people and for programs."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyft import cli
from tinyft.models import load

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("lora", "full", "mezo")


def row(i, **changes):
    prompt = f"The film was {'great' if i % 2 else 'a bore'} {'x' * (i % 5)}. It was"
    return {"prompt": prompt, "choices": [" terrible", " great"], "answer": i % 2, **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path, tiny_model_dir, monkeypatch):
    """A working folder with `base`, `train.jsonl` and `dev.jsonl` in it."""
    tiny_model_dir("llama").rename(tmp_path / "base")
    write(tmp_path / "train.jsonl", [row(i) for i in range(16)])
    write(tmp_path / "dev.jsonl", [row(i) for i in range(4)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tinyft(text):
    return cli.main(text.split())


TRAIN = "train --model base --data train.jsonl --output out --batch-size 4 --steps 2"


def failing(text, capfd, code=2):
    """Run a command that must fail; returns its error, which must be short and no traceback."""
    capfd.readouterr()
    assert tinyft(text) == code
    printed = capfd.readouterr()
    assert printed.err.startswith("tinyft: ") and "Traceback" not in printed.err
    assert printed.err.count("tinyft: ") == 1 and len(printed.err) < 1500
    return printed.err


# Bad input. Each says what was found and what to do, and leaves nothing behind.


def empty(place):
    (place / "train.jsonl").write_text("")


def broken(place):
    write(place / "train.jsonl", [row(0)])
    with (place / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x", \n')


def fields(place):
    write(place / "train.jsonl", [row(0), {"question": "?"}, row(2)])


def out_of_range(place):
    write(place / "train.jsonl", [row(0), row(1, answer=2)])


def too_long(place):
    write(place / "train.jsonl", [{"prompt": "The film", "completion": " was great" * 30}])


def no_model(place):
    for path in (place / "base").iterdir():
        path.unlink()


def pickled(place):
    (place / "base" / "model.safetensors").unlink()
    (place / "base" / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


BAD = {
    "missing data": (None, "--data nothing.jsonl", ["nothing.jsonl does not exist"]),
    "missing model": (None, "--model ./nothing", ["There is no model at ./nothing"]),
    "empty file": (empty, "", ["train.jsonl is empty"]),
    "broken JSON": (broken, "", ["line 2", "not JSON", "--skip-bad-rows"]),
    "missing fields": (fields, "", ["line 2", "--skip-bad-rows"]),
    "answer out of range": (out_of_range, "", ["line 2", "answer"]),
    "completion too long": (too_long, "--max-length 16", ["line 1", "--max-length"]),
    "no model in folder": (no_model, "", ["base"]),
    "pickled weights": (pickled, "", ["its weights are pickles", "safetensors"]),
    "unknown method": (None, "--method mezzo", ["--method mezzo is unknown", "mezo"]),
    "unknown flag": (None, "--batchsize 3", ["--batchsize is not known", "--batch-size"]),
    "no number": (None, "--lr fast", ["--lr fast: must be a valid number"]),
    "another method's option": (
        None,
        "--eps 1e-3",
        ["--eps belongs to mezo and roste_mezo, not to lora"],
    ),
    "no device": (None, "--device gpu", ["--device gpu is unknown: auto, cpu, cuda or cuda:N"]),
    "no GPU": (None, "--device cuda:99", ["--device cuda:99"]),
    "eval data": (None, "--eval-data nix.csv", ["nix.csv does not exist"]),
    "output is a file": (None, "--output train.jsonl", ["--output train.jsonl is a file"]),
    "no config": (None, "--config none.yaml", ["--config none.yaml cannot be read"]),
    "value missing": (None, "--lr", ["expected one argument"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(place, capfd, case):
    prepare, flags, expected = BAD[case]
    if prepare:
        prepare(place)
    before = sorted(path.name for path in place.iterdir())
    method = "" if "--method" in flags else "--method lora"
    error = failing(f"{TRAIN} {method} {flags}", capfd)
    for part in expected:
        assert part in error, error
    assert sorted(path.name for path in place.iterdir()) == before


def test_all_is_reported_at_once(place, capfd):
    error = failing("train --modle base --methd lora --steps 0", capfd)
    for part in (
        "--modle is not known (did you mean --model?)",
        "--methd is not known (did you mean --method?)",
        "--model is missing",
        "--steps 0",
    ):
        assert part in error, error
    error = failing(f"{TRAIN} --method lora --data no.jsonl --eval-data nor.jsonl", capfd)
    assert "no.jsonl does not" in error and "nor.jsonl does not" in error


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_diverging_run(place, capfd, method):
    error = failing(f"{TRAIN} --method {method} --lr 1e30 --steps 20", capfd)
    assert "The loss at step" in error and "Lower --lr" in error


def test_skip_bad_rows(place, capfd):
    fields(place)
    assert tinyft(f"{TRAIN} --method lora --skip-bad-rows") == 0
    assert "1 bad rows left out" in capfd.readouterr().out
    report = json.loads((place / "out" / "report.json").read_text())
    assert [bad["line"] for bad in report["data"]["bad_rows"]] == [2]


def test_usage(capfd):
    assert "invalid choice: 'trian'" in failing("trian", capfd)
    assert "required: --model, --data" in failing("eval", capfd)
    assert "Unknown: --speed 3" in failing("eval --model m --data d --speed 3", capfd)
    assert "0 is no whole number above 0" in failing("eval --batch-size 0", capfd)
    assert "belongs to no flag" in failing("train model.gguf", capfd)
    for text in ("--help", "train --help", "eval --help", "merge --help", "demo --help"):
        with pytest.raises(SystemExit) as stopped:
            tinyft(text)
        assert stopped.value.code == 0
    printed = capfd.readouterr().out
    assert "--grad-accumulation" in printed and "options of mezo" in printed


# What works.


@pytest.mark.parametrize("method", METHODS)
def test_train_eval_merge(place, capfd, method):
    assert tinyft(f"{TRAIN} --method {method} --eval-data dev.jsonl --lr 1e-3") == 0
    printed = capfd.readouterr()
    assert "step 2/2" in printed.out and "held-out after" in printed.out
    assert printed.err == ""
    report = json.loads((place / "out" / "report.json").read_text())
    assert tinyft("eval --model out --data dev.jsonl --json --batch-size 4") == 0
    scored = json.loads(capfd.readouterr().out)
    assert scored["loss"] == pytest.approx(report["eval"]["after"]["loss"], abs=1e-5)
    assert tinyft("merge out --output merged") == 0
    merged = load(place / "merged")
    assert not (place / "merged" / "tinyft.json").exists()
    ids = torch.tensor([[5, 17, 300]])
    with torch.no_grad():
        one, other = (m.model(input_ids=ids).logits for m in (merged, load(place / "out")))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert "not empty" in failing("merge out --output merged", capfd)


def test_a_seed_log_merges_to_the_same_bits(place):
    assert tinyft(f"{TRAIN} --method mezo --lr 1e-3") == 0
    assert tinyft("merge out --output one") == 0
    assert tinyft("merge out --output other") == 0
    files = [(place / name / "model.safetensors").read_bytes() for name in ("one", "other", "base")]
    assert files[0] == files[1] != files[2]


def test_json_lines(place, capfd):
    assert tinyft(f"{TRAIN} --method lora --eval-data dev.jsonl --json") == 0
    printed = capfd.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["evaluation", "begin", "step", "step", "evaluation", "report"]
    assert events[2]["loss"] > 0 and events[-1]["measured"]["steps"] == 2
    assert "parameters" in printed.err


def test_generate(place, capfd):
    arguments = "eval --model base --data dev.jsonl --generate --max-new-tokens 3"
    assert tinyft(arguments) == 0
    assert "exact_match" in capfd.readouterr().out
    assert tinyft(arguments + " --json") == 0
    assert {"rougeL", "samples", "accuracy"} <= json.loads(capfd.readouterr().out).keys()


def test_yaml_and_flags_that_win(place, capfd):
    (place / "run.yaml").write_text(
        "model: base\ndata: train.jsonl\nmethod: mezo\nlr: 1e-5\nepochs: 3\nbatch-size: 4\n"
    )
    assert tinyft("train --config run.yaml --output out --steps 1 --eps 1e-2") == 0
    saved = json.loads((place / "out" / "report.json").read_text())["config"]
    assert (saved["lr"], saved["steps"], saved["epochs"], saved["eps"]) == (1e-5, 1, None, 1e-2)
    assert tinyft("train --config out/config.yaml --output again") == 0
    again = json.loads((place / "again" / "report.json").read_text())
    assert again["config"] == {**saved, "output": "again"}
    (place / "run.yaml").write_text("modle: base\n")
    assert "did you mean --model" in failing("train --config run.yaml --output o", capfd)


def test_resume_needs_nothing_but_the_folder(place, capfd):
    assert tinyft(f"{TRAIN} --method mezo --schedule constant") == 0
    assert tinyft("train --output out --resume") == 0
    assert "2 steps" in capfd.readouterr().out
    assert tinyft("train --output out --resume --steps 3") == 0
    assert "3 steps" in capfd.readouterr().out
    assert "lr was" in failing("train --output out --resume --lr 1", capfd)
    assert "method was mezo, is lora" in failing(f"{TRAIN} --method lora --resume", capfd)


def test_a_plan_says_how_long(place, monkeypatch):
    """Also where that was given as passes over the data: 16 rows, twice, 4 a step."""
    from tinyft.config import as_flag
    from tinyft.planning import make_plan

    plan = lambda values, show: make_plan(values, spell=as_flag).config  # noqa: E731
    monkeypatch.setattr(cli, "_planned", plan)  # without a process of its own
    flags = "--method lora --dtype float32 --base-bits 16 --batch-size 4 --epochs 2 --memory 64GiB"
    assert tinyft(f"train --model base --data train.jsonl --output out {flags}") == 0
    saved = json.loads((place / "out" / "report.json").read_text())["config"]
    assert (saved["steps"], saved["epochs"], saved["memory"]) == (8, None, "64GiB")


def test_only_a_run_that_is_there_needs_no_plan(place, capfd, monkeypatch):
    def plan(values, show):
        raise cli.InputError("It is planned.")

    monkeypatch.setattr(cli, "_planned", plan)
    new = "train --model base --data train.jsonl --output out --memory 64GiB --resume"
    assert "It is planned" in failing(new, capfd)
    assert "It is planned" in failing(f"{new} --method auto", capfd)
    assert tinyft(f"{TRAIN} --method mezo") == 0
    assert tinyft("train --output out --resume --method auto") == 0
    assert tinyft("train --output out --resume --memory 64GiB") == 0


def test_debug_raises(place):
    with pytest.raises(cli.InputError):
        tinyft("train --debug")


# In a process of its own: signals, limits, pipes.


def command(*words):
    return [sys.executable, "-m", "tinyft.cli", *words]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(place, number):
    words = [*TRAIN.split(), "--method", "lora", "--json"]
    words[words.index("--steps") + 1] = "100000"
    process = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    for line in process.stdout:  # until it is in its stride
        if json.loads(line).get("step", 0) >= 2:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "and saved. To go on: tinyft train --output out --resume" in errors
    assert "Traceback" not in errors
    state = json.loads((place / "out" / "checkpoint" / "state.json").read_text())
    lines = (place / "out" / "metrics.jsonl").read_text().splitlines()
    assert state["step"] == len(lines) >= 2


def test_a_full_disk(place):
    """A limit on file sizes stands in for the disk: the same error path, another number."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))

    words = [*TRAIN.split(), "--method", "full", "--checkpoint-every", "1"]
    done = subprocess.run(
        command(*words), capture_output=True, text=True, preexec_fn=limit, env=ENVIRONMENT
    )
    assert done.returncode == 4, done.stderr
    assert "There is no room to write to out" in done.stderr and "Traceback" not in done.stderr
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "run.json"}
    assert tinyft("train --output out --resume") == 0


def test_a_reader_that_leaves(place):
    process = subprocess.Popen(
        command("train", "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    process.stdout.close()
    assert b"Traceback" not in process.communicate()[1]
