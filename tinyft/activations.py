"""What autograd keeps between forward and backward, and how to keep less.

Three ways (`keeping`):

* `"none"`: everything that torch saves.
* `"selective"`: nothing that a cheap operation can make again from what is kept anyway. A network
  saves a lot of that: a normalised input beside the input, `silu(gate)` and its product with `up`
  beside `gate` and `up`. No matrix product and no attention is ever done twice, and since the same
  operation on the same operands gives the same bits, gradients are bit-identical to `"none"`.
* `"full"`: the inputs of each block alone; blocks run a second time in the backward pass
  (Chen et al. 2016, arXiv:1604.06174), a third more arithmetic.

Measured on SmolLM2-135M, 8 x 128 tokens, float32: see `bench/peft_parity.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from tinyft.heap import HeapWatch

MODES = ("none", "selective", "full")


@contextmanager
def keeping(model: nn.Module, mode: str, watch: HeapWatch) -> Iterator[None]:
    """Run a forward pass inside this; the backward pass may come outside, and may come never."""
    watch.trim()
    blocks = _blocks(model)
    for block in blocks:
        block.forward = partial(_run_block, block.forward, watch, mode == "full")
    # A cache of keys and values is for generating; a block that runs again would fill it again.
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", False)
    if cached:
        config.use_cache = False
    try:
        with Rematerialise() if mode == "selective" else nullcontext():
            yield
    finally:
        if cached:
            config.use_cache = True
        for block in blocks:
            block.forward = block.forward.args[0]
            if getattr(block.forward, "__func__", None) is type(block).forward:
                del block.forward  # it was the class's own
        watch.trim()  # the peak comes next, when the backward pass begins


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The items of the `nn.ModuleList` with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()))


def _run_block(
    forward: Callable[..., Any], watch: HeapWatch, again: bool, *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args, **kwargs)`, checkpointed if `again`."""
    watch.check()
    run = partial(checkpoint, forward, use_reentrant=False) if again else forward
    return run(*args, **kwargs)


aten = torch.ops.aten
# One pass over memory each, deterministic, and free of random numbers.
_CHEAP = {
    aten.add,
    aten.cat,
    aten.div,
    aten.exp,
    aten.gelu,
    aten.mul,
    aten.native_layer_norm,
    aten.neg,
    aten.pow,
    aten.reciprocal,
    aten.relu,
    aten.rsqrt,
    aten.rsub,
    aten.sigmoid,
    aten.silu,
    aten.sqrt,
    aten.sub,
    aten.tanh,
    aten._to_copy,
}
_VIEWS = {
    aten.alias,
    aten.detach,
    aten.expand,
    aten.permute,
    aten.select,
    aten.slice,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
    aten._unsafe_view,
}
_LONGEST = 12  # operations to make one tensor again


