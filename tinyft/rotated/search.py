"""Which rotations to use and how far to clip: RoSTE's lower level (Wei et al. 2025, eq. 8 and 9).

For every block, and every place where a rotation may act, both the rotated and the plain numbers
are rounded by the quantiser that training will use, and the way of less error is taken:

    ||Q(R'W) - R'W||^2 / ||W||^2 + mean ||Q(XR) - XR||^2 / ||X||^2

with the mean over batches X. Deviations from the published code, which errs there: the quantiser
is training's own, errors are relative (so that no large tensor outvotes the rest), and padding does
not count. In one go each place gets the clip of least error.

| place | numbers that are rounded |
|---|---|
| R2, values | V, the rows that make it, the output projection's inputs and weight |
| R3, keys | K |
| R4, down | the down projection's inputs and weight |

R1 is always on unless there are to be no rotations: what it rotates all blocks share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinyft.dry_run import alike
from tinyft.errors import InputError
from tinyft.kernels.hadamard_quant import rotate_ref
from tinyft.kernels.int4_linear import GROUPS
from tinyft.memory import forget_mapped, trim
from tinyft.rotated.families import block_names, family_of
from tinyft.rotated.layers import QuantLinear, convert
from tinyft.rotated.quantisers import CLIPS, Int4Groups, Quantiser
from tinyft.rotated.rotation import (
    Block,
    Rotation,
    add_ends,
    blocks_of,
    by_head,
    can_rotate,
    fuse,
    rotate_down,
    rotate_values,
    rotated_rows,
)

ROTATIONS = ("adaptive", "all", "none")
GRADIENTS = ("identity", "clipped")
PLACES = ("attention_input", "mlp_input", "key", "value", "output_input", "down_input")
_MOST_ROWS = 4096  # of a place, rounded in every way to compare them


@dataclass(frozen=True)
class Recipe:
    """How a model is to be quantised.

    Attributes:
        weights, activations, kv: bits, 2 to 8; 16 leaves them alone.
        rotations: `"adaptive"`, `"all"` or `"none"`.
        clip: share of each range that is kept; None searches it.
        symmetric: quantisers of weights, activations, keys and values.
        group: columns of a weight that share a range; 0 for whole rows.
        ste: `"identity"` or `"clipped"`, see `quantisers`.
        int4_base: weights frozen in the format of `kernels/int4_linear.py`.
        seed: of R1's signs.
    """

    weights: int = 4
    activations: int = 8
    kv: int = 8
    rotations: str = "adaptive"
    clip: float | None = None
    symmetric: bool = False
    group: int = 0
    ste: str = "identity"
    int4_base: bool = False
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong, one sentence each."""
        found = [
            f"{name} takes 2 to 8 bits, or 16 to leave it alone; found {getattr(self, name)}."
            for name in ("weights", "activations", "kv")
            if getattr(self, name) not in (*range(2, 9), 16)
        ]
        for name, known in (("rotations", ROTATIONS), ("ste", GRADIENTS)):
            if getattr(self, name) not in known:
                found.append(
                    f"{name} must be one of {', '.join(known)}; found {getattr(self, name)!r}."
                )
        if self.clip is not None and not 0 < self.clip <= 1:
            found.append(f"clip must be above 0 and at most 1; found {self.clip}.")
        if self.int4_base and self.weights != 4:
            found.append(f"weights of a frozen base have 4 bits; found {self.weights}.")
        if self.int4_base and self.group and self.group not in GROUPS:
            found.append(
                f"group of a frozen base must be one of {', '.join(map(str, GROUPS))}; found "
                f"{self.group}."
            )
        elif self.group < 0:
            found.append(f"group must be 0 (whole rows) or more; found {self.group}.")
        return found

    def quantiser(self, bits: int, *, weight: bool = False) -> Quantiser | Int4Groups | None:
        """Of activations, or of weights."""
        if weight and self.int4_base:
            return Int4Groups(self.group or 64)
        if bits == 16:
            return None
        group = self.group if weight else 0
        return Quantiser(bits, self.clip or 1.0, self.symmetric, group, self.ste == "clipped")

    @property
    def clips(self) -> tuple[float, ...]:
        return CLIPS if self.clip is None else (self.clip,)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one block.

    Attributes:
        values, keys, down: whether R2, R3 and R4 are Hadamard (else they are the identity).
        clips: by place, and by name of linear layer.
        errors: by rotation (`"values"`, ...), relative, `(plain, rotated)`; None where not tried.
        ranges: by place, the largest magnitude over the root mean square, `(plain, rotated)`.
    """

    values: bool = False
    keys: bool = False
    down: bool = False
    clips: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Rotated:
    """A model made of the modules in `layers`, on its way to be quantised.

    Args:
        model: changed in place: converted, and, unless `recipe.rotations` is `"none"`, its norms
            fused and its residual stream rotated.
        recipe: how to quantise it.

    Attributes:
        choices: one a block, empty until `calibrate` or `apply`.
        gains: by weight, how much smaller it is for the norm's scale that it took (`fuse`).

    Raises:
        InputError: a model or a recipe that cannot be.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, arithmetic: bool = True) -> None:
        if problems := recipe.problems():
            raise InputError(" ".join(problems))
        self.model, self.recipe = model, recipe
        self.choices: list[Choice] = []
        self.gains: dict[Tensor, float] = {}
        self.r1 = None
        family = family_of(model)
        if recipe.group and not recipe.int4_base:  # before anything is changed
            for name in block_names(model):
                for path in family.linears():
                    columns = model.get_submodule(f"{name}.{path}").in_features
                    if columns % recipe.group:
                        raise InputError(
                            f"group {recipe.group} does not divide the {columns} columns of a "
                            f"layer of this model."
                        )
        if recipe.rotations != "none":
            self.r1 = Rotation.random(model.config.hidden_size, recipe.seed)
        convert(model)
        if self.r1 is not None:
            if arithmetic:
                self.gains = fuse(model, self.r1)
            else:
                for block in blocks_of(model):
                    block.attention_norm.make_plain()
                    block.mlp_norm.make_plain()
            add_ends(model, self.r1)

    @torch.no_grad()
    def calibrate(
        self, run: Callable[[Any], Any], batches: list[tuple[Any, Tensor | None]]
    ) -> None:
        """Search, rotate and begin to quantise.

        Args:
            run: takes a batch through the model.
            batches: each with a mask `(rows, T)` of the tokens that count, or None for all.
        """
        with ExitStack() as stack:
            heard = [
                stack.enter_context(_listening(block, self.recipe, self.r1))
                for block in blocks_of(self.model)
            ]
            for batch, keep in batches:
                for listener in heard:
                    listener.hear(keep)
                run(batch)
        choices = []
        for block, listener in zip(blocks_of(self.model), heard, strict=True):
            trim()  # holes of many sizes, of activations, of copies in float64 and of rounded ones
            choices.append(self._choose(block, listener))
        self.apply(choices)

    def _choose(self, block: Block, heard: _Listener) -> Choice:
        """Decide for one block; its weights are rotated accordingly."""
        recipe = self.recipe
        of_weights = recipe.quantiser(recipe.weights, weight=True)

        def weight_error(weight: Tensor) -> float:
            return 0.0 if of_weights is None else _best(of_weights, weight, recipe)[1]

        value, output, down = block.value.weight, block.output.weight, block.down.weight
        rows, size = value[block.value_rows.flatten()], block.head_size
        errors: dict[str, tuple[float, float]] = {}
        if can_rotate(size):
            errors["values"] = (
                heard.least("value", False)
                + heard.least("output_input", False)
                + weight_error(rows)
                + weight_error(output),
                heard.least("value", True)
                + heard.least("output_input", True)
                + weight_error(rotated_rows(rows, size))
                + weight_error(by_head(output.double(), size).to(output.dtype)),
            )
            errors["keys"] = heard.least("key", False), heard.least("key", True)
        if can_rotate(block.down.in_features):
            errors["down"] = (
                heard.least("down_input", False) + weight_error(down),
                heard.least("down_input", True)
                + weight_error(rotate_ref(down.double()).to(down.dtype)),
            )
        on = {
            name: recipe.rotations != "none"
            and name in errors
            and (recipe.rotations == "all" or errors[name][1] < errors[name][0])
            for name in ("values", "keys", "down")
        }
        if on["values"]:
            rotate_values(block)
        if on["down"]:
            rotate_down(block)
        turned = {
            "value": on["values"],
            "output_input": on["values"],
            "key": on["keys"],
            "down_input": on["down"],
        }
        clips = {
            place: heard.best_clip(place, turned.get(place, self.r1 is not None))
            for place in PLACES
        }
        for name, linear in _named_linears(block):
            if isinstance(of_weights, Quantiser):
                clips[name] = _best(of_weights, linear.weight, recipe)[0].clip
        return Choice(**on, clips=clips, errors=errors, ranges=heard.ranges())

    def apply(self, choices: list[Choice]) -> None:
        """Give every module its quantiser. Weights are as the choices say already."""
        self.choices, recipe = choices, self.recipe
        for block, choice in zip(blocks_of(self.model), choices, strict=True):

            def at(place: str, bits: int, choice: Choice = choice) -> Quantiser | None:
                found = recipe.quantiser(bits)
                return found and replace(found, clip=choice.clips[place])

            block.attention_norm.quantiser = at("attention_input", recipe.activations)
            block.mlp_norm.quantiser = at("mlp_input", recipe.activations)
            block.output.input_quantiser = at("output_input", recipe.activations)
            block.down.input_quantiser = at("down_input", recipe.activations)
            block.down.rotate_input = choice.down
            kv = block.attention.kv_quantiser
            kv.key, kv.value, kv.rotate = at("key", recipe.kv), at("value", recipe.kv), choice.keys
            of_weights = recipe.quantiser(recipe.weights, weight=True)
            for name, linear in _named_linears(block):
                if isinstance(of_weights, Quantiser):
                    linear.quantiser = replace(of_weights, clip=choice.clips[name])

    def freeze_int4(self) -> None:
        """Pack all weights for good, one after the other."""
        for block in blocks_of(self.model):
            for linear in block.linears():
                self.gains.pop(linear.weight, None)  # it keeps what it is the gain of
                latent = linear.weight.detach()
                linear.freeze_int4(self.recipe.group or 64)
                # Of a mapped file: what rotating wrote there would stay until all of it goes.
                forget_mapped(latent.data_ptr(), latent.nbytes)
                del latent
            trim()  # or the temporaries stay
        # The mapping itself lives as long as one tensor of it.
        for parameter in self.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()

    def manifest(self) -> dict[str, Any]:
        """Recipe and choices as JSON has them."""
        return {
            "recipe": asdict(self.recipe),
            "blocks": [asdict(choice) for choice in self.choices],
        }


