"""One place decides which implementation runs, says so, and never changes what was asked for."""

from __future__ import annotations

import logging

import pytest
import torch
from kernel_checks import needs_triton
from torch.utils.flop_counter import FlopCounterMode

from tinyft.activations import Rematerialise
from tinyft.kernels import dispatch, philox

COUNTER = torch.zeros(4, 1, dtype=torch.int64)


@pytest.fixture
def nothing_ran(monkeypatch):
    monkeypatch.setattr(dispatch, "ran", {})


def test_the_choice_is_logged_when_it_changes(nothing_ran, caplog):
    with caplog.at_level(logging.INFO, "tinyft.kernels"):
        for impl in ("auto", "auto", "torch", "torch"):
            philox.philox(COUNTER, 0, impl=impl)
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("philox runs in torch (")
    assert caplog.messages[1] == "philox runs in torch (asked for)"
    assert dispatch.ran == {"philox": "torch (asked for)"}


def test_without_triton_auto_takes_torch_and_triton_is_refused(nothing_ran, monkeypatch):
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert dispatch.choose("op", "auto", COUNTER) == "torch"
    assert dispatch.ran["op"] == "torch (Triton is not installed)"
    with pytest.raises(ValueError, match="op cannot run in Triton: Triton is not installed"):
        dispatch.choose("op", "triton", COUNTER)


@needs_triton
def test_on_the_cpu_only_the_interpreter_runs_and_only_when_asked(nothing_ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", "auto", COUNTER) == "torch"
    assert dispatch.choose("op", "triton", COUNTER) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="tensors on the CPU"):
        dispatch.choose("op", "triton", COUNTER)


@needs_triton
def test_kernels_refuse_what_they_cannot_do(nothing_ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="no kernel for float64"):
        dispatch.choose("op", "triton", COUNTER.double())
    trained = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass"):
        dispatch.choose("op", "triton", None, trained, forward_only=True)
    with torch.no_grad():
        assert dispatch.choose("op", "triton", trained, forward_only=True) == "triton"


@needs_triton
def test_traced_operations_stay_in_torch(nothing_ran, monkeypatch):
    """Or a kernel would run on tensors without contents, its FLOPs uncounted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="being traced"):
        dispatch.choose("op", "triton", COUNTER)


@needs_triton
def test_what_recomputes_activations_lets_kernels_pass(nothing_ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with Rematerialise():
        assert dispatch.choose("op", "triton", COUNTER) == "triton"
        with FlopCounterMode(display=False), pytest.raises(ValueError, match="being traced"):
            dispatch.choose("op", "triton", COUNTER)


@needs_triton
def test_an_old_triton_is_refused(nothing_ran, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_triton_is_old", lambda: True)
    with pytest.raises(ValueError, match=r"older than 3\.4"):
        dispatch.choose("op", "triton", COUNTER)


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="impl is 'auto', 'torch' or 'triton'; found 'cuda'"):
        philox.philox(COUNTER, 0, impl="cuda")
