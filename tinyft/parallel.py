"""Work in Python that a second core can share, or that is to leave nothing behind."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from tinyft.errors import BudgetError

T, R = TypeVar("T"), TypeVar("R")
_PR_SET_PDEATHSIG = 1
_current: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


class Killed(BudgetError):
    """The system ended a process that shared the work."""


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]`, in as many processes as this one may use cores.

    They are forked, so that neither `function` nor an item is copied or need be picklable; only
    results and errors come back as pickles. So this is for a process without threads of its own:
    a lock that another thread holds at that moment stays locked in a forked process for ever.
    Elsewhere than on Linux, where forking is not safe or not possible, one after the other.

    Raises:
        Killed: one of them was.
    """
    n = min(len(items), len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1
    return _forked(function, items, n) if n > 1 else [function(item) for item in items]


def apart(function: Callable[[], R]) -> R:
    """`function()` in a process of its own, forked as for `in_parallel`: its memory does not grow
    into what earlier work left here, and nothing of it stays."""
    return _forked(lambda _: function(), [None], 1)[0]


def _forked(function: Callable[[T], R], items: Sequence[T], n: int) -> list[R]:
    global _current
    if sys.platform != "linux":
        return [function(item) for item in items]
    _current = function, items
    # Said beforehand, a tokenizer's library does not warn of the fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.freeze()  # what is here already the workers' collections need not look through
    try:
        with ProcessPoolExecutor(n, get_context("fork"), _prepare) as pool:
            return list(pool.map(_call, range(len(items))))
    except BrokenProcessPool:
        raise Killed(
            f"One of {n} processes that shared the work was killed, as happens where memory is "
            f"short: free some, or share among fewer (`taskset -c 0 tinyft ...` takes one core)."
        ) from None
    finally:
        gc.unfreeze()
        _current = None


def _prepare() -> None:
    """Signals end a worker without a word: its parent has its own, and a worker ends with it. And
    it has none of its parent's OpenMP threads, which it would wait for."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _call(index: int) -> Any:
    assert _current is not None
    function, items = _current
    return function(items[index])
