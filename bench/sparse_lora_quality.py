"""What SparseLoRA's savings cost in quality: SmolLM2-135M, two tasks whose prompts hold examples.

    python bench/sparse_lora_quality.py [--seeds 0 1] [--steps 60] [--runs runs/sparse-lora-quality]

Film-review sentiment after four labelled reviews, and a restaurant's description after two others
(the shots are training rows, also for held-out ones). Rows: dense LoRA; calibrated schedules at
shares 0.65 and 0.5 of its FLOPs; the same sparsity in all MLPs at 0.65; calibrated at 0.5 with the
output's tokens sparse, too. Every row is one `tinyft train` in a process of its own. Runs that are
finished are kept and one that was interrupted resumes; table and `sparse_lora_quality.csv` are made
from all reports there are. FLOPs and time are the whole run's: dense first steps and calibration
included, scoring not.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
from pathlib import Path
from typing import Any

from commands import train

from tinyft.assets import fetch
from tinyft.checkpoint import write_atomic
from tinyft.config import as_flags

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 200  # rows
TASKS = {"film-reviews": 4, "e2e": 2}  # shots
COMMON = {
    "model": "smollm2-135m",
    "dtype": "bfloat16",
    "batch_size": 8,
    "lr": 3e-4,
    "warmup": 4,
    "max_length": 384,
}
SPARSE = {"method": "sparse_lora"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "calibrated, 0.65": {**SPARSE, "flops_share": 0.65},
    "calibrated, 0.5": {**SPARSE, "flops_share": 0.5},
    "uniform MLPs, 0.65": {**SPARSE, "flops_share": 0.65, "sparsity": "uniform"},
    "all tokens, 0.5": {**SPARSE, "flops_share": 0.5, "sparse_tokens": "all"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse-lora-quality"))
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:  # all rows of one seed before the next seed begins
        for task in arguments.tasks:
            data = data_of(task, arguments)
            for row in arguments.rows:
                config = {**COMMON, **data, **ROWS[row], "seed": seed, "steps": arguments.steps}
                train(as_flags(config), arguments.runs / f"{task}-{slug(row)}-{seed}")
    lines = [
        record(task, row, seed, json.loads(report.read_text()))
        for task in TASKS
        for row in ROWS
        for seed in range(9)
        if (report := arguments.runs / f"{task}-{slug(row)}-{seed}" / "report.json").exists()
    ]
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "sparse_lora_quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(table(lines))


def slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "-")


def data_of(task: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Rows whose prompts begin with some training rows and their answers."""
    source, found = fetch(task), {}
    train = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    for name, split in (("data", "train"), ("eval_data", "dev")):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        rng = random.Random(0)
        text = ""
        for row in rows[: arguments.held_out] if split == "dev" else rows:
            shots = [shot for shot in rng.sample(train, TASKS[task] + 1) if shot != row]
            before = "".join(f"{s['prompt']}{answer(s)}\n\n" for s in shots[: TASKS[task]])
            text += json.dumps({**row, "prompt": before + row["prompt"]}) + "\n"
        path = arguments.runs / f"{task}-{split}.jsonl"
        write_atomic(path, text)
        found[name] = str(path)
    return found


def answer(row: dict) -> str:
    return row["choices"][row["answer"]] if "choices" in row else row["completion"]


def record(task: str, row: str, seed: int, report: dict) -> dict:
    """A line of the CSV."""
    got, after = report["measured"], report["eval"]["after"]
    return {
        "task": task,
        "row": row,
        "seed": seed,
        "loss_before": report["eval"]["before"]["loss"],
        "loss": after["loss"],
        "accuracy": after.get("accuracy", ""),
        "steps": got["steps"],
        "wall_s": round(got["wall_s"], 1),
        "flops": got["flops"],
        "peak_memory_mib": round(got["peak_memory_bytes"] / 2**20),
    }


def table(lines: list[dict]) -> str:
    """Markdown: a row a task and method; means over seeds, and shares of dense LoRA's."""
    out = [
        "| task | method | held-out loss | accuracy | FLOPs | time | peak memory | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(line["task"] for line in lines):
        ours = [line for line in lines if line["task"] == task]
        for row in dict.fromkeys(line["row"] for line in ours):
            found = [line for line in ours if line["row"] == row]
            dense = {line["seed"]: line for line in ours if line["row"] == "LoRA"}
            pairs = [(line, dense[line["seed"]]) for line in found if line["seed"] in dense]

            def share(name: str, pairs: list = pairs) -> str:
                if not pairs:
                    return ""
                return f"{statistics.median(a[name] / b[name] for a, b in pairs):.2f}"

            accuracy = [line["accuracy"] for line in found if line["accuracy"] != ""]
            out.append(
                f"| {task} | {row} | {spread([line['loss'] for line in found])} "
                f"| {spread(accuracy) if accuracy else ''} | {share('flops')} | {share('wall_s')} "
                f"| {max(line['peak_memory_mib'] for line in found):,} MiB | {len(found)} |"
            )
    return "\n".join(out)


def spread(values: list[float]) -> str:
    """Mean, and the values it is of."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
