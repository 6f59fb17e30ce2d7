"""What SparseLoRA's savings cost in quality: SmolLM2-135M, two tasks whose prompts hold examples.

    python bench/sparse_lora_quality.py [--seeds 0 1] [--steps 30] [--runs runs/sparse-lora-quality]

Film-review sentiment after four labelled reviews, and a restaurant's description after two others
(the shots are training rows, also for held-out ones). Rows: the model as it came; dense LoRA;
calibrated schedules at shares 0.65 and 0.5 of its FLOPs; the same sparsity in all MLPs at 0.65;
calibrated at 0.5 with the output's tokens sparse, too; and calibrated with channels chosen by the
published guess from singular vectors. Every row is one `tinyft train` in a process of its own,
scored by a `tinyft eval` on held-out rows. What `results/sparse_lora_quality.csv` holds is not run
again (delete a line to have it anew), what was interrupted resumes, and processes with other
`--tasks` or `--rows` may run beside. FLOPs and time are the whole run's: dense first steps
and calibration included, scoring not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

from commands import add, kept, score, train

from tinyft.assets import fetch
from tinyft.checkpoint import write_atomic
from tinyft.config import as_flags

RESULTS = Path(__file__).parent / "results" / "sparse_lora_quality.csv"
HELD_OUT = 100  # rows
TASKS = {"film-reviews": 4, "e2e": 2}  # shots
COMMON = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "batch_size": 8,
    "lr": 5e-4,
    "warmup": 3,
    "max_length": 384,
}
KEY = ("task", "row", "seed")
NONE = "no training"
SPARSE = {"method": "sparse_lora"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora"},
    "calibrated, 0.65": {**SPARSE, "flops_share": 0.65},
    "calibrated, 0.5": {**SPARSE, "flops_share": 0.5},
    "uniform MLPs, 0.65": {**SPARSE, "flops_share": 0.65, "sparsity": "uniform"},
    "all tokens, 0.5": {**SPARSE, "flops_share": 0.5, "sparse_tokens": "all"},
    "svd, 0.65": {**SPARSE, "flops_share": 0.65, "estimator": "svd"},
    "svd, 0.5": {**SPARSE, "flops_share": 0.5, "estimator": "svd"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--runs", type=Path, default=Path("runs/sparse-lora-quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:  # all rows of one seed before the next seed begins
        for task in arguments.tasks:
            data, held_out = data_of(task, arguments)
            if (task, NONE, "") not in done(arguments.results):
                path = arguments.runs / f"{task}.json"
                found = score(COMMON["model"], path, *shape(held_out))
                add(line(task, NONE, "", found, {}), arguments.results, *KEY)
            for row in arguments.rows:
                if (task, row, seed) in done(arguments.results):
                    continue
                config = {**COMMON, "data": str(data), **ROWS[row]}
                config |= {"seed": seed, "steps": arguments.steps}
                output = arguments.runs / f"{task}-{slug(row)}-{seed}"
                train(as_flags(config), output)
                found = score(output, output.with_name(f"{output.name}.json"), *shape(held_out))
                measured = json.loads((output / "report.json").read_text())["measured"]
                add(line(task, row, seed, found, measured), arguments.results, *KEY)
    print(table(kept(arguments.results)))


def done(results: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in KEY) for line in kept(results)]


def slug(row: str) -> str:
    return row.replace(",", "").replace(" ", "-")


def shape(held_out: Path) -> list[str]:
    names = ("dtype", "max_length")
    return [f"--data={held_out}", "--batch-size=8", *as_flags({n: COMMON[n] for n in names})]


def data_of(task: str, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Training and held-out rows whose prompts begin with some training rows and their answers."""
    source, paths = fetch(task), []
    train = [json.loads(line) for line in (source / "train.jsonl").read_text().splitlines()]
    for split in ("train", "dev"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        rng = random.Random(0)
        text = ""
        for row in rows[: arguments.held_out] if split == "dev" else rows:
            shots = [shot for shot in rng.sample(train, TASKS[task] + 1) if shot != row]
            before = "".join(f"{s['prompt']}{answer(s)}\n\n" for s in shots[: TASKS[task]])
            text += json.dumps({**row, "prompt": before + row["prompt"]}) + "\n"
        paths.append(arguments.runs / f"{task}-{split}.jsonl")
        write_atomic(paths[-1], text)
    return paths[0], paths[1]


def answer(row: dict) -> str:
    return row["choices"][row["answer"]] if "choices" in row else row["completion"]


def line(task: str, row: str, seed: int | str, found: dict, measured: dict) -> dict:
    """Of the CSV: held-out scores, and what training took."""
    return {
        "task": task,
        "row": row,
        "seed": seed,
        "loss": found["loss"],
        "accuracy": found.get("accuracy", ""),
        "steps": measured.get("steps", ""),
        "wall_s": round(measured["wall_s"], 1) if measured else "",
        "flops": measured.get("flops", ""),
        "peak_memory_mib": round(measured["peak_memory_bytes"] / 2**20) if measured else "",
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
            peak = max(line["peak_memory_mib"] or 0 for line in found)

            def share(name: str, pairs: list = pairs) -> str:
                if not pairs:
                    return ""
                return f"{statistics.median(a[name] / b[name] for a, b in pairs):.2f}"

            accuracy = [line["accuracy"] for line in found if line["accuracy"] != ""]
            out.append(
                f"| {task} | {row} | {spread([line['loss'] for line in found])} "
                f"| {spread(accuracy) if accuracy else ''} | {share('flops')} | {share('wall_s')} "
                f"| {f'{peak:,} MiB' if peak else ''} | {len(found)} |"
            )
    return "\n".join(out)


def spread(values: list[float]) -> str:
    """Mean, and the values it is of."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({', '.join(f'{v:.3f}' for v in values)})" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
