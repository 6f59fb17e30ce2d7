"""Run a model, or a whole training step, without its arithmetic: shapes, lifetimes and FLOPs alone.

Inside `DryRun` every large tensor is memory that is asked for and never touched (the system gives
pages only to what is written), and every operation on such tensors only finds out its result's
shape, on torch's meta device. All else is as always: the same Python, autograd, hooks and modes,
the same branches for the device. So the step that is traced is the step that will run, whatever
the architecture or the method, and seven billion parameters take a few megabytes.

Small integer tensors (token ids, labels, masks) stay real, so that what depends on the data (how
many tokens carry a label) is what it will be.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tinyft.cost import DispatchMode, formula_of, tensors_in

_SMALL = 1 << 12  # elements; below, a stand-in is written where a value would be
_LARGE = 1 << 16  # elements; factories of less run for real

# Of operations that are one here and many inside: bytes for each element of the first operand,
# measured with torch's profiler on the CPU.
_SCRATCH = {"bitsandbytes::optimizer_update_8bit_blockwise": 24}

aten = torch.ops.aten
T = TypeVar("T")


def alike(items: Iterable[T], rounds: float | None = None) -> Iterator[T]:
    """What a loop goes through whose rounds do the same work and leave nothing alive.

    All items; in a dry run the first one alone, whose work counts for that of them all.

    Args:
        rounds: how many times the first one's work all of them are; their number if None.
    """
    run = current()
    if run is None:
        yield from items
        return
    if rounds is None:
        items = list(items)
        rounds = len(items)
    for first in items:
        with run.counting(rounds):
            yield first
        return


def current() -> DryRun | None:
    """The dry run that this happens in, if any."""
    active = _get_current_dispatch_mode_stack()
    return next((mode for mode in active if isinstance(mode, DryRun)), None)


@dataclass(eq=False)
class _Block:
    """A piece of memory: when it was alive, by the number of the operation."""

    size_bytes: int
    kind: str
    born: int
    place: int | None  # its address; None where the memory is another's
    died: int | None = None


class DryRun(DispatchMode):
    """While active, nothing is computed; what would be allocated is written down.

    Attributes:
        flops, flops_by_dtype: of the operations since `reset`; the dtype is that of the operands.
        operations, moved_bytes: their number, and what they read and wrote.
        product_bytes: the part of `moved_bytes` that the operations with FLOPs moved.
        peak_bytes: the largest sum of what was alive at one time since `reset`.

    Example:
        >>> with DryRun() as trace:
        ...     x = torch.empty(1 << 20, 1 << 10)
        ...     y = x @ x.t()[:, :256]
        >>> trace.peak_bytes == 4 * (1 << 30) + 4 * (1 << 28)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._times = 1.0
        self._dry: dict[int, Any] = {}  # storages without contents, by address; weak references
        self._known: dict[int, _Block] = {}
        self._blocks: list[_Block] = []
        self._places: set[int] = set()  # addresses of what is alive
        self._now = 0
        self.live_bytes = 0
        self.reset()

    @contextmanager
    def counting(self, times: float) -> Iterator[None]:
        """Meanwhile, what is done counts so often."""
        before = self._times
        self._times *= times
        try:
            yield
        finally:
            self._times = before

    def reset(self) -> None:
        """Begin anew to count FLOPs and to look for the peak; what is alive stays."""
        self.flops = 0.0
        self.flops_by_dtype: dict[torch.dtype, float] = {}
        self.moved_bytes = 0.0
        self.product_bytes = 0.0
        self.operations = 0.0
        self.peak_bytes = self.live_bytes
        self._blocks = [block for block in self._blocks if block.died is None]
        self._phases: list[tuple[int, bool]] = []  # first operation, of a backward pass?
        self._marks: list[int] = []
        self._history = [(self._now, self.live_bytes)]

    def label(self, tensors: Any, kind: str) -> None:
        """Say what some tensors are ("weights", "optimizer", ...), for `peaks`."""
        for tensor in tensors:
            self._track(tensor).kind = kind

    def mark(self) -> None:
        """Say that a backward pass has come on, as it does equally often in every layer."""
        self._marks.append(self._now)

    def peaks(self) -> list[dict[str, int]]:
        """Bytes alive, by kind, at the peak of each forward pass and of each half of each backward
        pass since `reset`, in their order.

        From layer to layer as much comes to life or dies. So a forward pass has its peak at its
        end, a backward pass at one of its ends, and with more layers of the same kind each of
        these peaks is higher by as much for every layer. Of the highest among them that is not so.
        Half of a backward pass is half of its `mark`s, if there are any: what comes before and
        after the layers, a head's loss or an embedding's update, may have most of the operations.
        """
        starts = [start for start, _ in self._phases] + [self._now + 1]
        parts = []
        for (start, backward), end in zip(self._phases, starts[1:], strict=True):
            marks = self._marks[bisect_left(self._marks, start) : bisect_left(self._marks, end)]
            middle = marks[len(marks) // 2] if marks else (start + end) // 2
            parts += [(start, middle), (middle, end)] if backward else [(start, end)]
        times = [now for now, _ in self._history]
        found = []
        for start, end in parts:
            first = max(bisect_left(times, start) - 1, 0)  # what was alive as the part began
            moments = self._history[first : bisect_left(times, end)]
            found.append(self._alive(max(moments, key=lambda moment: moment[1])[0]))
        return found

    def _alive(self, now: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for block in self._blocks:
            if block.born <= now and (block.died is None or block.died >= now):
                found[block.kind] = found.get(block.kind, 0) + block.size_bytes
        return found

    # Operations.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._now += 1
        backward = _in_backward()
        if not self._phases or self._phases[-1][1] != backward:
            self._phases.append((self._now, backward))
        operator = _operator(func)
        if operator.is_free:
            return func(*args, **kwargs)
        tensors = tensors_in((*args, *kwargs.values()))
        if _is_meta(tensors, kwargs):
            return func(*args, **kwargs)
        if not self._any_dry(tensors) and not (operator.is_factory and _is_large(args)):
            out = func(*args, **kwargs)
        elif operator.is_mutable:
            out = self._mutate(func, operator, args, kwargs)
        else:
            out = self._make(func, operator, args, kwargs)
        results = tensors_in((out,))
        for tensor in results:
            self._track(tensor)
        self._count(operator, args, out, tensors, results)
        return out

    def _make(self, func: Any, operator: _Operator, args: tuple, kwargs: dict[str, Any]) -> Any:
        """New tensors of the shapes that `func` would make."""
        shapes = _remembered(_shapes_made, func, args, kwargs)
        if not isinstance(shapes, list):
            return self._empty(shapes)
        made = [self._empty(shape) for shape in shapes]
        return made if operator.returns_list else tuple(made)

    def _mutate(self, func: Any, operator: _Operator, args: tuple, kwargs: dict[str, Any]) -> Any:
        """An operation that writes into some of its arguments: at most their shapes change."""
        given = dict(zip(operator.names, args, strict=False)) | kwargs
        if operator.has_out:
            for name, shape in _remembered(_shapes_written, func, args, kwargs).items():
                if given[name].shape != shape.size:
                    given[name].resize_(shape.size).as_strided_(shape.size, shape.stride)
        for tensor in tensors_in([given.get(name) for name in operator.written]):
            self._stand_in(tensor)
        if operator.scratch_bytes:
            n_bytes = operator.scratch_bytes * args[1].numel()
            self._grow(n_bytes)
            self._grow(-n_bytes)
        made = [given[name] for name in operator.written[: operator.n_results]]
        return tuple(made) if len(made) > 1 else made[0] if made else None

    def _empty(self, shape: _Shape | None) -> Tensor | None:
        if shape is None:
            return None
        made = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype)
        self._stand_in(made)
        return made

    def _stand_in(self, tensor: Tensor) -> None:
        """Note that a tensor has no contents; where a program may read it, leave likely ones."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._dry:
            self._dry[key] = weakref.ref(storage, lambda _: self._dry.pop(key, None))
        if tensor.numel() <= _SMALL and tensor.device.type == "cpu":
            if tensor.is_floating_point():
                tensor.copy_(_likely(tensor.numel()).view(tensor.shape))
            else:
                tensor.fill_(tensor.dtype == torch.bool)

    def _any_dry(self, tensors: list[Tensor]) -> bool:
        return any([tensor.untyped_storage()._cdata in self._dry for tensor in tensors])

    # Memory.

    def _track(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._known.get(key)
        if block is None:
            kind = "workspace" if _in_backward() else "activations"
            block = _Block(storage.nbytes(), kind, self._now, storage.data_ptr())
            # Lent by a block of `heap.Shelf`, which counts; what has no bytes has the address 0.
            if block.place and block.place in self._places:
                block.size_bytes, block.place = 0, None
            else:
                self._places.add(block.place)
            self._known[key] = block
            self._blocks.append(block)
            # Storages keep their Python object, so this is called when the memory is freed.
            block.reference = weakref.ref(storage, lambda _: self._free(key))
            self._grow(block.size_bytes)
        elif block.place is not None and block.size_bytes != storage.nbytes():
            self._grow(storage.nbytes() - block.size_bytes)
            self._places.discard(block.place)
            self._places.add(storage.data_ptr())
            block.size_bytes, block.place = storage.nbytes(), storage.data_ptr()
        return block

    def _grow(self, n_bytes: int) -> None:
        self.live_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._history.append((self._now, self.live_bytes))

    def _free(self, key: int) -> None:
        block = self._known.pop(key)
        block.died = self._now
        self._places.discard(block.place)
        self.live_bytes -= block.size_bytes
        self._history.append((self._now, self.live_bytes))

    def _count(self, operator: _Operator, args: tuple, out: Any, read: list, written: list) -> None:
        moved_bytes = self._times * sum([t.nbytes for t in (*read, *written)])
        self.operations += self._times
        self.moved_bytes += moved_bytes
        if operator.flops and (flops := self._times * operator.flops(args, out)):
            self.flops += flops
            self.flops_by_dtype[read[0].dtype] = self.flops_by_dtype.get(read[0].dtype, 0) + flops
            self.product_bytes += moved_bytes


@cache
def _likely(n: int) -> Tensor:
    """So many values, distinct, finite, positive."""
    # In the dtype that is the default now they might not be distinct in another.
    return torch.linspace(1, 2, n, dtype=torch.float32)


def _is_meta(read: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether an operation takes no memory and no time in a real run either."""
    device = kwargs.get("device")
    return (device is not None and device.type == "meta") or any([t.is_meta for t in read])


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _Shape(NamedTuple):
    """All of a tensor but its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def meta(self) -> Tensor:
        return torch.empty_strided(*self[:2], dtype=self.dtype, device="meta")


# A network repeats itself: most operations were seen before, on operands of the same shapes.
_MEMORY: dict[Hashable, Any] = {}


def _remembered(find: Callable, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`find(func, args, kwargs)` for these shapes of operands."""
    named = tuple((name, _key(value)) for name, value in kwargs.items())
    key = (func, _key(args), named, torch.get_default_dtype())
    try:
        found = _MEMORY.get(key, _MEMORY)  # which stands for nothing, as None may be remembered
    except TypeError:  # an operand that has no hash
        key, found = None, _MEMORY
    if found is _MEMORY:
        found = find(func, *_map((args, kwargs), lambda t: _Shape.of(t).meta()))
        if key:
            _MEMORY[key] = found
    return found


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return type(value), value  # 1, 1.0 and True are equal, and make different tensors


def _map(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map(item, function) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, function) for item in value)
    return value


