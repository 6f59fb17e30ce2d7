"""16-bit products on this CPU: torch's own, ours in float32 blocks, and float32 as it comes.

    python bench/widened.py [--threads 1] [--rounds 7] [--attention]

The shapes are SmolLM2-135M's at a few tokens: a layer's forward product, its gradients to the input
and to the weight, the vocabulary's, a batched product, and attention's backward pass; with
`--attention` that alone, in rows of 16 to 512 tokens, 512 in all, and with other models' heads. One
process, the three in turn, medians. Where a CPU multiplies 16-bit numbers itself nothing would be
installed; the bench installs it regardless and says so. Writes `results/widened.csv`, or
`results/widened_attention.csv`.
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

from tinyft.kernels import widened

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
    parser.add_argument("--attention", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases: list[Case] = [
        *layer(1024, 576, 1536),
        *layer(64, 576, 1536),
        *layer(1, 576, 1536)[:1],
        *layer(256, 576, 49152),
        ("bmm 72 x 128 x 64 x 128", 2.0 * 72 * 128 * 64 * 128, bmm),
        attention(8, 9, 128, 64),
    ]
    if arguments.attention:
        heads = ((9, 64), (12, 32), (8, 128))  # SmolLM2's, MiniLM's, and of many larger models
        lengths = (16, 32, 64, 128, 256, 512)
        cases = [attention(512 // n, h, n, size) for h, size in heads for n in lengths]
    names = ", ".join(str(d)[6:] for d in widened.missing()) or "nothing: it has them"
    print(f"{arguments.threads} threads; this CPU lacks products of {names}")
    print("| product | torch's bfloat16 | widened | float32 | widened over torch's |")
    print("|---|---|---|---|---|")
    lines = []
    for name, flops, make in cases:
        times: dict[str, list[float]] = {"torch": [], "widened": [], "float32": []}
        half, single = make(DTYPE), make(torch.float32)
        for round_ in range(arguments.rounds + 1):
            for way, run in (("torch", half), ("widened", half), ("float32", single)):
                if way == "widened":
                    widened.install((DTYPE,))
                began = perf_counter()
                run()
                seconds = perf_counter() - began
                widened.remove()
                if round_:
                    times[way].append(seconds)
        rates = {way: flops / median(found) / 1e9 for way, found in times.items()}
        lines.append(
            {"product": name, "threads": arguments.threads}
            | {f"{way}_gflop_per_s": round(rate, 1) for way, rate in rates.items()}
        )
        print(
            f"| {name} | {rates['torch']:.1f} | {rates['widened']:.1f} | {rates['float32']:.1f} "
            f"| {rates['widened'] / rates['torch']:.1f}x |",
            flush=True,
        )
    keep(lines, RESULTS / f"widened{'_attention' if arguments.attention else ''}.csv")


if __name__ == "__main__":
    main()
