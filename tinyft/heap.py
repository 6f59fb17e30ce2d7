"""glibc's heap: memory that is free but still resident, handed back before it adds up.

A forward pass frees many tensors around the few that it keeps. glibc keeps those holes resident,
and since tensors differ in size many are never used again: 0.5 GB of 0.65 GB beyond the weights of
SmolLM2-135M at 8 x 128 tokens with whole blocks checkpointed. Trimming gives the pages back and
leaves the addresses; a page that is used again costs a page fault.
"""

from __future__ import annotations

from tinyft.memory import resident_bytes, trim

SLACK_BYTES = 96 << 20


class HeapWatch:
    """Bounds the growth of holes: `check` trims each time `SLACK_BYTES` more became resident.

    Trimming at growth, rather than always, keeps page faults few (mapping every tensor on its own
    would bound the holes too, and doubled a step's processor time).
    """

    def __init__(self) -> None:
        self._floor = resident_bytes()

    def check(self) -> None:
        if resident_bytes() > self._floor + SLACK_BYTES:
            self.trim()

    def trim(self) -> None:
        trim()
        self._floor = resident_bytes()
