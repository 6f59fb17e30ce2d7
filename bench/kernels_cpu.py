"""Each operation of kernels/ on the CPU, against plain torch and against the machine's ceilings.

chrt -r 20 python bench/kernels_cpu.py --out bench/results/kernels_cpu

All in one process: first the ceilings (bytes/s of a large copy, FLOP/s of square products), then
each operation, the contenders in turn, medians. "plain" is what one writes in torch without these
kernels: torch's own generator and products, weights perturbed or dequantised whole, whole logits, a
dense rotation, autograd. The least time is the larger of bytes over bandwidth and FLOPs over
FLOP/s, as `tinyft.kernels.traffic` counts them. They are also what the Triton kernels are predicted
to move and to compute (but that with a Hadamard direction those make a second product); their speed
on a GPU is unmeasured. Shapes are SmolLM2-135M's: 576 wide, 1,536 inside, 49,152 tokens.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from tinyft.kernels import cpu_products, philox, traffic
from tinyft.kernels.chunked_cross_entropy import chunked_cross_entropy
from tinyft.kernels.hadamard import split_size
from tinyft.kernels.hadamard_quant import hadamard_quant, quantize_ref, rotate_ref
from tinyft.kernels.int4_linear import int4_linear, int4_linear_ref, pack_int4
from tinyft.kernels.lora_linear import lora_linear, lora_linear_ref
from tinyft.kernels.packed import pack_int8, rows_of
from tinyft.kernels.perturbed_linear import (
    KINDS,
    Direction,
    perturbed_linear,
    subtract_directions_,
)
from tinyft.kernels.sparse_linear import (
    sparse_gate_up,
    sparse_gate_up_ref,
    sparse_linear,
    sparse_linear_ref,
)
from tinyft.kernels.traffic import Traffic
from tinyft.memory import reuse_heap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
D, INNER, VOCABULARY, TOKENS = 576, 1536, 49152, 1024


@dataclass(frozen=True)
class Case:
    """One row: `others` are timed besides, for their ratio to ours."""

    operation: str
    shape: str
    dtype: str
    traffic: Traffic
    ours: Callable[[], object]
    plain: Callable[[], object]
    dense: Callable[[], object] | None = None  # the plain linear layer of a perturbed one


def forward_and_backward(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], object]:
    """One pass each way, to those of the tensors that want gradients."""

    def run() -> object:
        y = function()
        return torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))

    return run


def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
    return torch.no_grad()(function)


def drawn(kind: str, rows: int, cols: int) -> Tensor:
    """A direction from torch's own generator."""
    if kind == "gaussian":
        return torch.randn(rows, cols)
    return torch.randint(0, 2, (rows, cols)).float().mul_(2).sub_(1)


def generator() -> Iterator[Case]:
    rows, point = torch.arange(INNER), dict(seed=1, tensor=2, step=3)
    levels = philox.table("levels")
    plain = {
        "signs": lambda: drawn("rademacher", INNER, D),
        "levels": lambda: levels[torch.randint(0, 16, (INNER, D))],
        "gaussians": lambda: drawn("gaussian", INNER, D),
    }
    for kind in philox.PER_BLOCK:
        ours = partial(philox.matrix, kind, rows, D, **point)
        moved = traffic.matrix(kind, INNER, D)
        yield Case(f"philox {kind}", f"{INNER} x {D}", "float32", moved, ours, plain[kind])


def perturbed(name: str, dtype: torch.dtype) -> Iterator[Case]:
    m, scales = 2 * TOKENS, (1e-3, -1e-3)
    x, w = torch.randn(m, D).to(dtype), torch.randn(INNER, D).mul_(D**-0.5).to(dtype)
    shape = f"{m} x {D} -> {INNER}"

    def plain(kind: str, weight: object = w) -> Tensor:
        """Both signs with their own weights, in one piece each."""
        whole = rows_of(weight, slice(None), dtype)
        z = drawn(kind, INNER, D).to(dtype)
        both = zip(x.chunk(2), scales, strict=True)
        return torch.cat([linear(part, torch.add(whole, z, alpha=s)) for part, s in both])

    for kind in KINDS:
        z = Direction(kind, 1, 2, 3)
        yield Case(
            f"perturbed_linear {kind}",
            shape,
            name,
            # In torch a Hadamard direction is a fast transform, not Triton's second product.
            traffic.perturbed_linear(
                "sign-rank1" if kind == "hadamard" else kind, m, INNER, D, dtype.itemsize
            ),
            partial(perturbed_linear, x, w, z, scales),
            partial(plain, kind),
            partial(linear, x, w),
        )
    for bits, packed in ((8, pack_int8(w)), (4, pack_int4(w))):
        z = Direction("sign-rank1", 1, 2, 3)
        yield Case(
            f"perturbed_linear sign-rank1, int{bits} W",
            shape,
            name,
            traffic.perturbed_linear("sign-rank1", m, INNER, D, dtype.itemsize, bits),
            partial(perturbed_linear, x, packed, z, scales),
            partial(plain, "sign-rank1", packed),
            lambda packed=packed: linear(x, rows_of(packed, slice(None), dtype)),
        )
    for kind in KINDS:
        ours, theirs = w.clone(), w.clone()
        z = Direction(kind, 1, 2, 3)
        yield Case(
            f"subtract_directions_ {kind}",
            f"{INNER} x {D}",
            name,
            traffic.subtract_directions(kind, INNER, D, dtype.itemsize),
            partial(subtract_directions_, ours, [(z, 1e-6)]),
            lambda kind=kind, w=theirs: w.sub_(drawn(kind, INNER, D).to(dtype), alpha=1e-6),
        )


