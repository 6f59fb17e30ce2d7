"""The engine under methods that use gradients: backward, accumulate, clip, update, free.

With neither clipping nor accumulation a parameter is updated as soon as its gradient is complete,
in the middle of the backward pass, and the gradient is freed: gradients are never all alive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from tinyft.activations import MODES, keeping
from tinyft.errors import InputError
from tinyft.importance import sweep, undisturbed
from tinyft.kernels import cpu_products
from tinyft.kernels.chunked_cross_entropy import using_rows
from tinyft.memory import reuse_heap
from tinyft.optim.base import Optimizer, call_per_example, check_finite, size_of, split
from tinyft.updates import update_rule

_LARGE = 1 << 18  # elements of a gradient worth a look at the heap when it is freed


class GradientArguments(TypedDict, total=False):
    """What every method with gradients can be told; `GradientOptimizer` says what it means."""

    weight_decay: float
    optimizer: str
    betas: tuple[float, float]
    eps: float
    grad_clip: float | None
    grad_accumulation: int
    checkpointing: str


class GradientOptimizer(Optimizer):
    """Steps along the gradient of `parameters` of `model`. `LoRA` and `Full` choose those.

    Args:
        model: runs inside the closure; known here to find its blocks.
        parameters: (name, parameter) pairs.
        lr: learning rate.
        weight_decay: decoupled.
        optimizer: `"adamw"`, `"sgd"` or `"adamw8bit"`.
        betas, eps: of AdamW.
        grad_clip: largest norm of the whole gradient, or None. A number here keeps all gradients
            in memory at once.
        grad_accumulation: parts that a step's batch is run in; needs `step(closure, batch)`.
        checkpointing: what is recomputed in the backward pass: `"none"`, `"selective"` (what is
            cheap; same bits) or `"full"` (each block). See `tinyft/activations.py`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        optimizer: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        grad_clip: float | None = None,
        grad_accumulation: int = 1,
        checkpointing: str = "selective",
    ) -> None:
        if checkpointing not in MODES:
            raise InputError(
                f"There is no checkpointing {checkpointing!r}. Choose from: {', '.join(MODES)}."
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(list(parameters), defaults)
        self.model, self.rule, self.rule_name = model, update_rule(optimizer), optimizer
        self.grad_clip, self.grad_accumulation = grad_clip, grad_accumulation
        self.checkpointing = checkpointing
        self.steps = 0
        self._places = {p: i for i, (_, p) in enumerate(self._named())}
        reuse_heap()
        cpu_products.install_for(model)

    @staticmethod
    def arguments(config: Any) -> dict[str, Any]:
        """Of these keyword arguments, those that a run's configuration holds, for `attach`."""
        names = ("weight_decay", "optimizer", "grad_clip", "grad_accumulation", "checkpointing")
        return {name: getattr(config, name) for name in names}

    def step(  # type: ignore[override]
        self, closure: Callable[..., Tensor] | None = None, batch: Any = None
    ) -> Tensor | None:
        """See `Optimizer.step`. Without a closure: a step along the gradients that are there (as
        trainers that call `backward` themselves have it), which are then freed; returns None."""
        if closure is None:
            self._update_all()
            return None
        self.clean = True
        for _, parameter in self._named():
            parameter.grad = None
            # Before the first activations: moments made among them, in the backward pass, left
            # holes in the heap that the next step could not use (0.3 GB for 135M parameters).
            if parameter.requires_grad:
                self._state_of(parameter)
        parts = [None] if batch is None else split(batch, self.grad_accumulation)
        total = 0.0
        for part in parts:
            with torch.enable_grad(), self.keeping(by_rows=self.by_rows):
                if part is None:
                    loss = closure()
                else:
                    share = size_of(part) / size_of(batch) if len(parts) > 1 else 1.0
                    loss = call_per_example(closure, part).mean() * share
            check_finite(loss.detach(), self.steps + 1)
            self._backward(loss, is_last=part is parts[-1])
            total = total + loss.detach().float()
        self._update_all()
        return total

    @property
    def by_rows(self) -> bool:
        """Whether a step uses the gradient of a head a block of rows at a time."""
        return self.rule.by_rows and self.grad_clip is None and self.grad_accumulation == 1

    def keeping(self, *, by_rows: bool = False) -> AbstractContextManager[None]:
        """What forward passes run under: see `tinyft.activations.keeping`. `by_rows`: the backward
        pass will use a head's gradient so."""
        return keeping(self.model, self.checkpointing, self.heap, head_by_rows=by_rows)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Gradients of `loss`, each used at once where possible."""
        if not loss.requires_grad:
            if any(parameter.grad is not None for _, parameter in self._named()):
                return  # the closure went backward itself and returned a detached loss
            raise InputError(
                "The loss does not depend on any trainable parameter by a gradient. Accuracy and "
                "F1 have none: minimise those with a zeroth-order method (--method mezo)."
            )
        if is_last and self.grad_clip is None:
            with self._updating():
                loss.backward()
        else:
            loss.backward()

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Meanwhile, a parameter whose gradient is complete is updated and its gradient freed; a
        head's is by its rows."""
        trained = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._use(p, group))
            for parameter, group in trained
        ]
        users = {p: partial(self._use_rows, p, group) for p, group in trained}
        try:
            with using_rows(users if self.by_rows else {}):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _use(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Update `parameter` by its gradient, and free that."""
        if parameter.grad is None:
            return  # used by rows
        self._use_rows(parameter, group, 0, parameter.grad)
        parameter.grad = None
        if parameter.numel() >= _LARGE:
            self.heap.check()

    @torch.no_grad()
    def _use_rows(self, parameter: Tensor, group: dict[str, Any], row: int, grad: Tensor) -> None:
        """Update those rows of `parameter`, from `row` on, that `grad` is of; in their order."""
        self.clean = False
        state = self._state_of(parameter)
        place = self._places.setdefault(parameter, len(self._places))
        rows, first = parameter, 0
        if grad.shape != parameter.shape:
            here = slice(row, row + len(grad))
            if row and "step" in state:
                state["step"] -= 1  # which the first rows' update has counted
            state = {k: v[here] if v.shape == parameter.shape else v for k, v in state.items()}
            rows, first = parameter[here], row * parameter[0].numel()
        self.rule.step(rows, grad, state, group, (self.steps, place, first))

    @torch.no_grad()
    def _update_all(self) -> None:
        """Use up the gradients that are still there."""
        grads = [p.grad for _, p in self._named() if p.grad is not None]
        if grads and self.grad_clip is not None:
            norm = torch.nn.utils.get_total_norm(grads)
            check_finite(norm, self.steps + 1)
            for grad in grads:
                grad.mul_((self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        del grads
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._use(parameter, group)
        self.steps += 1

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter not in self.state:
            self.state[parameter] = self.rule.start(parameter)
        return self.state[parameter]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)

    # In less memory.

    def n_parts(self, size: int) -> int:
        return self.grad_accumulation

    def cost_key(self, batch: Any) -> tuple[Hashable, tuple[int, ...]]:
        return self.checkpointing, super().cost_key(batch)[1]

    def settings(self, size: int) -> list[dict[str, Any]]:
        """Smaller parts, and then smaller parts with blocks recomputed."""
        counts = [min(self.grad_accumulation, size)]
        while counts[-1] < size:
            counts.append(min(2 * counts[-1], size))
        return [
            {"checkpointing": mode, "grad_accumulation": count}
            for mode in dict.fromkeys((self.checkpointing, "full"))
            for count in counts
        ]

    def leaner(self, size: int) -> dict[str, Any] | None:
        """Blocks recomputed before smaller parts, where the whole batch frees its gradients as they
        come and those, which parts keep, are of most of the model."""
        found = self.settings(size)[1:]
        trained = sum(p.numel() for _, p in self._named() if p.requires_grad)
        large = 2 * trained > sum(p.numel() for p in self.model.parameters())
        if large and self.grad_clip is None and self.grad_accumulation == 1:
            found.sort(key=lambda setting: setting["grad_accumulation"] > 1)
        return next(iter(found), None)

    def probe(self, closure: Callable[..., Tensor], batch: Any) -> int:
        """Forward and backward of the first part, which is the longest. Where gradients are kept
        for a second part, of that too, for it meets them."""
        parts = split(batch, self.grad_accumulation)
        with undisturbed(self.model):
            try:
                if len(parts) == 1 and self.grad_clip is None:
                    loss = partial(_mean_loss, closure, batch)
                    sweep(self, loss, lambda k, parameter, group: None, by_rows=self.by_rows)
                else:
                    for part in parts[:2]:
                        with torch.enable_grad(), self.keeping():
                            root = _mean_loss(closure, part)
                        root.backward()
                        del root
            finally:
                for _, parameter in self._named():
                    parameter.grad = None
        return sum(
            self._moment_bytes(p)
            for _, p in self._named()
            if p.requires_grad and p not in self.state
        )

    def _moment_bytes(self, parameter: Tensor) -> int:
        state = self.rule.start(torch.empty_like(parameter, device="meta"))
        return sum(t.numel() * t.element_size() for t in state.values())

    # Resuming.

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and counts as `"<parameter>/<kind>"`, and the step."""
        tensors = {
            f"{name}/{kind}": tensor
            for name, parameter in self._named()
            for kind, tensor in self.state.get(parameter, {}).items()
        }
        return {**tensors, "steps": torch.tensor(self.steps)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        self.steps = int(rest.pop("steps", 0))
        for name, parameter in self._named():
            state = self.rule.start(parameter)
            if not all(f"{name}/{kind}" in rest for kind in state):
                continue  # a parameter that had no gradient yet
            for kind, tensor in state.items():
                tensor.copy_(rest.pop(f"{name}/{kind}"))
            self.state[parameter] = state
        if rest:
            raise InputError(
                f"The saved optimizer state does not fit: {', '.join(list(rest)[:3])} belong to no "
                f"parameter of this run. Resume with the --method and --optimizer it began with."
            )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps its dtype (torch would cast 8-bit codes to floats)."""
        rest = {key: value for key, value in state_dict.items() if key != "steps"}
        super().load_state_dict({**rest, "state": {}})
        self.steps = state_dict.get("steps", 0)
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, (_, parameter) in zip(indices, self._named(), strict=True):
            if (saved := state_dict["state"].get(index)) is not None:
                state = self.rule.start(parameter)
                for kind, tensor in state.items():
                    tensor.copy_(saved[kind])
                self.state[parameter] = state


def _mean_loss(closure: Callable[..., Tensor], part: Any) -> Tensor:
    return call_per_example(closure, part).mean()
