"""What the backward pass costs for any set of trained tensors, traced from the model itself.

One forward and backward pass with every tensor trained gives the autograd graph. A node's FLOPs,
and the activations saved for it, go to the input whose gradient they serve, found by following the
data inside the node, or to the node itself where they serve several (attention's backward is one
operator for q, k and v). Whatever is paid for on the same condition is one unit, and the condition
is which tensors lie behind it:

    a unit is paid for if and only if one of the tensors it reaches is trained.

So a tensor's own gradient is a unit that reaches it alone, and the way to it is units that reach it
and all that is deeper. No layer is known by name: parallel branches, residual streams, tied
embeddings and decoders over encoders are in the graph as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tinyft.cost import DispatchMode, FlopCounter, flops_of, tensors_in

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class BackwardCost:
    """Costs of training sets of N tensors, in U units.

    Attributes:
        forward_flops: of the forward pass, whatever is trained. (Of a set that is nothing but the
            head it is a little too high: the gradient to the hidden states is made there, too.)
        flops: (U,) int64, backward.
        saved_bytes: (U,) int64, activations.
        reach: (U, N) bool: which tensors' training pays for a unit.
    """

    forward_flops: int
    flops: NDArray[np.int64]
    saved_bytes: NDArray[np.int64]
    reach: Mask

    def step_flops(self, mask: Mask | None = None) -> int:
        """Forward and backward FLOPs of a step that trains `mask` (N,), by default everything."""
        return self.forward_flops + int(self.flops[self._paid(mask)].sum())

    def activation_bytes(self, mask: Mask | None = None) -> int:
        """What autograd saves for that step, at most."""
        return int(self.saved_bytes[self._paid(mask)].sum())

    def _paid(self, mask: Mask | None) -> Mask:
        return self.reach.any(1) if mask is None else self.reach[:, mask].any(1)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(N,) the tensors from the output toward the input, by the length of the way to them.

        Where that is the same, what was defined last comes first."""
        way = self._shared[:, None] & self.reach
        flops, saved = ((unit[:, None] * way).sum(0) for unit in (self.flops, self.saved_bytes))
        return np.lexsort((-np.arange(self.reach.shape[1]), saved, flops))

    @cached_property
    def _shared(self) -> Mask:
        return self.reach.sum(1) > 1

    def own(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) in `order`: of `units` (`flops` or `saved_bytes`), what a tensor pays alone."""
        alone = self.reach[~self._shared]
        return (units[~self._shared, None] * alone).sum(0)[self.order]

    def way(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) in `order`: of `units`, what is paid to get to a tensor from the one before it.

        The tensors are taken for one chain. Where the model has parallel branches this is too much,
        never too little: a set's cost as it is comes from `step_flops`.
        """
        first = self.reach[self._shared][:, self.order].argmax(1)
        return np.bincount(first, units[self._shared], len(self.order)).astype(np.int64)


def trace(
    loss: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    module: nn.Module,
) -> BackwardCost:
    """Run `loss` forward and backward once and attribute what it cost.

    The gradients are dropped as they are made. Call it under the `tinyft.activations.keeping` that
    steps run under, and with the model in their mode.

    Args:
        loss: the scalar loss.
        parameters: the N tensors, all requiring gradients.
        module: the model; its parameters and buffers are no activations.
    """
    blame = _Blame({t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())})
    with torch.enable_grad(), FlopCounter() as forward, blame.saving():
        root = loss()
    graph = _Graph(root.grad_fn, parameters)
    hooks = [
        hook
        for node in graph.nodes
        for hook in (
            node.register_prehook(partial(blame.enter, node)),
            node.register_hook(partial(blame.leave, node)),
        )
    ]
    hooks += [p.register_post_accumulate_grad_hook(_drop) for p in parameters]
    try:
        with blame:
            root.backward()
    finally:
        for hook in hooks:
            hook.remove()

    units: dict[int, list[int]] = {}
    for node, flops in blame.flops.items():
        units.setdefault(graph.reach[node], [0, 0])[0] += flops
    for n_bytes, nodes in blame.saved.values():
        behind = reduce(or_, (graph.reach[node] for node in nodes), 0)
        units.setdefault(behind, [0, 0])[1] += n_bytes
    units.pop(0, None)  # what reaches no tensor of ours
    reach = [[bool(bits >> k & 1) for k in range(len(parameters))] for bits in units]
    costs = np.array(list(units.values()), dtype=np.int64).reshape(-1, 2)
    return BackwardCost(
        forward.flops, costs[:, 0], costs[:, 1], np.array(reach, bool).reshape(len(costs), -1)
    )


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Graph:
    """The nodes behind a loss, and for each the tensors behind it, as bits of a number."""

    def __init__(self, root: Any, parameters: Sequence[nn.Parameter]) -> None:
        bit = {parameter: 1 << k for k, parameter in enumerate(parameters)}
        self.nodes: list[Any] = []
        self.reach: dict[Any, int] = {None: 0}
        stack = [(root, False)]
        while stack:
            node, finished = stack.pop()
            if finished:
                self.nodes.append(node)
                self.reach[node] = bit.get(getattr(node, "variable", None), 0)
                for following, _ in node.next_functions:
                    self.reach[node] |= self.reach[following]
            elif node not in self.reach:
                self.reach[node] = 0
                stack.append((node, True))
                stack += [(following, False) for following, _ in node.next_functions]


