"""glibc's heap: memory that is free but still resident, and how little of it there can be.

A forward pass frees many tensors around the few that it keeps. What it keeps gets into the holes of
what it has freed, the next layer finds them too small, and goes on top: SmolLM2-135M at 8 x 128
tokens, float32, held 1.3 GB for 0.8 GB alive. On a `Shelf` the two do not mix; `HeapWatch` hands
back the holes that are left. Neither changes a value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyft.cost import DispatchMode
from tinyft.memory import resident_bytes, trim

SLACK_BYTES = 64 << 20


class HeapWatch:
    """Bounds the holes: `check` trims when memory goes `SLACK_BYTES` beyond what was ever in use.

    A page that is trimmed and used again costs a page fault (2 us in a virtual machine), so memory
    that an earlier moment needed anyway is let alone: what counts is the peak.
    """

    def __init__(self) -> None:
        self._ceiling = resident_bytes() + SLACK_BYTES
        self._limit = float("inf")

    def hold_below(self, limit_bytes: float) -> None:
        """From now on trim there, too: no limit on memory is to be broken by holes."""
        self._limit = limit_bytes

    def check(self, coming_bytes: int = 0) -> None:
        """`coming_bytes`: of what will be made next and fits no hole."""
        if resident_bytes() + coming_bytes > min(self._ceiling, self._limit):
            trim()
            now_bytes = resident_bytes()
            self._ceiling = max(self._ceiling, now_bytes + SLACK_BYTES)
            # What is in use may be above: then not at every look, but as soon as there are holes.
            self._limit = max(self._limit, now_bytes + SLACK_BYTES // 4)

    @contextmanager
    def before(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Meanwhile, `check` before each run of each of these modules."""
        hooks = [m.register_forward_pre_hook(lambda *_: self.check()) for m in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


aten = torch.ops.aten
_LARGE_BYTES = 1 << 16


class Shelf:
    """Blocks of memory for the results of a forward pass, each used again for results of its size.

    What the pass keeps fills new blocks, one after the other; what it needs for a moment takes the
    place of what the layer before needed. Once the shelf is closed, a block goes back to the heap
    when its tensor dies, and neighbours with it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._is_open = True

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, the result on the shelf if it is large and on the CPU."""
        if func in _WRITTEN:
            into, size_of = _WRITTEN[func]
            operands = list(args[0]) if func is aten.cat.default else args
            if (spare := self._spare(operands, size_of)) is not None:
                return into(*args, **kwargs, out=spare)
        return func(*args, **kwargs)

    def empty(self) -> None:
        """Give back what is free now."""
        for blocks in self._free.values():
            blocks.clear()

    def close(self) -> None:
        """Give back what is free now, and the rest as it becomes free."""
        self._is_open = False
        self.empty()

    def _spare(self, operands: Iterable[Any], size_of: Callable[..., int]) -> Tensor | None:
        """An empty tensor with room for the result; None if that is small, or of a dtype that is
        not plainly the operands'."""
        tensors = [t for t in operands if isinstance(t, Tensor)]
        dtype = tensors[0].dtype
        if any(t.dtype != dtype or t.device.type != "cpu" for t in tensors):
            return None
        n_bytes = size_of(*tensors) * dtype.itemsize
        if n_bytes < _LARGE_BYTES or not dtype.is_floating_point:
            return None
        return torch.frombuffer(self._lease(n_bytes), dtype=dtype).resize_(0)

    def _lease(self, n_bytes: int) -> np.ndarray:
        """A block, as an array whose death gives it back; a tensor on it keeps it alive."""
        free = self._free.setdefault(n_bytes, [])
        block = free.pop() if free else torch.empty(n_bytes, dtype=torch.uint8).numpy()
        lease = block.view()
        weakref.finalize(lease, self._give_back, block).atexit = False
        return lease

    def _give_back(self, block: np.ndarray) -> None:
        if self._is_open:
            self._free[len(block)].append(block)


def _of_product(*operands: Tensor) -> int:
    left, right = operands[-2:]
    return left.shape[0] * right.shape[1]


def _of_elements(*operands: Tensor) -> int:
    shapes = {t.shape for t in operands}
    return prod(torch.broadcast_shapes(*shapes) if len(shapes) > 1 else shapes.pop())


def _of_all(*operands: Tensor) -> int:
    return sum(t.numel() for t in operands)


# The variant that writes where it is told, and how many numbers.
_WRITTEN: dict[Any, tuple[Any, Callable[..., int]]] = {
    aten.mm.default: (aten.mm.out, _of_product),
    aten.addmm.default: (aten.addmm.out, _of_product),
    aten.add.Tensor: (aten.add.out, _of_elements),
    aten.mul.Tensor: (aten.mul.out, _of_elements),
    aten.silu.default: (aten.silu.out, _of_elements),
    aten.gelu.default: (aten.gelu.out, _of_elements),
    aten.neg.default: (aten.neg.out, _of_elements),
    aten.cat.default: (aten.cat.out, _of_all),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, _of_elements),
}


class Shelved(DispatchMode):
    """While active, results lie on a shelf."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self._shelf = shelf

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._shelf.run(func, args, kwargs or {})
