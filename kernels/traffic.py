"""What each operation has to move and to compute: bytes to and from memory, and FLOPs.

Each tensor is counted once where it is read and once where it is written, as if caches held the
rest: what the Triton kernels are predicted to move (their GPU speed is unmeasured), and with a
machine's bandwidth and FLOP/s the least time that an operation can take on it. FLOPs are those of
the mathematics; integers (the generator's, unpacking) are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

TABLE_BYTES = 4 << 16  # of the Gaussians
DITHER_BYTES = 4 << 16


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, and FLOPs."""

    read_bytes: int
    written_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.flops + other.flops,
        )

    def least_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """The time below which no implementation can be on such a machine."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def weight_bytes(rows: int, cols: int, itemsize: int, bits: int = 16, group: int = 64) -> int:
    """Of rows of a weight: at 16 bits as it is, of that `itemsize`; at 8 or 4 with its scales."""
    if bits == 8:
        return rows * (cols + 4)
    groups = -(-cols // group)
    return rows * groups * (group // 2 + 2) if bits == 4 else rows * cols * itemsize


def matrix(kind: str, rows: int, cols: int) -> Traffic:
    """`philox.matrix`."""
    tables = {"signs": 0, "levels": 64, "gaussians": TABLE_BYTES}
    return Traffic(8 * rows + tables[kind], 4 * rows * cols, 0)


def perturbed_linear(
    kind: str, m: int, out: int, cols: int, itemsize: int, bits: int = 16, copies: int = 2
) -> Traffic:
    """`perturbed_linear` of m rows, all copies together; W is read once for both signs."""
    read = m * cols * itemsize + weight_bytes(out, cols, itemsize, bits)
    flops = 2 * m * out * cols
    if kind == "hadamard":  # a second product, by signs
        flops += 2 * m * out * cols + m * out
    elif kind == "sign-rank1":
        flops += 2 * m * (out + cols)
    else:
        flops += 2 * copies * out * cols
    read += TABLE_BYTES if kind == "gaussian" else 0
    return Traffic(read, m * out * itemsize, flops)


def subtract_directions(kind: str, rows: int, cols: int, itemsize: int, count: int = 1) -> Traffic:
    """`subtract_directions_` of `count` terms, 16-bit weights rounded stochastically."""
    size, read = rows * cols * itemsize, 20 * count  # counters and factors
    read += TABLE_BYTES if kind == "gaussian" else 0
    read += DITHER_BYTES if itemsize == 2 else 0
    return Traffic(size + read, size, (1 + 2 * count) * rows * cols)


def sparse_linear(m: int, selected: int, cols: int, itemsize: int, bits: int = 16) -> Traffic:
    """`sparse_linear`, forward or backward, transposed or not: `selected` rows of W are read."""
    moved = selected * m * itemsize, cols * m * itemsize
    read = weight_bytes(selected, cols, itemsize, bits) + moved[0]
    return Traffic(read, moved[1], 2 * m * selected * cols)


def sparse_gate_up(m: int, selected: int, cols: int, itemsize: int, bits: int = 16) -> Traffic:
    """`sparse_gate_up` forward, both factors kept for the backward pass."""
    read = 2 * weight_bytes(selected, cols, itemsize, bits) + m * cols * itemsize
    return Traffic(read, 3 * m * selected * itemsize, 4 * m * selected * cols + 5 * m * selected)


def sparse_gate_up_backward(
    m: int, selected: int, cols: int, itemsize: int, bits: int = 16
) -> Traffic:
    """`sparse_gate_up` backward."""
    read = 2 * weight_bytes(selected, cols, itemsize, bits) + 3 * m * selected * itemsize
    return Traffic(read, m * cols * itemsize, 4 * m * selected * cols + 10 * m * selected)


def rotate(m: int, n: int, order: int, itemsize: int, quantize: bool) -> Traffic:
    """`hadamard_quant` of m rows, n = order 2^k: a product by the small matrix, k butterflies."""
    k = (n // order).bit_length() - 1
    flops = m * n * (k + 1 + (2 * order if order > 1 else 0) + (8 if quantize else 0))
    return Traffic(m * n * itemsize + 4 * order * order, m * n * itemsize, flops)


def int4_linear(
    m: int, out: int, cols: int, itemsize: int, group: int = 64, activation_bits: int = 16
) -> Traffic:
    """`int4_linear`, forward or (at 16 bits) backward; 8-bit activations are written and read."""
    packed = weight_bytes(out, cols, itemsize, 4, group)
    moved = Traffic(m * cols * itemsize + packed, m * out * itemsize, 2 * m * out * cols)
    if activation_bits == 8:
        q = m * (cols + 4)
        moved += Traffic(q, q, 4 * m * cols)
    return moved


def cross_entropy_pass(n: int, v: int, itemsize: int) -> Traffic:
    """One pass of `chunked_cross_entropy` over a block of logits, in place, between products."""
    return Traffic(n * v * itemsize, n * v * itemsize, 6 * n * v)


def chunked_cross_entropy(
    n: int, v: int, d: int, itemsize: int, trained_head: bool = False
) -> Traffic:
    """Forward and backward: the products' operands once each, logits staying in the cache."""
    products = 4 if trained_head else 2
    read = (2 if trained_head else 1) * (n * d + v * d) * itemsize
    written = (n * d + (v * d if trained_head else 0)) * itemsize
    return Traffic(read, written, 2 * n * v * d * products + products // 2 * 6 * n * v)


def lora_linear(m: int, out: int, cols: int, rank: int, itemsize: int) -> Traffic:
    """`lora_linear` forward and backward: W is read in both."""
    w, ab = out * cols * itemsize, rank * (out + cols) * itemsize
    x, y = m * cols * itemsize, m * out * itemsize
    flops = 4 * m * out * cols + 6 * m * rank * (out + cols)
    return Traffic(2 * w + 2 * ab + 2 * x + y, y + x + ab, flops)
