"""The two graphs of a zeroth-order step: a perturbed forward pass, and an update.

MeZO's step (`tinyft.optim.mezo`) as pure functions for `graphs.trace`. The first gives the loss at
`theta + scale z`; a device runs it once a point of the estimator, so that one pass's activations
are all it holds. The second is `w - c z`, rounded once, and is run once a probe, so that a replay
of `(lr, g)` in torch gives the same weights, bit for bit. Directions are drawn from seed, step and
probe by the traced `philox` itself, so that their bits are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functionalize
from torch.overrides import TorchFunctionMode

from tinyft.kernels import philox
from tinyft.targets.graphs import NEXT, Loss, Tensors, tensors_of
from tinyft.zeroth.directions import make_directions
from tinyft.zeroth.forward import PerturbedForward

FAMILIES = ("sign-rank1", "rademacher")


class Plan:
    """Which signs make up the direction, fixed when a graph is made.

    All signs of a step come from one call of the generator: traced, a call is some 300 nodes.

    Args:
        name: one of `FAMILIES`.
        shapes: of the perturbed tensors; their order is part of the bits.

    Attributes:
        counters: (4, N) int64, step and probe left at 0. A constant of the graph.
    """

    def __init__(self, name: str, shapes: Sequence[Sequence[int]]) -> None:
        self.family = make_directions(name, shapes, 0)
        self.shapes, self.structured = self.family.shapes, self.family.structured
        if self.structured:
            self.counters = self.family.counters
            return
        found, self.starts = [], [0]
        for t, (rows, cols) in enumerate(self.shapes):
            blocks = -(-cols // philox.SIGNS_PER_BLOCK)
            found.append(philox.matrix_counters(torch.arange(rows), blocks, t, 0, 0))
            self.starts.append(self.starts[-1] + rows * blocks)
        self.counters = torch.cat(found, dim=1)


class Draw:
    """`scale z`, z the direction of a step's probe, as part of a graph; `t` is a tensor's index.

    z has entries +-1, so that scaling it is exact, wherever it is done: once, for fewer nodes.

    Args:
        plan: what to draw.
        tensors: holds the int64 scalars `seed`, `step` and `probe`, and `counters`.
        scale: float32, a scalar.
    """

    def __init__(self, plan: Plan, tensors: Tensors, scale: Tensor) -> None:
        self.plan = plan
        block, tensor, _, stream = tensors["counters"].unbind(0)
        stream = stream + tensors["probe"] * 8  # as in `zeroth.directions`
        counter = torch.stack((block, tensor, tensors["step"].expand_as(block), stream))
        words = functionalize(philox.philox)(counter, tensors["seed"])  # which works in place
        self.signs = signs(words)
        self.scaled = self.signs * scale

    def left(self, t: int, dim: int) -> Tensor:
        """u of tensor t, scaled, along dimension `dim` of two; structured only."""
        return self.scaled.flatten().unsqueeze(1 - dim)[_along(self.plan.family.left[t], dim)]

    def right(self, t: int, dim: int) -> Tensor:
        """v of tensor t, along dimension `dim` of two; structured only."""
        return self.signs.flatten().unsqueeze(1 - dim)[_along(self.plan.family.right[t], dim)]

    def rows(self, t: int, index: Tensor) -> Tensor:
        """Rows of `dense`, `(*index.shape, cols)`."""
        if self.plan.structured:
            return self.left(t, 0)[index] * self.right(t, 1)
        return self.dense(t)[index]

    def dense(self, t: int) -> Tensor:
        """All of `scale z_t`, `(rows, cols)`."""
        rows, cols = self.plan.shapes[t]
        if not self.plan.structured:
            blocks = self.scaled[self.plan.starts[t] : self.plan.starts[t + 1]]
            return blocks.reshape(rows, -1)[:, :cols]
        if rows == 1:
            return self.scaled.flatten().unsqueeze(0)[_along(self.plan.family.right[t], 1)]
        return self.left(t, 0) * self.right(t, 1)


def _along(part: slice, dim: int) -> tuple[slice, ...]:
    return (slice(None),) * dim + (part,)


def signs(words: Tensor) -> Tensor:
    """`philox.signs` by arithmetic: it reinterprets bits, which ONNX cannot."""
    bits = words.unsqueeze(-1).bitwise_right_shift(torch.arange(32, dtype=torch.int32))
    return (1 - 2 * bits.bitwise_and(1)).float().view(-1, philox.SIGNS_PER_BLOCK)


class Perturbed:
    """The sites of a model, and the context in which it sees theta plus what was drawn.

    Args:
        model, parameters: as for `PerturbedForward`, which finds the sites.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.sites = PerturbedForward(model, parameters).sites

    @contextmanager
    def __call__(self, draw: Draw) -> Iterator[None]:
        self.draw = draw
        try:
            for module, own in self.sites:
                run = _linear if _is_linear(module) else _replaced
                run = _embedding if isinstance(module, nn.Embedding) else run
                module.forward = partial(run, self, module, own, module.forward)
            yield
        finally:
            for module, _ in self.sites:
                module.__dict__.pop("forward", None)


