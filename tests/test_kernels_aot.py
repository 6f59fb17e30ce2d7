"""Every Triton kernel compiles for what users own, as the kept table has it, and spills nothing.

In other processes: here Triton may be in its interpreter.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from kernel_checks import needs_triton

from tinyft.kernels.aot import TARGETS

ROOT = Path(__file__).resolve().parent.parent
with open(ROOT / "bench/results/kernel_resources.csv") as file:
    KEPT = list(csv.DictReader(file))


def by_name(rows: Iterable[dict]) -> dict[tuple[str, str], dict]:
    return {(row["configuration"], row["kernel"]): row for row in rows}


def test_nothing_kept_spills():
    assert {row["target"] for row in KEPT} == set(TARGETS)
    assert [row for row in KEPT if row["spill_bytes"] != "0"] == []


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_as_kept(target):
    """Each kernel in one configuration; all of them take minutes."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench/kernel_resources.py", "--targets", target, "--once"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = by_name(csv.DictReader(done.stdout.splitlines()))
    kept = by_name(row for row in KEPT if row["target"] == target)
    assert {kernel for _, kernel in found} == {kernel for _, kernel in kept}
    for name, row in found.items():
        if row["triton"] == kept[name]["triton"]:
            assert row == kept[name]
        else:  # another compiler takes other registers, but must still spill none
            assert row["spill_bytes"] == "0", name
