"""GreenTrainer: train the tensors that regain most loss for their FLOPs.

"Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation" (ICLR 2024).
A step of full fine-tuning costs T = T_forward + T_backward; the objective is rho T. Every
`reselect` steps each tensor k gets an importance I_k, and the set of most importance within the
objective is trained until the next time. The others are frozen for the forward pass, so that the
backward pass ends at the deepest tensor of the set and saves nothing for those between.

What differs from the published procedure:

* costs come from the autograd graph (`tinyft.backward_cost`), and the set is the best one
  (`tinyft.selection`), its cost never above the objective; there may be a limit on bytes as well;
* importance evaluations count against the objective, spread over the steps up to the next one, and
  importances are averaged over evaluations (the newest weighs `1 - smoothing`);
* a run's first batch is its longest, and is rated by no more of its examples than have the tokens
  of a usual batch; a selection that would serve less than half of its steps is left out;
* evaluations (`tinyft.importance`) leave everything as it was, to the bit, and run without dropout.
  The default is of first order: it copies no weights, uses each gradient as it is made, and takes
  the batch in parts so small that their activations need no more room than training's;
* to compare with, `choose="random"` and `"last"` take tensors in another order (a new random one at
  each selection; from the output inward), each that still fits, and evaluate nothing.

A tensor that leaves the set loses its moments, and begins anew if it comes back. Intervals are in
steps, as a method does not know how many make an epoch. A run shorter than one spends more on
evaluations than its objective allows for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import Unpack

from tinyft.adapters import adapter_arguments, adapters, ensure, save_adapter
from tinyft.backward_cost import BackwardCost, trace
from tinyft.errors import InputError
from tinyft.importance import first_order, published, undisturbed
from tinyft.losses import check_head
from tinyft.optim.base import call_per_example, check_finite, register
from tinyft.optim.gradient import GradientArguments, GradientOptimizer, size_of, split
from tinyft.plots import selection_plot
from tinyft.selection import Selection, saved_flops, select

CHOICES = ("importance", "random", "last")
IMPORTANCES = ("first-order", "published")
_LOOKED_AT = 32  # batches, to know a usual one
Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GreenTrainerOptions:
    """What `GreenTrainer` can be told besides what every gradient method can."""

    rho: float = field(
        default=0.5,
        metadata={
            "help": "FLOPs of a step over those of full fine-tuning, at most",
            "plan": (0.5, 0.7),
        },
    )
    memory_bytes: int | None = field(
        default=None, metadata={"help": "limit on what training keeps beside the weights"}
    )
    reselect: int = field(default=50, metadata={"help": "steps from one selection to the next"})
    choose: str = field(
        default="importance",
        metadata={
            "help": "which tensors: the most important or, to compare with, random or last ones",
            "choices": CHOICES,
        },
    )
    importance: str = field(
        default="first-order",
        metadata={"help": "how tensors are rated", "choices": IMPORTANCES},
    )
    smoothing: float = field(
        default=0.5, metadata={"help": "weight of the earlier importances in their average"}
    )

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if not 0 < self.rho <= 1:
            found.append(f"rho must be above 0 and at most 1; found {self.rho}.")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            found.append(f"memory_bytes must be positive; found {self.memory_bytes}.")
        if self.reselect < 1:
            found.append(f"reselect must be at least 1; found {self.reselect}.")
        for name, known in (("choose", CHOICES), ("importance", IMPORTANCES)):
            if (value := getattr(self, name)) not in known:
                found.append(f"{name} must be one of {', '.join(known)}; found {value!r}.")
        if not 0 <= self.smoothing < 1:
            found.append(f"smoothing must be in [0, 1); found {self.smoothing}.")
        return found


@register("green_trainer")
class GreenTrainer(GradientOptimizer):
    """The most important tensors of those that require a gradient, within a FLOP objective.

    Over a model with adapters it chooses among those: in effect, how deep to go backward. The
    first batch decides what tensors cost, so let it be the largest. The other arguments are
    `GradientOptimizer`'s.

    Args:
        rho: FLOPs over those of training all candidates, at most. The forward pass alone is about a
            third of that, and over adapters about half.
        memory_bytes: limit on activations, moments and kept gradients together, or None. The one
            gradient in use, and temporary results, come on top.
        reselect: steps from one selection to the next.
        choose: `"importance"`, or without any evaluation `"random"` or `"last"`.
        importance: `"first-order"` or `"published"`; the latter takes full fine-tuning's memory and
            a copy of the weights while it evaluates.
        smoothing: weight of the earlier importances in their average.

    Attributes:
        history: the `Selection`s so far.

    Example:
        >>> optimizer = tinyft.GreenTrainer(model, lr=2e-5, rho=0.5)
        >>> for batch in batches:
        ...     loss = optimizer.step(lambda: model(**batch).loss)
    """

    Options = GreenTrainerOptions

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-5,
        *,
        rho: float = 0.5,
        memory_bytes: int | None = None,
        reselect: int = 50,
        choose: str = "importance",
        importance: str = "first-order",
        smoothing: float = 0.5,
        **common: Unpack[GradientArguments],
    ) -> None:
        self.options = GreenTrainerOptions(
            rho, memory_bytes, reselect, choose, importance, smoothing
        )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        problems = self.options.problems()
        if not named:
            problems.append("The model has no parameter with requires_grad=True: nothing to train.")
        if problems:
            raise InputError(" ".join(problems))
        super().__init__(model, named, lr, **common)
        self.names = [name for name, _ in named]
        self.candidates: list[nn.Parameter] = [parameter for _, parameter in named]
        self.history: list[Selection] = []
        self.fixed = False  # see `select`
        self.is_assumed = False  # see `assume`
        self.total: int | None = None  # steps of the run, if it is known
        self._usual_tokens: float | None = None  # of a batch
        self.cost: BackwardCost | None = None  # its bytes are a whole step's

    def prepare(self, closure: Callable[..., Tensor], batches: Iterable[Any]) -> None:
        """See how many tokens a usual batch has; the first one, the longest, is not."""
        tokens = [batch.input_ids.numel() for batch in islice(batches, 1 + _LOOKED_AT)]
        self._usual_tokens = mean(tokens[1:] or tokens)

    def step(  # type: ignore[override]
        self, closure: Callable[..., Tensor] | None = None, batch: Any = None
    ) -> Tensor | None:
        """See `Optimizer.step`. Outside of it all candidates require gradients."""
        if closure is None:
            raise InputError(
                "GreenTrainer decides before the forward pass what is trained: call "
                "step(lambda: loss_fn(model, batch))."
            )
        self.renew(closure, batch)
        with self._only(self.history[-1].mask):
            return super().step(closure, batch)

    def renew(self, closure: Callable[..., Tensor], batch: Any) -> bool:
        """See `Optimizer.renew`: a selection, and the moments of what is new in it."""
        if not self.renews:
            return False
        self.clean = True
        if not self.history:
            self.cost = None  # of an attempt that failed
        self._reselect(closure, batch)
        for parameter, chosen in zip(self.candidates, self.history[-1].mask, strict=True):
            if chosen:
                self._state_of(parameter)
        return True

    def probe(self, closure: Callable[..., Tensor], batch: Any) -> int:
        """With the selection that the first step begins with."""
        if self.history:
            with self._only(self.history[-1].mask):
                return super().probe(closure, batch)
        try:
            self.cost = None
            self._reselect(closure, batch)
            return self.probe(closure, batch)
        finally:
            self.cost, self.history = None, []

    def select(self, closure: Callable[..., Tensor], batch: Any) -> Mask:
        """Select by one batch, for all steps to come: for an export, whose graph cannot change."""
        self.cost = None
        self._reselect(closure, batch)
        self.fixed = True
        return self.history[-1].mask

    @property
    def renews(self) -> bool:
        """See `Optimizer.renews`: whether a selection is due."""
        if self.fixed or self.steps % self.options.reselect:
            return False
        if self.history and self.history[-1].step == self.steps:
            return False  # the step that it is for is yet to be taken
        return self.steps == 0 or 2 * self._left >= self.options.reselect

    @property
    def _left(self) -> float:
        return math.inf if self.total is None else self.total - self.steps

    @property
    def _served(self) -> float:
        """Steps that carry the evaluation of a selection made now."""
        reselect = self.options.reselect
        return self._left if reselect < self._left < 1.5 * reselect else reselect

    @contextmanager
    def _only(self, mask: Mask) -> Iterator[None]:
        """Meanwhile, what is not in `mask` is frozen."""
        frozen = [p for p, chosen in zip(self.candidates, mask, strict=True) if not chosen]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    # Selection.

    def _reselect(self, closure: Callable[..., Tensor], batch: Any) -> None:
        overhead = 0.0
        if self.cost is None:
            self.cost = self._trace(closure, batch)
            overhead += 1.0 if batch is None else 1 / size_of(batch)
        if self.options.choose == "importance":
            is_published = self.options.importance == "published"
            overhead += 2 / self.grad_accumulation if is_published else 1.0
            importance = self._important(closure, self._usual_part(batch), overhead)
            mask = self._best(importance, overhead)
        else:
            importance = self._ranked()
            mask = self._first(importance, overhead)
        for parameter, chosen in zip(self.candidates, mask, strict=True):
            if not chosen:
                self.state.pop(parameter, None)
        share = self.cost.step_flops(mask) / self.cost.step_flops()
        self.history.append(Selection(self.steps, importance, mask, share, overhead))

    def _usual_part(self, batch: Any) -> Any:
        """As many of its examples as have no more tokens than a usual batch."""
        if self._usual_tokens is None:
            return batch
        # A tenth more is no matter, and half a batch says less than a whole one.
        parts = batch.input_ids.numel() / self._usual_tokens / 1.1
        return split(batch, min(math.ceil(parts), size_of(batch)))[0]

    def _important(self, closure: Callable[..., Tensor], batch: Any, overhead: float) -> Floats:
        """(N,) importances by this batch and those before, the largest 1."""
        # What would be chosen if all were alike tells how much room an evaluation has.
        before = self.history[-1] if self.history else None
        mask = before.mask if before else self._best(np.ones(len(self.candidates)), overhead)
        fresh = self._rated(closure, batch, mask)
        if self.is_assumed:
            fresh = self._usual_importance()
        if fresh.max() > 0:
            fresh /= fresh.max()
        else:  # as at a learning rate of 0, which says nothing
            fresh = before.importance if before else np.ones_like(fresh)
        if before:
            fresh = fresh + self.options.smoothing * (before.importance - fresh)
        return fresh

    def _usual_importance(self) -> Floats:
        """(N,) importances as they mostly are: that of a matrix grows with its size, vectors have
        next to none, and of an embedding few rows count, so that it is like the other matrices."""
        sizes = np.array([p.numel() for p in self.candidates], dtype=np.float64)
        modules = self.model.modules()
        tables = {module.weight for module in modules if isinstance(module, nn.Embedding)}
        is_table = np.array([p in tables for p in self.candidates])
        return np.minimum(sizes, sizes[~is_table].max(initial=1.0))

    def _ranked(self) -> Floats:
        """(N,) in (0, 1], by which to choose without importance."""
        n = len(self.candidates)
        if self.options.choose == "random":  # by torch's seed, and without a draw from its stream
            order = np.random.default_rng([torch.initial_seed(), self.steps]).permutation(n)
        else:
            order = self.cost.order
        ranks = np.empty(n)
        ranks[order] = np.arange(n, 0, -1) / n
        return ranks

    def _first(self, ranks: Floats, overhead: float) -> Mask:
        """From the highest rank down, each tensor that fits beside those before it."""
        memory_bytes, mask = self.options.memory_bytes, np.zeros(len(ranks), dtype=bool)
        state_bytes = np.array([self._state_bytes(p) for p in self.candidates])
        limit = self._limit(overhead)
        for k in np.argsort(-ranks):
            mask[k] = True
            fits = self.cost.step_flops(mask) <= limit
            if fits and memory_bytes is not None:
                fits = state_bytes[mask].sum() + self.cost.activation_bytes(mask) <= memory_bytes
            mask[k] = fits
        return self._checked(mask, overhead)

    def _limit(self, overhead: float) -> int:
        """FLOPs of a step, so that with evaluations the objective holds."""
        share = self.options.rho - overhead / self._served
        return int(share * self.cost.step_flops())

    def _best(self, importance: Floats, overhead: float) -> Mask:
        """The set of most importance within the limits."""
        cost, options = self.cost, self.options
        order, dw, dy = cost.order, cost.own(cost.flops), cost.way(cost.flops)
        state_bytes = np.array([self._state_bytes(self.candidates[k]) for k in order])
        state_bytes += cost.own(cost.saved_bytes)
        saved_bytes = cost.way(cost.saved_bytes)
        limit = self._limit(overhead) - cost.forward_flops
        mask, room = np.zeros(len(order), dtype=bool), limit
        for _ in range(4):
            found = np.zeros_like(mask)
            found[order] = select(
                importance[order],
                dw,
                dy,
                room,
                state_bytes=state_bytes,
                saved_bytes=saved_bytes,
                memory_bytes=options.memory_bytes,
            )
            spent = cost.step_flops(found) - cost.forward_flops
            if spent > limit or (found == mask).all():
                break
            mask, room = found, room + limit - spent  # parallel branches were charged too much
        return self._checked(mask, overhead)

    def _checked(self, mask: Mask, overhead: float) -> Mask:
        """The set, unless it is empty: then what the least tensor would take."""
        if mask.any():
            return mask
        cost, options = self.cost, self.options
        forward, evaluations = cost.forward_flops / cost.step_flops(), overhead / self._served
        flops = int((cost.own(cost.flops) + np.cumsum(cost.way(cost.flops))).min())
        state_bytes = np.array([self._state_bytes(self.candidates[k]) for k in cost.order])
        state_bytes += cost.own(cost.saved_bytes) + np.cumsum(cost.way(cost.saved_bytes))
        memory = options.memory_bytes
        raise InputError(
            f"Nothing can be trained within rho {options.rho:g}"
            f"{'' if memory is None else f' and memory_bytes {memory:,}'}: one tensor takes at "
            f"least rho {forward + evaluations + flops / cost.step_flops():.3f} (forward pass "
            f"{forward:.3f}, evaluations {evaluations:.3f}) and {state_bytes.min():,} bytes. Ask "
            f"for more, or for a larger reselect."
        )

    def _state_bytes(self, parameter: nn.Parameter) -> int:
        """Of a tensor's moments, and of its gradient where that is kept until the end."""
        kept = self.grad_clip is not None or self.grad_accumulation > 1
        gradient = parameter.numel() * parameter.element_size() if kept else 0
        return gradient + self._moment_bytes(parameter)

    def _trace(self, closure: Callable[..., Tensor], batch: Any) -> BackwardCost:
        """Costs by the batch's longest example, for whole batches would take too much memory."""
        rows, part = 1, batch
        if batch is not None:
            parts = split(batch, size_of(batch))
            part = max(parts, key=lambda part: getattr(part, "input_ids", torch.empty(0)).numel())
            rows = -(-size_of(batch) // self.grad_accumulation)
        with undisturbed(self.model), self.keeping():
            cost = trace(partial(self._loss, closure, part), self.candidates, self.model)
        return BackwardCost(cost.forward_flops, cost.flops, rows * cost.saved_bytes, cost.reach)

    def _rated(self, closure: Callable[..., Tensor], batch: Any, mask: Mask) -> Floats:
        """(N,) importances by `batch`, in parts whose activations fit where those of training
        `mask` do."""
        if self.options.importance == "published":
            part = None if batch is None else split(batch, self.grad_accumulation)[0]
            return published(self, partial(self._loss, closure, part))
        if batch is None:
            return first_order(self, [(1.0, partial(self._loss, closure, None))])
        room = self.cost.activation_bytes(mask)
        if self.options.memory_bytes is not None:
            moments = (t for state in self.state.values() for t in state.values())
            room = self.options.memory_bytes - sum(t.numel() * t.element_size() for t in moments)
        n_parts = self.grad_accumulation * -(-self.cost.activation_bytes() // max(room, 1))
        parts = split(batch, max(n_parts, 1))
        shares = [size_of(part) / size_of(batch) for part in parts]
        losses = [partial(self._loss, closure, part) for part in parts]
        return first_order(self, list(zip(shares, losses, strict=True)))

    def _loss(self, closure: Callable[..., Tensor], part: Any) -> Tensor:
        loss = closure() if part is None else call_per_example(closure, part).mean()
        check_finite(loss.detach(), self.steps + 1)
        return loss

    # Around the steps.

    def assume(self) -> None:
        """See `Optimizer.assume`: a price is of runs of any length, and of usual importances."""
        self.total, self.is_assumed = None, True

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> GreenTrainer:
        if config.trainable == "all":
            model.requires_grad_(True)
        else:
            ensure(model, **adapter_arguments(config))
        model.train()
        check_head(model)
        optimizer = cls(
            model,
            config.lr,
            **dataclasses.asdict(config.options),
            **cls.arguments(config),
        )
        optimizer.total = config.steps
        return optimizer

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        from tinyft.models import save_model

        if not adapters(model):
            save_model(model, tokenizer, directory)
            return "model"
        save_adapter(model, directory, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return "adapter"

    def cost_key(self, batch: Any) -> tuple[Hashable, tuple[int, ...]]:
        """Between two selections steps are of one kind."""
        kind, sizes = super().cost_key(batch)
        return (kind, len(self.history)), sizes

    @property
    def period(self) -> int:
        if self.total is None:
            return self.options.reselect
        selections = max(1, int(self.total / self.options.reselect + 0.5))
        return math.ceil(self.total / selections)

    def plots(self) -> dict[str, Callable[[Path], None]]:
        if not self.history or not self.steps:
            return {}
        order = self.cost.order
        draw = partial(
            selection_plot,
            names=[self.names[k] for k in order],
            starts=[s.step for s in self.history],
            end=self.steps,
            importance=np.stack([s.importance[order] for s in self.history], axis=1),
            chosen=np.stack([s.mask[order] for s in self.history], axis=1),
            saved=saved_flops(self.history, self.steps),
            title=f"What was trained at rho {self.options.rho:g}",
        )
        return {"selection.png": draw}

    # Costs and history are part of the state.

    def state_tensors(self) -> dict[str, Tensor]:
        own = {f"selection/{name}": tensor for name, tensor in self._selections().items()}
        return {**super().state_tensors(), **own}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        for name, tensor in tensors.items():
            parts[name.startswith("selection/")][name.removeprefix("selection/")] = tensor
        self._load_selections(parts[True])
        super().load_state_tensors(parts[False])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "selection": self._selections()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load_selections(state_dict["selection"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "selection"})

    def _selections(self) -> dict[str, Tensor]:
        if self.cost is None:
            return {}
        found = {f.name: getattr(self.cost, f.name) for f in dataclasses.fields(self.cost)}
        for f in dataclasses.fields(Selection):
            found[f.name] = np.stack([getattr(s, f.name) for s in self.history])
        return {name: torch.tensor(value) for name, value in found.items()}

    def _load_selections(self, tensors: Mapping[str, Tensor]) -> None:
        self.cost, self.history = None, []
        if not tensors:
            return
        if (n := tensors["mask"].shape[1]) != len(self.candidates):
            raise InputError(
                f"The saved selection is of {n} tensors; this run has {len(self.candidates)}. "
                f"Resume with the --trainable it began with."
            )
        found = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        self.cost = BackwardCost(
            int(found["forward_flops"]), found["flops"], found["saved_bytes"], found["reach"]
        )
        rows = zip(*(found[f.name] for f in dataclasses.fields(Selection)), strict=True)
        self.history = [
            Selection(int(step), importance, mask, float(share), float(overhead))
            for step, importance, mask, share, overhead in rows
        ]
