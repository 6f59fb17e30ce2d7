"""What training a part of the tensors costs in quality: GreenTrainer on three tasks.

    python bench/green_trainer.py [--tasks minilm-reviews ...] [--rows full ...] [--seeds N]

Film-review sentiment on MiniLM (three seeds) and on SmolLM2-135M, a restaurant's description (E2E)
on SmolLM2. GreenTrainer at rho 0.4, 0.5 and 0.7 against full fine-tuning, LoRA, sets chosen at
random and the last tensors at the same rho, and LoRA with as many steps as take the FLOPs, or the
time (by `green_trainer_step.py`'s results), of GreenTrainer at 0.5. All other rows take the same
number of steps. Full, GreenTrainer, random and last have the learning rate that film_reviews.py has
for full, LoRA its own.

Every row is one `tinyft train` in a process of its own, scored by a `tinyft eval` on held-out rows.
What `results/green_trainer.csv` holds is not run again (delete a line to have it anew), what was
interrupted resumes; plot and table are made from all lines. Models are deleted once they are
scored. FLOPs and seconds are training's, evaluations of importance among them. `--share 0.1` runs a
tenth of the steps; give it `--results` and `--runs` of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from commands import held_out, keep, kept, score, train

from tinyft.config import as_flags

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = {"model": "smollm2-135m", "dtype": "float32", "batch_size": 8, "steps": 60}
SMOLLM2 |= {"lr": 1e-4, "lora_lr": 5e-4}
TASKS: dict[str, dict[str, Any]] = {
    "minilm-reviews": {
        **{"model": "minilm-l6", "dtype": "float32", "data": "film-reviews", "held_out": 500},
        **{"batch_size": 16, "steps": 120, "lr": 2e-4, "lora_lr": 2e-3, "seeds": 3},
    },
    "smollm2-reviews": {**SMOLLM2, "data": "film-reviews", "held_out": 500, "seeds": 1},
    "smollm2-e2e": {**SMOLLM2, "data": "e2e", "held_out": 100, "seeds": 1},
}
CHOICES = {"green": "importance", "random": "random", "last": "last"}
MIDDLE = "green 0.5"
BY_FLOPS, BY_TIME = f"lora, FLOPs of {MIDDLE}", f"lora, time of {MIDDLE}"
ROWS = (
    *("full", "lora", *(f"{name} 0.5" for name in CHOICES), BY_FLOPS),
    *(f"{name} {rho:g}" for rho in (0.7, 0.4) for name in CHOICES),
    BY_TIME,
)


class Bench:
    """All rows of one task and seed."""

    def __init__(
        self, task: str, seed: int, done: list[dict[str, Any]], runs: Path, share: float
    ) -> None:
        ours = [line for line in done if (line["task"], line["seed"]) == (task, seed)]
        self.task, self.seed = task, seed
        self.kept = {line["row"]: line for line in ours}
        self.plan = TASKS[task] | {
            "steps": max(2, round(share * TASKS[task]["steps"])),
            "warmup": round(5 * share),
            "held_out": max(8, round(TASKS[task]["held_out"] * min(1, 10 * share))),
        }
        self.folder = runs / task / str(seed)

    def run(self, row: str) -> None:
        """Train and score, unless that was done."""
        output = self.path(row)
        self.folder.mkdir(parents=True, exist_ok=True)
        if row in self.kept or self.scores(row).exists():
            return
        if (config := self.config(row)) is None:
            return print(f"{row!r} waits for green_trainer_step.py, or for the rows it goes by.")
        train(as_flags(config), output)
        self.score(output, self.scores(row))
        for weights in output.rglob("*.safetensors"):
            weights.unlink()

    def config(self, row: str) -> dict[str, Any] | None:
        plan = self.plan
        names = ("model", "dtype", "batch_size", "lr", "steps", "warmup")
        config = {name: plan[name] for name in names}
        config |= {"data": f"{plan['data']}:train", "max_length": 128}
        config |= {"seed": self.seed, "method": "full"}
        if row.startswith("lora"):
            config |= {"method": "lora", "lr": plan["lora_lr"]}
            share = {"lora": 1.0, BY_FLOPS: self.flops_share, BY_TIME: self.time_share}[row]
            if not isinstance(share, float) and (share := share()) is None:
                return None
            config["steps"] = max(1, round(share * plan["steps"]))
        elif row != "full":
            name, rho = row.split()
            config |= {"method": "green_trainer", "rho": float(rho), "choose": CHOICES[name]}
            config["reselect"] = self.reselect
        return config

    @property
    def reselect(self) -> int:
        return max(50, self.plan["steps"] // 2)

    def flops_share(self) -> float | None:
        """Of GreenTrainer's run over LoRA's."""
        green, lora = (self.line(row) for row in (MIDDLE, "lora"))
        return green["flops"] / lora["flops"] if green and lora else None

    def time_share(self) -> float | None:
        """Of GreenTrainer's step over LoRA's, the run's selections added."""
        times = step_times(self.plan["model"], self.plan["dtype"])
        if not times:
            return None
        steps = self.plan["steps"]
        evaluations = max(1, round(steps / self.reselect)) / steps * times["full"]
        return (times["rho 0.5"] + evaluations) / times["lora"]

    def score(self, model: Path, path: Path) -> None:
        rows = slice(self.plan["held_out"])
        dev = held_out(self.plan["data"], rows, self.folder.parent / "dev.jsonl")
        flags = [f"--data={dev}", "--batch-size=16", "--max-length=128"]
        flags += [f"--dtype={self.plan['dtype']}"]
        flags += ["--generate", "--max-new-tokens=64"] if self.plan["data"] == "e2e" else []
        score(model, path, *flags)

    def path(self, row: str) -> Path:
        return self.folder / row.replace(",", "").replace(" ", "-").lower()

    def scores(self, row: str) -> Path:
        return self.path(row).with_name(f"{self.path(row).name}.json")

    def line(self, row: str) -> dict[str, Any] | None:
        """Of the CSV."""
        if row in self.kept or not self.scores(row).exists():
            return self.kept.get(row)
        report = json.loads((self.path(row) / "report.json").read_text())
        found, got = json.loads(self.scores(row).read_text()), report["measured"]
        full = got if row == "full" else self.line("full")
        return {
            "task": self.task,
            "row": row,
            "seed": self.seed,
            "accuracy": found.get("accuracy", ""),
            "rouge1": found.get("rouge1", ""),
            "rougeL": found.get("rougeL", ""),
            "loss": found["loss"],
            "steps": got["steps"],
            "flops": got["flops"],
            "flops_share": round(got["flops"] / full["flops"], 4) if full else "",
            "wall_s": round(got["wall_s"], 1),
            "peak_memory_mib": round(got["peak_memory_bytes"] / 2**20),
        }


