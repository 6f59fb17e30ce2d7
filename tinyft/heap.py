"""glibc's heap: memory that is free but still resident, and how little of it there can be.

A forward pass frees many tensors around the few that it keeps. glibc before 2.38 cannot put an
aligned tensor into the hole that one of its own size left: it asks for the alignment on top. So
holes stayed, and new layers went on top: SmolLM2-135M at 8 x 128 tokens, float32, held 1.3 GB for
0.8 GB alive. `Roomy` makes most of them fit; `HeapWatch` hands back what is left. Neither changes
a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinyft.memory import resident_bytes, trim

SLACK_BYTES = 32 << 20


class HeapWatch:
    """Bounds the holes: `check` trims when memory goes `SLACK_BYTES` beyond what was ever in use.

    A page that is trimmed and used again costs a page fault (2 us in a virtual machine), so memory
    that an earlier moment needed anyway is let alone: what counts is the peak.
    """

    def __init__(self) -> None:
        self._ceiling = resident_bytes() + SLACK_BYTES

    def check(self, coming_bytes: int = 0) -> None:
        """`coming_bytes`: of what will be made next and fits no hole."""
        if resident_bytes() + coming_bytes > self._ceiling:
            trim()
            self._ceiling = max(self._ceiling, resident_bytes() + SLACK_BYTES)

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
# Bytes asked for beyond a result's size, and the variant that writes where it is told. What is
# often kept (products, sums) fits the hole of what seldom is; a backward pass, which asks for
# nothing extra, fits both. glibc needs 88 bytes of difference.
_KEPT, _PASSING = 128, 256
_ROOM: dict[Any, tuple[Any, int]] = {
    aten.mm.default: (aten.mm.out, _KEPT),
    aten.addmm.default: (aten.addmm.out, _KEPT),
    aten.add.Tensor: (aten.add.out, _KEPT),
    aten.mul.Tensor: (aten.mul.out, _PASSING),
    aten.silu.default: (aten.silu.out, _PASSING),
    aten.gelu.default: (aten.gelu.out, _PASSING),
    aten.neg.default: (aten.neg.out, _PASSING),
    aten.cat.default: (aten.cat.out, _PASSING),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, _PASSING),
}
_LARGE_BYTES = 1 << 16


class Roomy(TorchDispatchMode):
    """While active, large results on the CPU are allocated a little longer than they are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ROOM:
            into, extra_bytes = _ROOM[func]
            if (spare := _spare(func, args, extra_bytes)) is not None:
                return into(*args, **kwargs, out=spare)
        return func(*args, **kwargs)


def _spare(func: Any, args: tuple, extra_bytes: int) -> Tensor | None:
    """An empty tensor with room for the result; None if that is small, or of mixed dtypes."""
    if func is aten.cat.default:
        operands = list(args[0])
        size = sum(t.numel() for t in operands)
    else:
        operands = [t for t in args if isinstance(t, Tensor)]
        if func in (aten.mm.default, aten.addmm.default):
            left, right = operands[-2:]
            size = left.shape[0] * right.shape[1]
        else:  # a broadcast of both to more than either is found too small, and grows
            size = max(t.numel() for t in operands)
    dtype, device = operands[0].dtype, operands[0].device
    if size * dtype.itemsize < _LARGE_BYTES or device.type != "cpu":
        return None
    if any(t.dtype != dtype for t in operands):
        return None
    return torch.empty(size + extra_bytes // dtype.itemsize, dtype=dtype).resize_(0)
