"""Cross-entropy of a linear head, with the logits never whole in memory, forward or backward.

For hidden states h, head W and labels y, the loss of a row is `lse(z) - z_y` with `z = W h`, and
its gradient is `(softmax(z) - onehot(y)) W`. Both need one pass over z, so the vocabulary goes by
in blocks with a running maximum and sum (online softmax, Milakov & Gimelshein 2018). Blocks of the
vocabulary rather than of rows: each block of W is read once, and the matrix products keep all N
rows, which a CPU needs (blocks of 128 rows took 1.45x the time of one product on 2 cores).

The gradient to h is finished in the forward pass; backward only scales it. The head's own gradient
takes a second pass in the backward pass, which writes each block in place, so it is never
accumulated in low precision. `postpone` moves that pass behind everything else of the backward
pass: a (V, D) gradient is then never alive beside the activations.

On a GPU the products stay with torch and what lies between them, a dozen passes over a block of
logits, is one Triton kernel in each direction.

The label's own term is kept apart: `p_y - 1` is computed as `-sum_{j != y} p_j`, which stays exact
where the model is sure (p_y -> 1), in half precision too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyft.kernels.dispatch import choose

BLOCK_BYTES = 16 << 20  # one (N, block) buffer of logits; fits the shared cache of small machines
IGNORE = -100


def chunked_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`chunked_cross_entropy` in plain torch, with whole logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(_accumulator(hidden))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


class Postponed:
    """Where a head's gradient waits for its turn; made by `postpone`."""

    def __init__(self) -> None:
        self.passes: list[Callable[[], tuple[Tensor | None, Tensor | None]]] = []


def postpone(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None, Postponed]:
    """`weight` and `bias`, as they are, whose gradients will be made last in the backward pass.

    Call it before the forward pass of what makes the hidden states, and give the results to
    `chunked_cross_entropy` alone: autograd goes backward in the reverse order of making.
    """
    later = Postponed()
    weight, bias = _Postpone.apply(weight, bias, later)
    return weight, bias, later


