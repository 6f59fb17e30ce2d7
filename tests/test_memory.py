"""Peaks against allocations of known size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyft import memory
from tinyft.memory import PeakMeter, human, resident_bytes

MIB = 1 << 20


def touch(n_mib):
    """Allocate and write, so that the pages are resident."""
    return torch.ones(n_mib * MIB // 4)


def test_phases_have_their_own_peaks():
    meter = PeakMeter()
    with meter.phase("train"):
        base = meter.now_bytes()
        held = touch(40)
        with meter.phase("eval"):
            touch(80)
        inner = meter.peak_bytes("train")
        del held
    assert meter.source == "VmHWM"
    assert inner - base == pytest.approx(40 * MIB, abs=8 * MIB)
    assert meter.peaks["eval"] - base == pytest.approx(120 * MIB, abs=8 * MIB)
    assert meter.peaks["train"] - base == pytest.approx(40 * MIB, abs=8 * MIB)


def test_a_peak_is_seen_after_it_has_gone():
    meter = PeakMeter()
    with meter.phase("train"):
        before = meter.peak_bytes()
        touch(64)
        assert meter.peak_bytes() - before == pytest.approx(64 * MIB, abs=8 * MIB)
        assert meter.now_bytes() - before < 8 * MIB


def test_without_the_kernels_mark_it_samples_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    meter = PeakMeter()
    assert meter.source == "sampled RSS"
    with meter.phase("train"):
        before = meter.now_bytes()
        held = touch(64)
        meter.now_bytes()
        del held
        assert meter.peak_bytes() - before == pytest.approx(64 * MIB, abs=8 * MIB)


def test_without_proc_psutil_is_asked(monkeypatch, tmp_path):
    expected = resident_bytes()
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "nothing")
    assert resident_bytes() == pytest.approx(expected, rel=0.05)


PRODUCTS = """
import torch
from tinyft.memory import bound_compiled_products, resident_bytes, trim

bound_compiled_products()
weight = torch.ones(256, 256, dtype=torch.bfloat16)

def products(lengths):
    for n in lengths:
        torch.ones(n, 256, dtype=torch.bfloat16) @ weight
    trim()
    return resident_bytes()

before = products(range(2, 80))
print(products(range(80, 800)) - before)
"""


def test_products_of_many_shapes_do_not_pile_up():
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout) < 24 * MIB  # 390 MiB where every one is kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_mapped_file_is_forgotten_and_nothing_else(tmp_path):
    def resident_of_files():
        return memory._status_bytes("RssFile")

    save_file({"a": torch.arange(8 * MIB), "b": torch.ones(4 * MIB)}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")
    total = mapped["a"].sum()  # read, hence resident
    before = resident_of_files()
    memory.forget_mapped(mapped["a"].data_ptr(), mapped["a"].nbytes)
    assert before - resident_of_files() > 63 * MIB
    assert mapped["a"].sum() == total  # read again, from the file
    own = torch.arange(8 * MIB)
    memory.forget_mapped(own.data_ptr(), own.nbytes)
    assert own.sum() == total


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "2 KiB"),
        (300 * MIB, "300 MiB"),
        (1503238553, "1.4 GiB"),
    ],
)
def test_human(n_bytes, text):
    assert human(n_bytes) == text
