"""Memory as the operating system counts it: resident bytes now, and their peak by phase.

On Linux the peak is `VmHWM`, the kernel's own high-water mark, which a write of `5` to
`/proc/self/clear_refs` sets back to what is resident now. On a CUDA device it is the allocator's.
Where neither exists, resident memory is sampled at every step, and `PeakMeter.source` says so.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CLEAR_REFS, _MAPS = Path("/proc/self/clear_refs"), Path("/proc/self/maps")
_MADV_DONTNEED = 4  # mman.h


def _status_bytes(field: str) -> int:
    """A line of `/proc/self/status`, which counts in KiB, as bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        return _status_bytes("VmRSS")
    except OSError:
        import psutil

        return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """That part of it which is no file's: what this process has written itself, and not the pages
    of programs, which come as they are run."""
    try:
        return _status_bytes("RssAnon")
    except OSError:
        return resident_bytes()


def trim() -> None:
    """Give freed heap pages back to the system, so that the next phase's peak is its own."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc: the allocator keeps its pages, and the peaks err upwards


def forget_mapped(address: int, n_bytes: int) -> None:
    """Let the system have the pages of a part of a mapped file that nobody will read again.

    A weight that took another place in memory is read no more, but its file stays mapped, and
    resident, as long as other weights are in it. Memory that is no file's is let alone.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-address // page) * page, (address + n_bytes) // page * page
    try:
        for line in _MAPS.read_text().splitlines():
            where, modes, _, _, inode, *_ = line.split()
            first, last = (int(part, 16) for part in where.split("-"))
            if first <= start < end <= last and inode != "0" and modes.endswith("p"):
                size = ctypes.c_size_t(end - start)
                ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(start), size, _MADV_DONTNEED)
    except (OSError, AttributeError):
        pass  # not Linux: the pages stay, and count


def reuse_heap() -> None:
    """Let glibc keep what is freed for the next allocation, for the whole process.

    By default it maps every larger tensor anew: 76,000 page faults a forward pass of SmolLM2-135M
    (8 x 48, float32), a tenth of its time. What is kept is bounded by what one step frees
    (`heap.py`).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
    except (OSError, AttributeError):
        pass  # not glibc


def bound_compiled_products() -> None:
    """Let oneDNN keep 64 compiled products, and torch's layer above it the last one alone.

    There is one for every shape of a product of 16-bit numbers, some 0.3 MB each, and both layers
    kept 1,024 of them: LoRA on all layers of SmolLM2-135M, bfloat16, held 0.5 GB of them after
    batches of sixty lengths. Works before the first product runs, and unless the variables say
    otherwise; one that is compiled again takes half a millisecond.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")


class PeakMeter:
    """Peaks of memory, kept apart by phase ("train", "eval").

    Args:
        device: `"cpu"` or a CUDA device; decides whose memory is counted.

    Attributes:
        source: where the numbers come from: `"VmHWM"`, `"CUDA allocator"` or `"sampled RSS"`.
        peaks: `{phase: bytes}`, each absolute (the model's own weights included).
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        self._phase = ""
        if device.startswith("cuda"):
            self.source = "CUDA allocator"
        else:
            self.source = "VmHWM" if _can_reset() else "sampled RSS"

    def now_bytes(self) -> int:
        """Bytes held now; also a sample of the peak where the system keeps none."""
        if self.source == "CUDA allocator":
            import torch

            return int(torch.cuda.memory_allocated(self.device))
        now = resident_bytes()
        if self.source == "sampled RSS":
            self._record(now)
        return now

    def peak_bytes(self, phase: str = "train") -> int:
        """The peak of a phase so far."""
        if phase == self._phase:
            self._record(self._high_water_bytes())
        return self.peaks.get(phase, 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards `name`; phases nest, the inner one alone counts."""
        outer = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap_bytes(self) -> int:
        """The present phase's peak since it began, or since this was last called."""
        high_water_bytes = self._high_water_bytes()
        self._record(high_water_bytes)
        self._reset()
        return high_water_bytes

    def _switch(self, name: str) -> None:
        self._record(self._high_water_bytes())
        trim()
        self._reset()
        self._phase = name

    def _reset(self) -> None:
        if self.source == "VmHWM":
            _CLEAR_REFS.write_text("5")
        elif self.source == "CUDA allocator":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)

    def _high_water_bytes(self) -> int:
        if self.source == "VmHWM":
            return _status_bytes("VmHWM")
        if self.source == "CUDA allocator":
            import torch

            return int(torch.cuda.max_memory_allocated(self.device))
        return resident_bytes()

    def _record(self, high_water_bytes: int) -> None:
        if self._phase:
            self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), high_water_bytes)


def _can_reset() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
        _status_bytes("VmHWM")
    except OSError:
        return False
    return True


def human(n_bytes: float) -> str:
    """`1503238553` -> `"1.4 GiB"`."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
