"""RoSTE: fine-tuning a rotated, quantised model through a straight-through estimator.

"RoSTE: An Efficient Quantization-Aware Supervised Fine-Tuning Approach for Large Language Models"
(Wei et al. 2025, arXiv:2502.09003). First the rotations are chosen that quantise best (the lower
level, `tinyft/rotated/search.py`, once, K = 1); then the loss of the quantised model is minimised,
its gradients passing the rounding as if it were not there:

    dX = dY Q(W R) R'        d(W R) = dY' Q(X R)

Three ways to train:

* `trainable="all"`: the paper's. Latent weights in 16 bits, rounded anew after each step.
* `trainable="lora"`: the rotated base is packed to 4 bits and frozen; adapters, and a scale a
  channel of the inputs of all linear layers (the norms' own where there is a norm), are trained
  through the rounding of the activations.
* `RoSTEMeZO` (`roste_mezo`): the same parameters by finite differences, without a backward pass.

Deviations from the published code: see `search` and `rotation`; embedding and head stay one matrix
and are trained with the rest in the first way; a weight that took a norm's scale is trained at a
rate as much smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from tinyft import activations
from tinyft.adapters import adapter_arguments, inject
from tinyft.errors import InputError
from tinyft.losses import check_head
from tinyft.modules import evaluating
from tinyft.optim.base import Optimizer, register, size_of
from tinyft.optim.gradient import GradientArguments, GradientOptimizer
from tinyft.optim.mezo import MeZO, MeZOOptions
from tinyft.plots import rotation_plot
from tinyft.rotated import artefact
from tinyft.rotated.families import obstacle
from tinyft.rotated.rotation import blocks_of
from tinyft.rotated.search import GRADIENTS, PLACES, ROTATIONS, Choice, Recipe, Rotated

CALIBRATION_EXAMPLES = 128  # the paper's


@dataclass(frozen=True)
class RoSTEOptions:
    """What `RoSTE` can be told besides what every gradient method can."""

    weights: int = field(default=4, metadata={"help": "bits of weights; 16 leaves them"})
    activations: int = field(default=8, metadata={"help": "bits of activations; 16 leaves them"})
    kv: int = field(default=8, metadata={"help": "bits of keys and values; 16 leaves them"})
    rotations: str = field(
        default="adaptive",
        metadata={"help": "Hadamard rotations: searched, all or none", "choices": ROTATIONS},
    )
    clip: float | None = field(
        default=None, metadata={"help": "share of each range that is kept (default: searched)"}
    )
    symmetric: bool = field(
        default=False, metadata={"help": "ranges symmetric about 0, of weights and activations"}
    )
    group: int = field(
        default=0,
        metadata={"help": "columns of a weight that share a scale (0: its row; frozen base: 64)"},
    )
    ste: str = field(
        default="identity",
        metadata={"help": "gradient of what is clipped: as it is, or none", "choices": GRADIENTS},
    )

    def recipe(self, *, int4_base: bool, seed: int) -> Recipe:
        """These options as the recipe of a model."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(RoSTEOptions)}
        return Recipe(**own, int4_base=int4_base, seed=seed)

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        return self.recipe(int4_base=False, seed=0).problems()