class _Postpone(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, later: Postponed
    ) -> tuple[Tensor, Tensor | None]:
        ctx.later = later
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_weight, grad_bias = ctx.later.passes.pop(0)()
        for one in ctx.later.passes:
            for total, grad in zip((grad_weight, grad_bias), one(), strict=True):
                if total is not None:
                    total += grad
        ctx.later.passes.clear()
        return grad_weight, grad_bias, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    later: Postponed | None = None,
    block_bytes: int = BLOCK_BYTES,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of `softmax(hidden @ weight.T + bias)` against `labels`, row by row.

    Args:
        hidden: (N, D), floating.
        weight: (V, D), same dtype.
        labels: (N,) int64; rows labelled -100 have loss and gradient 0.
        bias: (V,) or None.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma), or None.
        later: of `postpone`, which `weight` and `bias` then come from; None makes their gradients
            at once.
        block_bytes: size of the one buffer that holds a block of logits.
        impl: see `dispatch`.

    Returns:
        Losses, (N,) float32 (float64 for float64 input). Differentiable once in hidden, weight
        and bias.
    """
    in_triton = choose("chunked_cross_entropy", impl, hidden, weight, labels, bias) == "triton"
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, bias, softcap, later, block_bytes, in_triton
    )


def _accumulator(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(hidden: Tensor, weight: Tensor, block_bytes: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, hidden @ weight[start:stop].T) in one buffer."""
    n, v = hidden.shape[0], weight.shape[0]
    width = min(v, max(64, block_bytes // (max(n, 1) * _accumulator(hidden).itemsize)))
    buffer = hidden.new_empty(n * width)
    for start in range(0, v, width):
        stop = min(start + width, v)
        logits = buffer[: n * (stop - start)].view(n, stop - start)
        torch.mm(hidden, weight[start:stop].t(), out=logits)
        yield start, stop, logits


def _finished(logits: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """A block's logits in the accumulator's dtype, in place where that is theirs."""
    if bias is not None:
        logits += bias
    logits = logits.to(_accumulator(logits))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _absorb(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    top: Tensor,
    others: Tensor,
    z_label: Tensor,
    pulls: bool,
) -> tuple[Tensor, Tensor]:
    """Take a block into the running sums; its logits are overwritten.

    Args:
        logits, bias: of the block, (N, width) and (width,).
        labels: (N,) int64, counted from the block's first column.
        softcap: as in `chunked_cross_entropy`.
        top, others, z_label: (N, 1), updated in place; see `forward`.
        pulls: the terms are wanted.

    Returns:
        `exp(z_j - top) f_j`, 0 at the label, (N, width) in the dtype of `logits`, meaningless
        unless `pulls`; and what sums so far were rescaled by, (N, 1).
    """
    z = _finished(logits, bias, softcap)
    rows, columns = _labelled(labels, z.shape[1])
    z_label[rows, 0] = z[rows, columns]
    new_top = torch.maximum(top, z.amax(1, keepdim=True))
    slope = _slope(z, softcap) if pulls else None
    terms = z.sub_(new_top).exp_()
    terms[rows, columns] = 0
    rescale = torch.exp(top - new_top)
    others.mul_(rescale).add_(terms.sum(1, keepdim=True))
    top.copy_(new_top)
    if slope is not None:
        terms *= slope
    return (terms.to(logits.dtype) if pulls else terms), rescale


def _logit_gradients(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    lse: Tensor,
    missing: Tensor,
    scale: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """`scale (softmax(z) - onehot(y)) f` of a block, (N, width); its logits are overwritten.

    `lse`, `missing` (1 - p_y) and `scale` are (N, 1); the rest is as in `_absorb`. Second comes
    its sum over the rows, (width,), where `sums` asks for it.
    """
    z = _finished(logits, bias, softcap)
    rows, columns = _labelled(labels, z.shape[1])
    slope = _slope(z, softcap)
    grad = z.sub_(lse).exp_()
    grad[rows, columns] = -missing[rows, 0]
    grad *= scale
    if slope is not None:
        grad *= slope
    return grad, grad.sum(0) if sums else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        later: Postponed | None,
        block_bytes: int,
        in_triton: bool,
    ) -> Tensor:
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        ctx.softcap, ctx.later, ctx.block_bytes = softcap, later, block_bytes
        ctx.in_triton = in_triton

        n, dtype = hidden.shape[0], _accumulator(hidden)
        top = hidden.new_full((n, 1), float("-inf"), dtype=dtype)  # running maximum
        others = torch.zeros_like(top)  # sum of exp(z_j - top) over j != y
        z_label = torch.zeros_like(top)
        # Gradient to hidden = (sum_{j != y} e_j f_j W_j - others f_y W_y) / total, where f is the
        # softcap's derivative (1 without); this accumulates the sum.
        pull = hidden.new_zeros(hidden.shape, dtype=dtype) if need_hidden else None

        absorb = _absorb
        if in_triton:
            from tinyft.kernels.gpu.chunked_cross_entropy import absorb
        for start, stop, logits in _blocks(hidden, weight, block_bytes):
            block_bias = None if bias is None else bias[start:stop]
            terms, rescale = absorb(
                logits, block_bias, labels - start, softcap, top, others, z_label, need_hidden
            )
            if pull is not None:
                pull.mul_(rescale).add_(terms @ weight[start:stop])

        total = others + torch.exp(z_label - top)
        lse = top + torch.log(total)
        live = (labels != IGNORE).unsqueeze(1)
        losses = ((lse - z_label) * live).squeeze(1)
        if pull is not None:
            label_pull = others
            if softcap is not None:
                label_pull = others * _slope(z_label, softcap)
            pull.sub_(label_pull * weight[labels.clamp(min=0)]).mul_(live / total)
            pull = pull.to(hidden.dtype)
        if need_weight or need_bias:
            missing = others / total  # 1 - p_y
            ctx.save_for_backward(pull, hidden, weight, labels, bias, lse, missing)
        else:
            ctx.save_for_backward(pull)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        pull, *of_head = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if pull is not None:
            grad_hidden = (pull * grad_losses.unsqueeze(1)).to(pull.dtype)
        if of_head:
            needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
            options = ctx.softcap, ctx.block_bytes, ctx.in_triton
            make = partial(_head_gradients, *of_head, grad_losses, *options, *needs)
            if ctx.later is None:
                grad_weight, grad_bias = make()
            else:
                ctx.later.passes.append(make)
                _, weight, _, bias, *_ = of_head
                grad_weight, grad_bias = (
                    weight.new_zeros(()).expand_as(t) if need else None
                    for t, need in zip((weight, bias), needs, strict=True)
                )
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


def _head_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    missing: Tensor,
    grad_losses: Tensor,
    softcap: float | None,
    block_bytes: int,
    in_triton: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, by a second pass over the logits."""
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = torch.empty_like(bias) if need_bias else None
    scale = (grad_losses * (labels != IGNORE)).unsqueeze(1)
    logit_gradients = _logit_gradients
    if in_triton:
        from tinyft.kernels.gpu.chunked_cross_entropy import logit_gradients
    for start, stop, logits in _blocks(hidden, weight, block_bytes):
        block_bias = None if bias is None else bias[start:stop]
        grad_logits, sums = logit_gradients(
            logits, block_bias, labels - start, softcap, lse, missing, scale, need_bias
        )
        if grad_bias is not None:
            grad_bias[start:stop] = sums
        if grad_weight is not None:
            torch.mm(grad_logits.to(weight.dtype).t(), hidden, out=grad_weight[start:stop])
    return grad_weight, grad_bias


def _labelled(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows whose label lies in a block of `width` columns, and the label's column in it."""
    rows = ((labels >= 0) & (labels < width)).nonzero().squeeze(1)
    return rows, labels[rows]


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """d(capped)/d(raw) from the capped logits; None without a cap."""
    return None if softcap is None else 1 - (logits / softcap).square()
