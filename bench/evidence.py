"""Learning curves of every method on every task: what the planner's choice rests on.

    python bench/evidence.py [--tasks e2e ...] [--seeds 0] [--runs runs/evidence]
    python bench/evidence.py --of bench/results/minilm-l6 [...]

Every curve is one `tinyft train` with the method's defaults and a constant learning rate, so that
stopping it early and asking for fewer steps are the same, scored on the way. Finished runs are kept
and one that was interrupted resumes. With `--of` nothing is run: curves are taken from folders of
`tinyft bench`, where each point is a run of its own, with the rate that was found for it. Both
take their places in `tinyft/evidence.json`, among the curves that are there.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from commands import held_out, kept, scores, train

from tinyft.assets import fetch
from tinyft.checkpoint import write_atomic
from tinyft.config import as_flags
from tinyft.models import kind_of
from tinyft.optim import METHODS

EVIDENCE = Path(__file__).parent.parent / "tinyft" / "evidence.json"
TASKS = {  # model, data, and how many times the steps: the encoder's head begins at random
    "e2e": ("smollm2-135m", "e2e", 1),
    "reviews-encoder": ("minilm-l6", "film-reviews", 5),
    "reviews": ("smollm2-135m", "film-reviews", 1),
}
HELD_OUT = 160  # rows: enough to rank methods, few enough to be scored often
BATCH = 8
GRADIENT = {"steps": 80, "eval_every": 20}
ZEROTH = {"steps": 128, "eval_every": 32}  # of five passes each
F32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
RUNS: dict[str, dict[str, Any]] = {
    "lora-bf16": {"method": "lora", **BF16, **GRADIENT},
    "full-bf16": {"method": "full", **BF16, **GRADIENT},
    "green-0.5-bf16": {"method": "green_trainer", "rho": 0.5, **BF16, **GRADIENT},
    "lora-4": {"method": "lora", "base_bits": 4, **BF16, **GRADIENT},
    "mezo-bf16": {"method": "mezo", "trainable": "all", **BF16, **ZEROTH},
    "mezo-lora-4": {"method": "mezo", "trainable": "lora", "base_bits": 4, **BF16, **ZEROTH},
    "lora-8": {"method": "lora", "base_bits": 8, **BF16, **GRADIENT},
    "lora-f32": {"method": "lora", **F32, **GRADIENT},
    "full-f32": {"method": "full", **F32, **GRADIENT},
    "green-0.7-bf16": {"method": "green_trainer", "rho": 0.7, **BF16, **GRADIENT},
    "green-0.5-f32": {"method": "green_trainer", "rho": 0.5, **F32, **GRADIENT},
    "mezo-f32": {"method": "mezo", "trainable": "all", **F32, **ZEROTH},
    "sparse-bf16": {"method": "sparse_lora", **BF16, **GRADIENT},
    "sparse-4": {"method": "sparse_lora", "base_bits": 4, **BF16, **GRADIENT},
    "roste-bf16": {"method": "roste", "trainable": "all", **BF16, **GRADIENT},
    "roste-lora-bf16": {"method": "roste", "trainable": "lora", **BF16, **GRADIENT},
    "roste-mezo-bf16": {"method": "roste_mezo", **BF16, **ZEROTH},
}
DECODERS_ONLY = ("sparse_lora", "roste", "roste_mezo")


def inputs_of(task: str, folder: Path) -> dict[str, str]:
    """The model, training rows, and the first held-out ones."""
    model, data, _ = TASKS[task]
    rows = held_out(data, slice(HELD_OUT), folder / f"{data}-dev.jsonl")
    return {"model": model, "data": f"{data}:train", "eval_data": str(rows)}


def kind_of_rows(model: str, data: str) -> str:
    """As `tinyft.encoding` calls what it makes of a task's rows."""
    if kind_of(model) == "encoder":
        return "class"
    first = (fetch(data) / "dev.jsonl").read_text().partition("\n")[0]
    return "choice" if "choices" in json.loads(first) else "lm"


def curve(task: str, seed: int, output: Path) -> dict[str, Any]:
    """Held-out loss by examples seen, from a finished run."""
    loss = scores(output)
    config = json.loads((output / "report.json").read_text())["config"]
    kept = ("method", "trainable", "base_bits", "dtype", "rho", "flops_share")
    return {
        "task": task,
        "kind": kind_of_rows(*TASKS[task][:2]),
        "model": TASKS[task][0],
        "seed": seed,
        "config": {name: config[name] for name in kept if name in config},
        "examples": [step * BATCH for step in loss],
        "loss": [round(value, 4) for value in loss.values()],
    }


def of_benchmark(folder: Path) -> list[dict[str, Any]]:
    """Held-out loss by examples seen, over the budgets of a benchmark; peers are left out."""
    runs: dict[str, dict[str, Any]] = {}
    for row in kept(folder / "results.csv"):
        if (row["stage"], row["status"]) != ("run", "done") or row["method"] not in METHODS:
            continue
        options = dict(re.findall(r"--(\w+)=(\S+)", row["command"]))
        config = {name: row[name] for name in ("method", "trainable", "base_bits", "dtype")}
        config |= {"rho": float(options["rho"])} if "rho" in options else {}
        rates = "rates searched" if row["search_flops"] else "default rates"
        task = f"{row['task']}, {row['model']}, {rates}"
        kind = kind_of_rows(row["model"], row["task"])
        one = {
            **{"task": task, "kind": kind, "model": row["model"], "seed": row["seed"]},
            "config": config,
        }
        points = runs.setdefault(json.dumps(one), one | {"points": {0: row["loss_before"]}})
        points["points"][row["examples"]] = round(row["loss_after"], 4)
    return [
        {
            **{name: one[name] for name in ("task", "kind", "model", "seed", "config")},
            "examples": sorted(one["points"]),
            "loss": [round(one["points"][n], 4) for n in sorted(one["points"])],
        }
        for one in runs.values()
    ]


def put(found: list[dict[str, Any]]) -> None:
    """Into `evidence.json`, each in the place of one of the same task, seed and configuration."""

    def key(one: dict[str, Any]) -> str:
        return json.dumps([one[name] for name in ("task", "model", "seed", "config")])

    known = json.loads(EVIDENCE.read_text())["curves"] if EVIDENCE.exists() else []
    curves = {key(one): one for one in [*known, *found]}
    write_atomic(EVIDENCE, json.dumps({"curves": list(curves.values())}, indent=1) + "\n")
    print(f"{EVIDENCE}: {len(found)} curves of now, {len(curves)} in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="of the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--of", nargs="+", type=Path, default=[], help="folders of tinyft bench")
    arguments = parser.parse_args()
    if arguments.of:
        return put([one for folder in arguments.of for one in of_benchmark(folder)])
    arguments.runs.mkdir(parents=True, exist_ok=True)
    common = {"batch_size": BATCH, "schedule": "constant", "max_length": 128}
    for seed in arguments.seeds:
        for name in arguments.only:
            for task in arguments.tasks:
                is_encoder = kind_of(TASKS[task][0]) == "encoder"
                if is_encoder and RUNS[name]["method"] in DECODERS_ONLY:
                    continue
                config = common | inputs_of(task, arguments.runs) | RUNS[name] | {"seed": seed}
                for field in ("steps", "eval_every"):
                    config[field] *= TASKS[task][2]
                train(as_flags(config), arguments.runs / f"{task}_{name}_{seed}")
    found = []
    for report in sorted(arguments.runs.glob("*/report.json")):
        task, _, seed = report.parent.name.split("_")
        found.append(curve(task, int(seed), report.parent))
    put(found)


if __name__ == "__main__":
    main()
