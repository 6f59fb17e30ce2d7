"""Work in Python that a second core can share, or that is to leave nothing behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any, TypeVar

T, R = TypeVar("T"), TypeVar("R")
_current: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def in_parallel(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`[function(item) for item in items]`, in as many processes as there are cores.

    They are forked, so that neither `function` nor an item is copied or need be picklable; only
    results and errors come back as pickles. So this is for a process without threads of its own:
    a lock that another thread holds at that moment stays locked in a forked process for ever.
    Elsewhere than on Linux, where forking is not safe or not possible, one after the other.
    """
    n = min(len(items), os.cpu_count() or 1)
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
    try:
        with get_context("fork").Pool(n, _prepare) as pool:
            return pool.map(_call, range(len(items)), chunksize=1)
    finally:
        _current = None


def _prepare() -> None:
    """Signals end a worker without a word: its parent has its own. And it has none of its parent's
    OpenMP threads, which it would wait for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _call(index: int) -> Any:
    assert _current is not None
    function, items = _current
    return function(items[index])
