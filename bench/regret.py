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
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from commands import add, held_out, kept, scores, train

from tinyft.budget import Budget
from tinyft.config import LIMITS, as_flags
from tinyft.planner import Verdict
from tinyft.planning import make_plan

RESULTS = Path(__file__).parent / "results" / "regret.csv"
HELD_OUT = 128  # rows, the last ones: evidence is scored on the first
MODEL, PARTS = "smollm2-135m", 4
ANY_BYTES = 1 << 50


def job(task: str, folder: Path, seed: int) -> dict[str, Any]:
    """What is to be learned, on rows that the evidence does not know."""
    rows = held_out(task, slice(-HELD_OUT, None), folder / f"{task}-dev.jsonl")
    data = {"model": MODEL, "data": f"{task}:train", "eval_data": str(rows)}
    return {**data, "batch_size": 8, "max_length": 128, "schedule": "constant", "seed": seed}


def verdicts(values: Mapping[str, Any], budget: Budget) -> Sequence[Verdict]:
    """Of all candidates, the chosen first."""
    return make_plan(values, budget).plan.verdicts


def run(verdict: Verdict, flops: float, output: Path) -> dict[str, Any]:
    """One candidate, scored on the way; without the limits that it was planned for."""
    steps = PARTS * round(flops / verdict.cost.flops_per_step / PARTS)
    without = {"epochs", "output", *LIMITS}
    config = {k: v for k, v in verdict.setting.config.items() if k not in without}
    train(as_flags({**config, "steps": steps, "eval_every": steps // PARTS}), output)
    loss = scores(output)
    measured = json.loads((output / "report.json").read_text())["measured"]
    return {
        "examples": json.dumps([step * verdict.setting.examples for step in loss]),
        "loss": json.dumps([round(value, 4) for value in loss.values()]),
        "flops_per_step": measured["flops"] / measured["steps"],
        "peak_bytes": measured["peak_memory_bytes"],
        "wall_s": round(measured["wall_s"], 1),
    }


def loss_after(row: Mapping[str, Any], examples: int) -> float:
    """Between scores linear in the logarithm of the examples."""
    return float(np.interp(math.log1p(examples), np.log1p(row["examples"]), row["loss"]))


def regret(
    values: Mapping[str, Any], budget: Budget, known: Mapping[str, Mapping[str, Any]]
) -> tuple[float | None, str]:
    """How much higher the choice's loss is than the best's, and that in words; None: unknown."""
    fitting = [verdict for verdict in verdicts(values, budget) if verdict.fits]
    loss = {
        v.candidate.name: loss_after(known[v.candidate.name], v.steps * v.setting.examples)
        for v in fitting
        if v.candidate.name in known
    }
    if not fitting:
        return None, "nothing fits"
    chosen = fitting[0].candidate.name
    if chosen not in loss:
        return None, f"{chosen}, which was not run"
    best = min(loss, key=loss.__getitem__)
    found = loss[chosen] / loss[best] - 1
    return found, (
        f"{chosen} ({loss[chosen]:.3f}), best of {len(loss)} run of {len(fitting)} that fit "
        f"{best} ({loss[best]:.3f}), regret {found:.1%}"
    )


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

        def known(task: str = task) -> dict[str, dict[str, Any]]:
            """By candidate: other processes may run some, too."""
            rows = kept(arguments.results)
            return {
                row["candidate"]: row
                for row in rows
                if (row["task"], row["seed"]) == (task, arguments.seed)
            }

        values = job(task, arguments.runs, arguments.seed)
        roomy = Budget(flops=arguments.flops, memory_bytes=ANY_BYTES)
        for verdict in verdicts(values, roomy):
            name = verdict.candidate.name
            if name in known() or (arguments.only and name not in arguments.only):
                continue
            output = arguments.runs / f"{task} {name} {arguments.seed}".replace(" ", "-")
            row = {"task": task, "candidate": name, "seed": arguments.seed}
            row |= run(verdict, arguments.flops, output)
            add(row, arguments.results, "task", "candidate", "seed")
        for memory, part in product(arguments.memory, range(1, PARTS + 1)):
            budget = Budget.parse(memory=memory, flops=str(arguments.flops * part / PARTS))
            found, words = regret(values, budget, known())
            print(f"{task}, {memory}, {budget.flops:g} FLOPs: {words}", flush=True)
            regrets += [] if found is None else [found]
    if regrets:
        within = sum(found <= 0.02 for found in regrets)
        print(
            f"{within} of {len(regrets)} choices within 2% of the best; mean regret "
            f"{math.fsum(regrets) / len(regrets):.1%}, largest {max(regrets):.1%}"
        )


if __name__ == "__main__":
    main()
