"""Which implementation of an operation runs, and how Triton's kernels are launched.

An operation takes `impl="auto" | "torch" | "triton"`. "auto" takes Triton for tensors on a GPU
where Triton is installed and torch otherwise; the choice and its reason are logged when they
change, and kept in `ran`. Asking for an implementation that cannot run is an error, never a silent
change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

log = logging.getLogger("tinyft.kernels")
ran: dict[str, str] = {}  # operation -> what ran last, and why
_recorded: list[tuple[Any, tuple, dict]] | None = None


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def _triton_is_old() -> bool:
    """Whether what the kernels use is missing; imports Triton, so it is asked last."""
    import triton

    return not hasattr(triton, "knobs")


def choose(
    op: str, impl: str, *tensors: Tensor | None, forward_only: bool = False, obstacle: str = ""
) -> str:
    """`"torch"` or `"triton"` for this call of `op`.

    Args:
        op: the operation's name, for the log.
        impl: `"auto"`, `"torch"` or `"triton"`.
        tensors: those that the operation gets; None is skipped.
        forward_only: the Triton kernel has no backward pass.
        obstacle: why the Triton kernel cannot take these arguments, if so.

    Raises:
        ValueError: another `impl`, or `"triton"` where it cannot run.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is 'auto', 'torch' or 'triton'; found {impl!r}.")
    obstacle = _obstacle([t for t in tensors if t is not None], impl, forward_only) or obstacle
    if impl == "triton" and obstacle:
        raise ValueError(f"{op} cannot run in Triton: {obstacle}. Use impl='auto' or 'torch'.")
    chosen = "torch" if obstacle or impl == "torch" else "triton"
    said = f"{chosen} ({'asked for' if impl != 'auto' else obstacle or 'tensors on a GPU'})"
    if ran.get(op) != said:
        ran[op] = said
        log.info("%s runs in %s", op, said)
    return chosen


def said() -> str:
    """What ran last of each operation, and why, in a line; empty if none did."""
    return "; ".join(f"{op} in {what}" for op, what in sorted(ran.items()))


def _obstacle(tensors: list[Tensor], impl: str, forward_only: bool) -> str:
    """Why Triton cannot run, or an empty string."""
    if not has_triton():
        return "Triton is not installed"
    # Triton's interpreter runs on the CPU; it is for tests, and only for those who ask.
    interpreted = impl == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not all(t.is_cuda for t in tensors):
        return "tensors on the CPU"
    if _triton_is_old():
        return "this Triton is older than 3.4"
    modes = _get_current_dispatch_mode_stack()
    # One would neither see nor stop a kernel, and must say that it need not.
    if not all(getattr(mode, "passes_kernels", False) for mode in modes):
        return "operations are being traced"
    if any(t.dtype == torch.float64 for t in tensors):
        return "no kernel for float64"
    if forward_only and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient is wanted and the kernel has no backward pass"
    return ""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)` on the device of the first tensor."""
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


@contextmanager
def recording() -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Launches within the context are listed as (kernel, args, options) and not run."""
    global _recorded
    _recorded = found = []
    try:
        yield found
    finally:
        _recorded = None


def signed(word: int) -> int:
    """A 32-bit word as int32, which Triton passes as such whatever its value."""
    return (word & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)
