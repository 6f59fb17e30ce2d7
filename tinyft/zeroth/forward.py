"""Evaluate a model at theta + s eps z without writing to theta, several (z, s) in one batch.

The batch holds G copies of the examples, copies-major; copy g sees the weights theta + scale_g z_g.
`PerturbedForward` overrides `forward` on the instances of the modules that own perturbed parameters
for as long as its context lasts:

* linear layers and embeddings add the product of z, formed or not (see `directions`);
* any other leaf module (norms, scales, unknown ones) runs once a copy with its small parameters
  replaced, which needs to know nothing about what it computes.

So any architecture works whose parameters belong to leaf modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinyft.errors import InputError
from tinyft.kernels.dispatch import choose
from tinyft.kernels.perturbed_linear import perturbed_linear_triton
from tinyft.modules import replaced_forwards
from tinyft.zeroth.directions import Draw

# Dense families form W + s eps Z this many elements at a time.
SCRATCH_ELEMENTS = 1 << 20
Group = tuple[Draw | None, float]


class PerturbedForward:
    """The sites of a model where parameters act, and the context that perturbs them.

    Args:
        model: the module that the objective calls.
        parameters: the parameters to perturb; position is the index `t` of `directions`.

    Raises:
        InputError: a parameter belongs to a module with submodules, where no general rule applies.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        index = {id(parameter): t for t, parameter in enumerate(parameters)}
        self.sites: list[tuple[nn.Module, dict[str, int]]] = []
        self.paths: dict[nn.Module, str] = {}
        stuck = []
        for path, module in model.named_modules():
            own = {
                name: index[id(parameter)]
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) in index
            }
            if own:
                self.sites.append((module, own))
                self.paths[module] = path
                if any(True for child in module.children() for _ in child.parameters()):
                    stuck += [f"{path}.{name}" for name in own]
        if stuck:
            raise InputError(
                f"MeZO cannot perturb {', '.join(stuck)} inside the forward pass: the module that "
                f"owns them also contains other modules. Freeze them (requires_grad_(False)) or "
                f"use exact=True, which perturbs in place."
            )
        self.groups: list[Group] = []
        self.rows = 0
        self._scales: dict[Any, Tensor] = {}
        self._seen: dict[nn.Module, list[tuple[int, bool]]] = {}

    @contextmanager
    def __call__(self, groups: Sequence[Group], rows: int = 0) -> Iterator[None]:
        """Within the context copy g of the batch sees `theta + scale_g z_g`.

        Args:
            groups: `(z, scale)` a copy; z is None for the unperturbed weights.
            rows: rows of the whole batch, all copies, so that inputs without a batch dimension
                (position ids) can be told from those that have one. Not needed for one copy.
        """
        self.groups, self.rows = list(groups), rows
        perturbed = [
            (module, partial(_forward_of(module), self, module, own, module.forward))
            for module, own in self.sites
        ]
        try:
            with replaced_forwards(perturbed):
                yield
        finally:
            self.groups = []
            self._scales.clear()
            self._seen = {}

    def shared_inputs(self, run: Callable[[int], Any]) -> list[str]:
        """Paths of the modules with an input that is one and the same for all copies of a batch
        (relative positions, say), in which no copy can have its own perturbation.

        Args:
            run: evaluates the model on so many copies of one example.
        """
        run(1)  # the first time an objective may run the model for more (`losses.check_head`)
        seen = []
        for copies in (1, 2):
            with self([(None, 0.0)]):
                run(copies)
                seen.append(self._seen)
        once, twice = seen
        return [
            path
            for module, path in self.paths.items()
            if not _grows(once.get(module, []), twice.get(module, []))
        ]

    def see(self, module: nn.Module, n: int, *, may_be_shared: bool = False) -> None:
        """Note an input's leading size; one of 1 is given to each copy if it `may_be_shared`."""
        self._seen.setdefault(module, []).append((n, may_be_shared))

    def scales(self, y: Tensor) -> Tensor:
        """The scale of each row of `y`, all copies, `(N, 1)` in its dtype."""
        key = len(y), y.dtype
        if key not in self._scales:
            scales = torch.tensor([scale for _, scale in self.groups], device=y.device)
            rows = scales.to(y.dtype).repeat_interleave(len(y) // len(scales))
            self._scales[key] = rows.unsqueeze(1)
        return self._scales[key]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x` by copies. An input shared by all copies (leading size 1) is given to each."""
        copies = len(self.groups)
        if copies > 1 and x.shape[0] == 1 and self.rows > 1:
            return (x,) * copies
        if x.shape[0] % copies:
            raise InputError(
                f"A module got an input of shape {tuple(x.shape)} in a batch of {copies} copies: "
                f"dimension 0 must hold the examples. Give step() a closure without a batch, or "
                f"exact=True."
            )
        return x.chunk(copies)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    forward = type(module).forward
    if forward is nn.Linear.forward or type(module).__name__ == "Conv1D":
        return _linear
    if isinstance(module, nn.Embedding):
        return _embedding
    return _one_run_a_copy


def _grows(once: list[tuple[int, bool]], twice: list[tuple[int, bool]]) -> bool:
    """Whether what a module saw of two copies is twice what it saw of one. In sums, since a head
    may get its input in pieces."""
    given = sum(n == 1 and may_be_shared for n, may_be_shared in twice)
    return sum(n for n, _ in twice) - given == 2 * (sum(n for n, _ in once) - given)


def _linear(
    state: PerturbedForward, module: Any, own: Mapping[str, int], original: Callable, x: Tensor
) -> Tensor:
    """`nn.Linear`, weight `(out, in)`, and transformers' `Conv1D`, weight `(in, out)`."""
    state.see(module, x.shape[0])
    conv1d = not isinstance(module, nn.Linear)
    out_features = module.weight.shape[1 if conv1d else 0]
    t, t_bias = own.get("weight"), own.get("bias")
    draws = [draw for draw, _ in state.groups if draw is not None]
    structured = t is None or not draws or draws[0].family.structured
    y = None if t is None or conv1d else _fused_product(state.groups, module, t, x)
    fused = y is not None
    if not fused:
        y = original(x) if structured else x.new_empty(*x.shape[:-1], out_features)
    ys = y.view(-1, out_features)
    xs = x.reshape(-1, x.shape[-1])
    if xs.shape[0] % len(state.groups):
        raise InputError(
            f"A linear layer got an input of shape {tuple(x.shape)}, which {len(state.groups)} "
            f"copies of the batch do not divide. Give step() a closure without a batch."
        )
    unformed = t is not None and structured and not fused
    if unformed and draws:
        perturbed = state.groups[-len(draws) :]  # copies of theta itself come before them
        n = len(perturbed) * (len(xs) // len(state.groups))
        parts = xs[-n:], ys[-n:], state.scales(ys)[-n:]
        if all(draw is draws[0] for draw, _ in perturbed):
            draws[0].add_product_(t, *parts, transposed=conv1d)
            unformed = False
        elif all(draw is not None for draw, _ in perturbed) and draws[0].family.batches(xs):
            draws[0].family.add_products_(draws, t, *parts, transposed=conv1d)
            unformed = False
    if not unformed and structured and t_bias is None:
        return y
    per_copy = list(
        zip(xs.chunk(len(state.groups)), ys.chunk(len(state.groups)), state.groups, strict=True)
    )
    if not fused and not structured:
        _formed_product(module.weight, module.bias, conv1d, t, per_copy)
    for x_copy, y_copy, (draw, scale) in per_copy:
        if draw is None:
            continue
        if unformed:
            draw.add_product_(t, x_copy, y_copy, scale, transposed=conv1d)
        if t_bias is not None:
            y_copy.add_(draw.vector(t_bias), alpha=scale)
    return y


def _fused_product(groups: Sequence[Group], module: nn.Linear, t: int, x: Tensor) -> Tensor | None:
    """`x (W + s Z)' + b` by one Triton kernel, or None where that cannot be."""
    draws = {id(draw): draw for draw, _ in groups}
    draw = groups[0][0]
    z = None if draw is None or len(draws) > 1 or len(groups) > 2 else draw.direction(t)
    weight, bias = module.weight, module.bias
    if z is None or x.dtype != weight.dtype or x.numel() // x.shape[-1] % len(groups):
        return None
    if torch.is_autocast_enabled(x.device.type):  # which casts what it knows, and not a kernel
        return None
    if choose("perturbed_linear", "auto", x, weight, bias, forward_only=True) == "torch":
        return None
    return perturbed_linear_triton(x, weight, z, [scale for _, scale in groups], bias=bias)


def _formed_product(
    weight: Tensor, bias: Tensor | None, conv1d: bool, t: int, per_copy: list
) -> None:
    """`y = x (W + s Z)' + b` for every copy, W + s Z formed a block of rows at a time."""
    for _, y, _ in per_copy:
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    step = max(1, SCRATCH_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        blocks: dict[int, Tensor] = {}  # both signs of one probe share its z
        for x, y, (draw, scale) in per_copy:
            w = weight[start:stop]
            if draw is not None:
                if id(draw) not in blocks:
                    blocks[id(draw)] = draw.block(t, start, stop).to(weight.dtype)
                w = torch.add(w, blocks[id(draw)], alpha=scale)
            if conv1d:
                y.addmm_(x[:, start:stop], w)
            else:
                y[:, start:stop].addmm_(x, w.t())


def _embedding(
    state: PerturbedForward,
    module: Any,
    own: Mapping[str, int],
    original: Callable,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Embeddings, and their subclasses that move the index or scale the result."""
    with _EmbeddingMode(state, module, own["weight"]):
        return original(*args, **kwargs)


class _EmbeddingMode(TorchFunctionMode):
    """Adds z's rows to every `F.embedding` with the given weight, whoever calls it and how."""

    def __init__(self, state: PerturbedForward, module: nn.Module, t: int) -> None:
        super().__init__()
        self.state, self.module, self.t = state, module, t

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not F.embedding or args[1] is not self.module.weight:
            return result
        state = self.state
        state.see(self.module, args[0].shape[0], may_be_shared=True)
        pieces = state.split(args[0])
        if len(pieces) > 1 and args[0].shape[0] == 1:
            # Shared by all rows so far; from here on each copy has its own.
            result = result.expand(state.rows, *result.shape[1:]).clone()
        for ids, y, (draw, scale) in zip(
            pieces, result.chunk(len(pieces)), state.groups, strict=True
        ):
            if draw is not None:
                rows = draw.rows(self.t, ids.flatten())
                y.add_(rows.view(*ids.shape, -1), alpha=scale)
        return result


def _one_run_a_copy(
    state: PerturbedForward,
    module: nn.Module,
    own: Mapping[str, int],
    original: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the module once a copy on its share of every tensor argument, parameters replaced."""
    copies = len(state.groups)
    sizes = [a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor)] or [1]
    for n in sizes:
        state.see(module, n, may_be_shared=max(sizes) > 1)
    shares = [[a] * copies if not isinstance(a, Tensor) else state.split(a) for a in args]
    named = {
        k: [a] * copies if not isinstance(a, Tensor) else state.split(a) for k, a in kwargs.items()
    }
    parameters = {name: module._parameters[name] for name in own}
    outputs = []
    try:
        for g, (draw, scale) in enumerate(state.groups):
            if draw is not None:
                for name, t in own.items():
                    weight = parameters[name]
                    z = draw.dense(t).view(weight.shape).to(weight.dtype)
                    module._parameters[name] = torch.add(weight, z, alpha=scale)
            else:
                module._parameters.update(parameters)
            outputs.append(
                original(*(share[g] for share in shares), **{k: s[g] for k, s in named.items()})
            )
    finally:
        module._parameters.update(parameters)
    if copies == 1:
        return outputs[0]
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return type(outputs[0])(torch.cat(parts) for parts in zip(*outputs, strict=True))
