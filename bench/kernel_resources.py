"""What every Triton kernel takes of a GPU, per architecture, from compiling it without one.

python bench/kernel_resources.py > bench/results/kernel_resources.csv
python bench/kernel_resources.py --targets sm_86 gfx1100 --once

Columns: the configuration (operation, dtype, rows of x), the kernel, the target, registers a
thread, bytes of them that spill, shared memory a program, warps, and Triton's version, which the
numbers depend on. The kernels' speed is unmeasured.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, fields
from functools import partial
from typing import TextIO

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from torch import Tensor

from tinyft.kernels import int4_linear, packed, perturbed_linear, philox
from tinyft.kernels.aot import TARGETS, Usage, compile_for
from tinyft.kernels.dispatch import recording
from tinyft.kernels.gpu import chunked_cross_entropy as gpu_cross_entropy
from tinyft.kernels.gpu import hadamard_quant as gpu_hadamard_quant
from tinyft.kernels.gpu import int4_linear as gpu_int4_linear
from tinyft.kernels.gpu import perturbed_linear as gpu_perturbed_linear
from tinyft.kernels.gpu import philox as gpu_philox
from tinyft.kernels.gpu import sparse_linear as gpu_sparse_linear

COLUMNS = ("configuration", *(field.name for field in fields(Usage)), "triton")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
OUT, IN = 1536, 576
ROWS = (512, 2)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def int4_weight(group: int) -> int4_linear.Int4Weight:
    groups = -(-IN // group)
    packed = empty(OUT, groups * group // 2, dtype=torch.uint8)
    return int4_linear.Int4Weight(packed, empty(OUT, groups, dtype=torch.float16), IN)


def configurations() -> Iterator[tuple[str, Callable[[], object]]]:
    """`(name, call)` for everything that ships; the kernels differ by type and, some, by rows."""
    integers = partial(empty, dtype=torch.int64)
    int8 = packed.Int8Weight(empty(OUT, IN, dtype=torch.int8), empty(OUT))
    yield "philox", lambda: gpu_philox.words(integers(4, 999), 1)
    for kind in philox.PER_BLOCK:
        yield kind, partial(gpu_philox.matrix, kind, integers(99), IN, 1, 2, 3, 4)
    for name, dtype in DTYPES.items():
        w, scales = empty(OUT, IN, dtype=dtype), (1e-3, -1e-3)
        # Packed weights and activations, and functions but the first, in one dtype: float32's tiles
        # are smaller, and products of integers are the same.
        packed_too = [("int4 ", int4_weight(64)), ("int8 ", int8)] if name == "bfloat16" else []
        for kind in perturbed_linear.KINDS:
            z = perturbed_linear.Direction(kind, 1, 2, 3)
            structured = kind in perturbed_linear.STRUCTURED
            run = getattr(gpu_perturbed_linear, "structured" if structured else "dense")
            for rows in ROWS:
                x = empty(rows, IN, dtype=dtype)
                yield f"{kind} {name} {rows}", partial(run, x, w, z, scales, None)
                for bits, weight in ((8, int8), (4, int4_weight(64))):
                    yield (
                        f"{kind} int{bits} {name} {rows}",
                        partial(run, x, weight, z, scales, None),
                    )
            dither = empty(1 << 16, dtype=torch.int32)
            terms = [(perturbed_linear.Direction(kind, 1, 2, 3, probe), 1e-3) for probe in range(5)]
            update = partial(gpu_perturbed_linear.subtract_, w, terms, 1.0, 0, dither, 0)
            yield f"update {kind} {name}", update
        for n in (IN, OUT, 8192, 14336):
            x = empty(512, n, dtype=dtype)
            yield f"hadamard {n} {name}", partial(gpu_hadamard_quant.rotate, x, bits=4)
            back = partial(gpu_hadamard_quant.rotate, x, transposed=True)
            yield f"hadamard {n} backward {name}", back
        for softcap in (None, 30.0):
            case = f"cross-entropy {'capped ' if softcap else ''}{name}"
            logits, labels = empty(512, 4096, dtype=dtype), integers(512)
            column = partial(empty, 512, 1)
            block = logits, None, labels, softcap, column(), column(), column()
            yield case, partial(gpu_cross_entropy.absorb, *block, True)
            yield case, partial(gpu_cross_entropy.logit_gradients, *block, True)
        for rows in ROWS:
            blocks = integers(8)
            x, h = empty(rows, IN, dtype=dtype), empty(rows, 8 * 64, dtype=dtype)
            for bits, weight in (("", w), *packed_too):
                of, case = gpu_sparse_linear, f"sparse {bits}{name} {rows}"
                yield case, partial(of.product, x, weight, blocks, 64)
                yield case, partial(of.transposed_product, h, weight, blocks, 64)
                for f in of.CODES if weight is w and packed_too else ("silu",):
                    both, of_f = (weight, weight, blocks, 64, f), f"{case} {f}"
                    yield of_f, partial(of.gate_up, x, *both, True)
                    yield of_f, partial(of.gate_up_backward, h, h, h, *both)
        for group in int4_linear.GROUPS:
            weight = int4_weight(group)
            for rows in ROWS:
                x, grad_y = empty(rows, IN, dtype=dtype), empty(rows, OUT, dtype=dtype)
                case = f"int4 {group} {name} {rows}"
                yield case, partial(gpu_int4_linear.product, x, weight, None)
                if packed_too:
                    yield case, partial(gpu_int4_linear.product_in_8_bits, x, weight, None)
                yield case, partial(gpu_int4_linear.transposed_product, grad_y, weight)


def table(targets: Sequence[str], once: bool, only: str) -> Iterator[tuple]:
    """The rows of the CSV for the given targets; `once`: only a kernel's first configuration;
    `only`: configurations whose name holds it."""
    seen: set[str] = set()
    for name, call in configurations():
        if only not in name:
            continue
        with recording() as launches:
            call()
        kernels = {kernel.__name__ for kernel, *_ in launches}
        if once and kernels <= seen:
            continue
        seen |= kernels
        for target in targets:
            for usage in compile_for(target, call):
                yield name, *astuple(usage), triton.__version__


def main(arguments: Sequence[str] | None = None, out: TextIO = sys.stdout) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--once", action="store_true", help="each kernel in one configuration")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    options = parser.parse_args(arguments)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(table(options.targets, options.once, options.only))


if __name__ == "__main__":
    main()