class _Quantising(Optimizer):
    """What the ways have in common: the model, its calibration and its artefact."""

    rotated: Rotated
    packs_base = True
    layers_alike = True

    @classmethod
    def obstacle(cls, model_config: Any) -> str:
        return obstacle(model_config)

    def assume(self) -> None:
        """See `Optimizer.assume`: a search mostly finds that rotations are worth it."""
        if self.rotated.recipe.rotations == "adaptive":
            self.rotated.recipe = dataclasses.replace(self.rotated.recipe, rotations="all")

    @torch.no_grad()
    def prepare(self, closure: Callable[..., Tensor], batches: Iterable[Any]) -> None:
        """Choose rotations and clips by calibration batches, and quantise the model.

        Args:
            closure: as `step` takes it; without batches it is called alone.
            batches: 128 examples or more are used of them; see `tinyft.data.Batch`. An
                `attention_mask` that they have says what is padding.
        """
        chosen: list[tuple[Any, Tensor | None]] = []
        examples = 0
        for batch in batches:
            if examples >= CALIBRATION_EXAMPLES:
                break
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            chosen.append((batch, getattr(batch, "attention_mask", mask)))
            examples += size_of(batch)

        def run(batch: Any) -> None:
            closure() if batch is None else closure(batch)

        model = self.rotated.model
        with evaluating(model):
            check_head(model)  # now, and not amid the calibration
            # Activations are copied and rounded in many ways: no more holes than in training.
            with self.heap.before(activations.blocks_of(model)):
                self.rotated.calibrate(run, chosen or [(None, None)])
        if self.rotated.recipe.int4_base:
            self.rotated.freeze_int4()
        super().prepare(closure, [batch for batch, _ in chosen])

    def step(  # type: ignore[override]
        self, closure: Callable[..., Tensor] | None = None, batch: Any = None
    ) -> Tensor | None:
        """See `Optimizer.step`; the first one calibrates, unless `prepare` did."""
        if not self.rotated.choices:
            if closure is None:
                raise InputError(
                    "RoSTE quantises the model by a calibration batch before the first step: call "
                    "prepare(closure, batches), or step(lambda: loss_fn(model, batch))."
                )
            self.prepare(closure, [] if batch is None else [batch])
        return super().step(closure, batch)

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        artefact.save(self.rotated, tokenizer, directory)
        return "packed"

    def state_dict(self) -> dict[str, Any]:
        """As the method's own, with what was chosen for each block."""
        return {**super().state_dict(), "blocks": self.rotated.manifest()["blocks"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, for a model whose weights have been, or will be, loaded too.

        Raises:
            InputError: the state is of a packed base, and this one is not packed.
        """
        state = dict(state_dict)
        choices = [Choice(**block) for block in state.pop("blocks")]
        linears = [linear for block in blocks_of(self.rotated.model) for linear in block.linears()]
        if choices and self.rotated.recipe.int4_base and not all(m.is_packed for m in linears):
            raise InputError(
                "This state is of a packed base, and the model's is not packed: its weights cannot "
                "be loaded. Write it with tinyft.rotated.artefact.save, and go on from that by "
                "LoRA or MeZO."
            )
        super().load_state_dict(state)
        if choices:
            self.rotated.apply(choices)

    def plots(self) -> dict[str, Callable[[Path], None]]:
        if not self.rotated.choices:
            return {}
        choices, recipe = self.rotated.choices, self.rotated.recipe
        draw = partial(
            rotation_plot,
            ranges={place: [c.ranges[place] for c in choices] for place in PLACES},
            chosen={
                "R2 (values)": [c.values for c in choices],
                "R3 (keys)": [c.keys for c in choices],
                "R4 (down)": [c.down for c in choices],
            },
            title=f"Activation ranges; W{recipe.weights} A{recipe.activations} KV{recipe.kv}, "
            f"rotations {recipe.rotations}",
        )
        return {"rotations.png": draw}


def _on_packed_base(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | Sequence[str],
    seed: int,
) -> None:
    """Adapters, and a scale a channel of what linear layers read: what is trained on a packed base.

    Scales of inputs and not of outputs, since their gradients need nothing that is not kept anyway.
    """
    inject(model, rank, alpha, dropout, targets, seed)
    # Adapters remember what they froze, to give it back; here it is gone once it is packed.
    model.__dict__.pop("_frozen_by_adapters")
    for block in blocks_of(model):
        for norm in (block.attention_norm, block.mlp_norm):
            # In 16 bits a scale near 1 could not take small steps.
            norm.weight = nn.Parameter(norm.weight.detach().float())
        for linear in (block.output, block.down):
            device = linear.weight.device
            linear.input_scale = nn.Parameter(torch.ones(linear.in_features, device=device))


@register("roste")
class RoSTE(_Quantising, GradientOptimizer):
    """Straight-through fine-tuning of a rotated, quantised causal language model.

    The model is changed at once (its modules replaced, norms fused, the residual stream rotated),
    and quantised by `prepare` or by the first step, which then calibrates on its own batch. The
    arguments not listed are `GradientOptimizer`'s and `LoRA`'s.

    Args:
        weights, activations, kv: bits, 2 to 8, or 16.
        rotations: `"adaptive"`, `"all"` or `"none"`.
        clip: share of each range that is kept; None searches it.
        symmetric: ranges symmetric about 0.
        group: columns of a weight that share a scale; 0 for its row (frozen base: 64).
        ste: `"identity"`, or `"clipped"`: no gradient to what is clipped.
        trainable: `"all"` or `"lora"`, see the module.

    Attributes:
        rotated: the model with what was chosen for it.

    Example:
        >>> optimizer = tinyft.RoSTE(model, lr=5e-5, activations=8, kv=8)
        >>> for batch in batches:
        ...     loss = optimizer.step(lambda: model(**batch).loss)
        >>> tinyft.rotated.artefact.save(optimizer.rotated, tokenizer, "packed")
    """

    Options = RoSTEOptions
    default_lr = {"all": 1e-5, "lora": 2e-4}  # noqa: RUF012

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-5,
        *,
        weights: int = 4,
        activations: int = 8,
        kv: int = 8,
        rotations: str = "adaptive",
        clip: float | None = None,
        symmetric: bool = False,
        group: int = 0,
        ste: str = "identity",
        trainable: str = "all",
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] = "all-linear",
        dropout: float = 0.0,
        seed: int = 0,
        **common: Unpack[GradientArguments],
    ) -> None:
        options = RoSTEOptions(weights, activations, kv, rotations, clip, symmetric, group, ste)
        frozen = trainable == "lora"
        self.rotated = Rotated(model, options.recipe(int4_base=frozen, seed=seed))
        if frozen:
            _on_packed_base(model, rank, alpha, dropout, targets, seed)
        else:
            model.requires_grad_(True)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, named, lr, **common)

    def _use_rows(self, parameter: Tensor, group: dict[str, Any], row: int, grad: Tensor) -> None:
        # Adam's steps are as large for a weight that took a norm's small scale (SmolLM2: 0.03 to
        # 0.4) as for the one before, which would be 3 to 30 times the step that was asked for.
        gain = self.rotated.gains.get(parameter, 1.0)
        super()._use_rows(parameter, {**group, "lr": group["lr"] * gain}, row, grad)
        # Fused update rules write without saying so, and a layer rounds its weight anew by this.
        torch.autograd.graph.increment_version(parameter)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> RoSTE:
        model.train()
        optimizer = cls(
            model,
            config.lr,
            **dataclasses.asdict(config.options),
            trainable=config.trainable,
            **adapter_arguments(config),
            **cls.arguments(config),
        )
        check_head(model)
        return optimizer


@dataclass(frozen=True)
class RoSTEMeZOOptions(RoSTEOptions, MeZOOptions):
    """`RoSTEOptions` and `MeZOOptions`."""

    def problems(self) -> list[str]:
        return [*RoSTEOptions.problems(self), *MeZOOptions.problems(self)]


@register("roste_mezo")
class RoSTEMeZO(_Quantising, MeZO):
    """MeZO on the frozen, packed base of `RoSTE(trainable="lora")`.

    Finite differences need no gradient of the rounding. What is perturbed are adapters, scales and
    norms: eps is far below a step of 4 bits, and a perturbed weight would be rounded to itself.
    `options` are the fields of `RoSTEMeZOOptions`, the other arguments `RoSTE`'s and `MeZO`'s.

    Example:
        >>> optimizer = tinyft.RoSTEMeZO(model)
        >>> for batch in batches:
        ...     loss = optimizer.step(lambda: model(**batch).loss)
    """

    Options = RoSTEMeZOOptions
    default_lr = {"lora": 1e-2}  # noqa: RUF012
    two_sided_lr = {"lora": 5e-5}  # noqa: RUF012
    needs = "lora"

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] = "all-linear",
        weight_decay: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = self.completed(RoSTEMeZOOptions(**options), self.needs)
        self.rotated = Rotated(model, own.recipe(int4_base=True, seed=seed))
        _on_packed_base(model, rank, alpha, 0.0, targets, seed)
        of_mezo = {f.name: getattr(own, f.name) for f in dataclasses.fields(MeZOOptions)}
        super().__init__(model, lr, weight_decay=weight_decay, seed=seed, **of_mezo)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> RoSTEMeZO:
        return cls(
            model,
            config.lr,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.lora_targets,
            weight_decay=config.weight_decay,
            seed=config.seed,
            **dataclasses.asdict(config.options),
        )
