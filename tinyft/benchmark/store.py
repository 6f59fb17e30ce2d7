"""A benchmark's folder: what is finished, who works on what, and the table.

```
bench.json                                   what must stay the same: model, batches, search
data/TASK/{train,validation,test}.jsonl      and source.json, what they were taken from
runs/TASK/BUDGET/plan.json                   what the planner chooses by itself
runs/TASK/BUDGET/METHOD/search.json          configuration and learning rate; or why there is none
runs/TASK/BUDGET/METHOD/{lr-R,seed-N}/       one run: run/, log.txt, and row.json when it is over
results.csv, planner.csv, report.html, *.png
```
Whatever is written appears whole. A unit of work is locked while somebody is at it, and a run's own
process holds the lock too, so that it is not started again while one that lost its parent goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyft.benchmark.grid import Run, Search
from tinyft.checkpoint import write_atomic
from tinyft.errors import InputError


class Store:
    """Reads and writes the folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.runs = directory / "runs"

    def open(self, fixed: Mapping[str, Any]) -> None:
        """Begin or go on.

        Args:
            fixed: settings that rows of one table must share.

        Raises:
            InputError: the folder holds a benchmark with other ones, or something else.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "bench.json"
        with self.waiting("bench"):
            if path.is_file():
                before = read(path)
                differing = [k for k in fixed if before.get(k) != fixed[k]]
                if differing:
                    was = "; ".join(f"{k} was {before.get(k)}, is {fixed[k]}" for k in differing)
                    raise InputError(
                        f"--output {self.directory} holds a benchmark whose rows could not be "
                        f"compared with these: {was}. Keep these, or name another folder."
                    )
            elif any(p for p in self.directory.iterdir() if not p.name.startswith(".")):
                raise InputError(f"--output {self.directory} is not empty: name a new folder.")
            else:
                write(path, fixed)

    def of(self, unit: Search | Run, trial: float | None = None) -> Path:
        """The folder of a unit, or of one trial of a search."""
        search = unit.search
        folder = self.runs / search.task / search.limits.slug / search.method.slug
        if isinstance(unit, Run):
            return folder / f"seed-{unit.seed}"
        return folder if trial is None else folder / f"lr-{trial:g}"

    def result(self, unit: Search | Run, trial: float | None = None) -> Path:
        """The file that says that a unit is done."""
        is_search = isinstance(unit, Search) and trial is None
        return self.of(unit, trial) / ("search.json" if is_search else "row.json")

    def plan(self, search: Search) -> Path:
        return self.runs / search.task / search.limits.slug / "plan.json"

    def rows(self) -> list[dict[str, Any]]:
        """Of all runs that are over, trials too, in a fixed order."""
        return [read(path) for path in sorted(self.runs.glob("*/*/*/*/row.json"))]

    def plans(self) -> list[dict[str, Any]]:
        return [read(path) for path in sorted(self.runs.glob("*/*/plan.json"))]

    # Locks.

    @contextmanager
    def locked(self, name: str) -> Iterator[int | None]:
        """Yields the lock's descriptor, or None if another process has it; -1 without locks."""
        yield from self._lock(name, wait=False)

    @contextmanager
    def waiting(self, name: str) -> Iterator[int | None]:
        """The same, but waits."""
        yield from self._lock(name, wait=True)

    def _lock(self, name: str, *, wait: bool) -> Iterator[int | None]:
        try:
            import fcntl
        except ImportError:  # Windows: one process a folder
            yield -1
            return
        folder = self.directory / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            yield descriptor
        finally:
            os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(dict(values), indent=1))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV; what is None is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: row.get(name) for name in columns} for row in rows])
    return out.getvalue()
