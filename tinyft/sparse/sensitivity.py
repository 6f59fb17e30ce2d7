"""What leaving out channels of each part does to the loss: all parts by one backward pass.

A part that is sparse moves the output of its module, by d at a token. With g the gradient of the
loss to that output, the sum over tokens of `(g . d)^2` is what the empirical Fisher information
says of the rise of the loss, tokens taken as independent (the first-order `g . d` has a sign, which
is the batch's more than the part's). Every d is found within its module, so all of it takes some
four forward passes, where trying each part would take one for each of them.

Effects do not add up, however: with most parts sparse the loss rises by many times the sum. So
they are asked for again on the way, where some parts are sparse already (`SparseLoRA._refine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyft.sparse.layers import Context, SparseAttention, SparseMLP
from tinyft.sparse.schedule import Key

Layer = SparseMLP | SparseAttention


class Effects:
    """Listens to a forward and a backward pass of a model whose layers are bound.

    Attributes:
        found: (keys, levels) float64: the sum over tokens of `(g . d)^2`, d being what the output
            of a part's module moves by when the part is as sparse as the level says and all others
            are as `base` has it; 0 where `base` has the part that sparse already.

    Args:
        keys: parts, `(layer, "ffn" | "qk" | "vo")`; `layers`: of each, in the same order.
        levels: sparsities.
        context: of the layers; its `sparsity` is `base` while passes run.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        layers: Sequence[Layer],
        levels: Sequence[float],
        context: Context,
    ) -> None:
        self.levels, self.context = levels, context
        self.base: Mapping[Key, float] = context.sparsity
        self.found = np.zeros((len(keys), len(levels)))
        self._parts: dict[nn.Module, list[tuple[int, Key]]] = {}
        for i, (key, layer) in enumerate(zip(keys, layers, strict=True)):
            self._parts.setdefault(layer.module, []).append((i, key))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile, passes add to `found`."""
        hooks = [
            module.register_forward_hook(partial(self._see, parts), with_kwargs=True)
            for module, parts in self._parts.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(
        self, parts: list[tuple[int, Key]], module: nn.Module, args: tuple, kwargs: dict, out: Any
    ) -> None:
        y = _first(out)
        if y.requires_grad:
            again = partial(module.forward, *_detached(args), **_detached(kwargs))
            y.register_hook(partial(self._rate, parts, again, y.detach()))

    @torch.no_grad()
    def _rate(
        self, parts: list[tuple[int, Key]], again: Callable[[], Any], y: Tensor, grad: Tensor
    ) -> None:
        for i, key in parts:
            for j, level in enumerate(self.levels):
                least = self.base.get(key, 0.0)
                if level <= least:
                    continue
                self.context.sparsity = {**self.base, key: level}
                moved = (grad.float() * (_first(again()) - y).float()).sum(-1)
                self.found[i, j] += float(moved.square().sum())
        self.context.sparsity = dict(self.base)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _detached(values: Any) -> Any:
    """Arguments of a module, free of the graph that they came from."""
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    return tuple(map(_detached, values)) if isinstance(values, tuple) else values
