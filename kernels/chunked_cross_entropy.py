"""Cross-entropy of a linear head, with the logits never whole in memory, forward or backward.

For hidden states h, head W and labels y, the loss of a row is `lse(z) - z_y` with `z = W h`, and
its gradient is `(softmax(z) - onehot(y)) W`. Both need one pass over z, so the vocabulary goes by
in blocks with a running maximum and sum (online softmax, Milakov & Gimelshein 2018). Blocks of the
vocabulary rather than of rows: each block of W is read once, and the matrix products keep all N
rows, which a CPU needs (blocks of 128 rows took 1.45x the time of one product on 2 cores).

The gradient to h is finished in the forward pass; backward only scales it. The head's own gradient
takes a second pass in the backward pass, which writes each block in place, so it is never
accumulated in low precision. `postpone` moves that pass behind everything else of the backward
pass: a (V, D) gradient is then never alive beside the activations. Inside `using_rows` it is never
alive at all: its rows are used a block at a time, those of a tied embedding's lookups included.

On a GPU the products stay with torch and what lies between them, a dozen passes over a block of
logits, is one Triton kernel in each direction.

The label's own term is kept apart: `p_y - 1` is computed as `-sum_{j != y} p_j`, which stays exact
where the model is sure (p_y -> 1), in half precision too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyft.kernels.dispatch import choose

BLOCK_BYTES = 16 << 20  # one (N, block) buffer of logits; fits the shared cache of small machines
_LOOKUP_ROWS = 1 << 12  # of a gradient in 16 bits that are summed up at a time
IGNORE = -100
# Of a gradient by blocks: the first row, the weight's rows, the bias's.
_Block = tuple[int, Tensor | None, Tensor | None]


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


# Uses the gradient of a weight's rows from the first number on.
UseRows = Callable[[int, Tensor], None]
_USERS: dict[int, UseRows] = {}


@contextmanager
def using_rows(users: Mapping[Tensor, UseRows]) -> Iterator[None]:
    """For backward passes inside: the gradient of a head's weight that is named here goes to its
    user in blocks of rows, each of them once and in order, and the weight gets none."""
    _USERS.update({id(weight): use for weight, use in users.items()})
    try:
        yield
    finally:
        for weight in users:
            del _USERS[id(weight)]


class Postponed:
    """Where a head's gradient waits for its turn; made by `postpone`.

    Attributes:
        weight: the head's.
        alone: no other gradient of the weight is to come but those of `lookups`.
        passes: `make(grad_weight)` writes the gradients, the weight's into a tensor if there is
            one, and yields its blocks `(start, rows, of the bias)`.
        lookups: of a tied embedding: tokens (N,), and the gradients (N, D) of their rows.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.alone = weight, True
        self.passes: list[Callable[[Tensor | None], Iterator[_Block]]] = []
        self.lookups: list[tuple[Tensor, Tensor]] = []


def postpone(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None, Postponed]:
    """`weight` and `bias`, as they are, whose gradients will be made last in the backward pass.

    Call it before the forward pass of what makes the hidden states, and give the results to
    `chunked_cross_entropy` alone: autograd goes backward in the reverse order of making.
    """
    later = Postponed(weight)
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
        later, (need_weight, need_bias, _) = ctx.later, ctx.needs_input_grad
        passes = later.passes
        lookups = [torch.cat(parts) for parts in zip(*later.lookups, strict=True)]
        later.passes, later.lookups = [], []
        at_once = need_weight and later.alone and len(passes) == 1
        use = _USERS.get(id(later.weight)) if at_once else None
        if use is not None:
            of_bias = []
            for start, rows, bias in passes[0](None):
                if lookups:
                    _add_lookups(rows, start, *lookups)
                use(start, rows)
                of_bias.append(bias)
            return None, torch.cat(of_bias) if need_bias else None, None
        grad_weight, grad_bias = _whole(passes[0], later.weight, need_weight, need_bias)
        for make in passes[1:]:
            more = _whole(make, later.weight, need_weight, need_bias)
            for total, grad in zip((grad_weight, grad_bias), more, strict=True):
                if total is not None:
                    total += grad
        if lookups and need_weight:
            _add_lookups(grad_weight, 0, *lookups)
        return grad_weight, grad_bias, None