def _named_linears(block: Block) -> Iterator[tuple[str, QuantLinear]]:
    """Linear layers with a name for each within the block."""
    names = (
        *(f"reader_{i}" for i in range(len(block.readers))),
        "output",
        *(f"inner_{i}" for i in range(len(block.inner))),
        "down",
    )
    return zip(names, block.linears(), strict=True)


def _best(quantiser: Any, weight: Tensor, recipe: Recipe) -> tuple[Any, float]:
    """The quantiser at its best clip for a weight, and its error."""
    if isinstance(quantiser, Int4Groups):
        return quantiser.best_clip(weight)
    return quantiser.best_clip(weight, recipe.clips)


class _Listener:
    """Collects the errors of one block's activations, in every way that may be chosen."""

    def __init__(self, block: Block, recipe: Recipe, r1: Rotation | None) -> None:
        self.recipe, self.r1, self.size = recipe, r1, block.head_size
        self.keep: Tensor | None = None
        self.errors: dict[tuple[str, bool], Tensor] = {}  # (clips,), summed over batches
        self.peaks: dict[tuple[str, bool], tuple[float, float]] = {}  # largest, sum of mean squares
        self.batches = 0

    def hear(self, keep: Tensor | None) -> None:
        """What counts in the batch that comes: indices of tokens, rows one after the other."""
        self.tokens = 0 if keep is None else keep.numel()
        self.keep = None if keep is None else keep.flatten().nonzero().squeeze(1)
        self.batches += 1

    def take(self, place: str, bits: int, x: Tensor) -> None:
        """`(B, T, ...)` or `(B T, n)` at a place."""
        x = x.flatten(0, 1) if x.dim() > 2 else x
        if self.keep is not None:
            if len(x) != self.tokens:
                raise InputError(
                    f"The calibration batch has a mask for {self.tokens} tokens, and the model ran "
                    f"on {len(x)}: let the closure run the batch whole, once."
                )
            x = x.index_select(0, self.keep)
        x = x.reshape(-1, self.size) if place in ("key", "value") else x.flatten(1)
        x = x[:: -(-len(x) // _MOST_ROWS)].float()
        for turned, way in self._ways(place, x):
            mean_square = way.square().mean().item()
            largest, before = self.peaks.get((place, turned), (0.0, 0.0))
            self.peaks[place, turned] = max(largest, way.abs().max().item()), before + mean_square
            quantiser = self.recipe.quantiser(bits)
            errors = [
                0.0 if quantiser is None else replace(quantiser, clip=clip).error(way)
                for clip in alike(self.recipe.clips)
            ]
            total = self.errors.get((place, turned), torch.zeros(len(errors)))
            self.errors[place, turned] = total + torch.tensor(errors)

    def _ways(self, place: str, x: Tensor) -> Iterator[tuple[bool, Tensor]]:
        """`x` as it would be without its rotation and with it."""
        if place in ("attention_input", "mlp_input"):  # R1 is on already
            if self.r1 is None:
                yield False, x
            else:
                yield False, self.r1.undo(x)
                yield True, x
            return
        yield False, x
        if place == "output_input" and can_rotate(self.size):
            yield True, by_head(x, self.size)
        elif place != "output_input" and can_rotate(x.shape[1]):
            yield True, rotate_ref(x)

    def least(self, place: str, turned: bool) -> float:
        """The mean error over batches, at the best clip."""
        return self.errors[place, turned].min().item() / self.batches

    def best_clip(self, place: str, turned: bool) -> float:
        return self.recipe.clips[int(self.errors[place, turned].argmin())]

    def ranges(self) -> dict[str, tuple[float, float]]:
        def crest(place: str, turned: bool) -> float:
            largest, square = self.peaks.get((place, turned), self.peaks[place, False])
            return largest / max(square / self.batches, 1e-30) ** 0.5

        return {place: (crest(place, False), crest(place, True)) for place in PLACES}


@contextmanager
def _listening(block: Block, recipe: Recipe, r1: Rotation | None) -> Iterator[_Listener]:
    """Meanwhile the block's activations are told to a listener."""
    listener = _Listener(block, recipe, r1)
    act = recipe.activations

    def of_input(module: nn.Module, args: tuple, place: str) -> None:
        listener.take(place, act, args[0])

    def of_output(module: nn.Module, args: tuple, out: Tensor, place: str) -> None:
        listener.take(place, act, out)

    def of_heads(k: Tensor, v: Tensor) -> None:
        listener.take("key", recipe.kv, k.transpose(1, 2))
        listener.take("value", recipe.kv, v.transpose(1, 2))

    hooks = [
        block.attention_norm.register_forward_hook(partial(of_output, place="attention_input")),
        block.mlp_norm.register_forward_hook(partial(of_output, place="mlp_input")),
        block.output.register_forward_pre_hook(partial(of_input, place="output_input")),
        block.down.register_forward_pre_hook(partial(of_input, place="down_input")),
    ]
    block.attention.kv_quantiser.listen = of_heads
    try:
        yield listener
    finally:
        block.attention.kv_quantiser.listen = None
        for hook in hooks:
            hook.remove()