def sparse(name: str, dtype: torch.dtype) -> Iterator[Case]:
    size, blocks = 64, torch.arange(0, 24, 2)
    selected = len(blocks) * size
    x = torch.randn(TOKENS, D).to(dtype).requires_grad_()
    h = torch.randn(TOKENS, selected).to(dtype).requires_grad_()
    dense = [torch.randn(INNER, D).mul_(D**-0.5).to(dtype) for _ in range(2)]
    for bits in (16, 4):
        gate, up = dense if bits == 16 else map(pack_int4, dense)
        suffix = "" if bits == 16 else ", int4 W"
        shape = (TOKENS, selected, D, dtype.itemsize, bits)
        for given, transposed, what in ((x, False, ""), (h, True, " transposed")):
            yield Case(
                f"sparse_linear{what}{suffix}, both ways",
                f"{TOKENS} x {D}, {selected} of {INNER}",
                name,
                traffic.sparse_linear(*shape) + traffic.sparse_linear(*shape),
                *(
                    forward_and_backward(
                        partial(f, given, gate, blocks, size, transposed=transposed), given
                    )
                    for f in (sparse_linear, sparse_linear_ref)
                ),
            )
        yield Case(
            f"sparse_gate_up{suffix}, both ways",
            f"{TOKENS} x {D}, {selected} of {INNER}",
            name,
            traffic.sparse_gate_up(*shape) + traffic.sparse_gate_up_backward(*shape),
            *(
                forward_and_backward(partial(f, x, gate, up, blocks, size, activation="silu"), x)
                for f in (sparse_gate_up, sparse_gate_up_ref)
            ),
        )


def rotations(name: str, dtype: torch.dtype) -> Iterator[Case]:
    for n in (D, INNER):
        x = torch.randn(TOKENS, n).to(dtype).requires_grad_()
        r = rotate_ref(torch.eye(n))

        def plain(x: Tensor = x, r: Tensor = r) -> Tensor:
            rotated = x.float() @ r
            return (rotated + (quantize_ref(rotated.detach(), 4, 0.95) - rotated).detach()).to(
                dtype
            )

        size = TOKENS, n, split_size(n)[0], dtype.itemsize
        yield Case(
            "hadamard_quant, both ways",
            f"{TOKENS} x {n}, 4 bits",
            name,
            traffic.rotate(*size, True) + traffic.rotate(*size, False),
            forward_and_backward(partial(hadamard_quant, x, 4, clip=0.95), x),
            forward_and_backward(plain, x),
        )


def int4(name: str, dtype: torch.dtype) -> Iterator[Case]:
    """Plain torch that dequantises W whole, in each pass anew, as a base in 4 bits must be."""
    weight = pack_int4(torch.randn(INNER, D) * D**-0.5)
    for m, both in ((TOKENS, True), (1, False)):
        x = torch.randn(m, D).to(dtype).requires_grad_()
        grad = torch.ones(m, INNER, dtype=dtype)
        for bits in (16, 8):

            def plain(x: Tensor = x, grad: Tensor = grad, bits: int = bits, both: bool = both):
                with torch.no_grad():
                    y = int4_linear_ref(x, weight, activation_bits=bits)
                    return y, grad @ rows_of(weight, slice(None), dtype) if both else None

            ours = partial(int4_linear, x, weight, activation_bits=bits)
            shape = m, INNER, D, dtype.itemsize
            moved = traffic.int4_linear(*shape, activation_bits=bits)
            yield Case(
                f"int4_linear, {bits}-bit x{', both ways' if both else ''}",
                f"{m} x {D} -> {INNER}",
                name,
                moved + traffic.int4_linear(*shape) if both else moved,
                forward_and_backward(ours, x) if both else ours,
                plain,
            )


