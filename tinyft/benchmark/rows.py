"""From a run's report to a row of the table: quality, cost, and all it takes to do it again."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tinyft.benchmark.grid import Run, Search
from tinyft.config import as_flags
from tinyft.report import versions

# Without counters of the processor's energy: what a core draws under load, the figure for any
# processor in Green Algorithms (doi.org/10.1002/advs.202100707; its data, v2.2). Cores alone,
# without memory, the rest of the machine or cooling.
WATTS_PER_CORE = 12.0
# World's electricity in 2022, CO2 equivalents over its whole life cycle: Ember, Global Electricity
# Review 2023.
GRAMS_PER_KWH = 436.0

COLUMNS = (
    *("stage", "status", "reason", "task", "model", "budget", "flops_limit", "memory_limit_bytes"),
    *("method", "seed", "lr", "lr_at_edge", "metric", "before", "after", "loss_before"),
    *("loss_after", "steps", "examples", "flops", "train_s", "elapsed_s", "peak_memory_bytes"),
    *("loaded_memory_bytes", "energy_j", "energy_source", "co2_g", "search_flops", "search_s"),
    *(
        "stopped_by",
        "same_run_as",
        "trainable",
        "dtype",
        "base_bits",
        "batch_size",
        "grad_accumulation",
    ),
    *("train_rows", "scored_rows", "data_sha256", "commit", "versions", "cpu", "cores", "threads"),
    *("machine_memory_bytes", "command"),
)


def done(
    unit: Run | Search,
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    search: Mapping[str, Any] | None,
    watts_per_core: float,
    grams_per_kwh: float,
) -> dict[str, Any]:
    """The row of a finished run.

    Args:
        unit: the run; a search for one of its trials.
        config: flat.
        report: as in report.json.
        search: what was found before the run; None for a trial.
    """
    got, scores, machine = report["measured"], report["eval"], report["hardware"]
    metric = "accuracy" if "accuracy" in scores["after"] else "perplexity"
    joules, source = _energy(got, machine["threads"], watts_per_core)
    per_step = config["batch_size"] * config.get("grad_accumulation", 1)
    return {
        **left(unit, "done", None, config.get("lr")),
        "model": config["model"],
        "lr_at_edge": search and search.get("at_edge"),
        "metric": metric,
        **{when: scores[when][metric] for when in ("before", "after")},
        **{f"loss_{when}": scores[when]["loss"] for when in ("before", "after")},
        "steps": got["steps"],
        "examples": got["steps"] * per_step,
        "flops": got["flops"],
        "train_s": got["wall_s"],
        "elapsed_s": round(got["elapsed_s"], 3),
        "peak_memory_bytes": max(got["peak_memory_bytes"], got["eval_peak_memory_bytes"]),
        "loaded_memory_bytes": got["loaded_memory_bytes"],
        "energy_j": round(joules, 1),
        "energy_source": source,
        "co2_g": round(joules / 3.6e6 * grams_per_kwh, 4),
        "search_flops": search and search.get("flops"),
        "search_s": search and search.get("elapsed_s"),
        "stopped_by": report["stopped_by"],
        **{k: config.get(k) for k in ("trainable", "batch_size", "grad_accumulation")},
        **{k: report["parameters"][k] for k in ("dtype", "base_bits")},
        "train_rows": report["data"]["examples"],
        "scored_rows": scores["after"].get("n", scores["after"].get("tokens")),
        "data_sha256": report["data"]["sha256"][:16],
        "commit": commit(),
        "versions": " ".join(f"{k}={v}" for k, v in report["versions"].items()),
        **{k: machine[k] for k in ("cpu", "cores", "threads")},
        "machine_memory_bytes": machine["memory_bytes"],
        "command": command(unit, config),
    }


def left(
    unit: Run | Search, status: str, reason: str | None, lr: float | None = None
) -> dict[str, Any]:
    """The row of a run that did not end well: `status` is "left out" (it does not fit the budget
    or the model) or "failed" (it began, and broke off)."""
    search = unit.search
    return {
        "stage": "run" if isinstance(unit, Run) else "search",
        "status": status,
        "reason": reason,
        "task": search.task,
        **budget_of(unit),
        "method": search.method.label,
        "seed": unit.seed if isinstance(unit, Run) else 0,
        "lr": lr,
    }


def budget_of(unit: Run | Search) -> dict[str, Any]:
    """The columns that say what a run was held to."""
    limits = unit.search.limits
    return {
        "budget": str(limits),
        "flops_limit": limits.budget.flops,
        "memory_limit_bytes": limits.budget.memory_bytes,
    }


def command(unit: Run | Search, config: Mapping[str, Any]) -> str:
    """What repeats the run, from the benchmark's own folder."""
    values = {k: v for k, v in config.items() if k != "output"}
    method = unit.search.method
    if method.counterpart:
        begin = ["python", "-m", "tinyft.benchmark.peers", method.label]
    else:
        begin = ["tinyft", "train"]
    return shlex.join([*begin, *as_flags(values), "--output=OUTPUT"])


def same_job(row: Mapping[str, Any], unit: Run | Search, config: Mapping[str, Any]) -> bool:
    """Whether a row's run was the same but for its limit on memory."""

    def words(line: str) -> list[str]:
        return sorted(word for word in shlex.split(line) if not word.startswith("--memory="))

    return words(row.get("command", "")) == words(command(unit, config))


def _energy(got: Mapping[str, Any], threads: int, watts_per_core: float) -> tuple[float, str]:
    if "energy_j" in got:
        return got["energy_j"], "RAPL, the whole processor"
    watts = watts_per_core * min(threads, os.cpu_count() or 1)
    return got["elapsed_s"] * watts, f"estimate, {watts:g} W"


@cache
def commit() -> str:
    """Of the checkout that runs, `+` if files in it were changed; else the version."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip()

    if not (root / ".git").exists() or not (found := git("rev-parse", "--short=12", "HEAD")):
        return f"tinyft {versions()['tinyft']}"
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