def step_times(model: str, dtype: str) -> dict[str, float]:
    """Of a step over full's, by row, as `green_trainer_step.py` measured them."""
    lines = kept(RESULTS / "green_trainer_step.csv")
    ours = [line for line in lines if (line["model"], line["dtype"]) == (model, dtype)]
    # Lines of a peak alone have no time.
    return {line["row"]: 1 - line["time_saved"] for line in ours if line["time_saved"] != ""}


def quality(line: dict[str, Any]) -> float:
    return float(line["rougeL"] if line["accuracy"] == "" else line["accuracy"])


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a task and method, quality with its spread over seeds."""
    out = [
        "| task | method | accuracy or ROUGE-L | loss | steps | FLOPs | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(line["task"] for line in lines):
        for row in ROWS:
            ours = [line for line in lines if (line["task"], line["row"]) == (task, row)]
            if not ours:
                continue
            shares = [line["flops_share"] for line in ours if line["flops_share"] != ""]
            out.append(
                f"| {task} | {row} | {spread([quality(line) for line in ours])} "
                f"| {statistics.mean(line['loss'] for line in ours):.3f} | {ours[0]['steps']} "
                f"| {f'{statistics.mean(shares):.2f}' if shares else ''} "
                f"| {statistics.median(line['wall_s'] for line in ours):.0f} "
                f"| {max(line['peak_memory_mib'] for line in ours):,} MiB |"
            )
    return "\n".join(out)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.3f} (n = {len(values)})"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Quality against FLOPs, a panel a task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure = Figure(figsize=(4.6 * len(tasks), 3.8), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        ours = [line for line in lines if line["task"] == task and line["flops_share"] != ""]
        for color, kind in enumerate(("full", "lora", *CHOICES)):
            points: dict[str, list[dict[str, Any]]] = {}
            for line in ours:
                if line["row"].startswith(kind) and line["row"] != BY_TIME:
                    points.setdefault(line["row"], []).append(line)
            means = sorted(
                (
                    statistics.mean(line["flops_share"] for line in found),
                    statistics.mean(map(quality, found)),
                    statistics.stdev(map(quality, found)) if len(found) > 1 else math.nan,
                )
                for found in points.values()
            )
            if means:
                x, y, error = zip(*means, strict=True)
                style = {"fmt": "o-", "ms": 4, "lw": 1, "capsize": 2, "color": f"C{color}"}
                axis.errorbar(x, y, yerr=error, label=kind, **style)
        name = "ROUGE-L" if TASKS[task]["data"] == "e2e" else "accuracy"
        axis.set(title=task, xlabel="FLOPs over full fine-tuning's", ylabel=f"held-out {name}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, help="only the first N of each task")
    parser.add_argument("--runs", type=Path, default=Path("runs/green-trainer"))
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.results / "green_trainer.csv"
    where = (kept(path), arguments.runs, arguments.share)
    for task in arguments.tasks:
        for row in arguments.rows:
            for seed in range(TASKS[task]["seeds"])[: arguments.seeds]:
                Bench(task, seed, *where).run(row)
    found = [
        Bench(task, seed, *where).line(row)
        for task, plan in TASKS.items()
        for row in ROWS
        for seed in range(plan["seeds"])
    ]
    if lines := [line for line in found if line]:
        keep(lines, path)
        plot(lines, arguments.results / "green_trainer.png")
        print(table(lines))


if __name__ == "__main__":
    main()
