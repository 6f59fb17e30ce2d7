"""The modules of a quantised transformer, and how they take the place of a model's own.

* `QuantNorm`: a norm whose output, the input of linear layers, is rounded token by token.
* `QuantLinear`: a linear layer with a rounded weight, latent (trained) or packed (frozen), whose
  own input may be rotated and rounded as well.
* attention through transformers' interface for it, with K and V rounded by token and head.

Until they are given quantisers, all of them compute what the original does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from tinyft.kernels.hadamard_quant import hadamard_quant, rotate_ref
from tinyft.kernels.int4_linear import Int4Weight, int4_linear, pack_int4
from tinyft.rotated.families import block_names, family_of
from tinyft.rotated.quantisers import PackedWeight, Quantiser, straight

ATTENTION = "tinyft_quantised"
_BLOCK_ELEMENTS = 1 << 20  # of a packed weight, dequantised at a time


def rotate_and_round(x: Tensor, quantiser: Quantiser | None) -> Tensor:
    """`Q(x R)`, by the fused kernel where that knows the quantiser."""
    if quantiser is None:
        return rotate_ref(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    if quantiser.symmetric or quantiser.clipped or quantiser.group:
        return quantiser(rotate_and_round(x, None))
    return hadamard_quant(x, quantiser.bits, clip=quantiser.clip)


class QuantNorm(nn.Module):
    """RMSNorm, or LayerNorm where `centred`, and a quantiser on what comes out.

    Args:
        weight: `(D,)`.
        bias: `(D,)` or None.
        eps: added to the variance.
        centred: subtract the mean.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, centred: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.eps, self.centred = eps, centred
        self.quantiser: Quantiser | None = None

    @classmethod
    def of(cls, norm: nn.Module) -> QuantNorm:
        """The same norm, with the same parameters."""
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        centred = isinstance(norm, nn.LayerNorm)
        return cls(norm.weight, norm.bias if centred else None, eps, centred)

    def make_plain(self) -> None:
        """Scale 1, no shift, no mean: what is left when the linear layers have taken them over."""
        self.weight.data.fill_(1)
        self.bias, self.centred = None, False

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> `(..., D)`, dtype of x."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight
        if self.bias is not None:
            y = y + self.bias
        y = y.to(x.dtype)
        return y if self.quantiser is None else self.quantiser(y)


class QuantLinear(nn.Linear):
    """`Q(x R) Q(W)' + b`, W `(out, in)` being kept rotated: `W R` of the original.

    A latent weight is rounded once for every value it takes, however often the layer runs.

    Attributes:
        weight: latent, or, when packed, the codes (uint8), frozen.
        input_scale: `(in,)` float32 that multiplies the input first, or None.
        quantiser: of the weight; None leaves it as it is.
        input_quantiser: of the input; None where whoever makes the input has rounded it.
        rotate_input: the input gets R before it is rounded.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, bias
        self.register_parameter("input_scale", None)
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)
        self.quantiser: Quantiser | None = None
        self.input_quantiser: Quantiser | None = None
        self.rotate_input = False
        self._rounded: Tensor | None = None
        self._rounded_of: tuple[Any, ...] = ()

    @property
    def is_packed(self) -> bool:
        return self.scales is not None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`, dtype of x."""
        if self.input_scale is not None:
            x = (x * self.input_scale).to(x.dtype)
        if self.rotate_input:
            x = rotate_and_round(x, self.input_quantiser)
        elif self.input_quantiser is not None:
            x = self.input_quantiser(x)
        if not self.is_packed:
            return linear(x, self.rounded_weight(), self.bias)
        weight = self.packed()
        if isinstance(weight, Int4Weight):
            return int4_linear(x, weight, bias=self.bias)
        return _PackedProduct.apply(x, weight, self.bias)

    def rounded_weight(self) -> Tensor:
        """`Q(W)` with the gradient straight through to W."""
        weight, quantiser = self.weight, self.quantiser
        if quantiser is None:
            return weight
        state = (weight._version, weight.data_ptr(), quantiser)
        if self._rounded is None or self._rounded_of != state:
            # An inference tensor could be used by no later step of training.
            with torch.inference_mode(False), torch.no_grad():
                if self._rounded is None or _kind(self._rounded) != _kind(weight):
                    self._rounded = torch.empty_like(weight, requires_grad=False)
                quantiser.round(weight, self._rounded)
            self._rounded_of = state
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return self._rounded
        return straight(weight, self._rounded, quantiser if quantiser.clipped else None)

    # Packed.

    @torch.no_grad()
    def packed(self) -> PackedWeight | Int4Weight:
        """The weight as it is stored."""
        if not self.is_packed:
            assert self.quantiser is not None, "a layer without a quantiser is not packed"
            return PackedWeight.of(self.weight, self.quantiser)
        if self.zeros is None:
            return Int4Weight(self.weight, self.scales, self.in_features)
        return PackedWeight(self.weight, self.scales, self.zeros, self.in_features)

    def set_packed(self, weight: PackedWeight | Int4Weight) -> None:
        """From now on this weight, frozen; the latent one is dropped."""
        is_int4 = isinstance(weight, Int4Weight)
        codes = weight.packed if is_int4 else weight.codes
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales, self.zeros = weight.scales, None if is_int4 else weight.zeros
        self._rounded, self._rounded_of = None, ()

    def freeze_int4(self, group: int) -> None:
        """Pack the weight to 4 bits in groups, as `kernels/int4_linear.py` multiplies them."""
        self.set_packed(pack_int4(self.weight, group))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