def _whole(
    make: Callable[[Tensor | None], Iterator[_Block]],
    weight: Tensor,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias that `make` makes in blocks."""
    total = torch.empty_like(weight) if need_weight else None
    of_bias = [bias for *_, bias in make(total)]
    return total, torch.cat(of_bias) if need_bias else None


def _add_lookups(rows: Tensor, start: int, tokens: Tensor, grads: Tensor) -> None:
    """Add to rows of a gradient, from row `start` of it on, those of the tokens that stand there,
    in place; sums of what a token has several times are rounded once."""
    for first in range(0, len(rows), _LOOKUP_ROWS):
        part = rows[first : first + _LOOKUP_ROWS]
        place = tokens - (start + first)
        elsewhere = ((place < 0) | (place >= len(part))).unsqueeze(1)
        sums = part.to(_accumulator(part))
        sums.index_add_(
            0, place.clamp(0, len(part) - 1), grads.masked_fill(elsewhere, 0).to(sums.dtype)
        )
        if sums is not part:
            part.copy_(sums)


class TiedLookup(torch.autograd.Function):
    """`weight[tokens]`, for an embedding whose weight is a head's, too, whose gradient waits.

    `TiedLookup.apply(tokens, weight, padding_idx, later)`: the gradients of the rows are added to
    the head's in place, instead of in a second (V, D) tensor of zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, padding_idx: int | None, later: Postponed
    ) -> Tensor:
        ctx.shape, ctx.padding_idx, ctx.later = weight.shape, padding_idx, later
        ctx.save_for_backward(tokens)
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, rows = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:  # as in torch: it keeps its row
            rows = rows.masked_fill((tokens == ctx.padding_idx).unsqueeze(1), 0)
        if ctx.later.passes:
            ctx.later.lookups.append((tokens, rows))
            return None, None, None, None
        total = rows.new_zeros(ctx.shape)  # the head's is made already, or never
        _add_lookups(total, 0, tokens, rows)
        return None, total, None, None


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


def _blocks(
    hidden: Tensor, weight: Tensor, block_bytes: int, beside: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (start, stop, hidden @ weight[start:stop].T) in one buffer; a second one, of `beside`
    numbers a row of the weight, would be no larger."""
    n, v = hidden.shape[0], weight.shape[0]
    width = min(v, max(64, block_bytes // (max(n, beside) * _accumulator(hidden).itemsize)))
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
                grad_weight, grad_bias = _whole(make, of_head[1], *needs)
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
    grad_weight: Tensor | None,
) -> Iterator[_Block]:
    """Gradients of weight and bias by a second pass over the logits: blocks of rows, those of the
    weight in `grad_weight`, or without that in a buffer that is overwritten by the next."""
    beside, buffer = 1, None
    if need_weight and grad_weight is None:
        beside = weight.shape[1]
    scale = (grad_losses * (labels != IGNORE)).unsqueeze(1)
    logit_gradients = _logit_gradients
    if in_triton:
        from tinyft.kernels.gpu.chunked_cross_entropy import logit_gradients
    for start, stop, logits in _blocks(hidden, weight, block_bytes, beside):
        block_bias = None if bias is None else bias[start:stop]
        grad_logits, sums = logit_gradients(
            logits, block_bias, labels - start, softcap, lse, missing, scale, need_bias
        )
        rows = None
        if need_weight:
            if grad_weight is not None:
                rows = grad_weight[start:stop]
            else:
                buffer = torch.empty_like(weight[start:stop]) if buffer is None else buffer
                rows = buffer[: stop - start]
            torch.mm(grad_logits.to(weight.dtype).t(), hidden, out=rows)
        yield start, rows, None if sums is None else sums.to(weight.dtype)


def _labelled(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows whose label lies in a block of `width` columns, and the label's column in it."""
    rows = ((labels >= 0) & (labels < width)).nonzero().squeeze(1)
    return rows, labels[rows]


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """d(capped)/d(raw) from the capped logits; None without a cap."""
    return None if softcap is None else 1 - (logits / softcap).square()