def _shapes_made(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if "device" in kwargs or not any(True for _ in tensors_in(args)):
        kwargs["device"] = torch.device("meta")
    kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    if isinstance(out, (list, tuple)):
        return [None if t is None else _Shape.of(t) for t in out]
    return _Shape.of(out)


def _shapes_written(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, _Shape]:
    """Of the `out` arguments, as they will be: a meta tensor that is resized would lose the order
    of its dimensions, so the variant that makes its result is asked."""
    names = [a.name for a in func._schema.arguments if a.is_out]
    others = {name: value for name, value in kwargs.items() if name not in names}
    made = func.overloadpacket(*args, **others)
    results = [made] if isinstance(made, Tensor) else made
    return {name: _Shape.of(t) for name, t in zip(names, results, strict=True)}


class _Operator(NamedTuple):
    """What an operator says of itself, found out once.

    Attributes:
        is_free: touches no element, or reads a stand-in's.
        is_mutable: writes into an argument.
        is_factory: makes a tensor of a size that it is told.
        names: of its arguments; `written`: of those that it writes into; `has_out`: one is an out.
        scratch_bytes: meanwhile, for each element of its second operand.
        flops: its formula (`tinyft.cost.formula_of`).
    """

    is_free: bool
    is_mutable: bool
    is_factory: bool
    names: tuple[str, ...]
    written: tuple[str, ...]
    has_out: bool
    n_results: int
    returns_list: bool
    scratch_bytes: int
    flops: Callable[[tuple, Any], int] | None


@cache
def _operator(func: Any) -> _Operator:
    schema, packet = func._schema, func.overloadpacket
    returns = [r.alias_info for r in schema.returns]
    is_view = torch.Tag.inplace_view in func.tags or packet in (
        aten._unsafe_view,
        aten.lift_fresh,
    )
    is_view = is_view or (not schema.is_mutable and bool(returns) and all(returns))
    return _Operator(
        is_free=is_view or packet is aten._local_scalar_dense,
        is_mutable=schema.is_mutable,
        is_factory=packet in _FACTORIES,
        names=tuple(a.name for a in schema.arguments),
        written=tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write),
        has_out=any(a.is_out for a in schema.arguments),
        n_results=len(schema.returns),
        returns_list=len(schema.returns) == 1 and "List" in str(schema.returns[0].type),
        scratch_bytes=_SCRATCH.get(func.name(), 0),
        flops=formula_of(func),
    )


_FACTORIES = {
    aten.empty,
    aten.empty_strided,
    aten.zeros,
    aten.ones,
    aten.full,
    aten.rand,
    aten.randn,
    aten.randint,
    aten.scalar_tensor,
    aten.eye,
    aten.linspace,
    aten.tril_indices,
    aten.new_empty,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.empty_like,
    aten.zeros_like,
    aten.new_empty_strided,
    aten.empty_permuted,
    aten.ones_like,
    aten.full_like,
}


def _is_large(args: tuple) -> bool:
    """Of a factory's arguments: whether it makes more than what is made for real."""
    size = args[1] if isinstance(args[0], Tensor) and len(args) > 1 else args[0]
    if isinstance(size, Tensor):
        return size.numel() > _LARGE
    n = 1
    for s in size if isinstance(size, (list, tuple)) else [1]:
        n *= s
    return n > _LARGE
