"""A frozen linear layer with its adapter, multiplied by some of its rows or columns only.

Slices of the weight are gathered as rows of a contiguous matrix: where columns are wanted (of the
down and the output projection), the weight is laid out transposed in place, which changes neither
its values nor its shape.

Under `checkpointing="selective"` a gathered slice is made again in the backward pass, unless it is
small beside what the selection spares (`keep`): gathering is one pass over memory, the product with
it hundreds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tinyft.adapters import LoRALinear, absmax, dense_weight
from tinyft.errors import InputError
from tinyft.kernels.dispatch import choose
from tinyft.kernels.lora_linear import add_low_rank, lora_linear
from tinyft.kernels.rows import columns_linear, rows_linear
from tinyft.kernels.sparse_linear import sparse_linear
from tinyft.memory import forget_mapped
from tinyft.rotated.layers import QuantLinear


class Projection:
    """`y = x W' + b + s (x A') B'` for a layer of a model, by parts.

    Args:
        layer: `LoRALinear`, or one of the layers that it takes as a base.
        by: `"rows"` or `"columns"`: what will be selected. Columns of a plain weight are laid out
            for it now.
        exact: False: `scattered` and `from_some` pass no gradient through the base, as published.

    Raises:
        InputError: a layer of a rotated model.
    """

    def __init__(self, layer: nn.Module, by: str, *, exact: bool = True) -> None:
        self.layer, self.by, self.exact = layer, by, exact
        self.adapter = layer if isinstance(layer, LoRALinear) else None
        self.base = layer.base if self.adapter is not None else layer
        if isinstance(self.base, QuantLinear):
            raise InputError(
                "SparseLoRA leaves out channels, and the rotations of this model (RoSTE's) mix "
                "them. Use --method lora."
            )
        self.n_out, self.n_in = self._shape()
        self._stored = self._lay_out() if self.base.weight.is_floating_point() else None

    def _shape(self) -> tuple[int, int]:
        if hasattr(self.base, "out_features"):
            return self.base.out_features, self.base.in_features
        return tuple(dense_weight(self.base).shape)

    @torch.no_grad()
    def _lay_out(self) -> nn.Parameter:
        """The base's own memory as a matrix whose rows are what is selected."""
        weight = self.base.weight
        flipped = (dense_weight(self.base) is not weight) != (self.by == "columns")
        stored = weight.detach().t() if flipped else weight.detach()
        if not stored.is_contiguous():
            before, stored = stored, stored.contiguous()
            weight.data = stored.t() if flipped else stored
            forget_mapped(before.data_ptr(), before.nbytes)
        # A parameter, which is never counted among what a backward pass keeps.
        return nn.Parameter(stored, requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def dense(self) -> Tensor:
        """The weight (out, in)."""
        return dense_weight(self.base)

    def gather(self, index: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
        """Rows (k, in), or columns as rows (k, out), of the weight in `dtype`."""
        if self._stored is not None:
            # What `Rematerialise` does not know it keeps.
            return self._stored[index] if keep else self._stored.index_select(0, index)
        weight, axis = self.base.weight, 0 if self.by == "rows" else 1
        if getattr(weight, "quant_state", None) is not None:
            if self.by == "rows" and self.n_in % weight.quant_state.blocksize == 0:
                return _rows_of_4_bits(weight, index, self.n_in).to(dtype)
            some = self.dense().index_select(axis, index)  # blocks run across rows
        else:  # int8, one scale a row
            scale = absmax(self.base).float() / 127
            scale = scale[index] if axis == 0 else scale
            some = weight.index_select(axis, index).float() * scale.unsqueeze(1)
        return (some if axis == 0 else some.t()).to(dtype)

    # Products. x is (N, in) and `index` (k,) int64.

    def compact(self, x: Tensor, index: Tensor, keep: bool = False) -> Tensor:
        """Outputs `index` alone, (N, k)."""
        bias = None if self.bias is None else self.bias[index].to(x.dtype)
        if self._in_triton(x, index):
            y = sparse_linear(x, self._stored, index, 1)
            y = y if bias is None else y + bias
            B = None if self.adapter is None else self.adapter.lora_B.weight.index_select(0, index)
            return self._add(y, x, B=B)
        weight = self.gather(index, x.dtype, keep)
        if self.adapter is None:
            return linear(x, weight, bias)
        B = self.adapter.lora_B.weight.index_select(0, index)
        return self._adapted(x, weight, bias, self.adapter.lora_A.weight, B)

    def from_compact(self, x: Tensor, index: Tensor, keep: bool = False) -> Tensor:
        """(N, out) of an x (N, k) that holds inputs `index` alone."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._in_triton(x, index):
            y = sparse_linear(x, self._stored, index, 1, transposed=True)
            y = y if bias is None else y + bias
            A = None if self.adapter is None else self.adapter.lora_A.weight.index_select(1, index)
            return self._add(y, x, A=A)
        weight = self.gather(index, x.dtype, keep).t()
        if self.adapter is None:
            return linear(x, weight, bias)
        A = self.adapter.lora_A.weight.index_select(1, index)
        return self._adapted(x, weight, bias, A, self.adapter.lora_B.weight)

    def scattered(self, x: Tensor, index: Tensor) -> Tensor:
        """All outputs, (N, out): the base's part has outputs `index` and the bias, the adapter's
        is whole."""
        if self._in_triton(x, index):
            some = sparse_linear(x if self.exact else x.detach(), self._stored, index, 1)
            y = some.new_zeros(len(x), self.n_out).index_add(1, index, some)
            return self._add(y if self.bias is None else y + self.bias.to(x.dtype), x)
        weight = self.gather(index, x.dtype, False)
        low_rank = self._low_rank()
        y = rows_linear(x, weight, index, self.n_out, bias=self.bias, exact=self.exact, **low_rank)
        return y if low_rank else self._add(y, x)

    def from_some(self, x: Tensor, index: Tensor) -> Tensor:
        """(N, out) of an x (N, in): the base's part of inputs `index`, the adapter's of all."""
        if self._in_triton(x, index):
            some = (x if self.exact else x.detach()).index_select(1, index)
            y = sparse_linear(some, self._stored, index, 1, transposed=True)
            return self._add(y if self.bias is None else y + self.bias.to(x.dtype), x)
        weight = self.gather(index, x.dtype, False)
        low_rank = self._low_rank()
        y = columns_linear(x, weight, index, bias=self.bias, exact=self.exact, **low_rank)
        return y if low_rank else self._add(y, x)

    def _in_triton(self, x: Tensor, index: Tensor) -> bool:
        """Whether the kernel reads rows where they are, and nothing is gathered."""
        if self._stored is None or self._stored.dtype != x.dtype:
            return False
        if torch.is_autocast_enabled(x.device.type):  # which casts what it knows, and not a kernel
            return False
        return choose("sparse_linear", "auto", x, self._stored, index) == "triton"

    def _low_rank(self) -> dict[str, Any]:
        """The adapter as arguments, unless it drops some of its input."""
        if self.adapter is None or self._drops():
            return {}
        adapter = self.adapter
        return {"A": adapter.lora_A.weight, "B": adapter.lora_B.weight, "scale": adapter.scale}

    def _adapted(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        if self._drops():
            return self._add(linear(x, weight, bias), x, A, B)
        return lora_linear(x, weight, A, B, self.adapter.scale, bias=bias)

    def _add(
        self, y: Tensor, x: Tensor, A: Tensor | None = None, B: Tensor | None = None
    ) -> Tensor:
        """`y` and the adapter's part, of whole factors unless A or B are given."""
        if self.adapter is None:
            return y
        A = self.adapter.lora_A.weight if A is None else A
        B = self.adapter.lora_B.weight if B is None else B
        return add_low_rank(y, self.adapter.dropout(x), A, B, self.adapter.scale)

    def _drops(self) -> bool:
        return self.layer.training and getattr(self.adapter.dropout, "p", 0.0) > 0


def _rows_of_4_bits(weight: Tensor, index: Tensor, n_in: int) -> Tensor:
    """Rows (k, in) of a packed weight whose rows are whole blocks; no others are unpacked."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    some = QuantState(
        scales.view(-1, n_in // state.blocksize)[index].flatten(),
        shape=torch.Size([len(index), n_in]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    packed = weight.data.view(-1, n_in // 2).index_select(0, index)
    return dequantize_4bit(packed.view(-1, 1), some)
