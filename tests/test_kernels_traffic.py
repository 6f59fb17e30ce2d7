"""The predicted traffic of the kernels against the tensors that their launches are given."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import needs_triton

from tinyft.kernels import traffic
from tinyft.kernels.dispatch import recording
from tinyft.kernels.int4_linear import Int4Weight
from tinyft.kernels.packed import Int8Weight
from tinyft.kernels.perturbed_linear import KINDS, Direction
from tinyft.kernels.traffic import Traffic

pytestmark = needs_triton
M, OUT, COLS, SCALES = 10, 96, 192, (1e-3, -1e-3)
empty = partial(torch.empty, device="meta")
BITS = (16, 8, 4)


def weight(bits, dtype, rows=OUT):
    if bits == 16:
        return empty(rows, COLS, dtype=dtype)
    if bits == 8:
        return Int8Weight(empty(rows, COLS, dtype=torch.int8), empty(rows))
    packed = empty(rows, COLS // 2, dtype=torch.uint8)
    return Int4Weight(packed, empty(rows, COLS // 64, dtype=torch.float16), COLS)


def launched_bytes(call, twice=()):
    """Of every tensor of every launch once, those in `twice` again: they are read and written."""
    with recording() as launches:
        call()
    total = sum(tensor.nbytes for tensor in twice)
    for _, args, _ in launches:
        tensors = {id(a): a for a in args if isinstance(a, torch.Tensor)}
        total += sum(tensor.nbytes for tensor in tensors.values())
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_layers(kind, dtype):
    from tinyft.kernels.gpu import perturbed_linear as gpu

    z, x = Direction(kind, 1, 2, 3), empty(2 * M, COLS, dtype=dtype)
    run = gpu.structured if kind in ("sign-rank1", "hadamard") else gpu.dense
    for bits in BITS:
        found = traffic.perturbed_linear(kind, 2 * M, OUT, COLS, dtype.itemsize, bits)
        call = partial(run, x, weight(bits, dtype), z, SCALES, None)
        assert found.bytes == launched_bytes(call)
    w, dither = weight(16, dtype), empty(1 << 16, dtype=torch.int32)
    for terms in ([(z, 1e-3)], [(Direction(kind, 1, 2, 3, probe), 1e-3) for probe in range(5)]):
        call = partial(gpu.subtract_, w, terms, 1.0, 0, dither, 0)
        found = traffic.subtract_directions(kind, OUT, COLS, dtype.itemsize, len(terms))
        assert found.bytes == launched_bytes(call, twice=[w])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_sparse_layers(bits, dtype):
    """Every block selected, so that the whole weight is read; the list of blocks is not counted."""
    from tinyft.kernels.gpu import sparse_linear as gpu

    x, h = empty(M, COLS, dtype=dtype), empty(M, OUT, dtype=dtype)
    w, u, blocks = weight(bits, dtype), weight(bits, dtype), empty(3, dtype=torch.int64)
    shape = M, OUT, COLS, dtype.itemsize, bits
    both = w, u, blocks, 32, "silu"
    for found, call in (
        (traffic.sparse_linear(*shape), partial(gpu.product, x, w, blocks, 32)),
        (
            Traffic(x.nbytes - h.nbytes, h.nbytes - x.nbytes, 0) + traffic.sparse_linear(*shape),
            partial(gpu.transposed_product, h, w, blocks, 32),
        ),
        (traffic.sparse_gate_up(*shape), partial(gpu.gate_up, x, *both, True)),
        (
            traffic.sparse_gate_up_backward(*shape),
            partial(gpu.gate_up_backward, h, h.clone(), h.clone(), *both),
        ),
    ):
        assert found.bytes == launched_bytes(call) - blocks.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_others(dtype):
    from tinyft.kernels.gpu import chunked_cross_entropy, hadamard_quant, int4_linear, philox

    x, w, size = empty(M, COLS, dtype=dtype), weight(4, dtype), dtype.itemsize
    for bits, run in ((16, int4_linear.product), (8, int4_linear.product_in_8_bits)):
        found = traffic.int4_linear(M, OUT, COLS, size, activation_bits=bits)
        assert found.bytes == launched_bytes(partial(run, x, w, None))
    back = partial(int4_linear.transposed_product, empty(M, OUT, dtype=dtype), w)
    assert traffic.int4_linear(M, OUT, COLS, size).bytes == launched_bytes(back)
    rotated = partial(hadamard_quant.rotate, x, bits=4)
    assert traffic.rotate(M, COLS, 12, size, True).bytes == launched_bytes(rotated)
    logits, column = empty(M, 4096, dtype=dtype), partial(empty, M, 1)
    block = logits, None, empty(M, dtype=torch.int64), None, column(), column(), column()
    moved = launched_bytes(partial(chunked_cross_entropy.absorb, *block, True), twice=[logits])
    rest = M * (8 + 4 * 4)  # labels and the running sums, which are not counted
    assert traffic.cross_entropy_pass(M, 4096, size).bytes == moved - rest
    for kind in ("signs", "levels", "gaussians"):
        drawn = partial(philox.matrix, kind, empty(7, dtype=torch.int64), COLS, 1, 2, 3, 4)
        assert traffic.matrix(kind, 7, COLS).bytes == launched_bytes(drawn)


def test_flops_are_those_of_the_products_and_little_more():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(empty(M, COLS), empty(OUT, COLS))
    product = counter.get_total_flops()
    for found, products in (
        (traffic.perturbed_linear("sign-rank1", M, OUT, COLS, 2), 1),
        (traffic.perturbed_linear("hadamard", M, OUT, COLS, 2), 2),
        (traffic.sparse_linear(M, OUT, COLS, 2), 1),
        (traffic.sparse_gate_up(M, OUT, COLS, 2), 2),
        (traffic.sparse_gate_up_backward(M, OUT, COLS, 2), 2),
        (traffic.int4_linear(M, OUT, COLS, 2), 1),
    ):
        assert products * product <= found.flops <= 1.1 * products * product


def test_least_time():
    moved = Traffic(60, 40, 1000)
    assert moved.bytes == 100
    assert moved.least_s(bytes_per_s=10, flops_per_s=1000) == 10
    assert moved.least_s(bytes_per_s=1000, flops_per_s=100) == 10
