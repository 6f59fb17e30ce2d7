"""Predicted against measured peak memory and FLOPs, over architectures, methods, shapes and dtypes.

    python bench/plan_accuracy.py [--only TEXT ...] [--known] [--jobs 2] [--output bench/results]

Every cell is a real `tinyft train` in a process of its own: loading, an evaluation, some steps, an
evaluation, whose peak the operating system reports (VmHWM, the whole process). The prediction is
`tinyft plan`'s for the same flags, made without the weights and anew each time. What was measured
is kept in the CSV and not repeated. Models are random, of real widths, with the tokenizer of
SmolLM2, which is itself among them; a method has no cells of a model that it cannot train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from commands import add, kept

from tinyft.config import as_flags
from tinyft.errors import InputError

MODELS = ("smollm2-135m", "gpt2", "opt", "qwen2", "bert")
METHODS = {
    "lora": {"method": "lora", "base_bits": 16},
    "lora, 8 bits": {"method": "lora", "base_bits": 8},
    "lora, 4 bits": {"method": "lora", "base_bits": 4},
    "full": {"method": "full"},
    "full, adamw8bit, recomputing": {
        "method": "full",
        "optimizer": "adamw8bit",
        "checkpointing": "full",
    },
    # A whole period: a selection, and steps with it.
    "green_trainer": {"method": "green_trainer", "rho": 1.0, "reselect": 6, "steps": 6},
    "mezo": {"method": "mezo", "trainable": "all"},
    "mezo of lora, 4 bits": {"method": "mezo", "trainable": "lora", "base_bits": 4},
    "sparse_lora": {
        **{"method": "sparse_lora", "base_bits": 16, "sparsity": "uniform", "sparse_tokens": "all"},
        **{"flops_share": 0.85, "start_step": 2, "steps": 8},
    },
    "roste": {"method": "roste", "trainable": "all"},
    "roste of lora": {"method": "roste", "trainable": "lora"},
    "roste_mezo": {"method": "roste_mezo"},
}
# Whose memory is told apart: of forward passes alone, on a base that is searched, and the rest.
_ON_ROSTES_BASE = ("roste of lora",)
_ZEROTH = tuple(name for name in METHODS if "mezo" in name)
GROUPS = {
    "zeroth order": _ZEROTH,
    "adapters on RoSTE's base": _ON_ROSTES_BASE,
    "others": tuple(name for name in METHODS if name not in (*_ZEROTH, *_ON_ROSTES_BASE)),
}
SHAPES = ((8, 1, 64), (4, 2, 128), (1, 1, 384))  # batch, accumulation, tokens
DTYPES = ("float32", "bfloat16")
KEY = ("model", "method", "shape", "dtype")


def make_model(name: str, folder: Path) -> str:
    """A reference to the model: a folder that is made, or a built-in name."""
    if name == "smollm2-135m":
        return name
    import transformers as hf

    from tinyft.assets import fetch

    tokenizer = hf.AutoTokenizer.from_pretrained(fetch("smollm2-135m"))
    common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {
        "gpt2": lambda: hf.GPT2Config(**common, n_embd=512, n_layer=8, n_head=8),
        "opt": lambda: hf.OPTConfig(
            **common, hidden_size=512, num_hidden_layers=8, ffn_dim=2048, num_attention_heads=8
        ),
        "qwen2": lambda: hf.Qwen2Config(
            **common, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
        ),
        "bert": lambda: hf.BertConfig(
            **common, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
            num_attention_heads=8,
        ),
    }[name]()  # fmt: skip
    where = folder / name
    if not (where / "config.json").exists():
        auto = hf.BertForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
        model = auto(config) if name == "bert" else auto.from_config(config)
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
    return str(where)


def make_data(tokens: int, encoder: bool, folder: Path) -> tuple[str, str]:
    """Training and held-out rows of about so many tokens, half of them to be learned."""
    files = []
    for name, count in (("train", 16), ("dev", 8)):
        path = folder / f"{name}-{tokens}-{encoder}.jsonl"
        half = " word" * (tokens // 2 - 1)
        row: dict[str, Any] = {"prompt": "A" + half, "completion": half}
        if encoder:
            row = {"prompt": "A" + 2 * half, "choices": ["no", "yes"]}
        rows = [row | ({"answer": i % 2} if encoder else {}) for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(path))
    return files[0], files[1]


def cells(folder: Path) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """What identifies each cell, and its flat configuration."""
    found = []
    for model in MODELS:
        reference = make_model(model, folder)
        for name, values in METHODS.items():
            for batch, parts, tokens in SHAPES:
                data, held_out = make_data(tokens, model == "bert", folder)
                for dtype in DTYPES:
                    key = {
                        "model": model,
                        "method": name,
                        "shape": f"{batch}x{parts}x{tokens}",
                        "dtype": dtype,
                    }
                    config = {
                        **{"model": reference, "data": data, "eval_data": held_out},
                        **{"dtype": dtype, "steps": 3, "max_length": 512},
                        **values,
                        "batch_size": batch,
                    }
                    if "mezo" in values["method"]:
                        config["batch_size"] = batch * parts
                    else:
                        config["grad_accumulation"] = parts
                        config.setdefault("checkpointing", "selective")
                        config.setdefault("optimizer", "adamw")
                    found.append((key, config))
    return found


def predict(config: dict[str, Any]) -> tuple[int, float]:
    """As a process does that has planned nothing before: what tokenizer and rows take is measured,
    and would not be seen where an earlier one's memory is free."""
    from tinyft.budget import Budget
    from tinyft.machine import import_libraries
    from tinyft.parallel import apart
    from tinyft.planning import make_plan

    import_libraries()
    verdicts = apart(lambda: make_plan(config, Budget(memory_bytes=1 << 50)).plan.verdicts)
    assert len(verdicts) == 1, "every choice is given"
    return verdicts[0].cost.peak_memory_bytes, verdicts[0].cost.flops_per_step


