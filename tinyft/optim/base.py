"""The optimizer owns its step: one interface for gradients, zeroth order, and what comes next.

A method is one file in this folder with one class marked `@register("name")`; the command line,
the training loop and the conformance tests find it in `METHODS`. See `Optimizer` for what the class
must provide.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tinyft.errors import InputError
from tinyft.heap import HeapWatch

LR_WIDTH = 4096  # channels of a model that default rates are stated for
_LEAST_WIDTH = 256  # below, nothing was tried

METHODS: dict[str, type[Optimizer]] = {}
_C = TypeVar("_C", bound="type[Optimizer]")


def for_width(lr: float, model_config: Any, power: float) -> float:
    """A rate that is stated for `LR_WIDTH` channels and falls with a power of their number."""
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    if width is None:
        return lr
    return float(f"{lr * (LR_WIDTH / max(width, _LEAST_WIDTH)) ** power:.2g}")


class ExpandableBatch(Protocol):
    """What a method may ask of a batch: to be repeated (zeroth order) or split (accumulation)."""

    copies: int

    @property
    def size(self) -> int: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def repeat(self, copies: int) -> ExpandableBatch: ...

    def split(self, parts: int) -> list[ExpandableBatch]: ...


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none of its own."""


def register(name: str) -> Callable[[_C], _C]:
    """Class decorator: make a method known to the command line, the loop and the tests."""

    def decorate(cls: _C) -> _C:
        cls.name = name
        METHODS[name] = cls
        return cls

    return decorate


