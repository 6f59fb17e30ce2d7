"""A packed, frozen base in plain operators: what bitsandbytes computes, for graphs.

`convert` puts these layers where bitsandbytes' are, and checks that their weights are the same
bits. Unlike bitsandbytes' int8 layer they leave activations as they are. Packed weights are inputs
of a graph, so that no runtime can fold them into float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyft.adapters import absmax, dense_weight
from tinyft.errors import InputError

BLOCK = 64  # weights of a 4-bit scale
WIDENED_ELEMENTS = 1 << 22  # of a table in 16 bits, at a time


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is made anew at each use.

    Attributes:
        again: trace a backward pass that makes the weight once more, instead of keeping it.
    """

    again = False

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale.float(), requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """For those who ask a layer for its precision: the scales."""
        return self.scale

    def tensors(self) -> tuple[Tensor, ...]:
        """What `dense` makes the weight of, the scales first."""
        return self.scale, self.packed

    def dense(self, scale: Tensor, packed: Tensor, *more: Tensor) -> Tensor:
        """The weight (out, in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if PackedLinear.again:
            y = _Product.apply(x, self.dense, *self.tensors())
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dense(*self.tensors()), self.bias)


class Int8Linear(PackedLinear):
    """int8 weights (out, in), a scale a row."""

    def dense(self, scale: Tensor, packed: Tensor) -> Tensor:
        return packed.to(scale.dtype) * scale.unsqueeze(1)


class Nf4Linear(PackedLinear):
    """Two 4-bit weights a byte (out * in / 2,), a scale for 64 of them; `code` (16,) is what they
    stand for."""

    def __init__(
        self, packed: Tensor, scale: Tensor, bias: Tensor | None, code: Tensor, shape: torch.Size
    ) -> None:
        super().__init__(packed, scale, bias)
        self.shape = shape
        both = torch.stack((code.repeat_interleave(16), code.repeat(16)), 1)  # of every byte
        self.register_buffer("pairs", both.float())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.scale, self.packed, self.pairs

    def dense(self, scale: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
        values = F.embedding(packed.int(), pairs)
        return (values.view(-1, BLOCK) * scale.unsqueeze(1)).view(self.shape)


class NarrowHead(nn.Module):
    """Logits of a table in 16 bits, which is widened some rows after the others."""

    def __init__(self, weight: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` -> `(..., vocabulary)`."""
        parts, last = [], x
        for index in torch.arange(len(self.weight)).split(WIDENED_ELEMENTS // x.shape[-1]):
            # After the part before: a runtime would widen all of them first.
            rows = F.embedding(index + 0 * (last.flatten()[0] > 0).long(), self.weight)
            parts.append(last := F.linear(x, rows.float()))
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """`x W'`, whose backward pass makes W from its bits again. Its scales then wait for the
    gradient: else a runtime would see the same thing computed twice and keep the first."""

    @staticmethod
    def forward(ctx, x: Tensor, dense: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.dense = dense
        return x @ dense(*tensors).t()

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        scale, *more = ctx.saved_tensors
        x = g @ ctx.dense(scale + 0 * g.flatten()[0], *more)
        return x, None, *[None] * (1 + len(more))


@contextmanager
def recomputing() -> Iterator[None]:
    """Within it, backward passes make packed weights again."""
    PackedLinear.again = True
    try:
        yield
    finally:
        PackedLinear.again = False


def convert(model: nn.Module) -> list[str]:
    """Replace bitsandbytes' layers, in place; returns the names of the packed tensors.

    Raises:
        InputError: a layer's weight is not what bitsandbytes makes of it.
    """
    names = []
    for name, layer in list(model.named_modules()):
        if not type(layer).__module__.startswith("bitsandbytes"):
            continue
        new = _converted(layer)
        if not torch.equal(new.dense(*new.tensors()), dense_weight(layer).float()):
            # bitsandbytes 0.50.2 on a CPU: rows that are no multiple of 64 get another row's scale.
            raise InputError(
                f"{name}: bitsandbytes makes another weight of its bits than a graph would. "
                f"Leave --base-bits at 16 for rows of {layer.in_features}."
            )
        model.set_submodule(name, new)
        names.append(f"{name}.packed")
    return names


def narrow_ends(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep embeddings and head, tied or not, in 16 bits, in place; without gradients."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = nn.Parameter(embeddings.weight.to(dtype), requires_grad=False)
    tied = head.weight is embeddings.weight
    weight = table if tied else nn.Parameter(head.weight.to(dtype), requires_grad=False)
    embeddings.weight = table
    embeddings.register_forward_hook(lambda module, args, out: out.float(), prepend=True)
    model.set_output_embeddings(NarrowHead(weight, head.bias))


def _converted(layer: nn.Module) -> PackedLinear:
    weight, bias = layer.weight, layer.bias
    state = getattr(weight, "quant_state", None)
    if state is None:
        return Int8Linear(weight.data, absmax(layer).float() / 127, bias)
    scale = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scale = dequantize_blockwise(state.absmax, state.state2) + state.offset
    if state.blocksize != BLOCK or state.shape.numel() % BLOCK:
        raise InputError(f"a 4-bit weight in blocks of {state.blocksize} has no graph")
    return Nf4Linear(weight.data.flatten(), scale.float(), bias, state.code, state.shape)
