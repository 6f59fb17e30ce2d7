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
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tinyft.cost import DispatchMode
from tinyft.heap import HeapWatch, Shelf, Shelved
from tinyft.modules import is_plain_linear, replaced_forwards

MODES = ("none", "selective", "full")


@contextmanager
def keeping(
    model: nn.Module, mode: str, watch: HeapWatch, *, head_by_rows: bool = False
) -> Iterator[None]:
    """Run a forward pass inside this; the backward pass may come outside, and may come never.

    `head_by_rows`: the gradient of a plain head's weight will be used a block at a time.
    """
    blocks = blocks_of(model)
    apart = {id(p) for block in blocks for p in block.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head_by_rows and is_plain_linear(head) and head.weight.requires_grad:
        apart.add(id(head.weight))
    outside = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    largest_bytes = max((p.numel() * p.element_size() for p in outside), default=0)
    # Only where there is a heap: on a GPU the mode would keep Triton's kernels away.
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    shelf = Shelf() if on_cpu else None
    recipes = Rematerialise(shelf) if mode == "selective" else None
    runs = []
    for i, block in enumerate(blocks):
        forward = block.forward
        if mode == "full":
            forward = partial(checkpoint, forward, use_reentrant=False)
        coming_bytes = 0 if i else largest_bytes
        last = shelf if block is blocks[-1] else None
        runs.append((block, partial(_run_block, forward, watch, recipes, coming_bytes, last)))
    shelved = recipes or (Shelved(shelf) if shelf else nullcontext())
    try:
        # A block that runs again would fill a cache again.
        with without_cache(model), replaced_forwards(runs), shelved:
            yield
    finally:
        if shelf:
            shelf.close()
        watch.check()  # the peak comes next, when the backward pass begins


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model makes no cache of keys and values, which is for generating."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", False)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = True


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The items of the `nn.ModuleList` with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=()))


