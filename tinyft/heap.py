"""glibc's heap: memory that is free but still resident, handed back before it adds up.

A forward pass frees many tensors around the few things that it keeps. glibc keeps those holes
resident, and does not fill them well (before 2.38 no aligned tensor fits the hole that one of its
own size left): 0.5 GB of 0.65 GB beyond the weights of SmolLM2-135M at 8 x 128 tokens with whole
blocks checkpointed. Trimming gives the pages back and leaves the addresses.
"""

from __future__ import annotations

from tinyft.memory import resident_bytes, trim

SLACK_BYTES = 224 << 20


class HeapWatch:
    """Bounds the holes: `check` trims when memory goes `SLACK_BYTES` beyond what was ever in use.

    A page that is trimmed and used again costs a page fault (2 us in a virtual machine), so memory
    that an earlier moment needed anyway is let alone: what counts is the peak.
    """

    def __init__(self) -> None:
        self._ceiling = resident_bytes() + SLACK_BYTES

    def check(self) -> None:
        if resident_bytes() > self._ceiling:
            trim()
            self._ceiling = max(self._ceiling, resident_bytes() + SLACK_BYTES)
