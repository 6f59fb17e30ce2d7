"""Holds a run to its budget: when it must end, and what it has used.

FLOPs are those of training steps, as report.json counts them; evaluations and memory probes are not
counted. Another step is taken if the largest so far fits into what is left, so that only a step
dearer than all before it goes beyond the limit; what some steps begin with (`Optimizer.renew`) is
set aside for those alone. Time and energy are counted from the begin to the
end of every process of the run, and what the end takes (the last evaluation, saving) is set aside.
What a killed process did after its last checkpoint is not counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from tinyft.budget import Budget
from tinyft.errors import InputError

_FINISH_S = 2.0  # plot and report, and the first import of what draws
_WRITING_BYTES_PER_S = 100e6  # of a slow disk, until a checkpoint has been timed
_POWERCAP = Path("/sys/class/powercap")


class Guard:
    """The limits that end a run, and what has been used of them. Its clock starts when it is made.

    Args:
        budget: the limits.

    Raises:
        InputError: a limit on energy where none can be measured.

    Attributes:
        evaluation_s: of the longest evaluation so far; 0 without any.
        saving_bytes: what the end will write.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.evaluation_s, self.saving_bytes = 0.0, 0
        self._bytes_per_s = _WRITING_BYTES_PER_S
        self._flops = self._largest_flops = self._largest_renewal_flops = 0
        self._began, self._before_s, self._before_j = monotonic(), 0.0, 0.0
        self._energy = EnergyMeter() if budget.energy_j else EnergyMeter.where_readable()
        # (seconds, joules) of the latest steps: the longest of them stands for the next.
        self._recent: deque[tuple[float, float]] = deque(maxlen=8)

    def go_on(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add what earlier processes used: the lines of metrics.jsonl about steps."""
        known = [line for line in lines if line["seconds"] is not None]
        for line in known:
            self.count(line["flops"], line.get("renewal_flops", 0))
        if known:
            self._before_s = known[-1].get("elapsed_s", known[-1]["wall_s"])
            self._before_j = known[-1].get("energy_j", 0.0)

    def used(self) -> dict[str, float]:
        """`elapsed_s` and, where it can be read, `energy_j`, of all processes of the run."""
        found = {"elapsed_s": self._before_s + monotonic() - self._began}
        if self._energy:
            found["energy_j"] = self._before_j + self._energy.joules()
        return found

    @property
    def finish_s(self) -> float:
        """What the end will take, as far as it is known."""
        return self.evaluation_s + self.saving_bytes / self._bytes_per_s + _FINISH_S

    @property
    def flops_share(self) -> float:
        """Used of the limit on FLOPs; 0 without one."""
        return self._flops / self.budget.flops if self.budget.flops else 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step, all that belongs to it included."""
        before = self.used()
        yield
        after = self.used()
        spent = [after[name] - before[name] for name in after]
        self._recent.append((spent[0], spent[1] if len(spent) > 1 else 0.0))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation."""
        began = monotonic()
        yield
        self.evaluation_s = max(self.evaluation_s, monotonic() - began)

    def count(self, flops: int, renewal_flops: int = 0) -> None:
        """FLOPs of all steps so far, after each of them, and what of the last one was a renewal."""
        step_flops = flops - self._flops - renewal_flops
        self._largest_flops = max(self._largest_flops, step_flops)
        self._largest_renewal_flops = max(self._largest_renewal_flops, renewal_flops)
        self._flops = flops

    def wrote(self, n_bytes: int, seconds: float) -> None:
        """How long a checkpoint took."""
        if n_bytes and seconds > 0:
            self._bytes_per_s = n_bytes / seconds

    def over(self, *, evaluation_first: bool = False, renews: bool = False) -> str | None:
        """The limit that another step would break, by the name of its field in `TrainConfig`.

        Args:
            evaluation_first: another one is due before that step.
            renews: the step begins with a renewal.
        """
        budget, used = self.budget, self.used()
        step_s = max((seconds for seconds, _ in self._recent), default=0.0)
        step_j = max((joules for _, joules in self._recent), default=0.0)
        rest_s = self.finish_s + (self.evaluation_s if evaluation_first else 0.0)
        flops = self._flops + self._largest_flops + renews * self._largest_renewal_flops
        if budget.flops is not None and flops > budget.flops:
            return "flops"
        if budget.time_s is not None and used["elapsed_s"] + step_s + rest_s > budget.time_s:
            return "time"
        if budget.energy_j is not None:
            power_w = used["energy_j"] / max(used["elapsed_s"], 1e-9)
            if used["energy_j"] + step_j + rest_s * power_w > budget.energy_j:
                return "energy"
        return None


class EnergyMeter:
    """What the processor packages have drawn since this was made, by their own counters (RAPL).

    They count all that runs on the machine, and no GPU. Ask at least every few minutes: counters
    wrap around.

    Raises:
        InputError: there are none, or they may not be read.
    """

    def __init__(self, root: Path = _POWERCAP) -> None:
        # intel-rapl:0 is a package (of AMD's, too), intel-rapl:0:0 a part of it; intel-rapl:1 is
        # another package or, of laptops, the whole machine ("psys"), packages included.
        self._zones = [
            zone.parent
            for zone in sorted(root.glob("intel-rapl:*/name"))
            if zone.read_text().startswith("package")
        ]
        if not self._zones:
            raise InputError(
                "A limit on energy needs counters of what the processor draws (RAPL), and this "
                f"machine shows none in {root}. Limit the time instead (--time)."
            )
        try:
            self._ranges = [self._read(zone, "max_energy_range_uj") for zone in self._zones]
            self._last = [self._read(zone, "energy_uj") for zone in self._zones]
        except OSError as error:
            raise InputError(
                f"A limit on energy needs to read {error.filename}: {error.strerror}. Let this "
                f"user read it (chmod a+r, as root), or limit the time instead (--time)."
            ) from error
        self._joules = 0.0

    @classmethod
    def where_readable(cls) -> EnergyMeter | None:
        """None where nothing is counted."""
        try:
            return cls()
        except InputError:
            return None

    def joules(self) -> float:
        now = [self._read(zone, "energy_uj") for zone in self._zones]
        for before, after, span in zip(self._last, now, self._ranges, strict=True):
            self._joules += ((after - before) % (span + 1)) / 1e6
        self._last = now
        return self._joules

    @staticmethod
    def _read(zone: Path, name: str) -> int:
        return int((zone / name).read_text())


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU (the wording differs by system) or
    on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "not enough memory" in text
    )