def _run_block(
    forward: Callable[..., Any],
    watch: HeapWatch,
    recipes: Rematerialise | None,
    coming_bytes: int,
    shelf: Shelf | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`forward(*args, **kwargs)`.

    `coming_bytes`: of the gradients that the backward pass makes after this block's. `shelf`: to be
    emptied after it, for what comes next is of other sizes: a head's logits.
    """
    watch.check()
    if args and isinstance(args[0], Tensor) and args[0].requires_grad:
        args[0].register_hook(lambda grad: watch.check(coming_bytes))
        if recipes:
            recipes.begin_from(args[0])
    out = forward(*args, **kwargs)
    if shelf:
        shelf.empty()
    return out


aten = torch.ops.aten
# One pass over memory each, deterministic, and free of random numbers.
_CHEAP = {
    aten.add,
    aten.cat,
    aten.div,
    aten.exp,
    aten.gelu,
    aten.index_select,
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
_SWEEP_BYTES = 1 << 25
_LONGEST = 12  # operations to make one tensor again


class Rematerialise(DispatchMode):
    """While active, autograd saves recipes instead of tensors where that holds fewer bytes.

    Below autograd, every cheap operation leaves a recipe for its result: the operation and its
    operands, which are recipes themselves or tensors (leaves). When autograd then saves that
    result, the recipe takes its place if its leaves, as far as nothing else holds them already,
    are smaller. Leaves must not change before the backward pass; one that did is an error.

    Args:
        shelf: where results lie, if on any.
    """

    # What a kernel writes has no recipe: it is a leaf, as a matrix product is.
    passes_kernels = True

    def __init__(self, shelf: Shelf | None = None) -> None:
        super().__init__()
        self._shelf = shelf
        # By address of the storage. The weak reference keeps the address from being used again.
        self._made: dict[int, tuple[StorageWeakRef, dict[Any, _Recipe]]] = {}
        self._held: dict[int, StorageWeakRef] = {}
        self._sweep_at, self._recorded_bytes = 64, 0
        # What was cooked last, with its intermediates: q, k and v save the same input, a product
        # and its factor are saved by neighbours.
        self._cooked: dict[_Recipe, Tensor] = {}

    def __enter__(self) -> Rematerialise:
        # Held no longer than this is active: they hold `self`, and cycles wait for the collector.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._hooks.__exit__(*exception)
        del self._hooks
        self._made.clear()
        self._held.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._shelf.run(func, args, kwargs) if self._shelf else func(*args, **kwargs)
        kind = _kind(func)
        if kind == "view":
            if self._recipe_of(args[0]) is not None:
                self._record(out, _Recipe.of(func, args, kwargs, self._recipe_of))
        elif kind == "cheap":
            result = out[0] if isinstance(out, tuple) else out
            # Statistics of a row, (..., 1), are small: leaves, not worth a recipe.
            if result.dim() and result.shape[-1] > 1:
                self._record(result, _Recipe.of(func, args, kwargs, self._recipe_of))
        elif kind == "mutable":
            for changed in (*args, *kwargs.values()):
                if isinstance(changed, Tensor):  # at worst an operand that was only read
                    self._made.pop(changed.untyped_storage()._cdata, None)
        return out

    def begin_from(self, tensor: Tensor) -> None:
        """Make nothing again from what came before `tensor`, a block's input."""
        self._made.pop(tensor.untyped_storage()._cdata, None)
        self._sweep()

    def _sweep(self) -> None:
        """Results that died free their leaves: a head's blocks of logits, 0.2 GB in all, say."""
        self._recorded_bytes = 0
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        self._sweep_at = len(self._made) + 32

    def _record(self, made: Tensor, recipe: _Recipe) -> None:
        if recipe.length > _LONGEST:
            return
        storage = made.untyped_storage()
        _, recipes = self._made.setdefault(storage._cdata, (StorageWeakRef(storage), {}))
        recipes[_geometry(made)] = recipe
        self._recorded_bytes += storage.nbytes()
        if len(self._made) >= self._sweep_at or self._recorded_bytes >= _SWEEP_BYTES:
            self._sweep()

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


@cache
def _kind(func: Any) -> str | None:
    """What an operation means for recipes: `"mutable"`, `"view"`, `"cheap"`, or None: nothing."""
    if func._schema.is_mutable:  # in place, or with `out=`
        return "mutable"
    packet = func.overloadpacket
    if func.namespace == "bitsandbytes" and packet.__name__ == "dequantize_4bit":
        return "cheap"  # a weight from its packed bits
    return "view" if packet in _VIEWS else "cheap" if packet in _CHEAP else None


@dataclass(frozen=True, eq=False)
class _Recipe:
    """A tensor as the operation that makes it.

    Attributes:
        args: constants, tensors and recipes, or lists of them; `kwargs` has constants alone.
        leaves: the tensors to begin from, each with its version when it was read.
        length: operations in total.
    """

    func: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    leaves: list[tuple[Tensor, int]]
    length: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, find: Callable[..., Any]) -> _Recipe:
        """`func(*args, **kwargs)`; `find` has the recipes of operands that have one."""
        # No function that calls itself here: its cell would hold the tensors in a cycle, until the
        # garbage collector comes.
        leaves: list[tuple[Tensor, int]] = []
        length = 1
        operands: list[Any] = []
        for value in args:
            items = value if isinstance(value, (list, tuple)) else [value]  # `cat` takes a list
            found = []
            for item in items:
                recipe = find(item) if isinstance(item, Tensor) else None
                if recipe is not None:
                    length += recipe.length
                    leaves.extend(recipe.leaves)
                elif isinstance(item, Tensor):
                    leaves.append((item, item._version))
                found.append(item if recipe is None else recipe)
            operands.append(found if items is value else found[0])
        return cls(func, operands, kwargs or {}, leaves, length)

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
        operands = [_cooked(value, known, made) for value in self.args]
        out = self.func(*operands, **self.kwargs)
        made[self] = out[0] if isinstance(out, tuple) else out
        return made[self]


def _cooked(value: Any, known: Mapping[_Recipe, Tensor], made: dict[_Recipe, Tensor]) -> Any:
    if isinstance(value, list):
        return [_cooked(item, known, made) for item in value]
    return value.cook(known, made) if isinstance(value, _Recipe) else value


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """What tells apart the views of one storage."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
