"""What `tinyft targets` prints of the profiles: a table, their sources, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tinyft.memory import human
from tinyft.targets.profiles import DeviceProfile

_MARKS = {"derived": "*", "assumed": "?"}
_LEGEND = "* derived, ? assumed: how, and all sources, with --sources or --json."


def show(profiles: Sequence[DeviceProfile], *, sources: bool = False) -> None:
    """Print a table of profiles, and on request how each figure is known."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    # 78 columns: the narrow terminal that everybody has.
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), leading=1
    )
    for title in ("target, runtimes", "memory", "peak FLOP/s", "bandwidth", "power"):
        table.add_column(title, no_wrap=True)
    for profile in profiles:
        table.add_row(*_cells(profile))
    console.print(table)
    console.print(f"\n{_LEGEND}", soft_wrap=True)
    for profile in profiles if sources else ():
        console.print(f"\n{profile.name}: {profile.title}", soft_wrap=True)
        for key, evidence in profile.evidence.items():
            note = f": {evidence.note}" if evidence.note else ""
            value = _value(profile, key)
            console.print(f"  {key} {value}, {evidence.basis}{note}", soft_wrap=True)
            for source in evidence.sources:
                console.print(f"    {source}", soft_wrap=True)


def as_json(profiles: Sequence[DeviceProfile]) -> str:
    """Profiles by name, with everything that is known of each figure."""
    return json.dumps({profile.name: profile.as_dict() for profile in profiles}, indent=2)


def _cells(profile: DeviceProfile) -> list[str]:
    def marked(text: str, key: str) -> str:
        return text + _MARKS.get(profile.evidence[key].basis, "")

    bandwidth = f"{_si(profile.memory_bandwidth_bytes_per_s)}B/s"
    rates = [
        marked(f"{dtype:<8} {_si(rate)}", f"peak_flops_per_s.{dtype}")
        for dtype, rate in profile.peak_flops_per_s.items()
    ]
    memory = [
        marked(human(profile.memory_bytes), "memory_bytes"),
        marked(human(profile.usable_memory_bytes), "usable_memory_bytes") + " usable",
    ]
    return [
        "\n  ".join([profile.name, *profile.runtimes]),
        "\n".join(memory),
        "\n".join(rates),
        marked(bandwidth, "memory_bandwidth_bytes_per_s"),
        marked(f"{profile.power_w:g} W", "power_w"),
    ]


def _value(profile: DeviceProfile, key: str) -> str:
    """Of a key of the evidence, with all digits."""
    field, _, dtype = key.partition(".")
    value = getattr(profile, field)
    if dtype:
        value = value[dtype]
    return ", ".join(value) if isinstance(value, tuple) else f"{value:,}"


def _si(rate: float) -> str:
    """`153.6e9` -> `"154 G"`."""
    unit, size = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
    return f"{rate / size:.3g} {unit}"
