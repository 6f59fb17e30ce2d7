"""LoRA and full fine-tuning against PEFT and plain torch: losses, time, memory.

    python bench/peft_parity.py --model smollm2-135m                     # 20 steps of 8 x 128
    python bench/peft_parity.py --method lora --targets all-linear --dtype bfloat16

Each side runs in its own process, so that peaks (VmHWM, reset after loading and before the first
step) are its own, and takes a step in turn, so that times see the same machine. Both start from
the same weights and the same adapter and see the same random tokens, no padding. The other side is
the loop that one writes: `model(labels=...).loss`, `backward`, `torch.optim.AdamW.step`,
`zero_grad`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

LR = {"lora": 2e-4, "full": 2e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="what tinyft.load takes")
    parser.add_argument("--method", choices=["lora", "full", "both"], default="both")
    parser.add_argument("--targets", default="q_proj,k_proj,v_proj,o_proj")
    parser.add_argument("--checkpointing", default="selective", help="of our side")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    for method in ("lora", "full") if args.method == "both" else (args.method,):
        found = compare(args, method)
        print(json.dumps(found) if args.json else table(found), flush=True)


def compare(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Both sides step by step in turn."""
    with tempfile.TemporaryDirectory() as adapter:
        sides = {}
        for side in ("tinyft", "peft" if method == "lora" else "torch"):
            command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
            process = subprocess.Popen(
                [*command, "--worker", side, "--adapter", adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            sides[side] = process
            ask(process)  # loaded; ours also wrote the adapter that both start from
        replies: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.steps):
            for side, process in sides.items():
                replies[side].append(ask(process, "step"))
        for process in sides.values():
            process.stdin.close()
            process.wait()
    ours, theirs = replies.values()
    return {
        "method": method,
        "steps": args.steps,
        "shape": [args.batch, args.length],
        "dtype": args.dtype,
        "largest_relative_difference_of_losses": max(
            abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True)
        ),
        **{
            side: {
                "step_s_median": statistics.median(r["seconds"] for r in steps[1:]),
                "peak_beyond_loaded_bytes": steps[-1]["peak_bytes"],
                "loss_last": steps[-1]["loss"],
            }
            for side, steps in replies.items()
        },
    }


def ask(process: subprocess.Popen, request: str | None = None) -> dict[str, float]:
    if request:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"A worker stopped with code {process.wait()}.")
    return json.loads(line)


def table(found: dict[str, Any]) -> str:
    ours, theirs = [key for key in found if isinstance(found[key], dict)]
    a, b = found[ours], found[theirs]
    rows, length = found["shape"]
    return "\n".join(
        [
            f"{found['method']}, {found['steps']} steps of {rows} x {length}, {found['dtype']}",
            f"  losses differ by at most {found['largest_relative_difference_of_losses']:.1e}",
            *(
                f"  {label:32}{ours} {a[key] * unit:8.2f}   {theirs} {b[key] * unit:8.2f}"
                f"   ratio {a[key] / b[key]:.3f}"
                for label, key, unit in (
                    ("step, median (s)", "step_s_median", 1),
                    ("peak beyond loaded model (MB)", "peak_beyond_loaded_bytes", 1e-6),
                )
            ),
        ]
    )


def work(args: argparse.Namespace) -> None:
    """One side: for each line of stdin, a step and a line of JSON."""
    import torch

    import tinyft
    from tinyft.memory import PeakMeter, resident_bytes, trim

    model = tinyft.load(args.model, dtype=args.dtype).model
    tokens = torch.Generator().manual_seed(0)

    def batch() -> torch.Tensor:
        shape = (args.batch, args.length)
        return torch.randint(model.config.vocab_size, shape, generator=tokens)

    step = SIDES[args.worker](model, args)
    gc.collect()
    trim()
    loaded_bytes = resident_bytes()
    meter = PeakMeter("cpu")
    with meter.phase("train"):
        print("{}", flush=True)
        for _ in sys.stdin:
            ids = batch()
            began = time.perf_counter()
            loss = step(ids)
            seconds = time.perf_counter() - began
            peak_bytes = meter.peak_bytes("train") - loaded_bytes
            print(
                json.dumps({"loss": loss, "seconds": seconds, "peak_bytes": peak_bytes}), flush=True
            )


def tinyft_side(model: Any, args: argparse.Namespace) -> Callable[[Any], float]:
    import torch

    import tinyft
    from tinyft.adapters import save_adapter
    from tinyft.batches import Batch
    from tinyft.losses import check_head, objective

    options = {"lr": LR[args.method], "checkpointing": args.checkpointing}
    if args.method == "lora":
        targets = args.targets.split(",") if "," in args.targets else args.targets
        optimizer = tinyft.LoRA(model, targets=targets, **options)
        save_adapter(model, args.adapter, args.model)
    else:
        optimizer = tinyft.Full(model, **options)
    loss_of = objective("lm")
    check_head(model)

    def step(ids: torch.Tensor) -> float:
        batch = Batch(ids, torch.ones_like(ids), ids, tokens_per_example=args.length - 1.0)
        return float(optimizer.step(lambda part: loss_of(model, part), batch))

    return step


def other_side(model: Any, args: argparse.Namespace) -> Callable[[Any], float]:
    import torch

    from tinyft.kernels import cpu_products

    cpu_products.remove()  # torch as it comes
    if args.worker == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR[args.method], weight_decay=0.0)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


SIDES = {"tinyft": tinyft_side, "peft": other_side, "torch": other_side}

if __name__ == "__main__":
    main()
