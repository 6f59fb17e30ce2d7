"""A step of RoSTE beside plain fine-tuning's: time, losses and memory, on the same batches.

    python bench/roste_step.py --way paper     # against tinyft.Full: at most 1.35x its time
    python bench/roste_step.py --way frozen    # against tinyft.LoRA: below its peak memory

Contenders run in processes of their own, one at a time and in turn; times are medians of the steps
after the first, memory is the peak of the whole process during the steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any

WAYS = {"paper": ("full", "roste"), "frozen": ("lora", "roste")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--way", choices=tuple(WAYS), default="paper")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--kv", type=int, default=8)
    parser.add_argument("--rotations", default="adaptive")
    parser.add_argument("--checkpointing", default="selective")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    sides = WAYS[args.way]
    processes = {
        side: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in sides
    }
    lines: dict[str, list[dict]] = {side: [] for side in sides}
    for side in sides:
        ready = json.loads(processes[side].stdout.readline())
        print(f"{side}: loaded {ready['loaded_bytes'] / 2**20:,.0f} MiB", flush=True)
    for _ in range(args.steps):
        for side in sides:
            processes[side].stdin.write("step\n")
            processes[side].stdin.flush()
            lines[side].append(json.loads(processes[side].stdout.readline()))
    for side in sides:
        processes[side].stdin.close()
        processes[side].wait()
    shape = f"{args.batch_size} x {args.length}, {args.dtype}"
    print(f"{args.model}, {shape}, W4 A{args.activations} KV{args.kv}, {args.rotations}")
    print("| | first step s | step s (median) | peak MiB | losses |\n|---|---|---|---|---|")
    for side in sides:
        seconds = [line["seconds"] for line in lines[side]]
        losses = " ".join(f"{line['loss']:.3f}" for line in lines[side][:4])
        print(
            f"| {side} | {seconds[0]:.2f} | {statistics.median(seconds[1:]):.3f} "
            f"| {lines[side][-1]['peak_bytes'] / 2**20:,.0f} | {losses} |"
        )
    ratios = [
        ours["seconds"] / plain["seconds"]
        for plain, ours in zip(*(lines[side][1:] for side in sides), strict=True)
    ]
    peaks = [lines[side][-1]["peak_bytes"] for side in sides]
    print(f"time {statistics.median(ratios):.2f}x, peak memory {peaks[1] / peaks[0]:.2f}x")


def worker(args: argparse.Namespace) -> None:
    import torch

    import tinyft
    from tinyft.batches import Batch
    from tinyft.losses import check_head, objective
    from tinyft.memory import PeakMeter, resident_bytes, trim
    from tinyft.models import load

    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args.model, dtype=args.dtype).model
    model.requires_grad_(True).train()
    lm = objective("lm")
    check_head(model)
    options: dict[str, Any] = {"checkpointing": args.checkpointing}
    meter = PeakMeter("cpu")
    loaded_bytes = resident_bytes()
    with meter.phase("train"):
        if args.worker == "full":
            optimizer = tinyft.Full(model, lr=5e-5, **options)
        elif args.worker == "lora":
            optimizer = tinyft.LoRA(model, lr=2e-4, **options)
        else:
            optimizer = tinyft.RoSTE(
                model,
                lr=5e-5 if args.way == "paper" else 2e-4,
                trainable="all" if args.way == "paper" else "lora",
                activations=args.activations,
                kv=args.kv,
                rotations=args.rotations,
                **options,
            )
        gc.collect()
        trim()
        tokens = torch.Generator().manual_seed(0)
        print(json.dumps({"loaded_bytes": loaded_bytes}), flush=True)
        for _ in sys.stdin:
            shape = (args.batch_size, args.length)
            ids = torch.randint(3, model.config.vocab_size, shape, generator=tokens)
            batch = Batch(ids, torch.ones_like(ids), ids, tokens_per_example=args.length - 1.0)
            began = time.perf_counter()
            loss = float(optimizer.step(lambda part: lm(model, part), batch))
            seconds = time.perf_counter() - began
            peak_bytes = meter.peak_bytes("train")
            line = {"loss": loss, "seconds": seconds, "peak_bytes": peak_bytes}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
