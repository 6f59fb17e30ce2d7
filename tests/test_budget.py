"""Limits as people write them. The oracle is arithmetic written out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from tinyft.budget import Budget
from tinyft.errors import InputError

KIB, MIB, GIB, TIB = 1024, 1_048_576, 1_073_741_824, 1_099_511_627_776


def test_what_is_written_is_read_again():
    budget = Budget(9_007_199_254_740_993, 1e16 / 3, 1e-5, 1.1e300 / 3)
    assert Budget.parse(**budget.written) == budget
    assert Budget(time_s=90.0).written == {"time": "90.0s"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("1", 1), ("1500000000", 1_500_000_000), ("1B", 1), ("7 b", 7)),
        *(("2KB", 2_000), ("3MB", 3_000_000), ("4GB", 4_000_000_000), ("1TB", 10**12)),
        *(("2KiB", 2 * KIB), ("3MiB", 3 * MIB), ("4GiB", 4 * GIB), ("1TiB", TIB)),
        *(("2K", 2 * KIB), ("512M", 512 * MIB), ("4G", 4 * GIB), ("1T", TIB)),
        *(("1.5GiB", 1_610_612_736), ("1.5 gib", 1_610_612_736), (" 1.5GIB ", 1_610_612_736)),
        *(("0.1GB", 100_000_000), (".5K", 512), ("2.K", 2 * KIB), ("1e9", 10**9)),
        *(("1e3MB", 10**9), ("1.1B", 1), ("0.3KB", 300), ("2E-1 MB", 200_000)),
        *(("9007199254740993B", 9_007_199_254_740_993), (1 << 30, GIB), (1e9, 10**9)),
    ],
)
def test_memory(text, expected):
    found = Budget.parse(memory=text)
    assert found == Budget(memory_bytes=expected) and type(found.memory_bytes) is int


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("2e15", 2e15), ("2E+15", 2e15), ("1000", 1e3), (2e15, 2e15), (7, 7.0)),
        *(("1.5TFLOP", 1.5e12), ("1.5 TFLOPs", 1.5e12), ("1.5 tflops", 1.5e12)),
        *(("3GFLOP", 3e9), ("2 PFLOPs", 2e15), ("1PFLOP", 1e15), ("5 MFLOPs", 5e6)),
        *(("9 kflops", 9e3), ("4 FLOPs", 4.0), ("2P", 2e15), ("0.3T", 3e11), ("8 flop", 8.0)),
    ],
)
def test_flops(text, expected):
    assert Budget.parse(flops=text) == Budget(flops=expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("90s", 90), ("30min", 1800), ("2h", 7200), ("1d", 86400), ("0.1s", 0.1)),
        *(("1h30min", 5400), ("1 h 30 min", 5400), ("1H30M", 5400), ("1d2h3min4s", 93784)),
        *(("1.5h", 5400), ("30 minutes", 1800), ("1 hour", 3600), ("2 days", 172800)),
        *(("45 sec", 45), ("1 minute 1 second", 61), ("1h 0.5s", 3600.5), ("1e3s", 1000)),
    ],
)
def test_time(text, expected):
    assert Budget.parse(time=text) == Budget(time_s=expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("50Wh", 180_000), ("50 wh", 180_000), ("1kWh", 3_600_000), ("0.1 KWH", 360_000)),
        *(("5J", 5), ("1.5kJ", 1500), ("2e3 j", 2000)),
    ],
)
def test_energy(text, expected):
    assert Budget.parse(energy=text) == Budget(energy_j=expected)


NAMES = ("memory", "flops", "time", "energy")
NONSENSE = (
    *("0", "0s", "0.0GiB", "-1GiB", "-1", "-0", "12 parsecs", "nan", "inf", "-inf", "", "  "),
    *("GiB", "1,5", "1_000", "1..5", "1.2.3", "0x10", "1e", "1e9999", "1e400", "--1", "+1", "½"),
    *("1 2", "1 GiB 2 MiB", "1e-400", "e5", ".", "none of it", "1\x00", "1e5e5", "1e999999999"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_one_clear_error(name, text):
    with pytest.raises(InputError) as caught:
        Budget.parse(**{name: text})
    found = str(caught.value)
    assert found.startswith(f"{name} ") and found.endswith(".") and found.count(name) <= 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"memory": "12 parsecs"}, "memory 12 parsecs: parsecs is no unit of memory; there are B,"),
        ({"memory": "1h"}, "h is no unit of memory"),
        ({"memory": "0.5B"}, "memory 0.5B: is less than a byte"),
        ({"memory": ""}, "memory (empty): give a number and a unit: B, KB"),
        ({"memory": "-1GiB"}, "memory -1GiB: must be above 0"),
        ({"flops": "5 TFLOP/s"}, "TFLOP/s is a rate; the limit is on a total"),
        ({"flops": "1e999"}, "flops 1e999: is too large to be a limit"),
        ({"time": "90"}, "time 90: needs a unit: s, min, h, d (e.g. 90s, 1h30min)"),
        ({"time": 90}, "time 90: needs a unit"),
        ({"time": "1h30"}, "time 1h30: needs a unit"),
        ({"time": "1:30:00"}, "time 1:30:00: is no amount"),
        ({"time": "30min1h"}, "name each unit once, the largest first"),
        ({"time": "1h1h"}, "name each unit once"),
        ({"energy": "50"}, "energy 50: needs a unit: J, kJ, Wh, kWh"),
        ({"energy": "5000 mAh"}, "mAh is no unit of energy"),
        ({"energy": "50W"}, "W is no unit of energy"),
        ({"flops": "nan"}, "flops nan: is no amount"),
        ({"flops": float("inf")}, "flops inf: is no amount"),
    ],
)
def test_what_errors_say(values, expected):
    with pytest.raises(InputError) as caught:
        Budget.parse(**values)
    assert expected in str(caught.value)


def test_all_problems_at_once_in_the_callers_spelling():
    with pytest.raises(InputError) as caught:
        Budget.parse("12 parsecs", "-1", "90", "", spell=lambda name: f"--{name}")
    parts = str(caught.value).split("; ")
    assert len(str(caught.value).splitlines()) == 1
    for name in NAMES:
        assert sum(part.startswith(f"--{name} ") for part in parts) == 1, parts


def test_nothing_given_is_no_limit():
    assert Budget.parse() == Budget() == Budget(None, None, None, None)
    both = Budget.parse(memory="1G", time="1s")
    assert both == Budget(memory_bytes=GIB, time_s=1.0)


def test_numbers_for_programs():
    assert Budget(1 << 30, 1e15, 60, 3.5) == Budget(GIB, 1e15, 60.0, 3.5)
    with pytest.raises(InputError) as caught:
        Budget(memory_bytes=0, flops=float("nan"), time_s=-1, energy_j="50Wh")
    for name in ("memory_bytes", "flops", "time_s", "energy_j"):
        assert f"{name} must be a number above 0" in str(caught.value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget().flops = 1.0
