"""A MeZO step against as many forward passes of the same batch: time and memory.

    python bench/mezo_step.py [--dtype bfloat16] [--estimator two-sided] [--families sign-rank1 ...]

Times: one process, the contenders in turn, medians. Peaks: the median of five processes for each
contender (one in four takes 50 MB more than the others, whichever it is), VmHWM over what is
resident when the model is loaded. Every token is labelled, both sides use the same chunked loss.
`published` is the exact mode, two passes a step: what the published procedure costs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import tinyft
from tinyft.data import Batch
from tinyft.losses import objective
from tinyft.memory import PeakMeter, resident_bytes, reuse_heap, trim
from tinyft.zeroth.estimators import ESTIMATORS, evaluation_points

_PROCESSES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--estimator", choices=ESTIMATORS, help="(default: MeZO's)")
    parser.add_argument("--families", nargs="+", default=["sign-rank1"])
    parser.add_argument("--published", action="store_true", help="also the published procedure")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    reuse_heap()
    model = tinyft.load(arguments.model, dtype=arguments.dtype).model
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(
        model.config.vocab_size,
        (arguments.batch, arguments.length),
        generator=torch.Generator().manual_seed(0),
    )
    labels = ids.clone()
    labels[:, 0] = -100
    batch = Batch(ids, torch.ones_like(ids), labels, tokens_per_example=arguments.length - 1)
    lm = objective("lm")

    def losses(part: Batch) -> torch.Tensor:
        return lm(model, part)

    contenders: dict[str, Callable[[], object]] = {}
    for family in arguments.families:
        how = {"estimator": arguments.estimator, "directions": family}
        optimizer = tinyft.MeZO(model, lr=1e-9, **how)
        contenders[family] = lambda optimizer=optimizer: optimizer.step(losses, batch)
    options = optimizer.options
    passes = len(evaluation_points(options.estimator, options.probes))
    plain = f"{passes} forward passes"

    @torch.no_grad()
    def forward_passes() -> None:
        for _ in range(passes):
            losses(batch)

    contenders = {plain: forward_passes, **contenders}
    if arguments.published:
        exact = tinyft.MeZO(model, lr=1e-9, exact=True)
        contenders["published"] = lambda: exact.step(losses, batch)

    if arguments.peak_of:
        run = contenders[arguments.peak_of]
        trim()
        before, meter = resident_bytes(), PeakMeter()
        with meter.phase("step"):
            for _ in range(3):
                run()
        print(meter.peaks["step"] - before)
        return
    extra = {}
    for name in contenders:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--peak-of", name]
        peaks = []
        for _ in range(_PROCESSES):
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(int(done.stdout.split()[-1]))
        extra[name] = statistics.median(peaks)
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds[plain])
    print(
        f"{arguments.model}, {arguments.dtype}, {arguments.batch} x {arguments.length} tokens, "
        f"{torch.get_num_threads()} threads, {options.estimator}, median of {arguments.rounds}"
    )
    for name in contenders:
        median = statistics.median(seconds[name])
        share = (extra[name] - extra[plain]) / weight_bytes
        print(
            f"{name:20} {median:7.3f} s  {median / base:5.2f}x   peak {extra[name] / 2**20:7.1f} "
            f"MiB over the weights, {share:+.2%} of their bytes over inference's"
        )


if __name__ == "__main__":
    main()
