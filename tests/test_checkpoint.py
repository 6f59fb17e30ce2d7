"""Files written whole or not at all, and the state that a run resumes from."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from tinyft import checkpoint
from tinyft.checkpoint import (
    RunState,
    is_disk_full,
    recover_directory,
    restore_weights,
    trainable,
    write_atomic,
    write_directory_atomic,
)
from tinyft.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_takes_text_bytes_and_writers(tmp_path):
    for content in ("text", b"text", lambda path: path.write_text("text")):
        write_atomic(tmp_path / "file.png", content)
        assert (tmp_path / "file.png").read_bytes() == b"text"
    assert names(tmp_path) == ["file.png"]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "file", "old")

    def half(path):
        path.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_directory_appears_whole_or_not(tmp_path):
    target = tmp_path / "deep" / "folder"
    with write_directory_atomic(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
    assert names(target) == ["a"]
    # What others may read of a folder follows the umask, not mkdtemp's privacy.
    reference = tmp_path / "made"
    reference.mkdir()
    assert target.stat().st_mode == reference.stat().st_mode
    with pytest.raises(RuntimeError), write_directory_atomic(target) as work:
        (work / "b").write_text("2")
        raise RuntimeError
    assert names(target) == ["a"]
    with write_directory_atomic(target) as work:
        (work / "c").write_text("3")
    assert names(target) == ["c"]
    assert names(target.parent) == ["folder"]


def test_windows_flushes_nothing(tmp_path, monkeypatch):
    """It cannot open the folder that a new file is in."""

    def denied(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(checkpoint.sys, "platform", "win32")
    monkeypatch.setattr(checkpoint.os, "open", denied)
    checkpoint.fsync_path(tmp_path)


def test_recovery_after_a_kill_between_the_two_renames(tmp_path):
    (tmp_path / ".folder.old").mkdir()
    (tmp_path / ".folder.old" / "a").write_text("1")
    (tmp_path / ".folder.partial-x").mkdir()
    recover_directory(tmp_path / "folder")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["a"]


def test_recovery_prefers_the_new_directory(tmp_path):
    for name in (".folder.old", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name.strip(".")).write_text("")
    recover_directory(tmp_path / "folder")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["folder"]


def a_state(step=3):
    weights = {"w": torch.randn(3, 2), "b": torch.randn(2, dtype=torch.bfloat16)}
    optimizer = {"w.exp_avg": torch.randn(3, 2), "step": torch.tensor(step)}
    return RunState(step, weights, optimizer)


def test_state_round_trip_is_exact(tmp_path):
    state = a_state()
    state.save(tmp_path / "checkpoint")
    loaded = RunState.load(tmp_path / "checkpoint")
    assert loaded.step == 3
    for mine, read in ((state.weights, loaded.weights), (state.optimizer, loaded.optimizer)):
        assert mine.keys() == read.keys()
        for name in mine:
            assert mine[name].dtype == read[name].dtype
            assert torch.equal(mine[name], read[name])
    files = names(tmp_path / "checkpoint")
    assert files == ["state.json", "state.safetensors"]  # and no pickle


def test_no_checkpoint_is_none_and_a_broken_one_an_error(tmp_path):
    assert RunState.load(tmp_path / "checkpoint") is None
    a_state().save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"cannot be read.*--overwrite"):
        RunState.load(tmp_path / "checkpoint")


def test_weights_come_back_into_the_trainable_parameters_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    saved = {name: tensor.detach().clone() for name, tensor in trainable(model).items()}
    assert saved.keys() == {"1.weight", "1.bias"}
    pointer = model[1].weight.data_ptr()
    with torch.no_grad():
        model[1].weight.zero_()
    restore_weights(model, saved)
    assert torch.equal(model[1].weight, saved["1.weight"])
    assert model[1].weight.data_ptr() == pointer
    with pytest.raises(InputError, match=r"1 parameters differ, 1\.bias first"):
        restore_weights(model, {"1.weight": saved["1.weight"]})
    with pytest.raises(InputError, match="differ"):
        restore_weights(model, {**saved, "1.bias": torch.zeros(7)})


def test_tied_parameters_are_saved_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert trainable(model).keys() == {"a.weight", "a.bias", "b.bias"}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A limit on the size of files stands in for a full disk: the same path, another number."""
    script = f"""
        import resource, signal, torch
        from pathlib import Path
        from tinyft.checkpoint import RunState, is_disk_full
        folder = Path({str(tmp_path / "checkpoint")!r})
        RunState(1, {{"w": torch.ones(10)}}, {{}}).save(folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        try:
            RunState(2, {{"w": torch.ones(10000)}}, {{}}).save(folder)
        except Exception as error:
            assert is_disk_full(error), error
        else:
            raise SystemExit("the limit did not hold")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
    assert RunState.load(tmp_path / "checkpoint").step == 1
    assert names(tmp_path) == ["checkpoint"]


def test_is_disk_full():
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(ValueError("os error 28"))
