"""Turn the channels of a transformer without changing what it computes.

A block reads the residual stream through norms and writes to it through two linear layers, so an
orthogonal R1 can act on the stream between the ends of the network: `W R1` where it is read and
`R1' W` where it is written. Within a block R2 acts on the values of each head (and on the inputs of
the output projection), R3 on queries and keys after RoPE, R4 on the inputs of the down projection
(QuaRot, Ashkboos et al. 2024, arXiv:2404.00456; SpinQuant, Liu et al. 2024, arXiv:2405.16406).
R = H / sqrt(n) with H a Hadamard matrix; R1 = diag(+-1) H / sqrt(n), its signs random.

R1 commutes with a norm only if that has no scale of its own, so scales (and shifts) go into the
linear layers that follow first. Of LayerNorm the mean stays: it is taken out of whatever writes to
the stream, after which LayerNorm is RMSNorm (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024).

Deviation: at the two ends R1 is not merged into embedding and head, which would then be two
matrices where they were one (57 MB for SmolLM2-135M in 16 bits). Embeddings are rotated as they
are looked up and turned back before the last norm: n log n operations a token, and what reads
hidden states (losses, heads) sees the original's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyft.adapters import LoRALinear
from tinyft.errors import InputError
from tinyft.kernels.hadamard import split_size
from tinyft.kernels.hadamard_quant import rotate_ref
from tinyft.rotated.families import block_names, family_of
from tinyft.rotated.layers import QuantLinear, QuantNorm


@dataclass(frozen=True)
class Block:
    """One block's parts, all of them quantised modules.

    Attributes:
        name: of the block in the model.
        readers, inner: linear layers behind `attention_norm` and `mlp_norm`.
        value_rows: which rows of the last reader make the values, `(heads, head size)`.
    """

    name: str
    attention: nn.Module
    attention_norm: QuantNorm
    readers: tuple[QuantLinear, ...]
    value_rows: Tensor
    output: QuantLinear
    mlp_norm: QuantNorm
    inner: tuple[QuantLinear, ...]
    down: QuantLinear

    @property
    def value(self) -> QuantLinear:
        return self.readers[-1]

    @property
    def head_size(self) -> int:
        return self.value_rows.shape[1]

    def linears(self) -> tuple[QuantLinear, ...]:
        return (*self.readers, self.output, *self.inner, self.down)


def blocks_of(model: nn.Module) -> Iterator[Block]:
    """The blocks of a model whose modules `layers.convert` has replaced."""
    family = family_of(model)
    for name in block_names(model):
        block = model.get_submodule(name)

        def get(path: str, block: nn.Module = block) -> Any:
            module = block.get_submodule(path)
            return module.base if isinstance(module, LoRALinear) else module

        attention, readers = get(family.attention), tuple(map(get, family.readers))
        yield Block(
            name,
            attention,
            get(family.attention_norm),
            readers,
            _value_rows(model.config, readers),
            get(family.output),
            get(family.mlp_norm),
            tuple(map(get, family.inner)),
            get(family.down),
        )


def _value_rows(config: Any, readers: tuple[QuantLinear, ...]) -> Tensor:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = torch.arange(readers[-1].out_features)
    if len(readers) == 1:  # GPT-NeoX: q, k and v of a head one after the other
        return rows.view(heads, 3, size)[:, 2]
    return rows.view(-1, size)


# Rotations.


@dataclass(frozen=True, eq=False)
class Rotation:
    """`R = diag(signs) H / sqrt(n)`, orthogonal."""

    signs: Tensor

    @classmethod
    def random(cls, n: int, seed: int) -> Rotation:
        """Signs from a seed.

        Raises:
            InputError: no Hadamard matrix of that size is known.
        """
        if not can_rotate(n):
            raise InputError(
                f"The model's hidden size is {n}, and no Hadamard matrix of that size is known "
                f"here. Use --rotations none."
            )
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1)

    def apply(self, x: Tensor) -> Tensor:
        """`x R`, in the dtype of x; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return rotate_ref(wide * self._signs(wide)).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        """`x R'`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (rotate_ref(wide, transposed=True) * self._signs(wide)).to(x.dtype)

    def _signs(self, x: Tensor) -> Tensor:
        return self.signs.to(x.device, x.dtype)


def can_rotate(n: int) -> bool:
    """Whether a Hadamard matrix of size n is known."""
    try:
        split_size(n)
    except ValueError:
        return False
    return True


@torch.no_grad()
def fuse(model: nn.Module, r1: Rotation) -> dict[Tensor, float]:
    """Put the norms' scales into the linear layers behind them and R1 around them, in place.

    The stream is rotated between embedding and last norm from here on (`add_ends` makes it so).

    Returns:
        how much smaller each weight that took a scale has become: the scale's root mean square.
    """
    gains = {}
    for block in blocks_of(model):
        for norm, readers in (
            (block.attention_norm, block.readers),
            (block.mlp_norm, block.inner),
        ):
            for linear in readers:
                gains[linear.weight] = float(norm.weight.double().square().mean().sqrt())
                w = linear.weight.double()
                if norm.bias is not None:
                    linear.bias.copy_(linear.bias.double() + w @ norm.bias.double())
                linear.weight.copy_(r1.apply(w * norm.weight.double()))
        for linear in (block.output, block.down):
            # The mean that LayerNorm would take out of every token.
            centre = _centred if block.attention_norm.centred else _same
            linear.weight.copy_(r1.apply(centre(linear.weight.double().T)).T)
            if linear.bias is not None:
                linear.bias.copy_(r1.apply(centre(linear.bias.double())))
        for norm in (block.attention_norm, block.mlp_norm):
            norm.make_plain()
    return gains


@dataclass(eq=False)
class Ends:
    """What turns the residual stream where it begins and where it ends.

    Attributes:
        rotation: R1, or whatever else has its `apply` and `undo`.
        centred: the mean is taken out of every token first.
    """

    rotation: Rotation
    centred: bool

    def enter(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """A forward hook for embeddings."""
        return self.rotation.apply(_centred(out) if self.centred else out)

    def leave(self, module: nn.Module, args: tuple) -> tuple:
        """A forward pre-hook for the last norm."""
        return (self.rotation.undo(args[0]), *args[1:])


def add_ends(model: nn.Module, r1: Rotation) -> None:
    """Rotate what the embeddings give, and turn back what the last norm gets: `model.ends`."""
    family = family_of(model)
    backbone = model.base_model
    final = backbone.get_submodule(family.final_norm)
    model.ends = Ends(r1, isinstance(final, nn.LayerNorm))
    for name in family.embeddings:
        backbone.get_submodule(name).register_forward_hook(model.ends.enter)
    final.register_forward_pre_hook(model.ends.leave)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _same(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def rotate_values(block: Block) -> None:
    """R2: merged into the values' rows and the output projection's columns."""
    value, output = block.value, block.output
    rows = block.value_rows.flatten()
    value.weight[rows] = rotated_rows(value.weight[rows], block.head_size)
    if value.bias is not None:
        value.bias[rows] = by_head(value.bias[rows].double(), block.head_size).to(value.bias.dtype)
    output.weight.copy_(by_head(output.weight.double(), block.head_size))


def rotated_rows(weight: Tensor, size: int) -> Tensor:
    """`R' W` for every `size` rows."""
    return by_head(weight.double().T, size).T.to(weight.dtype)


def by_head(x: Tensor, size: int) -> Tensor:
    """`x R` for every `size` numbers of the last dimension."""
    return rotate_ref(x.unflatten(-1, (-1, size))).flatten(-2)


@torch.no_grad()
def rotate_down(block: Block) -> None:
    """R4: its inverse into the weight; the inputs are rotated as they come."""
    block.down.weight.copy_(rotate_ref(block.down.weight.double()))
    block.down.rotate_input = True
