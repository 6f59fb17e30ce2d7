"""Products on this CPU: torch's own, and ours (16 bits in float32 blocks, float32 by oneDNN).

    python bench/cpu_products.py [--threads 1] [--rounds 7] [--attention | --float32]

The shapes are SmolLM2-135M's at a few tokens: a layer's forward product, its gradients to the input
and to the weight, the vocabulary's, a batched product, and attention's backward pass; with
`--attention` that alone, in rows of 16 to 512 tokens, 512 in all, and with other models' heads;
with `--float32` products of float32, adapters' among them. One process, all ways in turn, medians.
Where a CPU is quick itself nothing would be installed; the bench installs it regardless.
Writes `results/cpu_products.csv`, or one with `_attention` or `_float32` in its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from commands import keep
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tinyft.kernels import cpu_products

RESULTS = Path(__file__).parent / "results"
DTYPE = torch.bfloat16
Case = tuple[str, float, Callable[[torch.dtype], Callable[[], object]]]


def layer(tokens: int, n_in: int, n_out: int) -> list[Case]:
    def make(what: str) -> Callable[[torch.dtype], Callable[[], object]]:
        def at(dtype: torch.dtype) -> Callable[[], object]:
            x, w = torch.randn(tokens, n_in).to(dtype), torch.randn(n_out, n_in).to(dtype)
            grad = torch.randn(tokens, n_out).to(dtype)
            return {
                "y": lambda: linear(x, w),
                "dx": lambda: grad @ w,
                "dw": lambda: grad.t() @ x,
            }[what]

        return at

    shape = f"{tokens} x {n_in} x {n_out}"
    return [
        (f"{name} {shape}", 2.0 * tokens * n_in * n_out, make(name)) for name in "y dx dw".split()
    ]


def bmm(dtype: torch.dtype) -> Callable[[], object]:
    a = torch.randn(72, 128, 64).to(dtype)
    return lambda: a @ a.mT


def attention(rows: int, heads: int, length: int, channels: int) -> Case:
    def at(dtype: torch.dtype) -> Callable[[], object]:
        shape = rows, heads, length, channels
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        grad: Tensor = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, (q, k, v), grad, retain_graph=True)

    name = f"attention backward {rows} x {heads} x {length} x {channels}"
    return name, 10.0 * rows * heads * length**2 * channels, at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--attention", action="store_true")
    what.add_argument("--float32", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases: list[Case] = [
        *layer(1024, 576, 1536),
        *layer(64, 576, 1536),
        *layer(1, 576, 1536)[:1],
        *layer(256, 576, 49152),
    ]
    if arguments.attention:
        heads = ((9, 64), (12, 32), (8, 128))  # SmolLM2's, MiniLM's, and of many larger models
        lengths = (16, 32, 64, 128, 256, 512)
        cases = [attention(512 // n, h, n, size) for h, size in heads for n in lengths]
    elif arguments.float32:
        cases += [*layer(16, 576, 576), *layer(1024, 576, 8), *layer(1024, 8, 1536)]
    else:
        cases += [
            ("bmm 72 x 128 x 64 x 128", 2.0 * 72 * 128 * 64 * 128, bmm),
            attention(8, 9, 128, 64),
        ]
    slow = cpu_products.slow_in_mkl() if arguments.float32 else cpu_products.missing()
    names = ", ".join(str(d)[6:] for d in slow) or "nothing"
    lacks = "is slow by itself at products of" if arguments.float32 else "lacks products of"
    print(f"{arguments.threads} threads; this CPU {lacks} {names}")
    dtype = torch.float32 if arguments.float32 else DTYPE
    installed = ((), (), (dtype,)) if arguments.float32 else ((dtype,),)
    ways = ["torch", "ours"] if arguments.float32 else ["torch", "ours", "float32"]
    print(f"| product, {str(dtype)[6:]} | {' | '.join(ways)} | ours over torch's |")
    print("|---" * (len(ways) + 2) + "|")
    lines = []
    for name, flops, make in cases:
        times: dict[str, list[float]] = {way: [] for way in ways}
        runs = {way: make(torch.float32 if way == "float32" else dtype) for way in ways}
        for round_ in range(arguments.rounds + 1):
            for way in ways:
                if way == "ours":
                    cpu_products.install(*installed)
                began = perf_counter()
                runs[way]()
                seconds = perf_counter() - began
                cpu_products.remove()
                if round_:
                    times[way].append(seconds)
        rates = {way: flops / median(found) / 1e9 for way, found in times.items()}
        lines.append(
            {"product": name, "threads": arguments.threads}
            | {f"{way}_gflop_per_s": round(rate, 1) for way, rate in rates.items()}
        )
        print(
            f"| {name} | {' | '.join(f'{rate:.1f}' for rate in rates.values())} "
            f"| {rates['ours'] / rates['torch']:.2f}x |",
            flush=True,
        )
    part = "_attention" if arguments.attention else "_float32" if arguments.float32 else ""
    keep(lines, RESULTS / f"cpu_products{part}.csv")


if __name__ == "__main__":
    main()