class Optimizer(torch.optim.Optimizer):
    """A fine-tuning method as a `torch.optim.Optimizer` that owns its whole step.

    Subclasses set `Options` (a frozen dataclass whose fields carry `metadata={"help": ...}` and
    become command-line flags), and `default_lr`, and implement `step`. `param_groups` and
    `state_dict` work as in torch, so learning-rate schedulers and trainers do too.

    Class attributes:
        name: set by `register`.
        Options: the method's own options.
        needs: the trainable set that the method insists on (`"all"`, `"lora"`), or None when the
            user may choose (`--trainable`).
        default_lr: learning rate by trainable set, e.g. `{"all": 2e-5, "lora": 2e-4}`, for
            `LR_WIDTH` channels (see `learning_rate`).
        uses_gradients: False for zeroth-order methods (the loop then runs without autograd).
        packs_base: True when the method brings its own few bits a weight: `base_bits` stays 16.
        layers_alike: True when a step does the same for every layer of a kind, so that what few
            layers cost tells what many do (`tinyft/pricing.py`).
        keeps_log: True when the method appends each step to a log that replays into the weights:
            the log is then checkpoint and artefact in one, and `open_log` is called before step 0.

    Attributes:
        clean: after a step that raised an error: whether it left everything as it was before, so
            that it may be taken again.
        heap: bounds the holes that preparing and stepping leave in the heap.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    needs: ClassVar[str | None] = None
    default_lr: ClassVar[Mapping[str, float]] = {"all": 2e-5, "lora": 2e-4}
    uses_gradients: ClassVar[bool] = True
    packs_base: ClassVar[bool] = False
    layers_alike: ClassVar[bool] = False
    keeps_log: ClassVar[bool] = False
    clean: bool = False

    def __init__(self, parameters: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        self.heap = HeapWatch()

    def n_parts(self, size: int) -> int:
        """Parts that a step's batch of so many examples is run in, one after the other."""
        return 1

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[..., Tensor] | None = None,
        batch: ExpandableBatch | Any = None,
    ) -> Tensor:
        """Take one optimizer step and return the loss before it, a detached float32 scalar.

        Args:
            closure: without `batch`, `closure()` returns the scalar loss (torch.optim's own
                convention, but nobody calls `backward`: the method does what it needs). With
                `batch`, `closure(batch)` returns one loss per example, shape `(B,)`, whose mean is
                the loss; the method may then repeat or split the batch.
            batch: a `tinyft.data.Batch`, or a tensor, or a dict or tuple with tensors, of examples
                along dim 0.
        """
        raise NotImplementedError

    # What the training loop calls around the steps. Defaults suit most methods.

    @classmethod
    def completed(cls, options: Any, trainable: str) -> Any:
        """Options with what was left to depend on the trainable set."""
        return options

    @classmethod
    def learning_rate(
        cls, trainable: str, model_config: Any, options: Any, steps: int | None = None
    ) -> float:
        """What to train this set of a model with, unless a rate was asked for.

        Adam moves every weight by about the rate, whatever its gradient; what the weights of a
        layer then add to its outputs grows with their number. So the rate that is right falls with
        the width (Yang et al. 2022, arXiv:2203.03466), as RoSTE's published ones do: 5e-5, 3e-5
        and 1e-5 for 896, 2,048 and 3,584 channels. Of an adapter's two matrices only one reads that
        many numbers: its rate falls with the root (with the width, MiniLM's 384 channels would get
        2.1e-3, at which it learned nothing in 400 steps of a constant rate).

        Args:
            trainable: one of `default_lr`.
            model_config: transformers'.
            options: the method's own.
            steps: of the run, if known.
        """
        power = 0.5 if trainable == "lora" else 1.0
        return for_width(cls.default_lr[trainable], model_config, power)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> Optimizer:
        """Build the optimizer from a resolved `TrainConfig`: operate on the model (reversibly),
        choose the parameters, return `self`. `config.options` is an instance of `Options`."""
        raise NotImplementedError

    @classmethod
    def obstacle(cls, model_config: Any) -> str:
        """Why the method cannot train a model of this configuration (transformers'), or ""."""
        return ""

    def prepare(self, closure: Callable[..., Tensor], batches: Iterable[Any]) -> None:
        """Before the first step, and again before the weights of a checkpoint are restored: look at
        data, if the method must. `batches` begin the run's; `closure(batch)` is as `step`'s."""

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        """Write the result into `directory` (an adapter, a model); returns its kind:
        `"model"`, `"adapter"`, `"packed"` or `"seed_log"`."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything besides the trainable parameters that a bit-exact resume needs, flat."""
        raise NotImplementedError

    def assume(self) -> None:
        """For a model without values (`tinyft/dry_run.py`): decide without data what steps would
        find out from it, before the first one."""

    def settings(self, size: int) -> list[dict[str, Any]]:
        """Ways to take the same step (up to rounding) on `size` examples, from the present one to
        slower ones, which most often are leaner: each is attributes to set."""
        return [{}]

    def leaner(self, size: int) -> dict[str, Any] | None:
        """Of those the next that needs less than the present one; None if there is none."""
        return next(iter(self.settings(size)[1:]), None)

    def probe(self, closure: Callable[..., Tensor], batch: ExpandableBatch) -> int:
        """Do what takes most memory in a step, and leave everything as it was, random numbers too.

        Returns:
            bytes that the first step will take on top, and keep.
        """
        return 0

    def cost_key(self, batch: ExpandableBatch) -> tuple[Hashable, tuple[int, ...]]:
        """Before a step on a batch: its kind and sizes. Steps of a kind cost FLOPs, renewals apart,
        that are linear in the sizes."""
        parts = [part.sizes for part in batch.split(self.n_parts(size_of(batch)))]
        return None, (1, *map(sum, zip(*parts, strict=True)))

    @property
    def period(self) -> int:
        """Steps after which their costs repeat: one that may be dearer, then equal ones."""
        return 1

    @property
    def renews(self) -> bool:
        """Whether the coming step begins with what `renew` does."""
        return False

    def renew(self, closure: Callable[..., Tensor], batch: Any) -> bool:
        """Do now what the coming step would otherwise begin with, once a `period`; returns whether
        there was anything. (Its FLOPs are told from the step's so.)"""
        return False

    def plots(self) -> dict[str, Callable[[Path], None]]:
        """`{file name: a function that draws it to a path}`, for the output folder."""
        return {}

    def open_log(self, path: Path, *, resume: bool, at_most: int | None = None) -> int:
        """For `keeps_log` methods: start, or to resume replay, the log; returns steps replayed.
        What goes beyond `at_most` steps is cut off, to be done again."""
        raise NotImplementedError

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`, before the first step after a resume."""
        raise NotImplementedError


def call_per_example(closure: Callable[..., Tensor], batch: Any) -> Tensor:
    """`closure(batch)` with its contract checked: float losses of shape `(B,)` or a scalar."""
    losses = closure(batch)
    if not isinstance(losses, Tensor) or losses.dim() > 1:
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"The objective must return one loss per example, shape (B,), or a scalar; it returned "
            f"{found}. Reduce over tokens inside the objective."
        )
    return losses


# Batches: a `Batch`, or what is not one: a tensor, or a dict or tuple with tensors, which have the
# examples along their first dimension. What else a dict or tuple holds goes to every part.


def size_of(batch: Any) -> int:
    """Examples in a batch."""
    if _is_expandable(batch):
        return batch.size
    values = batch.values() if isinstance(batch, Mapping) else batch
    values = [batch] if isinstance(batch, Tensor) else values
    return max(len(value) for value in values if isinstance(value, Tensor))


def split(batch: Any, parts: int) -> list[Any]:
    """At most `parts` batches of consecutive examples, the largest first."""
    if parts == 1:
        return [batch]
    if _is_expandable(batch):
        return batch.split(parts)
    parts = min(parts, size_of(batch))
    return [_mapped(batch, lambda t, i=i: t.tensor_split(parts)[i]) for i in range(parts)]


def repeated(batch: Any, copies: int) -> Any:
    """The batch `copies` times over, copies-major."""
    if _is_expandable(batch):
        return batch.repeat(copies)
    return _mapped(batch, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)))


def _is_expandable(batch: Any) -> bool:
    return hasattr(batch, "repeat") and not isinstance(batch, Tensor)


def _mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {k: f(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return tuple(f(v) if isinstance(v, Tensor) else v for v in batch)


def check_finite(loss: Tensor, step: int) -> None:
    """Raise before a NaN or infinite loss can reach the weights."""
    if not bool(torch.isfinite(loss).all()):
        raise InputError(
            f"The loss at step {step} is {float(loss.mean()):g}. Nothing was updated by this step "
            f"and what was saved before it is intact. Lower --lr, use --dtype float32 or "
            f"bfloat16, or look for empty or broken rows in the data."
        )
