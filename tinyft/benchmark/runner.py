"""Works through a benchmark: plan, search, run, one after the other, each training in a process of
its own.

A unit that is done is never repeated, and several processes may share a folder: each takes what
nobody else has. What a signal ended goes on where it was the next time.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyft.benchmark import peers, rows, tasks
from tinyft.benchmark.grid import Limits, Method, Run, Search, rates, units
from tinyft.benchmark.store import Store, read, write
from tinyft.checkpoint import write_atomic
from tinyft.config import TrainConfig, as_flag, as_flags
from tinyft.errors import BudgetError, InputError, TinyFTError, TransientError
from tinyft.machine import import_libraries
from tinyft.parallel import Killed, apart
from tinyft.planning import Planned, make_plan

_KEPT = {"report.json", "config.yaml", "metrics.jsonl", "loss.png"}
_WAIT_S = 1.0


@dataclass(frozen=True)
class Settings:
    """What was asked for; the defaults are `tinyft.benchmark.command.bench`'s.

    Attributes:
        model: as for a run.
        sources: tasks, from `tasks.names`.
        limits, methods: of the grid.
        seeds: runs of each, with seeds 0, 1, ...
        common: fields of every run.
        factors: learning rates to try, as multiples of the method's own.
        share: of the steps that the budget affords, for each try.
        eval_rows: to score on, and as many to choose learning rates on.
        watts_per_core, grams_per_kwh: for energy where it is not measured, and for CO2.
    """

    model: str
    sources: Mapping[str, str]
    limits: Sequence[Limits]
    methods: Sequence[Method]
    seeds: int
    common: Mapping[str, Any]
    factors: Sequence[float]
    share: float
    eval_rows: int
    watts_per_core: float
    grams_per_kwh: float

    @property
    def fixed(self) -> dict[str, Any]:
        """What rows of one table share."""
        return {
            "model": self.model,
            "common": dict(self.common),
            "lr_search": list(self.factors),
            "search_share": self.share,
            "eval_rows": self.eval_rows,
        }


class Broken(TinyFTError):
    """A run's process died, or the disk or the network failed it: nothing is known of the run, and
    it may be done again."""


class Bench:
    """One process's part of a benchmark.

    Args:
        settings: what to do.
        store: the folder, open.
        say: who hears of each finished unit.
        live: who sees, every second, how far a run is.
        changed: called when the table has changed.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        say: Callable[[str], None] = print,
        live: Callable[[str], None] = lambda text: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.store = settings, store
        self.say, self.live, self.changed = say, live, changed
        self.tasks: dict[str, tasks.Task] = {}

    def work(self) -> list[str]:
        """Do all that is left, and wait for what others do; returns what broke."""
        with self.store.waiting("data"):
            for name, source in self.settings.sources.items():
                self.tasks[name] = tasks.make(
                    name, source, self.store.data, self.settings.eval_rows
                )
        left = units(
            list(self.tasks), self.settings.limits, self.settings.methods, self.settings.seeds
        )
        total, broken = len(left), {}
        if finished := sum(self.store.result(unit).is_file() for unit in left):
            self.say(f"{finished} of {total} are done already")
        while left:
            moved = False
            for unit in list(left):
                needs = self.needs(unit)
                if any(need in broken for need in needs):
                    broken[unit] = f"{unit}: needs what broke"
                elif not self.store.result(unit).is_file():
                    if not all(self.store.result(need).is_file() for need in needs):
                        continue
                    with self.store.locked(_key(unit)) as lock:
                        if lock is None:
                            continue
                        try:
                            self.do(unit, lock, f"[{total - len(left) + 1}/{total}]")
                        except Broken as error:
                            broken[unit] = f"{unit}: {error}"
                            self.say(broken[unit])
                    self.changed()
                left.remove(unit)
                moved = True
            if left and not moved:
                self.live(f"waiting for other processes, which have {len(left)} units")
                time.sleep(_WAIT_S)
        return list(broken.values())

    def needs(self, unit: Search | Run) -> list[Search | Run]:
        """What must be done before."""
        if isinstance(unit, Search):
            return []
        if unit.search.method.counterpart:
            ours = self.counterpart(unit)
            return [ours.search, ours]
        return [unit.search]

    def counterpart(self, run: Run) -> Run:
        """Our own run that a peer repeats."""
        label = run.search.method.counterpart
        method = next(m for m in self.settings.methods if m.label == label)
        return Run(Search(run.search.task, run.search.limits, method), run.seed)

    def do(self, unit: Search | Run, lock: int, count: str) -> None:
        """A unit that nobody has done; unless somebody just did."""
        if self.store.result(unit).is_file():
            return
        self.live(f"{count} {unit}")
        said = self.search(unit, lock) if isinstance(unit, Search) else self.run(unit, lock)
        self.live("")
        self.say(f"{count} {unit}: {said}")

    # Planning and search.

    def search(self, unit: Search, lock: int) -> str:
        """Find configuration and learning rate; returns a line about it."""
        self.plan(unit)
        found = self.configured(unit)
        if "config" not in found:
            write(self.store.result(unit), found)
            return f"left out. {found['reason']}"
        config, trials = found["config"], []
        given = "lr" in unit.method.fields
        tried = [config["lr"]] if given else rates(config["lr"], self.settings.factors)
        for rate in tried if len(tried) > 1 else []:
            trials.append(self.trial(unit, {**config, "lr": rate}, lock))
        known = [row for row in trials if row["status"] == "done"]
        if trials and not known:
            failed = {"status": trials[0]["status"], "reason": trials[0]["reason"]}
            write(self.store.result(unit), {**failed, "trials": tried})
            return f"{failed['status']}. {failed['reason']}"
        best = min(known, key=lambda row: row["loss_after"])["lr"] if known else tried[0]
        # Not the smallest: where all rates are too large for few steps there is nothing to gain.
        found |= {
            "lr": best,
            "trials": tried,
            "at_edge": len(tried) > 1 and best in (tried[0], tried[-1]),
            "flops": sum(row.get("flops", 0) for row in trials),
            "elapsed_s": round(sum(row.get("elapsed_s", 0.0) for row in trials), 3),
        }
        write(self.store.result(unit), found)
        if not trials:
            return f"{found['candidate']}, lr {best:g}"
        return f"{found['candidate']}, lr {best:g} of {', '.join(f'{r:g}' for r in tried)}"

    def plan(self, unit: Search) -> None:
        """Write down what the planner chooses by itself, once for a budget."""
        path = self.store.plan(unit)
        with self.store.waiting(_key(unit, "plan")):
            if not path.is_file():
                about = {"task": unit.task, "budget": str(unit.limits)}
                write(path, {**about, **self.configured(unit, free=True)})

    def configured(self, unit: Search, *, free: bool = False) -> dict[str, Any]:
        """The planner's configuration of a method inside the budget, or of any method.

        Returns:
            `config` (flat, paths relative to the folder), `candidate`, `method` and `predicted`;
            or `status` and `reason`.
        """
        task, limits = self.tasks[unit.task], unit.limits
        values = {
            "model": self.settings.model,
            "data": str(task.train.resolve()),
            "eval_data": str(task.test.resolve()),
            **self.settings.common,
            "flops": limits.flops,
            "memory": limits.memory,
        }
        if not free:
            values |= {**unit.method.fields, "method": unit.method.name}

        def planned() -> dict[str, Any]:
            found = make_plan(values, spell=as_flag)
            config = self.relative(TrainConfig.build(found.config).flat(), task)
            return {**_chosen(found), "config": config}

        import_libraries()  # here, once for all plans
        try:
            # Apart: a plan sees what tokenizer and rows take, unless earlier ones left it room.
            return apart(planned)
        except (Killed, TransientError) as error:
            raise Broken(str(error)) from error
        except (InputError, BudgetError) as error:
            return {"status": "left out", "reason": str(error)}

    def relative(self, config: Mapping[str, Any], task: tasks.Task) -> dict[str, Any]:
        here = {"data": self.inside(task.train), "eval_data": self.inside(task.test)}
        return {k: v for k, v in {**config, **here}.items() if v is not None}

    def inside(self, path: Path) -> str:
        return path.relative_to(self.store.directory).as_posix()

    def trial(self, unit: Search, config: dict[str, Any], lock: int) -> dict[str, Any]:
        """One try of a learning rate: a share of the steps that the budget affords, scored on rows
        of its own. No limit on FLOPs: it would end a few steps before half of them, since the first
        batch of a run is its longest."""
        config |= {
            "eval_data": self.inside(self.tasks[unit.task].validation),
            "steps": max(1, round(self.settings.share * config["steps"])),
            "seed": 0,
        }
        config.pop("flops", None)
        return self.recorded(unit, config, lock, trial=config["lr"])

    # Runs.

    def run(self, unit: Run, lock: int) -> str:
        """Train inside the budget, or repeat with other tools; returns a line about it."""
        search = unit.search
        if search.method.counterpart:
            ours = self.counterpart(unit)
            before = read(self.store.result(ours))
            reason = peers.missing(search.method.label)
            if reason is None and before["status"] != "done":
                reason = f"{ours.search.method.label} has no run to repeat: {before['reason']}"
            if reason:
                return self.leave(unit, "left out", reason)
            found = read(self.store.result(ours.search))
            config = {**found["config"], "steps": before["steps"]}
            config = {k: v for k, v in config.items() if k not in ("flops", "memory")}
        else:
            found = read(self.store.result(search))
            if "lr" not in found:
                return self.leave(unit, found["status"], found["reason"])
            config = dict(found["config"])
        config |= {"lr": found["lr"], "seed": unit.seed}
        row = self.recorded(unit, config, lock, search=found)
        if row["status"] != "done":
            return f"{row['status']}. {row['reason']}"
        return (
            f"{row['metric']} {row['before']:.4g} -> {row['after']:.4g}, {row['flops']:.3g} FLOPs, "
            f"{row['elapsed_s']:.0f} s, {row['peak_memory_bytes'] / 2**20:,.0f} MiB"
        )

    def leave(self, unit: Run, status: str, reason: str) -> str:
        write(self.store.result(unit), rows.left(unit, status, reason))
        return f"{status}. {reason}"

    def recorded(
        self,
        unit: Search | Run,
        config: dict[str, Any],
        lock: int,
        *,
        trial: float | None = None,
        search: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The row of a run, which is done unless there is one."""
        path = self.store.result(unit, trial)
        if path.is_file():
            return read(path)
        if twin := self.twin(unit, config, trial):
            write(path, twin)
            return twin
        method = unit.search.method
        folder = path.parent / "run"
        code = self.child(config, folder, method.label if method.counterpart else None, lock)
        if code in (InputError.exit_code, BudgetError.exit_code):
            status = "left out" if code == BudgetError.exit_code else "failed"
            row = rows.left(unit, status, _reason(path.parent / "log.txt"), config["lr"])
        elif code:
            raise Broken(f"its process ended with code {code}; see {path.parent / 'log.txt'}")
        else:
            row = rows.done(
                unit,
                config,
                read(folder / "report.json"),
                search=search,
                watts_per_core=self.settings.watts_per_core,
                grams_per_kwh=self.settings.grams_per_kwh,
            )
        write(path, row)
        _sweep(folder)
        return row

    def twin(
        self, unit: Search | Run, config: Mapping[str, Any], trial: float | None
    ) -> dict[str, Any] | None:
        """The row of the same run inside another limit on memory, if its peak keeps to both: a
        limit that a run stays below changes nothing of it."""
        limits = unit.search.limits
        mine = limits.budget.memory_bytes or math.inf
        for other in self.settings.limits:
            path = self.store.result(unit.inside(other), trial)
            if other == limits or other.flops != limits.flops or not path.is_file():
                continue
            row = read(path)
            allowed = min(mine, other.budget.memory_bytes or math.inf)
            if (
                row["status"] == "done"
                and row["peak_memory_bytes"] <= allowed
                and rows.same_job(row, unit, config)
            ):
                same = row.get("same_run_as") or row["budget"]
                return {**row, **rows.budget_of(unit), "same_run_as": same}
        return None

    def child(self, config: Mapping[str, Any], folder: Path, peer: str | None, lock: int) -> int:
        """Train in a process of its own; returns its exit code.

        A run's folder gets its configuration first, as that of a run to go on with: so the same
        command begins, continues, and reports a finished run. Peers do not go on.
        """
        import yaml

        here = self.inside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if peer:
            words = ["tinyft.benchmark.peers", peer, *as_flags({**config, "output": here})]
        else:
            words = ["tinyft.cli", "train", "--resume", "--output", here]
            if not (folder / "config.yaml").is_file():
                write_atomic(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        return self.process(words, folder.parent / "log.txt", lock)

    def process(self, words: Sequence[str], log: Path, lock: int) -> int:
        """`python -m WORDS` in the folder, its output in a log; returns its exit code."""
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with log.open("a") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.store.directory,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=() if lock < 0 else (lock,),  # locked as long as it lives
                start_new_session=True,  # Ctrl-C is for us, who then ask it to stop and save
            )
            try:
                while True:
                    try:
                        return process.wait(_WAIT_S)
                    except subprocess.TimeoutExpired:
                        self.live(f"{self.inside(log.parent)}: {_last_line(log)}")
            except BaseException:
                process.terminate()
                process.wait()
                raise


def _chosen(planned: Planned) -> dict[str, Any]:
    found = planned.as_dict()
    chosen = planned.plan.chosen
    assert chosen is not None
    return {
        "candidate": chosen.candidate.name,
        "method": found["method"],
        "reason": chosen.reason,
        "predicted": found["predicted"],
    }


def _key(unit: Search | Run, what: str = "") -> str:
    """The name of a unit's lock."""
    parts = [unit.search.task, unit.search.limits.slug]
    if not what:
        parts.append(unit.search.method.slug)
        what = f"seed-{unit.seed}" if isinstance(unit, Run) else "search"
    return " ".join([*parts, what])


def _sweep(folder: Path) -> None:
    """Leave what explains a run; its model goes."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in _KEPT:
            path.unlink()


def _reason(log: Path) -> str:
    """The error that ended a log."""
    return " ".join(log.read_text().rpartition("tinyft: ")[2].split())


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")