def measure(config: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tinyft.cli", "train", *as_flags(config)]
        command += ["--output", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads((Path(folder) / "report.json").read_text())["measured"]
    peak = max(found["peak_memory_bytes"], found["eval_peak_memory_bytes"])
    return {"measured_bytes": peak, "measured_flops": found["flops"] / found["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="cells whose key holds these texts")
    parser.add_argument("--known", action="store_true", help="run nothing, predict anew")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--models", type=Path, default=Path("runs/plan-accuracy"))
    arguments = parser.parse_args()
    arguments.models.mkdir(parents=True, exist_ok=True)
    table = arguments.output / "plan_accuracy.csv"
    known = {tuple(row[name] for name in KEY): row for row in kept(table)}
    wanted = [
        (key, config)
        for key, config in cells(arguments.models)
        if all(text in ", ".join(key.values()) for text in arguments.only)
        and (tuple(key.values()) in known or not arguments.known)
    ]

    def look(key: dict[str, str], config: dict[str, Any], bytes_: int, flops: float) -> Any:
        row = known.get(tuple(key.values())) or measure(config)
        row = key | {name: row[name] for name in ("measured_bytes", "measured_flops")}
        row |= {"predicted_bytes": bytes_, "predicted_flops": flops}
        for what in ("bytes", "flops"):
            row[f"{what}_error"] = row[f"predicted_{what}"] / row[f"measured_{what}"] - 1
        add(row, table, *KEY)
        errors = (f"{row[f'{what}_error']:+.2%}" for what in ("bytes", "flops"))
        print(*key.values(), *errors, flush=True)
        return row

    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = []
        for key, config in wanted:
            try:
                jobs.append(pool.submit(look, key, config, *predict(config)))
            except InputError as error:  # of the method, about this model
                print(*key.values(), "left out:", error, flush=True)
        rows = [job.result() for job in jobs]
    if not rows:
        raise SystemExit("No such cells: see --only, and without --known all are run.")
    for name, methods in GROUPS.items():
        if of := [row for row in rows if row["method"] in methods]:
            print(f"{name}: {summary(of)}")
    print(f"all: {summary(rows)}")
    plot(kept(table), arguments.output / "plan_accuracy.png")


def summary(rows: list[dict[str, Any]]) -> str:
    """How far off some cells' predictions are."""
    errors = [row["bytes_error"] for row in rows]
    return (
        f"{len(rows)} cells; memory's median |error| {statistics.median(map(abs, errors)):.1%}, "
        f"from {min(errors):+.1%} to {max(errors):+.1%}, {sum(e < -0.02 for e in errors)} below "
        f"-2%, {sum(e > 0.08 for e in errors)} above 8%; FLOPs at most "
        f"{max(abs(row['flops_error']) for row in rows):.2%}"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted over measured, a colour a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for i, method in enumerate(METHODS):
        of = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["measured_bytes"] / 2**20 for row in of],
            [100 * row["bytes_error"] for row in of],
            s=14, color=plt.cm.tab20(i), label=method,
        )  # fmt: skip
    axes.axhspan(-2, 8, color="#eef2ff", zorder=0, label="promised: -2% to +8%")
    axes.axhline(0, color="#22252b", linewidth=0.8)
    axes.set_xlabel("measured peak of the whole process, MiB")
    axes.set_ylabel("prediction's error, %")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path)


if __name__ == "__main__":
    main()