class _PackedProduct(torch.autograd.Function):
    """`x W' + b` for a `PackedWeight`; gradient to x alone. W is never whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows in _row_blocks(weight):
            part = None if bias is None else bias[rows]
            y[..., rows] = linear(x, weight.dequantize(x.dtype, rows), part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, total = ctx.weight, None
        wide = torch.promote_types(grad.dtype, torch.float32)  # or each block's sum were rounded
        for rows in _row_blocks(weight):
            part = grad[..., rows] @ weight.dequantize(grad.dtype, rows)
            total = part if total is None else total.to(wide).add_(part)
        return total.to(grad.dtype), None, None


def _row_blocks(weight: PackedWeight) -> list[slice]:
    n_out, n_in = weight.shape
    step = max(1, _BLOCK_ELEMENTS // n_in)
    return [slice(start, min(start + step, n_out)) for start in range(0, n_out, step)]


# Attention.


@dataclass
class KVQuantiser:
    """What happens to queries, keys and values between RoPE (and the cache) and attention.

    Attributes:
        key, value: quantisers, or None.
        rotate: queries and keys get R3, which leaves their products as they are.
        listen: called with keys and values as they come, for calibration.
    """

    key: Quantiser | None = None
    value: Quantiser | None = None
    rotate: bool = False
    listen: Callable[[Tensor, Tensor], None] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All `(B, heads, T, head size)`."""
        if self.listen is not None:
            self.listen(k, v)
        if self.rotate:
            q, k = rotate_and_round(q, None), rotate_and_round(k, self.key)
        elif self.key is not None:
            k = self.key(k)
        return q, k, v if self.value is None else self.value(v)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    quantiser = getattr(module, "kv_quantiser", None)  # None: another model of this configuration
    qkv = (q, k, v) if quantiser is None else quantiser(q, k, v)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *qkv, *args, **kwargs)


# Surgery.


def convert(model: nn.Module) -> None:
    """Put the modules above in the place of a model's own, with the same parameters.

    A linear layer behind a LayerNorm gets a bias if it has none: it may have to take over a shift.

    Raises:
        InputError: see `families.family_of`.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    family = family_of(model)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = ATTENTION
    for name in block_names(model):
        block = model.get_submodule(name)
        for path in (family.attention_norm, family.mlp_norm):
            block.set_submodule(path, QuantNorm.of(block.get_submodule(path)))
        shifts = block.get_submodule(family.attention_norm).bias is not None
        for path in family.linears():
            old = block.get_submodule(path)
            bias = old.bias
            if bias is None and shifts and path in (*family.readers, *family.inner):
                bias = nn.Parameter(old.weight.new_zeros(old.out_features))
            block.set_submodule(path, QuantLinear(old.weight, bias))
        block.get_submodule(family.attention).kv_quantiser = KVQuantiser()
