"""What GreenTrainer saves in a step: FLOPs, time, peak memory; and how long a selection takes.

    python bench/green_trainer_step.py [--models minilm-l6 smollm2-135m] [--rounds 9]

Steps on one batch of film reviews, the longest, with AdamW: full fine-tuning, LoRA, GreenTrainer at
each rho, a step of each in turn in one process; what is saved is the median of the rounds' ratios
to full's step. With one thread (OMP_NUM_THREADS=1) the time is the processor's, which others on
the machine disturb least. Peaks are the whole process's (VmHWM) over the first five steps, hence
with trace, evaluation and selection, each in a process of its own; those in the CSV are kept.
Selections are among the 291 tensors of a Llama of 7 billion weights, with costs traced from it.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import keep
from torch import nn

import tinyft
from tinyft.backward_cost import trace
from tinyft.cost import FlopCounter
from tinyft.data import Batches, encode, pad_id
from tinyft.dry_run import DryRun
from tinyft.inputs import read_source
from tinyft.losses import assume_head, check_head, objective, objective_of
from tinyft.memory import PeakMeter, trim
from tinyft.selection import select

RESULTS = Path(__file__).parent / "results" / "green_trainer_step.csv"
BATCH = {"minilm-l6": 16, "smollm2-135m": 8}
FIELDS = (
    *("model", "dtype", "row", "threads", "rounds", "flops", "step_s"),
    *("flops_saved", "time_saved", "peak_mib"),
)
NEVER = 10**6  # steps to the next selection
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=BATCH, default=list(BATCH))
    parser.add_argument("--rhos", type=float, nargs="+", default=[0.4, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--without-peaks", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(peak_bytes(arguments.models[0], arguments.peak_of, arguments.dtype))
        return
    lines = {}
    if RESULTS.exists():
        found = list(csv.DictReader(RESULTS.open()))
        lines = {(line["model"], line["dtype"], line["row"]): line for line in found}
    for model in arguments.models:
        names = ["full", "lora", *(f"rho {rho:g}" for rho in arguments.rhos)]
        timed = times(model, names, arguments) if arguments.rounds else {}
        for name in names:
            key = model, arguments.dtype, name
            named = dict(zip(FIELDS[:3], key, strict=True))
            line = lines.setdefault(key, dict.fromkeys(FIELDS, "") | named)
            line.update(timed.get(name, {}))
            if not line["peak_mib"] and not arguments.without_peaks:
                line["peak_mib"] = round(measured_apart(*key) / 2**20)
            keep(list(lines.values()), RESULTS)
    print(table(lines))
    print(selections())


def times(model: str, names: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """For each contender its FLOPs, its step's time and what it saves of full's."""
    # LoRA's model is its own: its adapters would be trained by the others, too.
    whole, adapted = (setting(model, arguments.dtype) for _ in range(2))
    steps = {name: step_of(name, *(adapted if name == "lora" else whole)) for name in names}
    threads, flops, seconds = torch.get_num_threads(), {}, {name: [] for name in names}
    clock = time.process_time if threads == 1 else time.perf_counter
    for name, step in steps.items():
        step()  # selection, moments
        with FlopCounter() as counter:
            step()
        flops[name] = counter.flops
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            began = clock()
            step()
            seconds[name].append(clock() - began)
    found = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds["full"], strict=True)]
        found[name] = {
            "threads": threads,
            "rounds": arguments.rounds,
            "flops": flops[name],
            "step_s": round(statistics.median(seconds[name]), 3),
            "flops_saved": round(1 - flops[name] / flops["full"], 4),
            "time_saved": round(1 - statistics.median(ratios), 4),
        }
    return found


def setting(name: str, dtype: str) -> tuple[nn.Module, Any, Callable[..., Any]]:
    """Model, batch, and one loss an example."""
    labels = {"num_labels": 2} if name.startswith("minilm") else {}
    loaded = tinyft.load(name, dtype=dtype, **labels)
    encoder = loaded.kind == "encoder"
    examples, _ = read_source("film-reviews:train", None, False)
    encoded = encode(examples, loaded.tokenizer, max_length=128, encoder=encoder, objective="auto")
    batches = Batches(encoded, BATCH[name], seed=0, pad_id=pad_id(loaded.tokenizer))
    batch = max((batches[i] for i in range(20)), key=lambda batch: batch.input_ids.shape[1])
    loss = partial(objective_of("auto", encoded.kind), loaded.model.train())
    if not encoder:
        check_head(loaded.model)
    return loaded.model, batch, loss


def step_of(name: str, model: nn.Module, batch: Any, loss: Callable[..., Any]) -> Step:
    if name == "full":
        optimizer = tinyft.Full(model, lr=1e-6)
    elif name == "lora":
        optimizer = tinyft.LoRA(model, lr=1e-6)
    else:
        rho = float(name.removeprefix("rho "))
        optimizer = tinyft.GreenTrainer(model, lr=1e-6, rho=rho, reselect=NEVER)
    return lambda: float(optimizer.step(loss, batch))


def measured_apart(model: str, dtype: str, name: str) -> int:
    words = ["--models", model, "--dtype", dtype, "--peak-of", name]
    command = [sys.executable, "-W", "ignore", __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def peak_bytes(model: str, name: str, dtype: str) -> int:
    step = step_of(name, *setting(model, dtype))
    gc.collect()
    trim()
    meter = PeakMeter()
    with meter.phase("steps"):
        for _ in range(5):
            step()
    return meter.peaks["steps"]


def table(lines: dict[tuple[str, ...], dict[str, Any]]) -> str:
    out = [
        "| model | dtype | | FLOPs saved | time saved | share | peak memory | of full's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, dtype, row), line in lines.items():
        flops, seconds = (float(line[name] or 0) for name in ("flops_saved", "time_saved"))
        peak, full = (float(x["peak_mib"] or 0) for x in (line, lines[model, dtype, "full"]))
        out.append(
            f"| {model} | {dtype} | {row} | {flops:.3f} | {seconds:.3f} "
            f"| {f'{seconds / flops:.2f}' if flops else ''} "
            f"| {f'{peak:,.0f} MiB | {peak / full:.2f}' if peak and full else '|'} |"
        )
    return "\n".join(out)


def selections() -> str:
    """Times of selections over a traced Llama of 7 billion weights."""
    import transformers

    config = transformers.LlamaConfig(  # Llama-2-7B's
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    ids = torch.randint(3, 30_000, (1, 512), generator=torch.Generator().manual_seed(0))
    with DryRun():
        with torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assume_head(model.train())
        parameters = list(model.parameters())
        batch = tinyft.batches.Batch(ids, torch.ones_like(ids), ids, tokens_per_example=511.0)
        cost = trace(lambda: objective("lm")(model, batch).mean(), parameters, model)
    order = cost.order
    own, way = cost.own(cost.flops), cost.way(cost.flops)
    state = np.array([4 * parameters[k].numel() for k in order]) + cost.own(cost.saved_bytes)
    saved = cost.way(cost.saved_bytes)
    out = [f"{len(order)} tensors, {sum(p.numel() for p in parameters):,} weights"]
    rng = np.random.default_rng(0)
    for rho in (0.4, 0.5, 0.7, 0.9):
        for share in (None, 0.3, 0.5):  # of all state and activations
            memory = share and int(share * (state + saved).sum())
            both = {"state_bytes": state, "saved_bytes": saved, "memory_bytes": memory}
            room = int(rho * cost.step_flops()) - cost.forward_flops
            times = []
            for _ in range(9):
                importance = rng.exponential(size=len(order)) * np.sqrt(own + 1)
                began = time.process_time()
                select(importance, own, way, room, **(both if memory else {}))
                times.append(1e3 * (time.process_time() - began))
            limit = "" if share is None else f", {share:g} of the memory"
            out.append(f"  rho {rho:g}{limit}: {statistics.median(times):.1f} ms")
    return "\n".join(out)


if __name__ == "__main__":
    main()
