"""Plans held to their word: every budget is enforced by the operating system.

    python bench/plan_enforced.py [--from 560MiB] [--to 2GiB] [--budgets 20] [--steps 3]

For each budget `tinyft train --memory BUDGET` plans and trains SmolLM2-135M inside a memory control
group that kills what takes more. A candidate that the planner refused for its memory is then run
without a limit: the peak of its process must be beyond the budget that it was refused for. Needs
root and cgroups (v2, or v1's memory controller). Rows that are measured are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import add, kept

from tinyft.assets import fetch
from tinyft.budget import Budget
from tinyft.config import as_flags
from tinyft.machine import this_machine

FIELDS = (
    *("budget_bytes", "exit_code", "chosen", "predicted_bytes", "peak_bytes", "group_peak_bytes"),
    *("refused", "refused_predicted_bytes", "refused_peak_bytes"),
)
COMMON = ["--model=smollm2-135m", "--max-length=128"]


class Group:
    """A memory control group of this process's making."""

    def __init__(self, limit_bytes: int) -> None:
        v1 = Path("/sys/fs/cgroup/memory")
        root, self.limit, self.peak = (
            (v1, "memory.limit_in_bytes", "memory.max_usage_in_bytes")
            if v1.is_dir()
            else (Path("/sys/fs/cgroup"), "memory.max", "memory.peak")
        )
        self.folder = root / f"tinyft-{os.getpid()}"
        self.folder.mkdir(exist_ok=True)
        (self.folder / self.limit).write_text(str(limit_bytes))

    def enter(self) -> None:
        """Called in the child, before it becomes the command."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> int:
        peak_bytes = int((self.folder / self.peak).read_text())
        while True:  # what the command started (multiprocessing's tracker) may outlive it a moment
            try:
                self.folder.rmdir()
                return peak_bytes
            except OSError:
                time.sleep(0.1)


def make_data(folder: Path) -> list[str]:
    """A few rows, so that a run is short: what it takes depends on the longest alone."""
    flags = []
    for flag, split, count in (("data", "train", 400), ("eval-data", "dev", 16)):
        lines = (fetch("film-reviews") / f"{split}.jsonl").read_text().splitlines(keepends=True)
        path = folder / f"{split}.jsonl"
        path.write_text("".join(sorted(lines[:count], key=len)))
        flags.append(f"--{flag}={path}")
    return flags


def train(flags: list[str], output: str, group: Group | None = None) -> tuple[int, str]:
    data = make_data(Path(output).parent)
    command = [sys.executable, "-m", "tinyft.cli", "train", *COMMON, *data, *flags, "--json"]
    done = subprocess.run(
        [*command, "--output", output],
        capture_output=True,
        text=True,
        preexec_fn=group.enter if group else None,
    )
    if done.returncode not in (0, 3):
        print(done.stderr[-800:], file=sys.stderr)
    return done.returncode, done.stdout


def peak_of(output: str) -> int:
    measured = json.loads((Path(output) / "report.json").read_text())["measured"]
    return max(measured["peak_memory_bytes"], measured["eval_peak_memory_bytes"])


def measure(limit_bytes: int, steps: int) -> dict[str, Any]:
    """One budget: the planned run inside it, and the nearest refused candidate without it."""
    row = dict.fromkeys(FIELDS, "") | {"budget_bytes": limit_bytes}
    with tempfile.TemporaryDirectory() as folder:
        group = Group(limit_bytes)
        flags = [f"--memory={limit_bytes}", f"--steps={steps}"]
        row["exit_code"], said = train(flags, f"{folder}/planned", group)
        row["group_peak_bytes"] = group.close()
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        plan = next((line for line in lines if line["event"] == "plan"), None)
        if plan is None:
            return row
        if row["exit_code"] == 0:
            chosen = next(c for c in plan["candidates"] if c["fits"])
            row["chosen"] = chosen["name"]
            row["predicted_bytes"] = chosen["predicted"]["peak_memory_bytes"]
            row["peak_bytes"] = peak_of(f"{folder}/planned")
        refused = [c for c in plan["candidates"] if "memory_bytes" in c["least_budget"]]
        if refused:
            nearest = min(refused, key=lambda c: c["predicted"]["peak_memory_bytes"])
            row["refused"] = nearest["name"]
            row["refused_predicted_bytes"] = nearest["predicted"]["peak_memory_bytes"]
            others = {"memory", "epochs", "model", "data", "eval_data", "max_length", "output"}
            config = {k: v for k, v in nearest["config"].items() if k not in others}
            flags = as_flags({**config, "steps": steps})
            code, _ = train(flags, f"{folder}/refused")
            row["refused_peak_bytes"] = peak_of(f"{folder}/refused") if code == 0 else ""
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from", dest="least", default="560MiB")
    parser.add_argument("--to", dest="most", default="2GiB")
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    arguments = parser.parse_args()
    least, most = (Budget.parse(memory=x).memory_bytes for x in (arguments.least, arguments.most))
    assert least and most
    table = arguments.output / "plan_enforced.csv"
    known = {row["budget_bytes"] for row in kept(table)}
    ratio = (most / least) ** (1 / (arguments.budgets - 1))
    this_machine()  # once, outside of all groups
    for budget in (int(least * ratio**i) for i in range(arguments.budgets)):
        if budget in known:
            continue
        row = measure(budget, arguments.steps)
        add(row, table, "budget_bytes")
        shown = {k: f"{v >> 20} MiB" if k.endswith("bytes") and v else v for k, v in row.items()}
        print(", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    rows = kept(table)
    accepted = sum(bool(row["chosen"]) for row in rows)
    killed = sum(row["exit_code"] not in (0, 3) for row in rows)
    refused = [row for row in rows if row["refused_peak_bytes"]]
    over = sum(row["refused_peak_bytes"] > row["budget_bytes"] for row in refused)
    print(
        f"{len(rows)} budgets: {accepted} runs accepted and finished, {killed} ended otherwise; "
        f"{over} of {len(refused)} refused candidates took more than the budget"
    )


if __name__ == "__main__":
    main()
