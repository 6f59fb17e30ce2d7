"""glibc's heap: memory that is free but still resident, handed back before it adds up.

A forward pass frees many tensors around the few that it keeps. glibc keeps those holes resident,
and since tensors differ in size many are never used again: 0.5 GB of 0.65 GB beyond the weights of
SmolLM2-135M at 8 x 128 tokens with whole blocks checkpointed. `malloc_trim` gives the pages back
and leaves the addresses; a page that is used again costs a page fault.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

SLACK_BYTES = 32 << 20


class HeapWatch:
    """Bounds the growth of holes: `check` trims each time `SLACK_BYTES` more became resident.

    Trimming at growth, rather than always, keeps page faults few (mapping every tensor on its own
    would bound the holes too, and doubled a step's processor time).
    """

    def __init__(self) -> None:
        self._floor = resident_bytes()

    def check(self) -> None:
        if _malloc_trim() and resident_bytes() > self._floor + SLACK_BYTES:
            trim()
            self._floor = resident_bytes()


def trim() -> None:
    """Hand every free page of the heap back to the system; does nothing without glibc."""
    if function := _malloc_trim():
        function(0)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