class _Blame(DispatchMode):
    """Attributes a backward pass's FLOPs, and the tensors saved for it, to nodes.

    An operator, or a saved tensor, that went into the gradient of one input alone is attributed to
    the node that follows on that input; one that several need, to the running node itself.

    Attributes:
        flops: by node.
        saved: by storage: its bytes, and the nodes for whose sake it is kept.
    """

    def __init__(self, resident: set[int]) -> None:
        super().__init__()
        self.flops: dict[Any, int] = {}
        self.saved: dict[int, tuple[int, set[Any]]] = {}
        self._resident = resident
        # References keep a storage's address from being used again.
        self._alive: list[StorageWeakRef] = []
        self._packed: list[list[int]] = []  # the storages of each time that something was saved
        # Of the running node: its operators' FLOPs, what was unpacked for it, and which of these
        # (operators from 0 up, unpacked things from -1 down) went into a storage.
        self._costs: list[int] = []
        self._unpacked: list[int] = []
        self._made_of: dict[int, tuple[StorageWeakRef, set[int]]] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Run the forward pass inside, to hear of what autograd saves and of when it is used."""
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        pack, unpack = outer if outer else (lambda tensor: tensor, lambda tensor: tensor)

        def packed(tensor: Tensor) -> tuple[Any, int]:
            kept, storages = pack(tensor), []
            leaves = [kept] if isinstance(kept, Tensor) else [leaf for leaf, _ in kept.leaves]
            for storage in (leaf.untyped_storage() for leaf in leaves):
                if storage._cdata not in self._resident:
                    self._alive.append(StorageWeakRef(storage))
                    self.saved.setdefault(storage._cdata, (storage.nbytes(), set()))
                    storages.append(storage._cdata)
            self._packed.append(storages)
            return kept, len(self._packed) - 1

        def unpacked(kept: tuple[Any, int]) -> Tensor:
            tensor = unpack(kept[0])
            self._unpacked.append(kept[1])
            self._mark(tensor, {-len(self._unpacked)})
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
            yield

    def enter(self, node: Any, *_: Any) -> None:
        self._costs.clear()
        self._unpacked.clear()
        self._made_of.clear()

    def leave(self, node: Any, grad_inputs: Sequence[Tensor | None], *_: Any) -> None:
        serves: dict[int, list[Any]] = {}
        for (following, _), grad in zip(node.next_functions, grad_inputs, strict=True):
            for thing in self._behind(grad):
                serves.setdefault(thing, []).append(following)
        for operator, flops in enumerate(self._costs):
            served = serves.get(operator, ())
            payer = served[0] if len(served) == 1 else node
            self.flops[payer] = self.flops.get(payer, 0) + flops
        for i, index in enumerate(self._unpacked):
            for storage in self._packed[index]:
                self.saved[storage][1].update(serves.get(-1 - i, (node,)))
        self.enter(node)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if flops := flops_of(func, args, out):
            self._costs.append(flops)
        if torch.is_grad_enabled():
            return out  # a block that is run again serves all its tensors
        behind = {len(self._costs) - 1} if flops else set()
        for operand in tensors_in((*args, *(kwargs or {}).values())):
            behind |= self._behind(operand)
        for result in tensors_in((out,)):
            self._mark(result, behind)
        return out

    def _mark(self, tensor: Tensor, things: set[int]) -> None:
        if things:
            storage = tensor.untyped_storage()
            entry = self._made_of.setdefault(storage._cdata, (StorageWeakRef(storage), set()))
            entry[1].update(things)

    def _behind(self, tensor: Tensor | None) -> set[int]:
        if tensor is None:
            return set()
        return self._made_of.get(tensor.untyped_storage()._cdata, (None, set()))[1]
