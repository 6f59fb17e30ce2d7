"""SparseLoRA's step against dense LoRA's, ours and PEFT's: FLOPs, time and peak memory.

    python bench/sparse_lora_step.py [--model wide|smollm2-135m] [--shares 0.8 0.65 0.5]

4 rows of 512 tokens, of which the last quarter is labelled. Times: one process, the contenders in
turn, medians of each round's ratio to our dense step. FLOPs are counted from the operations that
ran. Peaks: a process for each contender, VmHWM over what is resident when the model is loaded and
its method attached. `wide` is a random Llama of 4 layers, hidden 2048, intermediate 5632.

At each share all parts of all layers are equally sparse: what a schedule does to the loss is
`bench/sparse_lora_quality.py`'s question. `--schedule` adds one from a file, as a run leaves it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tinyft
from tinyft.cost import FlopCounter
from tinyft.data import Batch
from tinyft.kernels import cpu_products
from tinyft.losses import check_head, objective
from tinyft.memory import PeakMeter, resident_bytes, reuse_heap, trim
from tinyft.sparse.schedule import write

RANK, DENSE, PEFT = 8, "LoRA", "PEFT's LoRA"
Step = Callable[[], float]


def main() -> None:
    arguments = parse()
    if arguments.peak_of:
        print(peak_bytes(arguments))
        return
    names = [DENSE, *([] if arguments.without_peft else [PEFT]), *contenders_of(arguments)]
    peaks = {} if arguments.without_peaks else {name: measured_apart(name) for name in names}
    model, batch = load(arguments), make_batch(arguments)
    steps: dict[str, Step] = {}
    for name in names:  # ours share a model; PEFT has its own, made before ours are attached
        if name == PEFT:
            steps[name] = peft_step(load(arguments), batch)
        else:
            steps[name] = our_step(model, batch, name, arguments)
    flops = {}
    for name, step in steps.items():
        step()  # moments, estimators
        with FlopCounter() as counter:
            step()
        flops[name] = counter.flops
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            (cpu_products.remove if name == PEFT else cpu_products.install)()
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(
        f"{arguments.model}, {arguments.layers or 'all'} layers, {arguments.dtype}, "
        f"base of {arguments.base_bits} bits, "
        f"{arguments.batch} x {arguments.length} tokens, "
        f"{arguments.labelled:.0%} labelled, {torch.get_num_threads()} threads, medians of "
        f"{arguments.rounds}\n\n"
        f"| | FLOPs | time | time / FLOPs | PEFT's time over its | s | peak beyond the model |\n"
        f"|---|---|---|---|---|---|---|"
    )
    for name in names:
        flops_share = flops[name] / flops[DENSE]
        time_share = ratio(seconds[name], seconds[DENSE])
        faster = f"{ratio(seconds[PEFT], seconds[name]):.2f}x" if PEFT in seconds else ""
        peak = f"{peaks[name] / 2**20:,.0f} MiB" if peaks else ""
        print(
            f"| {name} | {flops_share:.3f} | {time_share:.3f} | {time_share / flops_share:.2f} "
            f"| {faster} | {statistics.median(seconds[name]):.2f} | {peak} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wide")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--base-bits", type=int, default=16, help="not of `wide`")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--labelled", type=float, default=0.25)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--schedule", nargs="*", default=[], help="files")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-peaks", action="store_true")
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def contenders_of(arguments: argparse.Namespace) -> list[str]:
    return [*(f"share {share:g}" for share in arguments.shares), *arguments.schedule]


def load(arguments: argparse.Namespace) -> nn.Module:
    model = whole(arguments).train()
    if arguments.layers:
        model.model.layers = model.model.layers[: arguments.layers]
        model.config.num_hidden_layers = arguments.layers
    return model


def whole(arguments: argparse.Namespace) -> nn.Module:
    if arguments.model != "wide":
        options = {"dtype": arguments.dtype, "base_bits": arguments.base_bits}
        return tinyft.load(arguments.model, **options).model
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32_000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_batch(arguments: argparse.Namespace) -> Batch:
    shape, generator = (arguments.batch, arguments.length), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30_000, shape, generator=generator)
    labels, labelled = ids.clone(), round(arguments.labelled * arguments.length)
    labels[:, :-labelled] = -100
    return Batch(ids, torch.ones_like(ids), labels, tokens_per_example=float(labelled))


def our_step(model: nn.Module, batch: Batch, name: str, arguments: argparse.Namespace) -> Step:
    check_head(model)
    options: dict[str, Any] = {"lr": 1e-4, "rank": RANK, "targets": arguments.targets}
    loss_of = objective("lm")
    if name == DENSE:
        optimizer = tinyft.LoRA(model, **options)
    elif name in arguments.schedule:
        optimizer = tinyft.SparseLoRA(model, sparsity=name, **options)
    else:
        share = float(name.removeprefix("share "))
        optimizer = tinyft.SparseLoRA(model, **options)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "schedule.yaml"
            write(path, equal(optimizer, batch, share))
            optimizer = tinyft.SparseLoRA(model, sparsity=str(path), **options)
    return lambda: float(optimizer.step(lambda part: loss_of(model, part), batch))


def equal(optimizer: tinyft.SparseLoRA, batch: Batch, share: float) -> dict:
    """The schedule of one sparsity that should have this share of the dense FLOPs."""
    dense, loss_of = tinyft.LoRA(optimizer.model, lr=0.0), objective("lm")
    with FlopCounter() as counter:
        dense.step(lambda part: loss_of(optimizer.model, part), batch)
    tokens = len(tinyft.sparse.tokens.Tokens.of_batch(batch).sparse)
    saved = optimizer.savings(tokens).sum()
    sparsity = (1 - share) * counter.flops / saved
    if sparsity > 0.99:
        raise SystemExit(f"A share of {share} is out of reach: {1 - 0.99 * saved / counter.flops}.")
    print(f"share {share}: {sparsity:.3f} of channels left out everywhere", file=sys.stderr)
    return dict.fromkeys(optimizer.keys, sparsity)


def peft_step(model: nn.Module, batch: Batch) -> Step:
    import peft

    cpu_products.remove()  # torch as it comes
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0
    )

    def step() -> float:
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measured_apart(name: str) -> int:
    command = [sys.executable, "-W", "ignore", *sys.argv, "--peak-of", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def peak_bytes(arguments: argparse.Namespace) -> int:
    """Over the loaded model, of the second and third step."""
    reuse_heap()
    model, batch, name = load(arguments), make_batch(arguments), arguments.peak_of
    gc.collect()
    trim()
    before = resident_bytes()
    if name == PEFT:
        step = peft_step(model, batch)
    else:
        step = our_step(model, batch, name, arguments)
    step()
    gc.collect()
    trim()
    meter = PeakMeter()
    with meter.phase("steps"):
        for _ in range(2):
            step()
    return meter.peaks["steps"] - before


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


if __name__ == "__main__":
    main()
