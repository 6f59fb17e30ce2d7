"""How much loss each tensor's update regains, found without a trace left behind.

GreenTrainer (ICLR 2024), eq. 5: with dw the update that a step makes and g1 the gradient after it,
I_k = -sum over tensor k of g1 dw is the loss that would come back if k's update were undone, to
first order. Two ways:

* `published`: that, by taking the step and undoing it. Needs what full fine-tuning needs, and a
  copy of the weights.
* `first_order`: I_k = -sum(g dw) with g the gradient before the step and dw the update rule's first
  step, without moments, so that tensors which have some and tensors which have none compare:
  -lr (g / (|g| + eps) + weight_decay w) for AdamW, -lr (g + weight_decay w) for SGD. Each gradient
  is used as it is made. Both ways agree as lr -> 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyft import modules
from tinyft.dry_run import alike
from tinyft.kernels.chunked_cross_entropy import using_rows

if TYPE_CHECKING:
    from tinyft.optim.gradient import GradientOptimizer

_PIECE = 1 << 20  # elements of a gradient looked at together
_Use = Callable[[int, Tensor, dict[str, Any]], None]


def first_order(
    optimizer: GradientOptimizer, losses: Sequence[tuple[float, Callable[[], Tensor]]]
) -> NDArray[np.float64]:
    """(N,) importances of the optimizer's parameters; at a learning rate of 0, where a schedule may
    begin, as at 1.

    Args:
        losses: (share, loss) of each part of a batch; the shares sum to 1. Gradients of several
            parts are never added up, which would keep them: importances are averaged.
    """
    gains = np.zeros(len(_places(optimizer)))
    stands = not any(group["lr"] for group in optimizer.param_groups)
    with undisturbed(optimizer.model, evaluating=True):
        for share, loss in alike(losses):

            def rate(k: int, parameter: Tensor, group: Any, share: float = share) -> None:
                lr = 1.0 if stands else group["lr"]
                gains[k] += share * lr * _regained(parameter, group, optimizer.rule_name == "sgd")

            sweep(optimizer, loss, rate)
    return gains


def _regained(parameter: Tensor, group: dict[str, Any], is_sgd: bool) -> float:
    """`-sum(g dw)` at a learning rate of 1, piece by piece."""
    total = 0.0
    pieces = (t.detach().flatten().split(_PIECE) for t in (parameter.grad, parameter))
    for grad, weight in alike(zip(*pieces, strict=True), max(1, parameter.numel() / _PIECE)):
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        along = grad if is_sgd else grad / (grad.abs() + group["eps"])
        if group["weight_decay"]:
            along = along + group["weight_decay"] * weight
        total += float((grad * along).sum(dtype=torch.float64))
    return total


def published(optimizer: GradientOptimizer, loss: Callable[[], Tensor]) -> NDArray[np.float64]:
    """(N,) importances of the optimizer's parameters, by a step that is undone.

    The step has the optimizer's own moments where there are any, and no clipping.
    """
    places, state = _places(optimizer), optimizer.state
    weights = {p: p.detach().clone() for p in places}
    moments = {p: {kind: t.clone() for kind, t in state[p].items()} for p in places if p in state}
    gains = np.zeros(len(places))

    def update(k: int, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter not in state:
            state[parameter] = optimizer.rule.start(parameter)
        optimizer.rule.step(parameter, parameter.grad, state[parameter], group)

    def rate(k: int, parameter: Tensor, group: dict[str, Any]) -> None:
        moved = parameter - weights[parameter]
        gains[k] = -float((parameter.grad * moved).sum(dtype=torch.float64))

    with undisturbed(optimizer.model, evaluating=True):
        try:
            sweep(optimizer, loss, update)
            sweep(optimizer, loss, rate)
        finally:
            with torch.no_grad():
                for parameter, weight in weights.items():
                    parameter.copy_(weight)
                    state.pop(parameter, None)
            state.update(moments)
    return gains


@contextmanager
def undisturbed(model: nn.Module, *, evaluating: bool = False) -> Iterator[None]:
    """Afterwards random numbers and buffers are as they were.

    Args:
        evaluating: in evaluation mode meanwhile, hence without dropout.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        mode = modules.evaluating(model) if evaluating else nullcontext()
        with torch.random.fork_rng(devices=list(devices)), mode:
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _places(optimizer: GradientOptimizer) -> dict[Tensor, tuple[int, dict[str, Any]]]:
    """The optimizer's parameters, each with its index and its group."""
    pairs = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return {p: (k, group) for k, (p, group) in enumerate(pairs)}


def sweep(
    optimizer: GradientOptimizer, loss: Callable[[], Tensor], use: _Use, *, by_rows: bool = False
) -> None:
    """Give each gradient to `use(index, parameter, group)` as it is made, and free it.

    `by_rows`: a head's is made a block of rows at a time, and goes unused.
    """

    def hear(k: int, group: dict[str, Any], parameter: Tensor) -> None:
        if parameter.grad is not None:  # else its rows were used
            with torch.no_grad():
                use(k, parameter, group)
        parameter.grad = None

    places = _places(optimizer)
    for parameter in places:
        parameter.grad = None
    with optimizer.keeping(by_rows=by_rows), torch.enable_grad():
        root = loss()
    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(hear, k, group))
        for parameter, (k, group) in places.items()
        if parameter.requires_grad
    ]
    unused = {parameter: lambda row, grad: None for parameter in places} if by_rows else {}
    try:
        with using_rows(unused):
            root.backward()
    finally:
        for hook in hooks:
            hook.remove()
