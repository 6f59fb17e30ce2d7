"""RoSTE against what else gives a 4-bit model: SmolLM2-135M on film reviews and on E2E sentences.

    python bench/roste.py [--tasks film-reviews e2e] [--rows RoSTE ...] [--gptq-python PYTHON]

Fine-tuning in 16 bits, and what becomes of it by rounding to nearest, GPTQ (llmcompressor's, by an
interpreter that has it: its transformers is another) and rotation with rounding; and fine-tuning of
the quantised model: without rotations, with all, adaptive (RoSTE; also with scales by groups), on a
frozen 4-bit base, by MeZO. All but the first at W4A8KV8 and at W4A4KV4; the rows that decide with a
second seed.

Every row is a command in a process of its own, scored on held-out rows. What `results/roste.csv`
holds is not run again (delete a line to have it anew), what was interrupted resumes; processes with
other `--tasks` or `--rows` may run beside. `--share 0.1` runs a tenth of the steps; give it
`--results` and `--runs` of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import add, held_out, kept, score, tinyft, train

from tinyft.assets import fetch

RESULTS = Path(__file__).parent / "results" / "roste.csv"
MODEL = "smollm2-135m"
BITS = {"W4A8KV8": ("8", "8"), "W4A4KV4": ("4", "4")}
# Steps of gradient methods and of MeZO, their shapes, and held-out rows.
TASKS: dict[str, dict[str, Any]] = {
    "film-reviews": {"steps": 60, "zeroth": 150, "max_length": 128, "held_out": 500},
    "e2e": {"steps": 60, "zeroth": 100, "max_length": 128, "held_out": 100},
}
PLAIN = "16 bits"
CONSTANT = ["--schedule=constant"]
TRAINED = {
    "STE": ["--method=roste", "--rotations=none", "--lr=5e-5"],
    "STE, all rotations": ["--method=roste", "--rotations=all", "--lr=5e-5"],
    "RoSTE": ["--method=roste", "--rotations=adaptive", "--lr=5e-5"],
    "RoSTE, groups of 64": ["--method=roste", "--group=64", "--lr=5e-5"],
    "RoSTE, frozen int4": ["--method=roste", "--trainable=lora", "--lr=1e-3"],
    "RoSTE, MeZO": ["--method=roste_mezo", "--estimator=two-sided", "--lr=5e-5", *CONSTANT],
}
ROUNDED = {"RTN": ["--rotations=none", "--clip=1"], "rotation + RTN": ["--rotations=all"]}
GPTQ = "GPTQ"
ROWS = (*ROUNDED, GPTQ, *TRAINED)
DECIDING = (PLAIN, GPTQ, "rotation + RTN", "STE", "STE, all rotations", "RoSTE")  # at W4A8KV8
KEY = ("task", "bits", "row", "seed")


class Bench:
    """All rows of one task and seed."""

    def __init__(self, task: str, seed: int, arguments: argparse.Namespace) -> None:
        self.task, self.seed, self.arguments = task, seed, arguments
        self.share, self.plan = arguments.share, TASKS[task]
        self.folder = arguments.runs / task / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = max(8, round(self.plan["held_out"] * min(1, 10 * self.share)))
        self.dev = held_out(task, slice(rows), self.folder / "dev.jsonl")
        self.shape = [
            f"--data={task}:train",
            f"--max-length={self.plan['max_length']}",
            "--batch-size=8",
            "--dtype=bfloat16",
        ]

    def run(self) -> None:
        self.row(PLAIN, "16", self.plain)
        for name, (activations, kv) in BITS.items():
            bits = [f"--activations={activations}", f"--kv={kv}"]
            for row, flags in ROUNDED.items():
                self.row(row, name, self.pack, self.plain, [*bits, *flags])
            if self.arguments.gptq_python:
                flags = [*bits, "--weights=16", "--rotations=none", "--clip=1"]
                self.row(GPTQ, name, self.pack, self.gptq, flags)
            for row, flags in TRAINED.items():
                self.row(row, name, self.train, [*bits, *flags])

    def row(self, row: str, bits: str, make: Callable[..., Path], *how: Any) -> None:
        """One, unless it is known or not asked for."""
        asked = row in self.arguments.rows or row == PLAIN
        if self.seed and (row not in DECIDING or bits == "W4A4KV4"):
            return
        done = [tuple(line[name] for name in KEY) for line in kept(self.arguments.results)]
        if asked and (self.task, bits if row != PLAIN else 16, row, self.seed) not in done:
            output = make(row, bits, *how) if how else make()
            add(self.line(row, bits, output), self.arguments.results, *KEY)

    def plain(self) -> Path:
        return self.train(PLAIN, "", ["--method=full", "--lr=1e-4"])

    def train(self, row: str, bits: str, flags: list[str]) -> Path:
        """One `tinyft train`, unless its report is there already."""
        output = self.path(row, bits)
        steps = self.plan["zeroth" if "MeZO" in row else "steps"]
        flags = [f"--model={MODEL}", *self.shape, *flags, f"--seed={self.seed}"]
        flags += [f"--steps={max(2, round(steps * self.share))}"]
        if "MeZO" not in row:
            flags += [f"--warmup={round(10 * self.share)}"]
        train(flags, output)
        return output

    def pack(self, row: str, bits: str, model: Callable[[], Path], flags: list[str]) -> Path:
        """One `tinyft export --format packed`."""
        output = self.path(row, bits)
        if not output.exists():
            command = ["export", "--format=packed", f"--model={model()}", *self.shape]
            tinyft(*command, *flags, f"--output={output}")
        return output

    def gptq(self) -> Path:
        """The 16-bit result with its weights on GPTQ's grid."""
        output = self.path("gptq", "weights")
        if not output.exists():
            script = Path(__file__).parent / "roste_gptq.py"
            flags = ["--model", self.plain(), "--data", fetch(self.task) / "train.jsonl"]
            command = [self.arguments.gptq_python, script, *flags, "--output", output]
            subprocess.run([*map(str, command)], check=True)
        return output

    def line(self, row: str, bits: str, output: Path) -> dict[str, Any]:
        """Score a row's model in a process of its own, once, as anybody would load it."""
        scores = self.folder / f"{output.name}.json"
        flags = [f"--data={self.dev}", "--max-length=128", "--batch-size=16"]
        flags += ["--generate", "--max-new-tokens=64"] if self.task == "e2e" else []
        found = score(output, scores, *flags)
        report = output / "report.json"
        measured = json.loads(report.read_text())["measured"] if report.exists() else {}
        weights = next(iter([*output.glob("packed.safetensors"), *output.glob("model.s*")]))
        return {
            "task": self.task,
            "bits": bits,
            "row": row,
            "seed": self.seed,
            "accuracy": found.get("accuracy", ""),
            "rougeL": found.get("rougeL", ""),
            "loss": found["loss"],
            "weights_mib": round(weights.stat().st_size / 2**20, 1) if row != GPTQ else "",
            "steps": measured.get("steps", ""),
            "train_s": round(measured["wall_s"], 1) if measured else "",
            "peak_mib": round(measured["peak_memory_bytes"] / 2**20) if measured else "",
        }

    def path(self, row: str, bits: str) -> Path:
        words = f"{row} {bits}".replace(",", "").replace("+ ", "").split()
        return self.folder / "-".join(words).lower()


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, a row a line of the CSV."""
    order = {"bits": ["16", *BITS], "row": [PLAIN, *ROWS]}

    def place(line: dict[str, Any]) -> tuple[Any, ...]:
        bits, row = (names.index(str(line[field])) for field, names in order.items())
        return line["task"], line["seed"], bits, row

    lines = sorted(lines, key=place)
    names = list(lines[0])
    rows = [
        [f"{v:.4g}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines
    ]
    head = [" | ".join(names), " | ".join("---" for _ in names)]
    return "\n".join(f"| {text} |" for text in [*head, *(" | ".join(row) for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--runs", type=Path, default=Path("runs/roste"))
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (default: all)")
    parser.add_argument("--gptq-python", help="an interpreter with llmcompressor, for GPTQ's row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            Bench(task, seed, arguments).run()
    print(table(kept(arguments.results)))
    if not arguments.gptq_python:
        print("GPTQ's row was left out: it needs --gptq-python.")


if __name__ == "__main__":
    main()
