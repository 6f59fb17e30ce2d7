"""Film-review sentiment, 500 held-out rows: zero-shot, MeZO, MeZO over LoRA, LoRA, full.

    python bench/film_reviews.py [--models smollm2-135m minilm-l6] [--runs runs/film-reviews]

Every row is one `tinyft train` in a process of its own, so that its peak memory is its own. Runs
that are finished are kept and one that was interrupted resumes; the table, `film_reviews.csv` and
`film_reviews.png` are made from all reports there are, and from the CSV's lines of other rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

from commands import add, kept, train

from tinyft.zeroth.estimators import evaluation_points

RESULTS = Path(__file__).parent / "results"
COMMON = ["--data", "film-reviews:train", "--eval-data", "film-reviews:dev", "--max-length", "128"]
# model -> seeds, flags, and for every row of the table its own flags.
PLANS: dict[str, dict] = {
    "smollm2-135m": {
        "seeds": [0],
        "flags": ["--dtype", "bfloat16", "--batch-size", "16"],
        "rows": {
            "lora": ["--method", "lora", "--steps", "100", "--lr", "5e-4", "--warmup", "5"],
            "full": ["--method", "full", "--steps", "100", "--lr", "1e-4", "--warmup", "5"],
            "mezo": ["--method", "mezo", "--steps", "200"],
            "mezo-lora": ["--method", "mezo", "--trainable", "lora", "--steps", "200"],
        },
    },
    "minilm-l6": {
        "seeds": [0, 1, 2],
        "flags": ["--batch-size", "32"],
        "rows": {
            "lora": ["--method", "lora", "--steps", "120", "--lr", "2e-3", "--warmup", "5"],
            "full": ["--method", "full", "--steps", "120", "--lr", "2e-4", "--warmup", "5"],
            "mezo": ["--method", "mezo", "--steps", "160"],
            "mezo-lora": ["--method", "mezo", "--trainable", "lora", "--steps", "160"],
        },
    },
}


def run(model: str, row: str, seed: int, output: Path) -> None:
    """One row's training."""
    plan = PLANS[model]
    flags = ["--model", model, *COMMON, *plan["flags"], *plan["rows"][row], "--seed", str(seed)]
    train(flags, output)


def record(model: str, row: str, seed: int, report: dict) -> dict:
    """A line of the CSV."""
    got, config = report["measured"], report["config"]
    zeroth = config["method"] == "mezo"
    passes = len(evaluation_points(config["estimator"], config["probes"])) if zeroth else None
    return {
        "model": model,
        "method": row,
        "seed": seed,
        "accuracy_before": report["eval"]["before"]["accuracy"],
        "accuracy": report["eval"]["after"]["accuracy"],
        "loss": report["eval"]["after"]["loss"],
        "steps": got["steps"],
        "forward_passes": passes * got["steps"] if passes else "",
        "wall_s": round(got["wall_s"], 1),
        "flops": f"{got['flops']:.3e}",
        "peak_memory_mib": round(got["peak_memory_bytes"] / 2**20),
        "loaded_memory_mib": round(got["loaded_memory_bytes"] / 2**20),
        "dtype": report["parameters"]["dtype"],
    }


def table(lines: list[dict]) -> str:
    """Markdown: a row a model and method; accuracy with its spread over seeds, median seconds."""
    out = [
        "| model | method | accuracy | steps | seconds | FLOPs | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(line["model"] for line in lines):
        ours = [line for line in lines if line["model"] == model]
        before = list({line["seed"]: line["accuracy_before"] for line in ours}.values())
        out.append(f"| {model} | zero-shot | {spread(before)} | 0 | | | |")
        for method in dict.fromkeys(line["method"] for line in ours):
            rows = [line for line in ours if line["method"] == method]
            first = rows[0]
            seconds = statistics.median(r["wall_s"] for r in rows)
            out.append(
                f"| {model} | {method} | {spread([r['accuracy'] for r in rows])} "
                f"| {first['steps']} | {seconds:.0f} | {float(first['flops']):.2g} "
                f"| {max(r['peak_memory_mib'] for r in rows):,} MiB |"
            )
    return "\n".join(out)


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return (
        f"{mean} ± {statistics.stdev(values):.3f} (n = {len(values)})" if len(values) > 1 else mean
    )


def plot(lines: list[dict], path: Path) -> None:
    """Accuracy against FLOPs, a panel a model."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(line["model"] for line in lines))
    figure = Figure(figsize=(5 * len(models), 3.6), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        ours = [line for line in lines if line["model"] == model]
        for method in dict.fromkeys(line["method"] for line in ours):
            rows = [line for line in ours if line["method"] == method]
            axis.scatter(
                [float(r["flops"]) for r in rows],
                [r["accuracy"] for r in rows],
                s=[r["peak_memory_mib"] / 10 for r in rows],
                alpha=0.7,
                label=method,
            )
        before = statistics.mean(line["accuracy_before"] for line in ours)
        axis.axhline(before, color="0.6", lw=1, ls="--")
        axis.annotate(
            "zero-shot",
            (0.02, before),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            color="0.4",
            fontsize=8,
        )
        axis.set(xscale="log", title=model, xlabel="FLOPs", ylabel="held-out accuracy")
        axis.spines[["top", "right"]].set_visible(False)
        legend = axis.legend(frameon=False, fontsize=8, loc="best")
        for handle in legend.legend_handles:
            handle.set_sizes([40])
    figure.suptitle("Film-review sentiment (area: peak memory)", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--runs", type=Path, default=Path("runs/film-reviews"))
    parser.add_argument("--seeds", type=int, help="only the first N seeds of each model")
    parser.add_argument("--rows", nargs="+", help="only these rows, e.g. lora mezo")
    arguments = parser.parse_args()
    for model in arguments.models:
        for seed in PLANS[model]["seeds"][: arguments.seeds]:
            for row in arguments.rows or PLANS[model]["rows"]:
                run(model, row, seed, arguments.runs / f"{model}-{row}-{seed}")
    for model, plan in PLANS.items():
        for row, seed in itertools.product(plan["rows"], plan["seeds"]):
            report = arguments.runs / f"{model}-{row}-{seed}" / "report.json"
            if report.exists():
                line = record(model, row, seed, json.loads(report.read_text()))
                add(line, RESULTS / "film_reviews.csv", "model", "method", "seed")
    lines = kept(RESULTS / "film_reviews.csv")
    plot(lines, RESULTS / "film_reviews.png")
    print(table(lines))


if __name__ == "__main__":
    main()
