"""Which directions, which estimator: what MeZO learns from the same FLOPs on four tasks.

    python bench/mezo_estimators.py [--tasks film-reviews ...] [--rows estimators ...]

SmolLM2-135M in bfloat16, batches of 8, one thread, 2e13 FLOPs a run, half a cosine down to 0,
scored on 200 held-out rows before and after. First every estimator at several rates, with the
default family; then adapters on 4 bits; the best with a constant rate; and every family at its
rate (all have E[zz'] = I, so that it means the same for each). Every row is one `tinyft train` in
a process of its own; what `results/mezo_estimators.csv` holds is not run again (delete a line to
have it anew), what was interrupted resumes, and processes with other `--tasks` may run beside.
Seconds are those of all steps, and of the median one.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

from commands import add, held_out, kept, train

from tinyft.config import as_flags

RESULTS = Path(__file__).parent / "results" / "mezo_estimators.csv"
HELD_OUT = 200  # rows
TASKS = ("film-reviews", "questions", "winogrande", "e2e")
COMMON = {
    **{"model": "smollm2-135m", "method": "mezo", "dtype": "bfloat16", "batch_size": 8},
    **{"max_length": 128, "flops": "2e13", "threads": 1},
}
KEY = ("task", "trainable", "directions", "estimator", "probes", "lr", "eps", "schedule")
USUAL = {"trainable": "all", "directions": "sign-rank1", "eps": 1e-3, "schedule": "cosine"}
TWO, FOUR, EIGHT = (
    {**USUAL, "estimator": "two-sided", "probes": 1},
    {**USUAL, "estimator": "one-sided", "probes": 4},
    {**USUAL, "estimator": "one-sided", "probes": 8},
)
CENTRED = {**USUAL, "estimator": "centred", "probes": 5}
LORA = {"trainable": "lora", "base_bits": 4, "eps": 1e-2}
OTHERS = ("hadamard", "rademacher", "gaussian")
ROWS: dict[str, list[dict[str, Any]]] = {
    "estimators": [
        *({**FOUR, "lr": lr} for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
        *({**TWO, "lr": lr} for lr in (5e-6, 2e-5, 8e-5)),
        *({**EIGHT, "lr": lr} for lr in (3e-3, 6e-3)),
        *({**CENTRED, "lr": lr} for lr in (3e-3, 6e-3)),
    ],
    "adapters": [
        *({**FOUR, **LORA, "lr": lr} for lr in (3e-3, 1e-2, 3e-2)),
        {**FOUR, **LORA, "lr": 1e-2, "eps": 1e-3},
    ],
    "schedules": [{**FOUR, "lr": 3e-3, "schedule": "constant"}],
    "families": [{**FOUR, "directions": name, "lr": 3e-3} for name in OTHERS],
}


def line_of(row: dict[str, Any], output: Path) -> dict[str, Any]:
    """What a finished run leaves in the CSV."""
    report = json.loads((output / "report.json").read_text())
    before, after, got = report["eval"]["before"], report["eval"]["after"], report["measured"]
    return {
        **{name: row[name] for name in KEY},
        "loss_before": round(before["loss"], 4),
        "loss": round(after["loss"], 4),
        "accuracy_before": before.get("accuracy", ""),
        "accuracy": after.get("accuracy", ""),
        "steps": got["steps"],
        "flops": f"{got['flops']:.3e}",
        "seconds": round(got["wall_s"], 1),
        "step_s_median": round(got["step_s_median"], 3),
        "peak_memory_mib": round(got["peak_memory_bytes"] / 2**20),
    }


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What tells rows apart."""
    return tuple(str(row[name]) for name in KEY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--runs", type=Path, default=Path("runs/mezo-estimators"))
    arguments = parser.parse_args()
    for name, task in product(arguments.rows, arguments.tasks):
        folder = arguments.runs / task
        rows = held_out(task, slice(HELD_OUT), folder / "dev.jsonl")
        common = {**COMMON, "data": f"{task}:train", "eval_data": str(rows)}
        for options in ROWS[name]:
            row = {"task": task, **options}
            if key_of(row) not in map(key_of, kept(RESULTS)):
                output = folder / "-".join(key_of(row)[1:])
                train(as_flags({**common, **options}), output)
                add(line_of(row, output), RESULTS, *KEY)


if __name__ == "__main__":
    main()
