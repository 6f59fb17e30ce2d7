"""Device profiles: what a target holds and how fast it is, read from the profiles.yaml beside it.

The head of the YAML file says what each figure means; every figure carries how it is known.
Loads neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tinyft.errors import InputError

BASES = ("documented", "measured", "derived", "assumed")
DTYPES = ("float32", "bfloat16", "float16", "int8")
RUNTIMES = ("pytorch", "onnxruntime", "onnxruntime-training")
_FILE = Path(__file__).with_name("profiles.yaml")
_RATES = "peak_flops_per_s"
_SHARES = ("utilisation", "assumed_utilisation")
_FIGURES = ("memory_bytes", "usable_memory_bytes", "memory_bandwidth_bytes_per_s", "power_w")
_KEYS = ("title", "kind", *_FIGURES, _RATES, *_SHARES, "runtimes")


@dataclass(frozen=True)
class Evidence:
    """How a figure is known.

    Attributes:
        basis: "documented", "measured", "derived" (computed, `note` has the formula) or "assumed".
        note: the formula, the reason of an assumption, or what the figure leaves out; may be "".
        sources: addresses; empty only for an assumption.
    """

    basis: str
    note: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class DeviceProfile:
    """A device to train on.

    Attributes:
        name: as `--target` takes it, `rtx-3060`.
        title: for people.
        kind: "cpu" or "gpu", what the rates are of.
        memory_bytes: all there is; on a board or a phone CPU and GPU share it.
        usable_memory_bytes: what one training process may take of it.
        peak_flops_per_s: of each dtype of `DTYPES` whose rate is known, float32 always; dense, a
            multiply-add counts two.
        memory_bandwidth_bytes_per_s: peak of the memory bus.
        power_w: see its evidence for what it is the power of.
        runtimes: of `RUNTIMES`, those published for the device.
        utilisation: share of the peak that large matrix products reach, from a source; or None.
        assumed_utilisation: the same, assumed, where `utilisation` is None.
        evidence: of each field above that is a figure; of the rates as `peak_flops_per_s.float32`.
    """

    name: str
    title: str
    kind: str
    memory_bytes: int
    usable_memory_bytes: int
    peak_flops_per_s: Mapping[str, float]
    memory_bandwidth_bytes_per_s: float
    power_w: float
    runtimes: tuple[str, ...]
    utilisation: float | None
    assumed_utilisation: float | None
    evidence: Mapping[str, Evidence]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        plain = {key: getattr(self, key) for key in self.__dataclass_fields__}
        return plain | {
            _RATES: dict(self.peak_flops_per_s),
            "runtimes": list(self.runtimes),
            "evidence": {
                key: {"basis": e.basis, "note": e.note, "sources": list(e.sources)}
                for key, e in self.evidence.items()
            },
        }


def profile(name: str) -> DeviceProfile:
    """The profile of that name.

    Example:
        >>> from tinyft.targets.profiles import profile
        >>> profile("raspberry-pi-5").memory_bytes
        8589934592

    Raises:
        InputError: there is none; it lists what is known.
    """
    known = load_profiles()
    if name in known:
        return known[name]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    close = difflib.get_close_matches(slug, known, n=1) or [k for k in known if slug and slug in k]
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise InputError(
        f"Unknown target {name!r}{meant}. Known: {', '.join(known)}. `tinyft targets` shows them."
    )


def load_profiles(path: Path | None = None) -> dict[str, DeviceProfile]:
    """All profiles by name, in the file's order; a fresh dict each time.

    Args:
        path: another file of the same form; ours if None.

    Raises:
        InputError: the file cannot be read, or profiles are not valid: all problems at once.
    """
    return dict(_load(_FILE if path is None else path))


@functools.cache
def _load(path: Path) -> Mapping[str, DeviceProfile]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path} must hold device profiles by name.")
    problems: list[str] = []
    found = {str(name): _Reader(str(name), entry, problems).read() for name, entry in data.items()}
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{path} has {count}:\n" + "\n".join(f"  {p}" for p in problems))
    return MappingProxyType({name: value for name, value in found.items() if value})


class _Reader:
    """Reads one profile and adds what is wrong with it to `problems`."""

    def __init__(self, name: str, entry: Any, problems: list[str]) -> None:
        self._name = name
        self._entry = entry
        self._problems = problems
        self._evidence: dict[str, Evidence] = {}

    def read(self) -> DeviceProfile | None:
        """The profile, or None if it has problems."""
        before = len(self._problems)
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self._name):
            self._wrong("the name must be lower-case words joined by hyphens")
        if not isinstance(self._entry, dict):
            self._wrong("must be a mapping")
            return None
        for key in sorted(self._entry.keys() - set(_KEYS), key=str):
            self._wrong(f"unknown key {key!r}")
        title, kind = self._entry.get("title"), self._entry.get("kind")
        if not isinstance(title, str) or not title:
            self._wrong("title must be a text")
        if kind not in ("cpu", "gpu"):
            self._wrong(f"kind must be cpu or gpu, not {kind!r}")
        values = {key: self._number(key, self._entry.get(key)) for key in _FIGURES}
        for key in ("memory_bytes", "usable_memory_bytes"):
            if isinstance(values[key], float):
                self._wrong(f"{key} must be a whole number")
        total, usable = values["memory_bytes"], values["usable_memory_bytes"]
        if total and usable and usable > total:
            self._wrong("usable_memory_bytes is above memory_bytes")
        rates, shares, runtimes = self._rates(), self._shares(), self._runtimes()
        if len(self._problems) > before:
            return None
        return DeviceProfile(
            name=self._name,
            title=title,
            kind=kind,
            **values,
            peak_flops_per_s=MappingProxyType(rates),
            runtimes=runtimes,
            **shares,
            evidence=MappingProxyType(self._evidence),
        )

    def _rates(self) -> dict[str, float]:
        rates = self._entry.get(_RATES)
        if not isinstance(rates, dict) or "float32" not in rates:
            self._wrong(f"{_RATES} must hold float32, and other dtypes where they are known")
            return {}
        for dtype in rates.keys() - set(DTYPES):
            self._wrong(f"{_RATES}.{dtype} is none of {', '.join(DTYPES)}")
        return {d: self._number(f"{_RATES}.{d}", rates[d]) for d in DTYPES if d in rates}

    def _shares(self) -> dict[str, float | None]:
        given = [key for key in _SHARES if key in self._entry]
        if len(given) != 1:
            self._wrong(f"needs exactly one of {' and '.join(_SHARES)}")
        shares = dict.fromkeys(_SHARES)
        for key in given:
            shares[key] = self._number(key, self._entry[key])
            if (shares[key] or 0) > 1:
                self._wrong(f"{key} must be at most 1")
            evidence = self._evidence.get(key)
            if evidence and (evidence.basis == "assumed") != (key == "assumed_utilisation"):
                self._wrong(f"{key} cannot be {evidence.basis}")
        return shares

    def _runtimes(self) -> tuple[str, ...]:
        value = self._value("runtimes", self._entry.get("runtimes"))
        if value is None:
            return ()
        if not isinstance(value, list) or not value or set(map(str, value)) - set(RUNTIMES):
            self._wrong(f"runtimes.value must be a list of {', '.join(RUNTIMES)}")
            return ()
        return tuple(value)

    def _number(self, key: str, figure: Any) -> Any:
        value = self._value(key, figure)
        if value is None:
            return None
        # A bool is an int to Python; 1e9 without a sign in the exponent is a text to YAML.
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            self._wrong(f"{key}.value must be a number above 0, not {value!r}")
            return None
        return value

    def _value(self, key: str, figure: Any) -> Any:
        """The value of a figure, whose evidence is kept."""
        if not isinstance(figure, dict) or figure.get("value") is None:
            self._wrong(f"{key} must have a value, its basis and its sources")
            return None
        for extra in sorted(figure.keys() - {"value", "basis", "note", "sources"}, key=str):
            self._wrong(f"{key} has the unknown key {extra!r}")
        basis, note = figure.get("basis"), figure.get("note", "")
        sources = figure.get("sources", [])
        if basis not in BASES:
            self._wrong(f"{key}.basis must be one of {', '.join(BASES)}, not {basis!r}")
        if basis in ("derived", "assumed") and not note:
            self._wrong(f"{key} is {basis}: its note must say how")
        if not isinstance(sources, list) or not all(
            isinstance(s, str) and re.fullmatch(r"https?://\S+", s) for s in sources
        ):
            self._wrong(f"{key}.sources must be a list of addresses")
        elif not sources and basis != "assumed":
            self._wrong(f"{key} needs a source")
        else:
            self._evidence[key] = Evidence(str(basis), str(note), tuple(sources))
        return figure["value"]

    def _wrong(self, text: str) -> None:
        self._problems.append(f"{self._name}: {text}")
