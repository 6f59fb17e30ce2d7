"""What the benches share: commands in processes of their own, none of them done twice."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyft.assets import fetch
from tinyft.checkpoint import write_atomic


def tinyft(*words: str, catch: bool = False) -> str:
    """Run a command, and say so; returns what it printed, if caught."""
    print("$ tinyft", *words, flush=True)
    command = [sys.executable, "-m", "tinyft.cli", *words]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if catch else None)
    return done.stdout or ""


def train(flags: Sequence[str], output: Path) -> None:
    """Train into `output`, unless its report is there already; what was interrupted goes on."""
    if not (output / "report.json").exists():
        resume = ["--resume"] if (output / "run.json").exists() else []
        tinyft("train", *flags, f"--output={output}", *resume)


def score(model: Path | str, path: Path, *flags: str) -> dict[str, Any]:
    """What `tinyft eval --json` says of a model, kept in `path`."""
    if not path.exists():
        write_atomic(path, tinyft("eval", f"--model={model}", "--json", *flags, catch=True))
    return json.loads(path.read_text())


def held_out(data: str, rows: slice, path: Path) -> Path:
    """Some of the held-out rows of built-in data, in a file of their own."""
    lines = (fetch(data) / "dev.jsonl").read_text().splitlines(keepends=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines[rows]))
    return path


def scores(output: Path) -> dict[int, float]:
    """Held-out losses of a finished run, by the steps before them: none, those of evaluations on
    the way, all."""
    report = json.loads((output / "report.json").read_text())
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    loss = {0: report["eval"]["before"]["loss"]}
    loss |= {line["step"]: line["eval"]["loss"] for line in lines if "eval" in line}
    return {**loss, report["measured"]["steps"]: report["eval"]["after"]["loss"]}


def kept(path: Path) -> list[dict[str, Any]]:
    """Lines of a CSV, numbers as numbers; none where there is no file."""
    return [
        {name: _number(value) for name, value in line.items()}
        for line in (csv.DictReader(path.open()) if path.exists() else [])
    ]


def _number(text: str) -> float | int | str:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def add(line: dict[str, Any], path: Path, *key: str) -> None:
    """Put a line into a CSV, in the place of one whose fields `key` are the same. Several processes
    may do so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = {tuple(str(one[name]) for name in key): one for one in kept(path)}
        lines[tuple(str(line[name]) for name in key)] = line
        keep(list(lines.values()), path)


def keep(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a CSV, a line a dictionary of the first's names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, text.getvalue())
