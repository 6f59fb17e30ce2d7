"""SparseLoRA: adapters trained through the channels of a frozen model that the context needs.

"SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity" (ICML 2025). For the tokens of
the context, each layer multiplies some channels of its frozen weights, chosen anew for each batch;
tokens of the output, adapters, and the first steps are dense.
Outside of `step` the model is dense, and the result is an ordinary adapter.

What differs from the published code:
* channels are chosen by what a sixteenth of the context's tokens make of them, and by what they do
  to the output; the published guess by singular vectors (`estimator="svd"`) misses the few channels
  that carry most (bench/RESULTS.md);
* query heads are mapped to key heads as the model does, rotary pairs stay together, and padding has
  no part in the choice (`tinyft/sparse/channels.py`);
* biases count in the guess and are always added;
* gradients are those of what was computed; the published attention passes none through the base
  (`exact_attention=False`);
* the prompt's last token, which predicts the first of the output, is dense;
* adapters on an MLP are sliced with it (the paper adapts attention alone);
* the schedule is calibrated (`tinyft/sparse/schedule.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from tinyft.adapters import adapter_arguments
from tinyft.assets import cache_directory
from tinyft.cost import FlopCounter
from tinyft.errors import InputError
from tinyft.importance import undisturbed
from tinyft.losses import check_head
from tinyft.modules import replaced_forwards
from tinyft.optim.base import call_per_example, check_finite, register
from tinyft.optim.gradient import size_of, split
from tinyft.optim.lora import LoRA, LoRAArguments
from tinyft.sparse.estimator import estimators, side_by_side
from tinyft.sparse.layers import Context, find
from tinyft.sparse.schedule import LEVELS, Key, costs, read, solve, summary, write
from tinyft.sparse.sensitivity import Effects
from tinyft.sparse.tokens import SPLITS, Tokens

log = logging.getLogger(__name__)

_ROWS = 2  # examples of a pass that effects are found in: few, as inputs and outputs are kept
_PASSES = 2  # of a turn
_TURNS = 3  # for each calibration batch, each further on the way to the schedule
_DENSE = 0.05  # of the steps, at first
ESTIMATORS = ("sample", "svd")
_SMALL = 10_000_000  # parameters of a model whose estimators are made faster than looked up


@dataclass(frozen=True)
class SparseLoRAOptions:
    """What `SparseLoRA` can be told besides what `LoRA` can."""

    sparsity: str = field(
        default="auto", metadata={"help": "auto (calibrated), uniform, or a schedule in YAML"}
    )
    flops_share: float = field(
        default=0.65, metadata={"help": "FLOPs of a sparse step over those of a dense one"}
    )
    start_step: int | None = field(
        default=None, metadata={"help": "dense steps at first (default: 5% of --steps)"}
    )
    sparse_tokens: str = field(
        default="context",
        metadata={"help": "tokens that are sparse: the context's, or all", "choices": SPLITS},
    )
    sparse_attention: bool = field(
        default=True, metadata={"help": "whether attention may be sparse, too"}
    )
    exact_attention: bool = field(
        default=True, metadata={"help": "gradients through the sparse base of attention"}
    )
    estimator: str = field(
        default="sample",
        metadata={
            "help": "channels are chosen by a sample of tokens (default), or by svd",
            "choices": ESTIMATORS,
        },
    )
    estimator_rank: int = field(default=8, metadata={"help": "rank of the estimator svd"})
    block: int = field(default=1, metadata={"help": "channels of an MLP chosen together"})
    calibration_batches: int = field(
        default=2, metadata={"help": "batches that the schedule is calibrated on"}
    )

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if not 0 < self.flops_share <= 1:
            found.append(f"flops_share must be above 0 and at most 1; found {self.flops_share}.")
        if self.sparse_tokens not in SPLITS:
            found.append(
                f"sparse_tokens must be one of {', '.join(SPLITS)}; found {self.sparse_tokens!r}."
            )
        if self.estimator not in ESTIMATORS:
            found.append(
                f"estimator must be one of {', '.join(ESTIMATORS)}; found {self.estimator!r}."
            )
        if self.start_step is not None and self.start_step < 0:
            found.append(f"start_step must not be negative; found {self.start_step}.")
        for name in ("estimator_rank", "block", "calibration_batches"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1; found {getattr(self, name)}.")
        return found


@register("sparse_lora")
class SparseLoRA(LoRA):
    """LoRA in which tokens of the context pass through some channels of the frozen model alone.

    A step needs to know which tokens are context: `step(closure, batch)` with a `tinyft.data.Batch`
    or a mapping that holds `input_ids` and `labels`, or a closure that calls `model(labels=...)`.
    Without labels (choices of one token) a row's last token is the output. The other arguments are
    `LoRA`'s.

    Args:
        sparsity: `"auto"`: calibrated on the first batches; `"uniform"`: the same for all layers'
            MLPs; else the path of a schedule (`tinyft/sparse/schedule.py`).
        flops_share: FLOPs of a sparse step over those of a dense one, for `"auto"` and `"uniform"`.
        start_step: steps that are dense at first.
        sparse_tokens: `"context"` or `"all"`.
        sparse_attention: False leaves attention dense.
        exact_attention: False: sparse attention passes no gradient through the base, as published.
        estimator: `"sample"`: channels are chosen by what a sample of the context's tokens makes of
            them; `"svd"`: by a guess from the weights' largest singular vectors, as published.
        estimator_rank: of that guess.
        block: channels of an MLP that are chosen together.
        calibration_batches: that `"auto"` measures sensitivities on.
        cache: folder that keeps singular vectors for the next run.
        break_even: False: sparse even where dense should be faster.

    Attributes:
        schedule: `{(layer, part): sparsity}`, part `"ffn"`, `"qk"` or `"vo"`; None until known.

    Example:
        >>> optimizer = tinyft.SparseLoRA(model, lr=2e-4, flops_share=0.5)
        >>> for batch in batches:  # with "input_ids" and "labels"
        ...     loss = optimizer.step(lambda: model(**batch).loss)
    """

    Options = SparseLoRAOptions

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        *,
        sparsity: str = "auto",
        flops_share: float = 0.65,
        start_step: int | None = None,
        sparse_tokens: str = "context",
        sparse_attention: bool = True,
        exact_attention: bool = True,
        estimator: str = "sample",
        estimator_rank: int = 8,
        block: int = 1,
        calibration_batches: int = 2,
        cache: Path | None = None,
        break_even: bool = True,
        **common: Unpack[LoRAArguments],
    ) -> None:
        self.options = SparseLoRAOptions(
            str(sparsity),
            flops_share,
            start_step or 0,
            sparse_tokens,
            sparse_attention,
            exact_attention,
            estimator,
            estimator_rank,
            block,
            calibration_batches,
        )
        if problems := self.options.problems():
            raise InputError(" ".join(problems))
        super().__init__(model, lr, **common)
        self.context = Context(None, {}, break_even, block)
        self.cache = cache
        self._mlps, self._attentions = find(
            model, self.context, attention=sparse_attention, exact=exact_attention
        )
        self.keys: list[Key] = [(m.layer, "ffn") for m in self._mlps]
        self.keys += [(a.layer, part) for part in ("qk", "vo") for a in self._attentions]
        self.schedule: dict[Key, float] | None = None
        if self.options.sparsity not in ("auto", "uniform"):
            self.schedule = read(sparsity, self.keys)
        self._so_far: dict[Key, float] = {}  # of a schedule that is being calibrated
        self._rises = np.zeros((len(self.keys), len(LEVELS)))
        # FLOPs, context tokens, sampled ones, and batches so far.
        self._flops = self._tokens = self._sampled = self._calibrated = 0
        self._ready, self.is_assumed, self._dense_share = False, False, _DENSE

    # Steps.

    def step(  # type: ignore[override]
        self, closure: Callable[..., Tensor] | None = None, batch: Any = None
    ) -> Tensor | None:
        """See `Optimizer.step`."""
        if closure is None:
            raise InputError(
                "SparseLoRA changes the forward pass: call step(lambda: loss_fn(model, batch))."
            )
        self.clean = True
        phase = self._phase()
        if phase == "calibrating":
            return self._calibrate(closure, batch)
        if phase == "dense":
            return self._dense_step(closure, batch)
        self.context.sparsity = self.schedule
        with self._sparse(closure) as inside:
            return super().step(inside, batch)

    def _dense_step(self, closure: Callable[..., Tensor], batch: Any) -> Tensor:
        with self._as_dense(batch):
            return super().step(closure, batch)

    @contextmanager
    def _as_dense(self, batch: Any) -> Iterator[None]:
        """Meanwhile in twice as many parts as a sparse step, so as not to need more memory."""
        parts = self.grad_accumulation
        if batch is not None and size_of(batch) >= 2 * parts:
            self.grad_accumulation = 2 * parts
        try:
            yield
        finally:
            self.grad_accumulation = parts

    def cost_key(self, batch: Any) -> tuple[Hashable, tuple[int, ...]]:
        phase = self._phase()
        if phase == "calibrating":  # which goes by what it finds
            return (phase, self.steps), (1,)
        with self._as_dense(batch) if phase == "dense" else nullcontext():
            kind, sizes = super().cost_key(batch)
        if phase == "sparse":
            parts = batch.split(self.n_parts(batch.size))
            tokens = [Tokens.of_batch(part, self.options.sparse_tokens) for part in parts]
            sizes += sum(len(t.sparse) for t in tokens), sum(len(t.sample[0]) for t in tokens)
        return (phase, kind), sizes

    def _phase(self) -> str:
        """What the next step is: "dense", "calibrating" (dense, too) or "sparse"."""
        start, batches = self.options.start_step, self.options.calibration_batches
        if self.schedule is None:
            return "calibrating" if self.steps >= start - batches else "dense"
        return "sparse" if self.steps >= start else "dense"

    @property
    def period(self) -> int:
        """The share of steps that are dense, if it is known, as one dense step in so many."""
        return max(2, round(1 / self._dense_share))

    def assume(self) -> None:
        """See `Optimizer.assume`: one dense step, and layers equally sparse from then on."""
        self.cache, self.is_assumed = None, True
        self.options = dataclasses.replace(self.options, start_step=1, calibration_batches=1)
        self._prepare()

    @contextmanager
    def _sparse(self, closure: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
        """Meanwhile the model is sparse, for passes of the closure that this yields."""
        self._prepare()
        parts = [part for layer in (*self._mlps, *self._attentions) for part in layer.bind()]
        hook = self.model.register_forward_pre_hook(self._see_call, with_kwargs=True)
        try:
            with replaced_forwards(parts):
                yield partial(self._told, closure)
        finally:
            hook.remove()
            self.context.tokens = None

    def _told(self, closure: Callable[..., Tensor], *part: Any) -> Tensor:
        """`closure(*part)`, with the sparse layers told which tokens are which."""
        self.context.tokens = None
        if part:
            self.context.tokens = Tokens.of_batch(part[0], self.options.sparse_tokens)
        loss = closure(*part)
        if self.context.tokens is None:
            raise InputError(
                "SparseLoRA needs to know which tokens are context: give step() the batch, with "
                "input_ids and labels, or call the model with input_ids=... and labels=...."
            )
        return loss

    def _see_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None and kwargs.get("input_ids") is not None:
            self.context.tokens = Tokens.of_batch(kwargs, self.options.sparse_tokens)

    def _prepare(self) -> None:
        """Singular vectors, once."""
        if self._ready or self.options.estimator != "svd":
            return
        layers = [*self._mlps, *self._attentions]
        parts = {
            f"{i}.{key}": part
            for i, layer in enumerate(layers)
            for key, part in layer.estimated().items()
        }
        made = estimators(
            {name: part.dense for name, part in parts.items()},
            {name: part.bias for name, part in parts.items()},
            self.options.estimator_rank,
            self.cache,
        )
        for i, layer in enumerate(layers):
            layer.guess = side_by_side([made[f"{i}.{key}"] for key in layer.estimated()])
        self._ready = True

    # Calibration.

    def _calibrate(self, closure: Callable[..., Tensor], batch: Any) -> Tensor:
        """A dense step; then what this batch says about the schedule."""
        tokens: list[Tokens] = []

        def watched(*part: Any) -> Tensor:
            loss = self._told(closure, *part)
            tokens.append(self.context.tokens)
            self.context.tokens = None
            return loss

        hook = self.model.register_forward_pre_hook(self._see_call, with_kwargs=True)
        self.context.sparsity = {}
        try:
            with FlopCounter() as counter:
                loss = self._dense_step(watched, batch)
        finally:
            hook.remove()
        self._flops += counter.flops
        self._tokens += sum(len(t.sparse) for t in tokens)
        self._sampled += sum(len(t.sample[0]) for t in tokens)
        self._calibrated += 1
        if self.options.sparsity == "auto":
            self._refine(closure, batch)
            is_known = self._calibrated >= self.options.calibration_batches
            self.schedule = self._so_far if is_known else None
        else:
            self.schedule = self._solved(self.options.flops_share, uniform=True)
        if self.schedule is not None:
            log.info("Sparse from step %d on: %s", self.steps + 1, summary(self.schedule))
        return loss

    def _refine(self, closure: Callable[..., Tensor], batch: Any) -> None:
        """Go some way to the wanted share of FLOPs, looking again at each turn what each part does
        to the loss where the parts found so far are sparse."""
        self._solved(self.options.flops_share)  # or an error, before anything is measured
        turns = _TURNS * self.options.calibration_batches
        parts: Sequence[Any] = [None]
        if batch is not None:
            parts = split(batch, math.ceil(size_of(batch) / _ROWS))
        for k in range(_TURNS):
            these = {(_PASSES * k + i) % len(parts) for i in range(_PASSES)}
            rises = sum(self._effects(closure, parts[i]) for i in sorted(these))
            self._rises = np.maximum(self._rises, rises)
            way = ((self._calibrated - 1) * _TURNS + k + 1) / turns
            self._so_far = self._solved(1 - way * (1 - self.options.flops_share))

    def _effects(self, closure: Callable[..., Tensor], part: Any) -> np.ndarray:
        """(keys, levels): what each part does to the loss of some examples, of all if None, where
        `self._so_far` is sparse already. Nothing is changed by it."""
        if self.is_assumed:
            return np.zeros_like(self._rises)
        layers = [*self._mlps, *self._attentions, *self._attentions]
        break_even, self.context.break_even = self.context.break_even, False
        self.context.sparsity = dict(self._so_far)
        effects = Effects(self.keys, layers, LEVELS, self.context)
        try:
            with undisturbed(self.model, evaluating=True), self._sparse(closure) as inside:
                with effects.listening(), self.keeping(), torch.enable_grad():
                    loss = inside() if part is None else call_per_example(inside, part).mean()
                check_finite(loss.detach(), self.steps + 1)
                loss.backward()
        finally:
            self.context.break_even = break_even
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        return effects.found

    def savings(self, tokens: int) -> np.ndarray:
        """(keys,) FLOPs that each part would save at sparsity 1 in a step with so many sparse
        tokens: forward and backward product of the base (and a second forward one if blocks are
        recomputed), and three of an adapter that is sliced along."""
        passes = 3 if self.checkpointing == "full" else 2
        layers = [*self._mlps, *self._attentions, *self._attentions]
        elements = [layer.elements(key[1]) for layer, key in zip(layers, self.keys, strict=True)]
        return np.array([2.0 * tokens * (passes * b + (passes + 1) * a) for b, a in elements])

    def _choosing(self) -> float:
        """FLOPs of all samples in a step like those so far."""
        if self.options.estimator == "svd":
            return 0.0  # a rank of 8 among hundreds
        parts = (p for layer in (*self._mlps, *self._attentions) for p in layer.sampled())
        return sum(2.0 * self._sampled * p.n_in * p.n_out for p in parts)

    def _solved(self, flops_share: float, *, uniform: bool = False) -> dict[Key, float]:
        """The schedule of least rise for a share of a dense step's FLOPs.

        Raises:
            InputError: `self.options.flops_share` is out of reach.
        """
        saved = self.savings(self._tokens)
        need = (1 - flops_share) * self._flops + self._choosing()
        if uniform:
            is_ffn = np.array([part == "ffn" for _, part in self.keys])
            saved = saved * is_ffn
            same = need / saved.sum() if saved.any() else np.inf
            found = same * is_ffn if same <= LEVELS[-1] else None
        else:
            found = solve(costs(self._rises), saved, need)
        if found is None:
            least = 1 - (LEVELS[-1] * saved.sum() - self._choosing()) / self._flops
            raise InputError(
                f"flops_share {flops_share:g} cannot be reached on these batches: "
                f"with {LEVELS[-1]:.0%} of channels left out everywhere it is {least:.2f}, as "
                f"{self._tokens:,} tokens of context are sparse and all else is dense. Ask for "
                f"more, or have longer contexts, or sparse_tokens all."
            )
        return {key: float(s) for key, s in zip(self.keys, found, strict=True) if s > 0}

    # Around the steps.

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> SparseLoRA:
        model.train()
        check_head(model)
        options = dataclasses.asdict(config.options)
        if options["start_step"] is None:
            options["start_step"] = round(_DENSE * config.steps) if config.steps else 10
        large = sum(p.numel() for p in model.parameters()) > _SMALL
        optimizer = cls(
            model,
            config.lr,
            **options,
            cache=cache_directory() / "sparse_lora" if large else None,
            **adapter_arguments(config),
            **cls.arguments(config),
        )
        if config.steps:
            optimizer._dense_share = max(options["start_step"], 1) / config.steps
        return optimizer

    def plots(self) -> dict[str, Callable[[Path], None]]:
        """The schedule, as `--sparsity` takes it."""
        if self.schedule is None:
            return {}
        return {"sparsity.yaml": partial(write, schedule=self.schedule)}

    # What calibration has found is part of the state.

    def state_tensors(self) -> dict[str, Tensor]:
        own = {f"sparsity/{name}": tensor for name, tensor in self._found().items()}
        return {**super().state_tensors(), **own}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = {n: t for n, t in tensors.items() if n.startswith("sparsity/")}
        self._load_found({n.removeprefix("sparsity/"): t for n, t in own.items()})
        super().load_state_tensors({n: t for n, t in tensors.items() if n not in own})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sparsity": self._found()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load_found(state_dict["sparsity"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "sparsity"})

    def _found(self) -> dict[str, Tensor]:
        found = self._so_far if self.schedule is None else self.schedule
        values = [found.get(key, 0.0) for key in self.keys]
        counts = [self._flops, self._tokens, self._sampled, self._calibrated]
        counts.append(self.schedule is not None)
        return {
            "rises": torch.from_numpy(self._rises.copy()),
            "counts": torch.tensor(counts),
            "schedule": torch.tensor(values, dtype=torch.float64),
        }

    def _load_found(self, tensors: Mapping[str, Tensor]) -> None:
        if "rises" not in tensors or len(tensors["rises"]) != len(self.keys):
            raise InputError(
                "The saved state holds no calibration of this model: resume with the --method and "
                "--sparse-attention that it began with."
            )
        self._rises = tensors["rises"].cpu().double().numpy().copy()
        counts = tensors["counts"].tolist()
        self._flops, self._tokens, self._sampled, self._calibrated, is_known = counts
        values = tensors["schedule"].tolist()
        self._so_far = {key: s for key, s in zip(self.keys, values, strict=True) if s > 0}
        self.schedule = self._so_far if is_known else None
