"""Triton twin of the passes between the products of `tinyft.kernels.chunked_cross_entropy`.

A program takes some rows of a block of logits and writes over them what the next product wants: one
read and one write of the block, the second read coming from the cache. GPU speed unmeasured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyft.kernels.dispatch import launch
from tinyft.kernels.gpu.common import cast


@triton.jit
def capped(logits, bias, at_row, at, live, width, softcap):
    """Logits `(rows, columns)` in float32, biased and capped; those not live are of no account."""
    z = tl.load(logits + at_row.to(tl.int64) * width + at, live, 0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at, at < width, 0.0).to(tl.float32)
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(z) / softcap)  # at most 1
        tanh = (1 - e) / (1 + e)
        z = softcap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def slope(z, softcap):
    """d(capped)/d(raw) from the capped logits."""
    tanh = z / softcap
    return 1 - tanh * tanh


@triton.jit(do_not_specialize=["n"])
def absorb_kernel(
    logits, bias, labels, top, others, z_label, rescale, n, width, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PULLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_row, at_row = rows < n, rows[:, None]
    label = tl.load(labels + rows, live_row, -1)
    highest = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    of_label = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        at = first + tl.arange(0, COLUMNS)[None, :]
        live = live_row[:, None] & (at < width)
        z = capped(logits, bias, at_row, at, live, width, softcap)
        highest = tl.maximum(highest, tl.where(at < width, z, float("-inf")))
        of_label = tl.where(at == label[:, None], z, of_label)
    old_top = tl.load(top + rows, live_row, float("-inf"))
    new_top = tl.maximum(old_top, tl.max(highest, 1))
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        at = first + tl.arange(0, COLUMNS)[None, :]
        live = live_row[:, None] & (at < width)
        z = capped(logits, bias, at_row, at, live, width, softcap)
        term = tl.exp(z - new_top[:, None])
        term = tl.where(live & (at != label[:, None]), term, 0.0)
        total += term
        if PULLS:
            if softcap is not None:
                term *= slope(z, softcap)
            out = logits + at_row.to(tl.int64) * width + at
            tl.store(out, cast(term, logits.dtype.element_ty), live)
    shrink = tl.exp(old_top - new_top)
    tl.store(top + rows, new_top, live_row)
    tl.store(rescale + rows, shrink, live_row)
    sums = tl.load(others + rows, live_row, 0.0) * shrink + tl.sum(total, 1)
    tl.store(others + rows, sums, live_row)
    # Labels beyond the matrix are -1, so this is within it.
    tl.store(z_label + rows, tl.sum(of_label, 1), (label >= 0) & (label < width))


@triton.jit(do_not_specialize=["n"])
def logit_gradients_kernel(
    logits, bias, labels, lse, missing, scale, sums, n, width, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live_row, at_row = rows < n, rows[:, None]
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    live = live_row[:, None] & (at < width)
    z = capped(logits, bias, at_row, at, live, width, softcap)
    grad = tl.exp(z - tl.load(lse + rows, live_row, 0.0)[:, None])
    label = tl.load(labels + rows, live_row, -1)[:, None]
    grad = tl.where(at == label, -tl.load(missing + rows, live_row, 0.0)[:, None], grad)
    grad *= tl.load(scale + rows, live_row, 0.0)[:, None]
    if softcap is not None:
        grad *= slope(z, softcap)
    out = logits + at_row.to(tl.int64) * width + at
    tl.store(out, cast(grad, logits.dtype.element_ty), live)
    if sums is not None:  # before the cast rounds
        column_sums = tl.sum(tl.where(live, grad, 0.0), 0)[None, :]
        tl.store(sums + tl.program_id(0).to(tl.int64) * width + at, column_sums, at < width)


def absorb(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    top: Tensor,
    others: Tensor,
    z_label: Tensor,
    pulls: bool,
) -> tuple[Tensor, Tensor]:
    """`_absorb` of the reference."""
    n, width = logits.shape
    rescale = torch.empty_like(top)
    launch(
        absorb_kernel,
        (triton.cdiv(n, 4),),
        *(logits, bias, labels, top, others, z_label, rescale, n, width),
        softcap if softcap is None else float(softcap),
        **{"ROWS": 4, "COLUMNS": 256, "PULLS": pulls},
        num_warps=4,
    )
    return logits, rescale


def logit_gradients(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    lse: Tensor,
    missing: Tensor,
    scale: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """`_logit_gradients` of the reference, in the dtype of `logits`."""
    n, width = logits.shape
    grid = (triton.cdiv(n, 16), triton.cdiv(width, 128))
    partial_sums = lse.new_empty(grid[0], width) if sums else None
    launch(
        logit_gradients_kernel,
        grid,
        *(logits, bias, labels, lse, missing, scale.contiguous(), partial_sums, n, width),
        softcap if softcap is None else float(softcap),
        **{"ROWS": 16, "COLUMNS": 128},
        num_warps=4,
    )
    return logits, None if partial_sums is None else partial_sums.sum(0)
