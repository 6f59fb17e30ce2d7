"""MeZO: fine-tuning with forward passes only.

"Fine-Tuning Language Models with Just Forward Passes" (NeurIPS 2023), algorithm 1: with z ~ (0, I),
pg = (L(theta + eps z) - L(theta - eps z)) / 2 eps, theta <- theta - lr (pg z + wd theta). And with
one-sided estimates over several z, in units of their spread (FZOO), which are the default here.

What differs from the published procedure, which `exact=True` follows to the bit:

* weights are read-only while the loss is evaluated: z enters the forward pass (`zeroth.forward`),
  so nothing drifts, and several signs and probes may ride in one batch;
* z comes from a counter-based generator, not from torch's stream, in one of four families
  (`zeroth.directions`); the default costs a dot product and an outer product a linear layer;
* 16-bit weights are updated with stochastic rounding, so that small updates are kept on average;
  vectors from which 16 bits would round the perturbation away (norm scales) are left as they are;
* a run is its seed log: a dozen bytes a step, from which `replay` makes the weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tinyft import adapters, prefix
from tinyft.activations import blocks_of, without_cache
from tinyft.errors import InputError
from tinyft.kernels import cpu_products
from tinyft.memory import reuse_heap
from tinyft.modules import evaluating
from tinyft.optim.base import (
    Optimizer,
    call_per_example,
    check_finite,
    for_width,
    register,
    repeated,
    size_of,
    split,
)
from tinyft.zeroth.directions import FAMILIES, make_directions
from tinyft.zeroth.estimators import (
    ESTIMATORS,
    STORED_AS,
    evaluation_points,
    projected_gradients,
)
from tinyft.zeroth.forward import Group, PerturbedForward
from tinyft.zeroth.seed_log import SeedLog, fingerprint
from tinyft.zeroth.update import update_

log = logging.getLogger(__name__)

# With momentum beta the terms older than this weigh less than 1% and are dropped.
_MOMENTUM_TAIL = 0.01


@dataclass(frozen=True)
class MeZOOptions:
    """What `MeZO` can be told besides the learning rate and the trainable set."""

    eps: float | None = field(
        default=None,
        metadata={"help": "size of the perturbation (default: 1e-3; lora, 1e-2; prefix, 1e-1)"},
    )
    directions: str = field(
        default="sign-rank1",
        metadata={"help": "family of random directions", "choices": tuple(FAMILIES)},
    )
    estimator: str | None = field(
        default=None,
        metadata={
            "help": "gradient estimator (default: centred; exact, two-sided)",
            "choices": ESTIMATORS,
        },
    )
    probes: int | None = field(
        default=None,
        metadata={"help": "directions a step (default: 5; one-sided, 4; two-sided, 1)"},
    )
    momentum: float = field(
        default=0.0, metadata={"help": "heavy-ball momentum, recomputed from the seed log"}
    )
    exact: bool = field(
        default=False, metadata={"help": "the published procedure, in place, bit for bit"}
    )

    def __post_init__(self) -> None:
        if self.estimator is None:
            object.__setattr__(self, "estimator", "two-sided" if self.exact else "centred")
        if self.probes is None:
            probes = {"two-sided": 1, "one-sided": 4, "centred": 5}  # others are a problem
            object.__setattr__(self, "probes", probes.get(self.estimator, 1))

    def problems(self) -> list[str]:
        """What is wrong with these options, one sentence each."""
        found = []
        if self.eps is not None and not self.eps > 0:
            found.append(f"eps must be positive; found {self.eps}.")
        if self.directions not in FAMILIES:
            found.append(
                f"directions must be one of {', '.join(FAMILIES)}; found {self.directions!r}."
            )
        if self.estimator not in ESTIMATORS:
            found.append(
                f"estimator must be one of {', '.join(ESTIMATORS)}; found {self.estimator!r}."
            )
        least = 1 if self.estimator == "two-sided" else 2
        if self.probes < least:
            found.append(
                f"probes must be at least {least} for the {self.estimator} estimator; "
                f"found {self.probes}."
            )
        if not 0 <= self.momentum < 1:
            found.append(f"momentum must be in [0, 1); found {self.momentum}.")
        if self.exact and (self.estimator, self.probes, self.momentum) != ("two-sided", 1, 0.0):
            found.append("exact is the published procedure: two-sided, one probe, no momentum.")
        return found


@register("mezo")
class MeZO(Optimizer):
    """Zeroth-order optimizer over the parameters of `model` that require a gradient.

    Example:
        >>> import torch, tinyft
        >>> model = torch.nn.Linear(4, 1)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> optimizer = tinyft.MeZO(model, lr=1e-2)
        >>> loss = optimizer.step(lambda: (model(x) - y).square().mean())
        >>> loss = optimizer.step(  # one loss an example: both signs in one forward pass
        ...     lambda b: (model(b["x"]) - b["y"]).square().mean(1), {"x": x, "y": y})

    Args:
        model: evaluated in eval mode (no dropout) whatever mode it is in.
        lr: learning rate: about twice as far as a step moves each weight; published rates of MeZO
            are for two-sided estimates. `weight_decay` is decoupled and skips vectors.
        seed: 64-bit key of all directions.
        Others: see `MeZOOptions`.

    Raises:
        InputError: an option out of range, nothing to train, or a parameter that cannot be
            perturbed in the forward pass.
    """

    Options = MeZOOptions
    default_lr = {"all": 7.2e-4, "lora": 1e-2, "prefix": 1e-2}  # noqa: RUF012
    two_sided_lr: ClassVar[Mapping[str, float]] = {"all": 4e-7, "lora": 1e-4, "prefix": 1e-2}
    uses_gradients = False
    layers_alike = True
    keeps_log = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 5e-3,
        *,
        eps: float = 1e-3,
        directions: str = "sign-rank1",
        estimator: str | None = None,
        probes: int | None = None,
        momentum: float = 0.0,
        exact: bool = False,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.options = MeZOOptions(eps, directions, estimator, probes, momentum, exact)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        problems = self.options.problems()
        if not named:
            problems.append("The model has no parameter with requires_grad=True: nothing to train.")
        problems += [
            f"{name} is {p.dtype}: only floating point parameters can be perturbed."
            for name, p in named
            if not p.is_floating_point()
        ]
        if not problems and not exact:
            lost = [name for name, p in named if _rounds_away(p, eps)]
            named = [(name, p) for name, p in named if name not in lost]
            what = f"eps {eps:g} is lost in the rounding of {len(lost)} vectors of 16 bits"
            if not named:
                problems.append(
                    f"{what}, and nothing else is to be trained. Train them in float32."
                )
            elif lost:
                log.info("%s, which are left as they are: %s, ...", what, lost[0])
        if problems:
            raise InputError(" ".join(problems))
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        super().__init__(self.parameters, {"lr": lr, "weight_decay": weight_decay})
        reuse_heap()
        cpu_products.install_for(model)
        self.model, self.seed, self.steps_taken = model, seed, 0
        self.log: SeedLog | None = None
        first = self.parameters[0]
        self.directions = make_directions(
            directions, [p.shape for p in self.parameters], seed, first.device, first.dtype
        )
        self._forward = None if exact else PerturbedForward(model, self.parameters)
        self._recent: deque[list[float]] = deque(maxlen=_window(momentum))
        self._looked = exact  # see `_look`
        self._scalar_objective = False
        self._apart = False
        self.splits = 1  # of a part of the batch, which without has the rows of inference

    def prepare(self, closure: Callable[..., Tensor], batches: Iterable[Any]) -> None:
        """See whether copies of a batch can ride in one; without this the first step does."""
        with evaluating(self.model), without_cache(self.model):
            for batch in islice(batches, 1):
                self._look(closure, batch)

    @torch.no_grad()
    def step(self, closure: Callable[..., Tensor] | None = None, batch: Any = None) -> Tensor:
        """One step; see `Optimizer.step`. The loss is that of all points, in the mean; one-sided,
        that at theta."""
        if closure is None:
            raise InputError(
                "MeZO evaluates the loss itself: call step(lambda: loss_fn(model, batch)). In the "
                "Hugging Face Trainer use tinyft.trainer.make_trainer."
            )
        self.clean = not self.options.exact  # weights are read-only until the update
        # What a layer's forward pass frees (a packed weight's numbers, say) leaves holes.
        model = self.model
        with evaluating(model), without_cache(model), self.heap.before(blocks_of(model)):
            if self.options.exact:
                loss, gradients = self._exact_losses(closure, batch)
            else:
                losses = self._losses(closure, batch, self._groups())
                check_finite(losses, self.steps_taken)
                loss, gradients = projected_gradients(
                    self.options.estimator, losses.tolist(), self.options.eps
                )
            self._apply(self.param_groups[0]["lr"], gradients)
        self.heap.check()  # batches of different lengths leave holes
        return torch.tensor(loss, dtype=torch.float32)

    def _groups(self) -> list[Group]:
        """The `(z, scale)` at which this step evaluates the objective."""
        draws = [self.directions.draw(self.steps_taken, p) for p in range(self.options.probes)]
        points = evaluation_points(self.options.estimator, self.options.probes)
        return [(None, 0.0) if p is None else (draws[p], s * self.options.eps) for p, s in points]

    def _losses(self, closure: Callable[..., Tensor], batch: Any, groups: list) -> Tensor:
        """The objective at every `(z, scale)`, float64 `(len(groups),)`."""
        self._look(closure, batch)
        if batch is None or self._scalar_objective:
            values = []
            for group in groups:
                with self._forward([group]):
                    value = closure() if batch is None else closure(batch)
                values.append(value.double().mean())
            return torch.stack(values).cpu()
        size = size_of(batch)
        if len(groups) > 1 and not self._rides(size):
            return torch.cat([self._losses(closure, batch, [group]) for group in groups])
        total = torch.zeros(len(groups), dtype=torch.float64)
        for part in split(batch, self.n_parts(size)):
            expanded = repeated(part, len(groups))
            with self._forward(groups, _rows(expanded)):
                losses = call_per_example(closure, expanded)
            total += losses.double().view(len(groups), -1).sum(1).cpu()
        return total / size

    @torch.no_grad()
    def _look(self, closure: Callable[..., Tensor], batch: Any) -> None:
        """Once, on one example: must points be evaluated one after the other, since the objective
        is one number for a whole batch, or since a layer has one input for all copies?"""
        if self._looked or batch is None:
            return
        example = split(batch, size_of(batch))[0]
        is_scalar = []

        def run(copies: int) -> None:
            losses = call_per_example(closure, repeated(example, copies))
            is_scalar.append(losses.dim() == 0)

        shared = self._forward.shared_inputs(run)
        self._scalar_objective, self._apart, self._looked = any(is_scalar), bool(shared), True
        if shared and not self._scalar_objective:
            log.warning(
                "%s: %s, of one input for all examples, cannot be perturbed for each copy of a "
                "batch apart; points are evaluated one after the other, which takes longer.",
                type(self.model).__name__,
                ", ".join(shared[:3]) + (" and others" if len(shared) > 3 else ""),
            )

    def _apply(self, lr: float, gradients: Sequence[float]) -> None:
        """Log the step, then update the weights: a logged step can be replayed, so none is lost."""
        self.clean = False
        lr = float(torch.tensor(lr, dtype=torch.float32))  # what the log stores is what is used
        if self.log is not None:
            self.log.append(lr, gradients)
        self._update(lr, gradients)

    @torch.no_grad()
    def _update(self, lr: float, gradients: Sequence[float]) -> None:
        decay = lr * self.param_groups[0]["weight_decay"]
        if self.options.exact:
            self._exact_update(lr, gradients[0])
        else:
            self._recent.append(list(gradients))
            terms = []
            for age, row in zip(range(len(self._recent) - 1, -1, -1), self._recent, strict=True):
                for p, g in enumerate(row):
                    c = lr * self.options.momentum**age * g / self.options.probes
                    terms.append((self.directions.draw(self.steps_taken - age, p), c))
            update_(self.parameters, terms, decay=decay)
        self.steps_taken += 1

    # In less memory.

    def _rides(self, size: int) -> bool:
        """Whether all points are evaluated in one batch of copies, an example at a time: they share
        a read of the weights. As many rows as there are points are as many reads in parts as one
        point after the other, since no more rows may be alive than in inference."""
        points = evaluation_points(self.options.estimator, self.options.probes)
        return size < len(points) and self.splits == 1 and not self._apart

    def n_parts(self, size: int) -> int:
        if self.options.exact or self._scalar_objective:
            return 1
        return size if self._rides(size) else min(size, self.splits)

    def settings(self, size: int) -> list[dict[str, Any]]:
        """Fewer rows at a time; not where an evaluation needs the whole batch."""
        if self.options.exact or self._scalar_objective:
            return [{"splits": self.splits}]
        most = max(size, 2) if self._rides(size) else size
        counts = [self.splits]
        while counts[-1] < most:
            counts.append(2 * counts[-1])
        return [{"splits": count} for count in counts]

    @torch.no_grad()
    def probe(self, closure: Callable[..., Tensor], batch: Any) -> int:
        """The forward passes of a step."""
        with evaluating(self.model), without_cache(self.model):
            if not self.options.exact:
                self._losses(closure, batch, self._groups())
                return 0
            closure(batch)
        # z, its product with eps, and the sum that replaces the weight.
        return 3 * max(p.numel() * p.element_size() for p in self.parameters)

    def cost_key(self, batch: Any) -> tuple[Hashable, tuple[int, ...]]:
        """By the directions of the update, of which momentum has more with every step."""
        directions = min(len(self._recent) + 1, self._recent.maxlen or 1)
        return directions, super().cost_key(batch)[1]

    # The published procedure. `p + scale * z * eps` and `p - lr * (pg * z + wd * p)`, in that order
    # of operations, z per parameter from one `torch.manual_seed` stream.

    def step_seed(self, step: int) -> int:
        """The seed given to `torch.manual_seed` at a step of the exact mode."""
        return (self.seed * 1_000_003 + step) & (2**63 - 1)

    def _exact_losses(self, closure: Callable, batch: Any) -> tuple[float, list[float]]:
        with torch.random.fork_rng(devices=[]):
            values, away = [], 0
            try:
                for scale in (1, -2):
                    self._exact_perturb(scale)
                    away += scale
                    value = closure() if batch is None else closure(batch)
                    values.append(value.mean())
            finally:
                self._exact_perturb(-away)
        plus, minus = values
        check_finite(torch.stack(values), self.steps_taken)
        gradient = ((plus - minus) / (2 * self.options.eps)).item()
        return float((plus + minus) / 2), [gradient]

    def _exact_perturb(self, scale: int) -> None:
        torch.manual_seed(self.step_seed(self.steps_taken))
        for p in self.parameters:
            p.data = p.data + scale * _normal_like(p) * self.options.eps

    def _exact_update(self, lr: float, gradient: float) -> None:
        weight_decay = self.param_groups[0]["weight_decay"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.step_seed(self.steps_taken))
            for name, p in zip(self.names, self.parameters, strict=True):
                z = _normal_like(p)
                if "bias" not in name and "norm" not in name and "ln" not in name:
                    p.data = p.data - lr * (gradient * z + weight_decay * p.data)
                else:
                    p.data = p.data - lr * (gradient * z)

    # What the training loop calls.

    @classmethod
    def completed(cls, options: MeZOOptions, trainable: str) -> MeZOOptions:
        """With the perturbation that was published for what is trained."""
        eps = {"all": 1e-3, "lora": 1e-2, "prefix": 1e-1}[trainable]
        return options if options.eps is not None else dataclasses.replace(options, eps=eps)

    @classmethod
    def learning_rate(
        cls, trainable: str, model_config: Any, options: Any, steps: int | None = None
    ) -> float:
        """Of all weights one that falls with the width. Estimates in units of their spread do not
        shrink as the model learns: their noise adds up, and the rate falls with the root of the
        steps, too, beyond those that it was found in. SmolLM2-135M, 576 channels: 5e-3 in 83
        steps, at which 200 lead away and at 3.3e-3 do not (`bench/RESULTS.md`), adapters 1e-2 in
        up to 200; by the same law OPT-13B's 5,120 channels get 4e-5 in 20,000 steps (FZOO's
        published: 5e-5). Two-sided ones have no such units; theirs fall with the square of the
        width, from 2e-5 to OPT-13B's published 1e-7 to 1e-6."""
        if options.estimator == "two-sided":
            power = 2.0 if trainable == "all" else 0.0
            return for_width(cls.two_sided_lr[trainable], model_config, power)
        known = 80 if trainable == "all" else 200
        lr = cls.default_lr[trainable] * min(1.0, (known / (steps or known)) ** 0.5)
        return for_width(lr, model_config, 1.0 if trainable == "all" else 0.0)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> MeZO:
        """From a resolved `TrainConfig`; `trainable` is all, lora or prefix."""
        if config.trainable == "lora":
            adapters.ensure(
                model,
                config.rank,
                config.alpha,
                targets=config.lora_targets,
                seed=config.seed,
            )
        elif config.trainable == "prefix":
            if not prefix.is_attached(model):
                prefix.inject(model, seed=config.seed)
        elif config.base_bits < 16:
            raise InputError(
                f"--base-bits {config.base_bits} keeps the base frozen: use --trainable lora, or "
                f"leave --base-bits at 16 to train all parameters."
            )
        return cls(
            model,
            config.lr,
            weight_decay=config.weight_decay,
            seed=config.seed,
            **dataclasses.asdict(config.options),
        )

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        """All parameters: the seed log, already in place, is the artefact. Else an adapter."""
        tokenizer.save_pretrained(directory)
        if prefix.is_attached(model) and model.prefix.weight.requires_grad:
            prefix.save(model, directory, base)
        elif adapters.adapters(model):
            adapters.save_adapter(model, directory, base)
        else:
            return "seed_log"
        return "adapter"

    # Log, resume, state.

    def open_log(self, path: Path, *, resume: bool, at_most: int | None = None) -> int:
        """Log every further step to `path`; with `resume`, first replay what is there, or its
        first `at_most` steps, and cut the rest off.

        Returns:
            the steps replayed.

        Raises:
            InputError: the log belongs to another model, or to other options.
        """
        header = {
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "weight_decay": self.param_groups[0]["weight_decay"],
            "base": fingerprint(self.names, self.parameters),
            "stored_as": STORED_AS[self.options.estimator],
        }
        if not (resume and path.exists()):
            self.log = SeedLog.create(path, header)
            return 0
        self.log = SeedLog.open(path)
        found = {key: self.log.header.get(key) for key in header}
        if found != header:
            changed = [
                f"{k}: {found[k]} there, {header[k]} now" for k in header if found[k] != header[k]
            ]
            raise InputError(
                f"The seed log {path} was written by another run ({'; '.join(changed)}). Resume "
                f"with the same model and options, or choose another output folder."
            )
        if at_most is not None:
            self.log.cut(at_most)
        for lr, gradients in self.log.records():
            if self.options.exact:
                for scale in (1, -2, 1):  # the published passes leave rounding behind: repeat them
                    self._exact_perturb(scale)
            self._update(lr, gradients)
        return self.log.steps

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the step count and what momentum remembers."""
        mezo = {"steps_taken": self.steps_taken, "recent": [list(r) for r in self._recent]}
        return {**super().state_dict(), "mezo": mezo}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        state = dict(state_dict)
        mezo = state.pop("mezo")
        super().load_state_dict(state)
        self.steps_taken = mezo["steps_taken"]
        self._recent.clear()
        self._recent.extend(mezo["recent"])


def replay(model: nn.Module, path: Path) -> int:
    """Turn the base model into the trained one, bit for bit, from its seed log.

    Args:
        model: the base as it was before training, all parameters trainable; changed in place.
        path: the log.

    Returns:
        the steps replayed.

    Raises:
        InputError: the log was written from other weights.
    """
    header = SeedLog.open(path).header
    options = {f.name: header[f.name] for f in dataclasses.fields(MeZOOptions)}
    optimizer = MeZO(model, weight_decay=header["weight_decay"], seed=header["seed"], **options)
    return optimizer.open_log(path, resume=True)


def _window(momentum: float) -> int:
    steps, weight = 1, momentum
    while weight >= _MOMENTUM_TAIL:
        steps, weight = steps + 1, weight * momentum
    return steps


def _rounds_away(p: Tensor, eps: float) -> bool:
    """Whether most of a parameter is the same with and without a perturbation of eps: then no loss
    tells anything of it, and updates are noise. (A matrix's is added to its output instead.)"""
    if p.dim() > 1 or p.dtype.itemsize > 2:
        return False
    return bool((p.detach() + eps == p.detach()).float().mean() > 0.5)


def _normal_like(p: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)


def _rows(batch: Any) -> int:
    """Of the tensors, which for examples of several rows are more than examples."""
    return len(batch.input_ids) if hasattr(batch, "input_ids") else size_of(batch)
