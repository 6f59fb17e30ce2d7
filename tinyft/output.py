"""The output folder of a run: what is in it, who may write it, and when it is whole.

```
config.yaml      the resolved configuration; `tinyft train --config` runs it again
metrics.jsonl    a line a step, and a line an evaluation
run.json         only while training: what the run began with (hashes of the data, first scores)
checkpoint/      only while training: the state of a gradient method
steps.seedlog    methods that keep a log: checkpoint and artefact in one
tinyft.json      the manifest; a folder without it is no finished model
loss.png, report.json, and the artefact's own files, a method's own pictures among them
```
The artefact's files are written elsewhere and moved in, then the manifest, then the report: a kill
at any moment leaves either an unfinished run that `--resume` continues, or a finished one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyft.checkpoint import RunState, fsync_path, recover_directory, write_atomic
from tinyft.config import TrainConfig, read_yaml
from tinyft.errors import InputError

# What may differ between the beginning of a run and its continuation: nothing the bits depend on.
# Of the limits, time and energy only end the run. Another limit on memory means that it is fitted
# anew from where it goes on, which is asked for, and changes no more than rounding.
_LIMITS = {"memory", "time", "energy"}
_FREE = {"threads", "eval_every", "checkpoint_every", "tensorboard", "output", *_LIMITS}
_LENGTH = {"steps", "epochs", "flops"}  # on which a cosine depends


class OutputFolder:
    """The one writer of an output folder. Opening it takes a lock that a kill releases."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.metrics = directory / "metrics.jsonl"
        self.run = directory / "run.json"
        self.checkpoint = directory / "checkpoint"
        self.log = directory / "steps.seedlog"
        self.manifest = directory / "tinyft.json"
        self.plot = directory / "loss.png"
        self.report = directory / "report.json"
        self.tensorboard = directory / "tensorboard"
        self._lock: int | None = None

    @property
    def finished(self) -> bool:
        return self.report.is_file() and self.manifest.is_file()

    @property
    def unfinished(self) -> bool:
        return self.run.is_file() and not self.finished

    def open(self, config: TrainConfig) -> bool:
        """Check that this run may write here, lock the folder, and say whether the run goes on.

        Returns:
            True to resume, False to begin.

        Raises:
            InputError: the folder holds another run, or files that are none of ours, or another
                process is writing to it.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"--output {self.directory} is a file: name a folder.")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--output {self.directory} cannot be made: {error.strerror}."
            ) from error
        if not os.access(self.directory, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(
                f"--output {self.directory} cannot be written to: change its permissions, or name "
                f"another folder."
            )
        self._take_lock()
        leftovers = self._leftovers()
        begun = self.finished or self.unfinished
        if not begun:
            ours = {self.config, self.run, self.metrics, *leftovers}
            found = sorted(p.name for p in self.directory.iterdir() if p not in ours)
            if found:
                raise InputError(
                    f"--output {self.directory} holds files that are not a run's ({found[0]}, "
                    f"{len(found)} in all): name a new or empty folder."
                )
        recover_directory(self.checkpoint)
        for leftover in leftovers:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        if not begun:
            return False
        if self.finished:
            self._sweep()  # of a run that was killed between its report and this
        if config.overwrite:
            return False
        if not config.resume:
            state = "a finished run" if self.finished else "an unfinished run"
            hint = "prints its report" if self.finished else "goes on with it"
            raise InputError(
                f"--output {self.directory} holds {state}: --resume {hint}, --overwrite discards "
                f"it, or name another folder."
            )
        self.check_same(config)
        return True

    def _leftovers(self) -> list[Path]:
        """What a killed process was writing of a run's own files and folders."""
        files = (self.config, self.metrics, self.run, self.manifest, self.plot, self.report)
        found = [
            path
            for file in files
            for path in self.directory.glob(f".{file.stem}.*.partial{file.suffix}")
        ]
        for name in (".artefact", f".{self.checkpoint.name}"):
            found += self.directory.glob(f"{name}.partial-*")
        return found

    def check_same(self, config: TrainConfig) -> None:
        """Refuse to go on with another configuration than the run began with."""
        before, now = self.saved_config(), config.flat()
        differing = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)} - _FREE
        if config.lr is None:  # not given: the run's
            differing -= {"lr"}
        if config.schedule == before.get("schedule") == "constant":
            differing -= _LENGTH  # whether it grew is checked once the data have been counted
        if differing:
            changes = [f"{k} was {before.get(k)}, is {now.get(k)}" for k in sorted(differing)]
            if differing & _LENGTH and config.schedule == "cosine":
                changes[-1] += " (on which a cosine schedule depends)"
            raise InputError(
                f"--resume goes on with the run in {self.directory} only as it began: "
                f"{'; '.join(changes)}. Leave these out (the saved values hold), or start anew "
                f"with --overwrite or another --output."
            )

    def saved_config(self) -> dict[str, Any]:
        """The flat configuration that the folder's run began with; empty when there is none."""
        return read_yaml(self.config) if self.config.is_file() else {}

    def begin(self, config: TrainConfig, info: Mapping[str, Any], *, resuming: bool) -> None:
        """Write down what the run begins with: from here the folder holds an unfinished run.

        Without `resuming`, what a run before it left (`--overwrite`) goes first. With it, a run
        that was finished, and shall now be longer, becomes unfinished again.
        """
        if not resuming:
            self.clear()
            self._save_config(config)
        self.save_info(info)
        self.report.unlink(missing_ok=True)
        self.manifest.unlink(missing_ok=True)
        if resuming:  # last: a kill before it leaves the run as it was, and so to be asked again
            self._save_config(config)

    def _save_config(self, config: TrainConfig) -> None:
        import yaml

        from tinyft import __version__

        values = config.flat()
        del values["output"]
        head = f"# Resolved by tinyft {__version__}. To run it again: tinyft train --config THIS\n"
        write_atomic(self.config, head + yaml.safe_dump(values, sort_keys=False))

    def save_info(self, info: Mapping[str, Any]) -> None:
        write_atomic(self.run, json.dumps(dict(info), indent=1))

    def info(self) -> dict[str, Any]:
        """What `begin` wrote; for a finished run, the report's copy of it."""
        if self.run.is_file():
            return json.loads(self.run.read_text())
        report = self.read_report()
        return {
            "data_sha256": report["data"]["sha256"],
            "eval_data_sha256": report["data"]["eval_sha256"],
            "before": report["eval"]["before"],
            "guard": report.get("guard", {}),
        }

    def read_report(self) -> dict[str, Any]:
        return json.loads(self.report.read_text())

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """One line, in one write, so that a kill leaves it whole or absent."""
        text = json.dumps(dict(line)).encode() + b"\n"
        descriptor = os.open(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if os.write(descriptor, text) != len(text):
                raise OSError(errno.ENOSPC, "the line was cut", str(self.metrics))
        finally:
            os.close(descriptor)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines so far."""
        found = []
        if self.metrics.is_file():
            for text in self.metrics.read_text().splitlines():
                try:
                    found.append(json.loads(text))
                except json.JSONDecodeError:
                    break  # a full disk may have cut the last line
        return found

    def cut_metrics(self, steps: int) -> list[dict[str, Any]]:
        """Drop the lines after `steps`, in the file too, and return those kept."""
        kept = [line for line in self.read_metrics() if line["step"] <= steps]
        write_atomic(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def save_state(self, state: RunState) -> None:
        """A checkpoint. The metrics up to it reach the disk first."""
        if self.metrics.is_file():
            fsync_path(self.metrics)
        state.save(self.checkpoint)

    @property
    def steps_done(self) -> int:
        """Those that a resumed run finds done, in the checkpoint or in the log."""
        from tinyft.zeroth.seed_log import SeedLog

        state = self.checkpoint / "state.json"
        if state.is_file():
            return json.loads(state.read_text())["step"]
        return SeedLog.open(self.log).steps if self.log.is_file() else 0

    def saved_so_far(self) -> str:
        """A sentence on what a run that breaks off now leaves."""
        if (self.checkpoint / "state.json").is_file():
            return f"The checkpoint of step {self.steps_done} is intact."
        if self.log.is_file():
            return "The log of the steps so far is intact."
        return "No checkpoint had been written yet."

    def finish(
        self, manifest: Mapping[str, Any], save_artefact: Callable[[Path], str], plot: Any
    ) -> str:
        """Move the artefact in, then write manifest and plot; returns the artefact's kind."""
        temporary = Path(tempfile.mkdtemp(prefix=".artefact.partial-", dir=self.directory))
        try:
            kind = save_artefact(temporary)
            files = sorted(p.name for p in temporary.iterdir())
            # Said before they appear, so that --overwrite after a kill knows what is ours.
            self.save_info({**self.info(), "files": files})
            for name in files:
                fsync_path(temporary / name)
                (temporary / name).replace(self.directory / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if self.log.is_file():
            fsync_path(self.log)
        manifest = {"format": 1, "kind": kind, **manifest, "files": files}
        write_atomic(self.manifest, json.dumps(manifest, indent=1))
        write_atomic(self.plot, plot)
        return kind

    def save_report(self, report: Mapping[str, Any]) -> None:
        """The last file. Then nothing is left to resume, and what served that goes."""
        write_atomic(self.report, json.dumps(report, indent=1))
        self._sweep()

    def _sweep(self) -> None:
        """Remove what only an unfinished run needs."""
        self.run.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def clear(self) -> None:
        """Remove a run's files, and no others."""
        files: list[str] = []
        for record in (self.manifest, self.run):
            if record.is_file():
                files += json.loads(record.read_text()).get("files", [])
        if files or self.report.is_file():
            self.save_info({"files": files})  # a kill amid this leaves a run to --overwrite
        own = [self.manifest, self.report, self.plot, self.metrics, self.log, self.config]
        for path in [*own, *(self.directory / Path(name).name for name in files)]:
            path.unlink(missing_ok=True)
        for folder in (self.checkpoint, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        self.run.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock, and leave no folder behind that nothing was written to."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self.directory.rmdir()
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: no lock, and no flushing to the disk
            return
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise InputError(
                f"Another process is writing to --output {self.directory}: wait for it, or name "
                f"another folder."
            ) from error