def heads(name: str, dtype: torch.dtype) -> Iterator[Case]:
    n = TOKENS // 2
    hidden = torch.randn(n, D).to(dtype).requires_grad_()
    frozen = torch.randn(VOCABULARY, D).mul_(D**-0.5).to(dtype)
    labels = torch.randint(0, VOCABULARY, (n,))
    for weight in (frozen, frozen.clone().requires_grad_()):
        trained = weight.requires_grad

        def plain(weight: Tensor = weight) -> Tensor:
            return cross_entropy(linear(hidden, weight).float(), labels, reduction="none")

        yield Case(
            f"chunked_cross_entropy, {'trained' if trained else 'frozen'} head, both ways",
            f"{n} x {D}, {VOCABULARY} tokens",
            name,
            traffic.chunked_cross_entropy(n, VOCABULARY, D, dtype.itemsize, trained),
            forward_and_backward(
                partial(chunked_cross_entropy, hidden, weight, labels), hidden, weight
            ),
            forward_and_backward(plain, hidden, weight),
        )


def adapters(name: str, dtype: torch.dtype) -> Iterator[Case]:
    rank, w = 8, torch.randn(INNER, D).mul_(D**-0.5).to(dtype)
    x, A, B = (
        torch.randn(*shape).to(dtype).requires_grad_()
        for shape in ((TOKENS, D), (rank, D), (INNER, rank))
    )
    yield Case(
        "lora_linear, both ways",
        f"{TOKENS} x {D} -> {INNER}, rank {rank}",
        name,
        traffic.lora_linear(TOKENS, INNER, D, rank, dtype.itemsize),
        *(
            forward_and_backward(partial(f, x, w, A, B, 2.0), x, A, B)
            for f in (lora_linear, lora_linear_ref)
        ),
    )


def cases() -> Iterator[Case]:
    yield from generator()
    for name, dtype in DTYPES.items():
        for family in (perturbed, sparse, rotations, int4, heads, adapters):
            yield from family(name, dtype)


def medians_s(
    functions: Sequence[Callable[[], object]], rounds: int, is_ours: Sequence[bool]
) -> list[float]:
    """Of each, taken in turn; the first round is not counted. Products of what is ours go the way
    that they go in a run, all others torch's."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, found, ours in zip(functions, times, is_ours, strict=True):
            (cpu_products.install if ours else cpu_products.remove)()
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


def ceilings(rounds: int) -> tuple[float, dict[str, float]]:
    """Bytes/s of a copy of 256 MB, and FLOP/s of products of size 2,048 by dtype."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    (copy_s,) = medians_s([lambda: target.copy_(source)], rounds, [True])
    flops = {}
    for name, dtype in DTYPES.items():
        square = torch.randn(2048, 2048).to(dtype)
        (product_s,) = medians_s([lambda square=square: square @ square], rounds, [True])
        flops[name] = 2 * 2048**3 / product_s
    return 2 * source.nbytes / copy_s, flops


COLUMNS = (
    *("operation", "shape", "dtype", "bytes", "flops"),
    *("least_ms", "plain_ms", "ours_ms", "ours_to_plain", "ours_to_linear", "share_of_ceiling"),
)


def measure(case: Case, rounds: int, bandwidth: float, flops: dict[str, float]) -> tuple:
    one_way = "both ways" not in case.operation
    functions = [case.plain, case.ours] + ([case.dense] if case.dense else [])
    functions = [without_gradients(f) if one_way else f for f in functions]
    is_ours = [f is not functions[0] for f in functions]
    plain_s, ours_s, *dense = medians_s(functions, rounds, is_ours)
    least_s = case.traffic.least_s(bandwidth, flops[case.dtype])
    return (
        *(case.operation, case.shape, case.dtype, case.traffic.bytes, case.traffic.flops),
        *(f"{1e3 * s:.3g}" for s in (least_s, plain_s, ours_s)),
        f"{ours_s / plain_s:.2f}",
        f"{ours_s / dense[0]:.2f}" if dense else "",
        f"{least_s / ours_s:.2f}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="1 where the machine is shared")
    parser.add_argument("--only", default="", help="operations whose name holds this")
    parser.add_argument("--out", type=Path, help="writes OUT.csv and OUT.md as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reuse_heap()
    bandwidth, flops = ceilings(options.rounds)
    head = (
        f"torch {torch.__version__}, {options.threads} thread(s); ceilings in the same process: "
        f"copy {bandwidth / 1e9:.1f} GB/s, products "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in flops.items())
    )
    print(head, flush=True)
    rows = []
    for case in cases():
        if options.only in case.operation:
            rows.append(measure(case, options.rounds, bandwidth, flops))
            print(*rows[-1], sep=" | ", flush=True)
    if options.out:
        with open(options.out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([COLUMNS, *rows])
        lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
        lines += [" | ".join(map(str, row)) for row in rows]
        text = "\n".join(f"| {line} |" for line in lines)
        command, about = __doc__.split("\n\n", 2)[1:]
        options.out.with_suffix(".md").write_text(f"`{command}`: {head}\n\n{text}\n\n{about}")


if __name__ == "__main__":
    main()