def zeroth_forward(
    model: nn.Module, trainable: Sequence[str], plan: Plan
) -> Callable[[Tensors], Tensors]:
    """The loss as a function `tensors -> outputs` for `trace`.

    Takes the trainable tensors, a batch, `scale`, `step`, `probe`, `seed` and the constant
    `counters`; the output `loss` is the batch's mean at `theta + scale z`, float64.
    """
    perturbed = Perturbed(model, [model.get_parameter(name) for name in trainable])
    loss_of = Loss(model)

    @torch.no_grad()
    def forward(tensors: Tensors) -> Tensors:
        with perturbed(Draw(plan, tensors, tensors["scale"])):
            losses = loss_of.at(tensors_of(model, tensors), tensors)
        return {"loss": losses.double().mean()}

    return forward


def zeroth_update(trainable: Sequence[str], plan: Plan) -> Callable[[Tensors], Tensors]:
    """The update, of tensors, `c`, `step`, `probe`, `seed` and `counters`: a step ends in one a
    probe, and it replays a seed log."""

    def update(tensors: Tensors) -> Tensors:
        draw, outputs = Draw(plan, tensors, tensors["c"]), {}
        for t, name in enumerate(trainable):
            w = tensors[name]
            if plan.structured and w.dim() == 2 and w.shape[0] > 1:
                # One product and sum, for which the runtime needs no memory beside w.
                outputs[name + NEXT] = torch.addmm(w, draw.left(t, 0), draw.right(t, 1), alpha=-1)
            else:
                outputs[name + NEXT] = w - draw.dense(t).view(w.shape)
        return outputs

    return update


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or type(module).__name__ == "Conv1D"


def _linear(state: Perturbed, module: Any, own: dict, original: Callable, x: Tensor) -> Tensor:
    """`nn.Linear`, weight `(out, in)`, and transformers' `Conv1D`, weight `(in, out)`."""
    y, draw = original(x), state.draw
    conv1d = not isinstance(module, nn.Linear)
    if (t := own.get("weight")) is not None:
        if draw.plan.structured and draw.plan.shapes[t][0] > 1:
            # As matrices: a vector's product would be traced as x * v, as large as x, and its sum.
            first, then = (draw.left, draw.right) if conv1d else (draw.right, draw.left)
            y = y + (x @ first(t, 0)) * then(t, 1)
        else:
            y = y + x @ (draw.dense(t) if conv1d else draw.dense(t).t())
    if (t := own.get("bias")) is not None:
        y = y + draw.dense(t)[0]
    return y


def _embedding(
    state: Perturbed, module: Any, own: dict, original: Callable, *args: Any, **kwargs: Any
) -> Tensor:
    """Embeddings, and their subclasses that move the index or scale the result."""
    with _EmbeddingMode(state, module.weight, own["weight"]):
        return original(*args, **kwargs)


class _EmbeddingMode(TorchFunctionMode):
    """Adds z's rows to every `F.embedding` with the given weight."""

    def __init__(self, state: Perturbed, weight: Tensor, t: int) -> None:
        super().__init__()
        self.state, self.weight, self.t = state, weight, t

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not F.embedding or args[1] is not self.weight:
            return result
        return result + self.state.draw.rows(self.t, args[0])


def _replaced(
    state: Perturbed, module: nn.Module, own: dict, original: Callable, x: Tensor
) -> Tensor:
    """Any other leaf (norms, mostly), run with its small parameters replaced."""
    before = {name: module._parameters[name] for name in own}
    try:
        for name, t in own.items():
            z = state.draw.dense(t).view(before[name].shape)
            module._parameters[name] = before[name] + z
        return original(x)
    finally:
        module._parameters.update(before)
