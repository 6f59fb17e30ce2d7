"""Limits of a run, in the units that people use.

Sizes: B, KB MB GB TB (powers of 1,000), KiB MiB GiB TiB (of 1,024); a bare K, M, G or T is of
1,024 too, as for Java and Docker. FLOPs: plain, or with K M G T P (of 1,000), and then with FLOP or
FLOPs or without. Times: s, min, h, d, also together (1h30min). Energies: J, kJ, Wh, kWh. Upper or
lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction

from tinyft.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Limits, each above 0; None is no limit.

    Attributes:
        memory_bytes: of the whole process; on a GPU, of its allocator.
        flops: of all training steps. Evaluations are not counted.
        time_s: from the run's begin to its end; loading, evaluations and saving are counted.
        energy_j: drawn by the processor in that time.

    Raises:
        InputError: naming every limit that is no number above 0.

    Example:
        >>> Budget.parse(memory="1.5GiB", time="1h30min")
        Budget(memory_bytes=1610612736, flops=None, time_s=5400.0, energy_j=None)
    """

    memory_bytes: int | None = None
    flops: float | None = None
    time_s: float | None = None
    energy_j: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that there are, by the name of their field."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def written(self) -> dict[str, str]:
        """The same as `parse` takes them, to the last digit."""
        units = {"memory_bytes": "B", "flops": "", "time_s": "s", "energy_j": "J"}
        return {
            name.partition("_")[0]: f"{value!r}{units[name]}" for name, value in self.limits.items()
        }

    def __post_init__(self) -> None:
        problems = [
            f"{f.name} must be a number above 0; found {value!r}"
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None and not _is_limit(value)
        ]
        if problems:
            raise InputError("; ".join(problems) + ".")

    @classmethod
    def parse(
        cls,
        memory: str | float | None = None,
        flops: str | float | None = None,
        time: str | float | None = None,
        energy: str | float | None = None,
        *,
        spell: Callable[[str], str] = str,
    ) -> Budget:
        """From what people write. A number is read as its digits: bytes, FLOPs.

        Args:
            spell: how errors name a limit, e.g. as a flag.

        Raises:
            InputError: naming every limit that cannot be read.
        """
        given = {"memory": memory, "flops": flops, "time": time, "energy": energy}
        found: dict[str, float | None] = {}
        problems = []
        for name, value in given.items():
            try:
                found[name] = None if value is None else _read(name, str(value).strip())
            except ValueError as error:
                problems.append(f"{spell(name)} {str(value).strip() or '(empty)'}: {error}")
        if problems:
            raise InputError("; ".join(problems) + ".")
        size = found["memory"]
        return cls(None if size is None else int(size), *(found[n] for n in list(given)[1:]))


_MOST = 1e300


def _is_limit(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value <= _MOST


_SIZES = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**k for k, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**k for k, p in enumerate("kmgt", 1)},
    **{p: 1024**k for k, p in enumerate("kmgt", 1)},
}
_FLOPS = {
    prefix + unit: 1000**k
    for k, prefix in enumerate(("", *"kmgtp"))
    for unit in ("", "flop", "flops")
}
_TIMES = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}
_ENERGIES = {"j": 1, "kj": 1000, "wh": 3600, "kwh": 3_600_000}
_UNITS = {"memory": _SIZES, "flops": _FLOPS, "time": _TIMES, "energy": _ENERGIES}
_SHOWN = {
    "memory": "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB (e.g. 1.5GiB)",
    "flops": "FLOPs, alone or after K, M, G, T or P (e.g. 2e15, 2PFLOPs)",
    "time": "s, min, h, d (e.g. 90s, 1h30min)",
    "energy": "J, kJ, Wh, kWh (e.g. 50Wh)",
}
# An exponent of more than three digits could be no limit, and would take forever to write out.
_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3}(?![\d.]))?\s*([a-z/]*)\s*", re.IGNORECASE)


def _read(name: str, text: str) -> float:
    """A limit in its base unit.

    Raises:
        ValueError: saying what is wrong with `text`.
    """
    if not text:
        raise ValueError(f"give a number and a unit: {_SHOWN[name]}")
    if text.startswith("-"):
        raise ValueError("must be above 0")
    parts, at = [], 0
    while at < len(text):
        match = _AMOUNT.match(text, at)
        if match is None:
            raise ValueError(f"is no amount; write a number and a unit: {_SHOWN[name]}")
        parts.append((Fraction(match[1] + (match[2] or "")), match[3].lower(), match[3]))
        at = match.end()
    if len(parts) > 1 and name != "time":
        raise ValueError(f"is more than one amount; write one number and a unit: {_SHOWN[name]}")
    total, before = Fraction(0), None
    for number, unit, written in parts:
        size = _UNITS[name].get(unit)
        if size is None and not unit:
            raise ValueError(f"needs a unit: {_SHOWN[name]}")
        if size is None and unit.endswith(("/s", "ps")):
            raise ValueError(f"{written} is a rate; the limit is on a total: {_SHOWN[name]}")
        if size is None:
            raise ValueError(f"{written} is no unit of {name}; there are {_SHOWN[name]}")
        if before is not None and size >= before:
            raise ValueError("name each unit once, the largest first (e.g. 1h30min)")
        total, before = total + number * size, size
    if total <= 0:
        raise ValueError("must be above 0")
    if name == "memory" and total < 1:
        raise ValueError("is less than a byte")
    if total > _MOST:
        raise ValueError("is too large to be a limit")
    value = int(total) if name == "memory" else float(total)
    if value == 0:  # too small for a float
        raise ValueError("must be above 0")
    return value
