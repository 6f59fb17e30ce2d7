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


def by_name(rows: Iterable[dict]) -> dict[tuple[str, str, str], dict]:
    return {(row["configuration"], row["kernel"], row["target"]): row for row in rows}


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def test_nothing_kept_spills():
    assert {row["target"] for row in KEPT} == set(TARGETS)
    assert [row for row in KEPT if row["spill_bytes"] != "0"] == []


SINGLE_ROWS = """
import torch
from tinyft.kernels.aot import compile_for
from tinyft.kernels.gpu.perturbed_linear import dense
from tinyft.kernels.perturbed_linear import Direction

x, w = (torch.empty(rows, 64, dtype=torch.float16, device="meta") for rows in (2, 32))
compile_for("sm_80", lambda: dense(x, w, Direction("rademacher", 1, 2, 3), (1e-3, -1e-3), None))
"""


@needs_triton
def test_a_single_row_of_each_copy_compiles():
    """A size of 1 is a constant to the just-in-time compiler, and constants have no methods."""
    done = python("-c", SINGLE_ROWS)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("targets", [[*TARGETS][:3], [*TARGETS][3:]], ids="-".join)
def test_kernels_compile_as_kept(targets):
    """Each kernel in one configuration; all of them take minutes."""
    done = python(ROOT / "bench/kernel_resources.py", "--targets", *targets, "--once")
    assert done.returncode == 0, done.stderr
    found = by_name(csv.DictReader(done.stdout.splitlines()))
    kept = by_name(row for row in KEPT if row["target"] in targets)
    kernels = {(kernel, target) for _, kernel, target in kept}
    assert {(kernel, target) for _, kernel, target in found} == kernels
    for name, row in found.items():
        if row["triton"] == kept[name]["triton"]:
            assert row == kept[name]
        else:  # another compiler takes other registers, but must still spill none
            assert row["spill_bytes"] == "0", name
