"""The demo: SmolLM2-135M learns to tell good film reviews from bad ones, in ten minutes.

A run like any other, `tinyft train` with the values below, and a few predictions at its end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyft.errors import InputError
from tinyft.memory import human

MODEL = "smollm2-135m"
TRAIN, HELD_OUT = "film-reviews:train", "film-reviews:dev"
# What fits ten minutes on two cores, scoring and fetching included. By method, or by any other's
# kind, with gradients or without, at the method's own rate.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"steps": 80, "batch_size": 16, "lr": 5e-4, "warmup": 4},
    "full": {"steps": 60, "batch_size": 16, "lr": 3e-5, "warmup": 6},
    "mezo": {"steps": 80, "batch_size": 16},
}
REVIEWS = 4  # shown with the model's opinion


def demo(
    method: str,
    output: Path,
    *,
    steps: int | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Fetch model and data once, fine-tune, and show what changed.

    A second call goes on with an interrupted demo; of a finished one it shows the report again.

    Args:
        method: any registered method.
        output: the run's folder.
        steps: instead of the method's own number.
        overwrite: discard the demo in the folder, which else is refused if it is another one.
        as_json: JSON lines instead of words.
    """
    from tinyft.config import TrainConfig
    from tinyft.optim import METHODS
    from tinyft.output import OutputFolder
    from tinyft.progress import make_reporter

    if method not in METHODS:
        raise InputError(f"--method {method} is unknown: choose from {', '.join(METHODS)}.")
    folder = OutputFolder(output)
    saved = None if overwrite else folder.saved_config().get("method")
    if saved not in (None, method):
        raise InputError(
            f"--output {output} holds {'a finished' if folder.finished else 'an unfinished'} run "
            f"of {saved}: --overwrite discards it, or name another folder."
        )
    settings = SETTINGS.get(method)
    if settings is None:
        kind = "lora" if METHODS[method].uses_gradients else "mezo"
        settings = {name: value for name, value in SETTINGS[kind].items() if name != "lr"}
    values = {
        "model": MODEL,
        "data": TRAIN,
        "eval_data": HELD_OUT,
        "method": method,
        "output": str(output),
        "max_length": 128,
        "resume": saved is not None,
        "overwrite": overwrite,
        **settings,
    }
    if steps:
        values |= {"steps": steps, "warmup": min(values.get("warmup", 0), steps // 2)}
    config = TrainConfig.build(values)
    reporter = make_reporter(as_json=as_json)
    from tinyft.train import run

    result = run(config, reporter)
    shown = _opinions(result, output)
    if as_json:
        print(json.dumps({"event": "report", **result.report, "predictions": shown}), flush=True)
    else:
        _show(result.report, shown, output)


def _opinions(result: Any, output: Path) -> list[dict[str, Any]]:
    """What the trained model makes of a few held-out reviews, good and bad ones in turn."""
    from dataclasses import replace

    from tinyft.evaluate import predictions
    from tinyft.inputs import read_source
    from tinyft.models import load

    model, tokenizer = result.model, result.tokenizer
    if model is None:  # the run was finished before
        loaded = load(output)
        model, tokenizer = loaded.model, loaded.tokenizer
    examples, _ = read_source(HELD_OUT, None, False)
    short = [example for example in examples.items if len(example.prompt) < 110]
    bad, good = ([e for e in short if e.answer == answer][: REVIEWS // 2] for answer in (0, 1))
    chosen = [e for pair in zip(bad, good, strict=False) for e in pair]
    return [
        {
            "review": p.prompt,
            "probability": {
                c.strip(): round(x, 3) for c, x in zip(p.choices, p.probabilities, strict=True)
            },
            "said": p.choices[p.predicted].strip(),
            "people": p.choices[p.answer].strip(),
        }
        for p in predictions(model, tokenizer, replace(examples, items=chosen))
    ]


def _show(report: dict[str, Any], shown: Sequence[dict[str, Any]], output: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    measured, scores = report["measured"], report["eval"]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("500 held-out reviews")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for name, form in (("accuracy", "{:.1%}"), ("loss", "{:.3f}")):
        table.add_row(name, *(form.format(scores[when][name]) for when in ("before", "after")))
    console.print(table)
    opinions = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("review", "the model says", "people said"):
        opinions.add_column(title)
    for row in shown:
        chance = row["probability"][row["said"]]
        opinions.add_row(row["review"], f"{row['said']} ({chance:.0%})", row["people"])
    console.print(opinions)
    minutes = measured["wall_s"] / 60
    console.print(
        f"{report['method']}: {measured['steps']} steps in {minutes:.1f} minutes, peak memory "
        f"{human(measured['peak_memory_bytes'])} (the loaded model: "
        f"{human(measured['loaded_memory_bytes'])})",
        soft_wrap=True,
    )
    for what, path in (
        ("model", output),
        ("loss plot", output / "loss.png"),
        ("report", output / "report.json"),
    ):
        console.print(f"{what + ':':<10} {path}", soft_wrap=True)
    console.print(
        f"to score it again: tinyft eval --model {output} --data {HELD_OUT}", soft_wrap=True
    )