class Rematerialise(TorchDispatchMode):
    """While active, autograd saves recipes instead of tensors where that holds fewer bytes.

    Below autograd, every cheap operation leaves a recipe for its result: the operation and its
    operands, which are recipes themselves or tensors (leaves). When autograd then saves that
    result, the recipe takes its place if its leaves, as far as nothing else holds them already,
    are smaller. Leaves must not change before the backward pass; one that did is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        # By address of the storage. The weak reference keeps the address from being used again.
        self._made: dict[int, tuple[StorageWeakRef, dict[Any, _Recipe]]] = {}
        self._held: dict[int, StorageWeakRef] = {}
        self._sweep_at = 64
        # What was cooked last, with its intermediates: q, k and v save the same input, a product
        # and its factor are saved by neighbours.
        self._cooked: dict[_Recipe, Tensor] = {}

    def __enter__(self) -> Rematerialise:
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hooks.__exit__(*exception)
        self._made.clear()
        self._held.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in _VIEWS:
            if (recipe := self._recipe_of(args[0])) is not None:
                self._record(out, _Recipe.of(func, args, kwargs, {args[0]: recipe}))
        elif operation in _CHEAP:
            result = out[0] if isinstance(out, tuple) else out
            # Statistics of a row, (..., 1), are small: leaves, not worth a recipe.
            if result.dim() and result.shape[-1] > 1:
                operands = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
                known = {a: r for a in operands if (r := self._recipe_of(a)) is not None}
                self._record(result, _Recipe.of(func, args, kwargs, known))
        elif func._schema.is_mutable:
            for changed in tree_flatten((args, kwargs))[0]:
                if isinstance(changed, Tensor):  # at worst an operand that was only read
                    self._made.pop(changed.untyped_storage()._cdata, None)
        return out

    def _record(self, made: Tensor, recipe: _Recipe) -> None:
        if recipe.length > _LONGEST:
            return
        storage = made.untyped_storage()
        _, recipes = self._made.setdefault(storage._cdata, (StorageWeakRef(storage), {}))
        recipes[_geometry(made)] = recipe
        if len(self._made) >= self._sweep_at:  # results that died free their leaves
            self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
            self._sweep_at = len(self._made) + 32

    def _recipe_of(self, tensor: Tensor) -> _Recipe | None:
        entry = self._made.get(tensor.untyped_storage()._cdata)
        return entry[1].get(_geometry(tensor)) if entry else None

    def _is_held(self, storage: torch.UntypedStorage) -> bool:
        reference = self._held.get(storage._cdata)
        return reference is not None and not reference.expired()

    def _pack(self, tensor: Tensor) -> Tensor | _Recipe:
        storage = tensor.untyped_storage()
        recipe = self._recipe_of(tensor)
        if recipe is not None and not self._is_held(storage):
            fresh = {
                leaf.untyped_storage()._cdata: leaf.untyped_storage()
                for leaf, version in recipe.leaves
                if not isinstance(leaf, nn.Parameter) and not self._is_held(leaf.untyped_storage())
            }
            unchanged = all(leaf._version == version for leaf, version in recipe.leaves)
            if unchanged and sum(s.nbytes() for s in fresh.values()) < storage.nbytes():
                self._held |= {key: StorageWeakRef(s) for key, s in fresh.items()}
                return recipe
        self._held[storage._cdata] = StorageWeakRef(storage)
        self._made.pop(storage._cdata, None)  # a leaf from now on; what it came from may go
        return tensor

    def _unpack(self, packed: Tensor | _Recipe) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._cooked:
            fresh: dict[_Recipe, Tensor] = {}
            packed.cook(self._cooked, fresh)
            self._cooked = fresh
        return self._cooked[packed]


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A tensor as the operation that makes it; operands are constants, recipes and tensors.

    Attributes:
        leaves: tensors to begin from, each with its version when it was read.
        length: operations in total.
    """

    func: Callable[..., Any]
    operands: list[Any]
    spec: Any
    leaves: list[tuple[Tensor, int]]
    length: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, known: dict[Tensor, _Recipe]) -> _Recipe:
        """`func(*args, **kwargs)`, with the recipes of those operands that have one."""
        flat, spec = tree_flatten((args, kwargs or {}))
        operands: list[Any] = []
        leaves: list[tuple[Tensor, int]] = []
        length = 1
        for value in flat:
            if isinstance(value, Tensor):
                if (recipe := known.get(value)) is not None:
                    value, length = recipe, length + recipe.length
                    leaves += recipe.leaves
                else:
                    leaves.append((value, value._version))
            operands.append(value)
        return cls(func, operands, spec, leaves, length)

    @torch.no_grad()
    def cook(self, known: Mapping[_Recipe, Tensor], made: dict[_Recipe, Tensor]) -> Tensor:
        """The tensor; it and what it is made from are put into `made`."""
        if self in known or self in made:
            return made.setdefault(self, known.get(self))
        if any(leaf._version != version for leaf, version in self.leaves):
            raise RuntimeError(
                "A tensor that the backward pass would compute from was changed in place. Use "
                'checkpointing="none".'
            )
        flat = [o.cook(known, made) if isinstance(o, _Recipe) else o for o in self.operands]
        args, kwargs = tree_unflatten(flat, self.spec)
        out = self.func(*args, **kwargs)
        made[self] = out[0] if isinstance(out, tuple) else out
        return made[self]


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """What tells apart the views of one storage."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
