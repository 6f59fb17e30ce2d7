"""The planner's choices beside the best that there was: budgets of FLOPs and memory, two tasks.

    python bench/regret.py [--tasks film-reviews e2e] [--flops 8e12] [--seed 1] [--runs runs/regret]

Every candidate of `tinyft plan` is run once, with the largest budget and a constant learning rate,
and scored at quarters of its steps: each score is what that run would have left with so many FLOPs.
Then each of four budgets of FLOPs with each of `--memory` is planned. Among the candidates that fit
it the best is that of the lowest held-out loss; the regret is how much higher that of the choice
is. `tinyft/evidence.json`, on which choices rest, holds curves of the same tasks with another seed,
scored on other rows. `results/regret.csv` holds all runs; what it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from commands import add, kept, train

from tinyft.assets import fetch
from tinyft.budget import Budget
from tinyft.checkpoint import write_atomic
from tinyft.config import as_flags
from tinyft.planner import Verdict
from tinyft.planning import make_plan

RESULTS = Path(__file__).parent / "results" / "regret.csv"
HELD_OUT = 128  # rows, the last ones: evidence is scored on the first
MODEL, PARTS = "smollm2-135m", 4
ANY_BYTES = 1 << 50


def job(task: str, folder: Path, seed: int) -> dict[str, Any]:
    """What is to be learned, on rows that the evidence does not know."""
    held_out = folder / f"{task}-dev.jsonl"
    lines = (fetch(task) / "dev.jsonl").read_text().splitlines(keepends=True)
    write_atomic(held_out, "".join(lines[-HELD_OUT:]))
    data = {"model": MODEL, "data": f"{task}:train", "eval_data": str(held_out)}
    return {**data, "batch_size": 8, "max_length": 128, "schedule": "constant", "seed": seed}


def verdicts(values: Mapping[str, Any], flops: float, memory_bytes: int) -> list[Verdict]:
    """Of all candidates, the chosen first."""
    found = make_plan(values, Budget(flops=flops, memory_bytes=memory_bytes))
    return list(found.plan.verdicts)


def run(verdict: Verdict, steps: int, output: Path) -> dict[str, Any]:
    """One candidate, scored on the way."""
    every = steps // PARTS
    config = {k: v for k, v in verdict.setting.config.items() if k not in ("epochs", "output")}
    train(as_flags({**config, "steps": steps, "eval_every": every}), output)
    report = json.loads((output / "report.json").read_text())
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    loss = {0: report["eval"]["before"]["loss"]}
    loss |= {line["step"]: line["eval"]["loss"] for line in lines if "eval" in line}
    loss[steps] = report["eval"]["after"]["loss"]
    examples = [step * verdict.setting.examples for step in sorted(loss)]
    measured = report["measured"]
    return {
        "examples": json.dumps(examples),
        "loss": json.dumps([round(loss[step], 4) for step in sorted(loss)]),
        "flops_per_step": measured["flops"] / measured["steps"],
        "peak_bytes": measured["peak_memory_bytes"],
        "wall_s": round(measured["wall_s"], 1),
    }


def loss_after(row: Mapping[str, Any], examples: int) -> float:
    """Between scores linear in the logarithm of the examples."""
    return float(np.interp(math.log1p(examples), np.log1p(row["examples"]), row["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["film-reviews", "e2e"])
    parser.add_argument("--flops", type=float, default=8e12)
    parser.add_argument("--memory", nargs="+", default=["800MiB", "1GiB", "2GiB"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/regret"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=[], help="run candidates of these names alone")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    regrets = []
    for task in arguments.tasks:
        values = job(task, arguments.runs, arguments.seed)
        for verdict in verdicts(values, arguments.flops, ANY_BYTES):
            name, own = verdict.candidate.name, (task, verdict.candidate.name, arguments.seed)
            known = {(r["task"], r["candidate"], r["seed"]) for r in kept(arguments.results)}
            if own in known or (arguments.only and name not in arguments.only):
                continue
            steps = PARTS * round(arguments.flops / verdict.cost.flops_per_step / PARTS)
            output = arguments.runs / f"{task} {name} {arguments.seed}".replace(" ", "-")
            row = {"task": task, "candidate": name, "seed": arguments.seed}
            row |= run(verdict, steps, output)
            add(row, arguments.results, "task", "candidate", "seed")
        rows = kept(arguments.results)
        of_task = {
            row["candidate"]: row
            for row in rows
            if (row["task"], row["seed"]) == (task, arguments.seed)
        }
        for part, memory in ((p, m) for m in arguments.memory for p in range(1, PARTS + 1)):
            flops = arguments.flops * part / PARTS
            memory_bytes = Budget.parse(memory=memory).memory_bytes
            assert memory_bytes
            fitting = [v for v in verdicts(values, flops, memory_bytes) if v.fits]
            loss = {
                v.candidate.name: loss_after(
                    of_task[v.candidate.name], v.steps * v.setting.examples
                )
                for v in fitting
                if v.candidate.name in of_task
            }
            if not fitting or fitting[0].candidate.name not in loss:
                print(f"{task}, {memory}, {flops:g} FLOPs: nothing fits, or it was not run")
                continue
            chosen, best = fitting[0].candidate.name, min(loss, key=loss.__getitem__)
            regrets.append(loss[chosen] / loss[best] - 1)
            print(
                f"{task}, {memory}, {flops:g} FLOPs: {chosen} ({loss[chosen]:.3f}), best of "
                f"{len(loss)} {best} ({loss[best]:.3f}), regret {regrets[-1]:.1%}",
                flush=True,
            )
    if regrets:
        within = sum(regret <= 0.02 for regret in regrets)
        print(
            f"{within} of {len(regrets)} choices within 2% of the best; mean regret "
            f"{math.fsum(regrets) / len(regrets):.1%}, largest {max(regrets):.1%}"
        )


if __name__ == "__main__":
    main()
