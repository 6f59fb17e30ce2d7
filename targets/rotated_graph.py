"""A model that RoSTE packed, made of what an ONNX graph has: `convert` changes it in place.

| in torch | in the graph |
|---|---|
| a packed weight | codes two a byte (one, above 4 bits), scales and zero points of MatMulNBits |
| a rotation | products with the two small factors of its Hadamard matrix |
| rounding of activations, keys, values | the quantiser's formula in plain operators |
| embeddings and head in 16 bits | one 16-bit table, widened as it is used |

MatMulNBits (domain com.microsoft, in every build of onnxruntime) has scales for blocks of a row, so
the scale of a row or of a group stands there for each of its blocks. Activations are rounded
already: at `accuracy_level` 1 it leaves them alone. The standard DequantizeLinear of UINT4 weights
becomes the same operator in onnxruntime 1.32, but at a level that the session chooses: by default
it rounds activations a second time, to int8 by block, 6e-3 of the largest output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from tinyft.errors import InputError
from tinyft.kernels.hadamard_quant import factors
from tinyft.kernels.int4_linear import Int4Weight
from tinyft.rotated.layers import QuantLinear
from tinyft.rotated.quantisers import PackedWeight, Quantiser, unpack_codes
from tinyft.rotated.rotation import blocks_of

OPERATORS = frozenset({"com.microsoft.MatMulNBits"})
ATTENTION = "tinyft_graph"
BLOCKS = (256, 128, 64, 32, 16)  # columns of a scale, for which MatMulNBits has fast products
_DENSE = 128  # rotations up to this size are one product
WIDENED_ELEMENTS = 1 << 23  # of a table in 16 bits, at a time


# Operators.


def matmul_nbits(x: Tensor, weight: nn.Module) -> Tensor:
    """`x W'` in float32, `(..., in)` -> `(..., out)`; zeros where no graph is traced.

    Args:
        weight: with `codes` `(out, blocks, bytes)` uint8, of 4 bits the even columns in the low
            ones, `scales` `(out, blocks)` float32, `zeros` `(out, bytes)` uint8, packed as codes
            are, or None for `2^(bits - 1)`, `bits`, 4 or 8, and `in_features`: what the last block
            has beyond them is unused.
    """
    rows, _, size = weight.codes.shape
    inputs = (x, weight.codes, weight.scales, weight.zeros)
    attributes = {
        "K": weight.in_features,
        "N": rows,
        "bits": weight.bits,
        "block_size": size * 8 // weight.bits,
        "accuracy_level": 1,  # activations as they are
    }
    return symbolic(
        "com.microsoft::MatMulNBits",
        inputs if weight.zeros is not None else inputs[:3],
        attributes,
        dtype=torch.float32,
        shape=(*x.shape[:-1], rows),
        version=1,
    )


def after(table: Tensor, x: Tensor) -> Tensor:
    """A constant `(n, d)` that is there when x `(B, T, ...)` is, and not before: a runtime would
    fold what is computed of constants alone."""
    sizes = symbolic("Shape", (x,), {"start": 0, "end": 2}, dtype=torch.int64, shape=(2,))
    # Sizes of 0 are the tensor's own, and these follow from an input.
    return symbolic("Reshape", (table, 0 * sizes), dtype=table.dtype, shape=table.shape)


# Weights.


@dataclass(frozen=True)
class BlockWeight:
    """A packed weight as `matmul_nbits` takes it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    bits: int

    @classmethod
    def of(cls, weight: PackedWeight | Int4Weight) -> BlockWeight:
        """The same numbers.

        Raises:
            InputError: groups that are not made of blocks.
        """
        rows, columns = weight.shape
        groups = weight.scales.shape[1]
        if isinstance(weight, Int4Weight):
            halves = weight.packed.view(rows, groups, -1)
            q, bits, group = torch.cat((halves & 15, halves >> 4), 2).flatten(1), 4, weight.group
            z = torch.full_like(weight.scales, 8, dtype=torch.uint8)
        else:
            q, z, group = unpack_codes(weight.codes, columns), weight.zeros, columns // groups
            bits = 4 if weight.codes.shape[1] < columns else 8
        block = _block(columns, bits) if groups == 1 else _block_within(group)
        count = -(-columns // block)
        repeats = count if groups == 1 else group // block
        scales = weight.scales.float().repeat_interleave(repeats, 1)[:, :count].contiguous()
        z = z.repeat_interleave(repeats, 1)[:, :count]
        q = F.pad(q[:, :columns], (0, count * block - columns))
        codes = _packed(q, bits).view(rows, count, -1)
        middle = bool((z == 2 ** (bits - 1)).all())
        return cls(codes, scales, None if middle else _packed(z, bits), columns, bits)


def _block(columns: int, bits: int) -> int:
    """Of whole rows, whose last block may be padded: the size that takes least memory."""
    return min(BLOCKS, key=lambda block: -(-columns // block) * (block * bits + 32 + bits))


def _block_within(group: int) -> int:
    fitting = [block for block in BLOCKS if group % block == 0]
    if not fitting:
        raise InputError(
            f"A graph has no packed weights in groups of {group} columns. Pack the model with a "
            f"--group that is a multiple of {BLOCKS[-1]}, or with one scale a row (0)."
        )
    return fitting[0]


def _packed(q: Tensor, bits: int) -> Tensor:
    """Codes `(rows, n)` uint8, the even ones in the low 4 bits."""
    if bits == 8:
        return q.contiguous()
    q = F.pad(q, (0, q.shape[1] % 2))
    return q[:, ::2] | q[:, 1::2] << 4


# Modules.


class Turn(nn.Module):
    """`x R` or, transposed, `x R'`: `kernels/hadamard_quant.py` without signs, R1 with them."""

    def __init__(self, n: int, signs: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        a, b = factors(n, transposed, torch.float32, torch.device("cpu"))
        a = a.T.contiguous()
        self.transposed = transposed
        self.register_buffer("a", None if n <= _DENSE else a)
        self.register_buffer("b", torch.kron(a, b) if n <= _DENSE else b)
        self.register_buffer("signs", None if signs is None else signs.float())

    def forward(self, x: Tensor) -> Tensor:
        """`(..., n)`."""
        if self.signs is None:
            return self._turned(x)
        return self._turned(x) * self.signs if self.transposed else self._turned(x * self.signs)

    def _turned(self, x: Tensor) -> Tensor:
        if self.a is None:
            return x @ self.b
        y = x.unflatten(-1, (len(self.a), len(self.b))) @ self.b
        return (y.transpose(-1, -2) @ self.a).transpose(-1, -2).flatten(-2)


class Residual(NamedTuple):
    """R1, in the place of a `rotation.Rotation`."""

    apply: Turn
    undo: Turn


class Rounding:
    """A quantiser of activations in plain operators.

    Args:
        quantiser: whose numbers it makes.
        heard: gets what comes out, by place.
        place: see `places`.
    """

    def __init__(self, quantiser: Quantiser, heard: dict[str, Tensor], place: str) -> None:
        self.quantiser, self.heard, self.place = quantiser, heard, place

    def __call__(self, x: Tensor) -> Tensor:
        """`s (q - z)` of each row; see `kernels/quantize.py`."""
        bits, clip, top = self.quantiser.bits, self.quantiser.clip, self.quantiser.top
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.quantiser.symmetric:
            z = 2 ** (bits - 1)
            s = torch.maximum(-low, high) * (clip / (z - 1))
            s = torch.where(s != 0, s, 1.0)
            q = (x / s).round().clamp(-z, top - z)
        else:
            low, high = low.clamp(max=0) * clip, high.clamp(min=0) * clip
            s = (high - low) / top
            s = torch.where(s != 0, s, 1.0)
            z = (-low / s).round()
            q = torch.minimum(torch.maximum((x / s).round(), -z), top - z)
        self.heard[self.place] = y = q * s
        return y


class GraphLinear(nn.Module):
    """`QuantLinear` with its weight in blocks."""

    def __init__(self, layer: QuantLinear, turn: Turn | None) -> None:
        super().__init__()
        weight = BlockWeight.of(layer.packed())
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits = weight.bits
        for name in ("codes", "scales", "zeros"):
            tensor = getattr(weight, name)
            held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, held)
        self.bias, self.input_scale = layer.bias, layer.input_scale
        self.input_quantiser, self.turn = layer.input_quantiser, turn

    @property
    def weight(self) -> Tensor:
        """For those who ask a layer for its precision: the scales."""
        return self.scales

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` -> `(..., out)`."""
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.turn is not None:
            x = self.turn(x)
        if self.input_quantiser is not None:
            x = self.input_quantiser(x)
        y = matmul_nbits(x, self)
        return y if self.bias is None else y + self.bias


class Head(nn.Module):
    """Logits of a table, which may be that of the embeddings.

    One in 16 bits is widened for every product, some rows after the others: SmolLM2-135M's would
    take 108 MiB.
    """

    def __init__(self, weight: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, d)` -> `(B, T, vocabulary)`."""
        parts: list[Tensor] = []
        narrow = self.weight.dtype != torch.float32
        count = -(-self.weight.numel() // WIDENED_ELEMENTS) if narrow else 1
        rows = -(-len(self.weight) // count)
        for start in range(0, len(self.weight), rows):
            # After the part before: a runtime would widen all of them first.
            table = after(self.weight, parts[-1] if parts else x)
            parts.append(F.linear(x, table[start : start + rows].float()))
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return y if self.bias is None else y + self.bias


class GraphKV(nn.Module):
    """`layers.KVQuantiser` with a rotation that a graph has."""

    def __init__(self, key: Any, value: Any, turn: Turn | None) -> None:
        super().__init__()
        self.key, self.value, self.turn = key, value, turn

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All `(B, heads, T, head size)`."""
        if self.turn is not None:
            q, k = self.turn(q), self.turn(k)
        k = k if self.key is None else self.key(k)
        return q, k, v if self.value is None else self.value(v)


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Softmax attention as it is written down, `(B, T, heads, head size)`."""
    q, k, v = module.kv_quantiser(q, k, v)
    copies = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ v).transpose(1, 2), None


# The model.


def places(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Where numbers are rounded: a name, and the object and the attribute that hold a quantiser."""
    for block in blocks_of(model):
        kv = block.attention.kv_quantiser
        for name, owner, attribute in (
            ("attention_input", block.attention_norm, "quantiser"),
            ("key", kv, "key"),
            ("value", kv, "value"),
            ("output_input", block.output, "input_quantiser"),
            ("mlp_input", block.mlp_norm, "quantiser"),
            ("down_input", block.down, "input_quantiser"),
        ):
            if getattr(owner, attribute) is not None:
                yield f"{block.name}/{name}", owner, attribute


def convert(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Change a packed model in float32 so that it can be traced.

    Args:
        model: as `artefact.load` makes it, `.float()`.
        dtype: in which embeddings and head were stored, and are kept.

    Returns:
        A dictionary that every forward pass fills with what it has rounded, by `places`.

    Raises:
        InputError: weights that are not packed, or whose groups a graph does not have.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    heard: dict[str, Tensor] = {}
    for place, owner, attribute in list(places(model)):
        setattr(owner, attribute, Rounding(getattr(owner, attribute), heard, place))
    turn = cache(Turn)  # layers share their factors
    for block in blocks_of(model):
        kv = block.attention.kv_quantiser
        turned = turn(block.head_size) if kv.rotate else None
        block.attention.kv_quantiser = GraphKV(kv.key, kv.value, turned)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            if not layer.is_packed:
                raise InputError(
                    f"{name} has a weight in 16 bits: pack the model with --weights 4."
                )
            turned = turn(layer.in_features) if layer.rotate_input else None
            model.set_submodule(name, GraphLinear(layer, turned))
    _convert_ends(model, dtype)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.config._attn_implementation = ATTENTION
    return heard


def _convert_ends(model: nn.Module, dtype: torch.dtype) -> None:
    """Embeddings and head in the dtype of their table; R1 between them as a graph has it."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    table = nn.Parameter(embeddings.weight.to(dtype), requires_grad=False)
    if head.weight is embeddings.weight:
        weight = table
    else:
        weight = nn.Parameter(head.weight.to(dtype), requires_grad=False)
    embeddings.weight = table
    embeddings.register_forward_hook(lambda module, args, out: out.float(), prepend=True)
    model.set_output_embeddings(Head(weight, head.bias))
    if (ends := getattr(model, "ends", None)) is not None:
        signs = ends.rotation.signs
        turn, back = Turn(len(signs), signs), Turn(len(signs), signs, transposed=True)
        ends.rotation = Residual(turn, back)
        model.residual = nn.ModuleList((turn, back))  # so that the graph has their factors
