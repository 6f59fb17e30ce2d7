"""What a person, or a program, sees of a run while it goes on.

One `Reporter` interface, and an implementation for each audience: a bar on a terminal, a few plain
lines elsewhere, JSON lines for programs. Only these print.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from tinyft.errors import InputError
from tinyft.memory import human

_LINES = 20  # of a whole run, where there is no terminal
_LINE_S = 5.0  # and the least time between two of them


@dataclass(frozen=True)
class Step:
    """What is known after a step. `step` counts from 1; memory is absolute, in bytes."""

    step: int
    total: int
    loss: float
    lr: float
    tokens: int
    seconds: float
    memory_bytes: int
    peak_memory_bytes: int


class Reporter:
    """Says nothing: the interface, and what `tinyft.fit(..., quiet=True)` uses."""

    def info(self, text: str) -> None:
        """A line for a person."""

    def begin(self, total: int, start: int) -> None:
        """Training goes from step `start` to step `total`."""

    def step(self, step: Step) -> None:
        """A step is done."""

    def evaluation(self, when: str, metrics: Mapping[str, Any]) -> None:
        """Held-out data have been scored: `when` is "before", "after" or "step N"."""

    def end(self) -> None:
        """Training is over, whether it finished or not."""


class LineReporter(Reporter):
    """Plain lines: about every five seconds and at most some twenty in a run."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._seconds: deque[float] = deque(maxlen=50)
        self._last = 0.0
        self._tokens = 0
        self._next = 1

    def info(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def begin(self, total: int, start: int) -> None:
        self._next = start + 1
        self._last = perf_counter() - _LINE_S  # the first step is always reported

    def step(self, step: Step) -> None:
        self._seconds.append(step.seconds)
        now = perf_counter()
        due = step.step >= self._next and now - self._last >= _LINE_S
        if due or step.step == step.total:
            self._last = now
            self._next = step.step + max(1, step.total // _LINES)
            self.info(
                f"step {step.step}/{step.total}  loss {step.loss:.4f}  "
                f"{step.tokens / step.seconds:,.0f} tokens/s  "
                f"memory {human(step.memory_bytes)}, peak {human(step.peak_memory_bytes)}  "
                f"{duration(self.left_s(step))} left"
            )

    def left_s(self, step: Step) -> float:
        """Seconds until the last step, by the median of the recent ones."""
        return statistics.median(self._seconds) * (step.total - step.step)

    def evaluation(self, when: str, metrics: Mapping[str, Any]) -> None:
        self.info(f"held-out {when}: {scores(metrics)}")


class BarReporter(LineReporter):
    """A bar on a terminal, with lines above it for what stays."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            transient=True,
        )
        self._task: Any = None

    def info(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def begin(self, total: int, start: int) -> None:
        self._task = self._bar.add_task("training", total=total, completed=start, text="")
        self._bar.start()

    def step(self, step: Step) -> None:
        self._seconds.append(step.seconds)
        text = (
            f"loss {step.loss:.4f}  {step.tokens / step.seconds:,.0f} tok/s  "
            f"{human(step.memory_bytes)} (peak {human(step.peak_memory_bytes)})  "
            f"{duration(self.left_s(step))} left"
        )
        self._bar.update(self._task, completed=step.step, text=text)

    def end(self) -> None:
        self._bar.stop()


class JsonReporter(Reporter):
    """A JSON object a line on `stream`, each with its `event`; words for a person elsewhere."""

    def __init__(self, stream: IO[str], human_stream: IO[str]) -> None:
        self._stream = stream
        self._human = human_stream

    def emit(self, event: str, values: Mapping[str, Any]) -> None:
        print(json.dumps({"event": event, **values}), file=self._stream, flush=True)

    def info(self, text: str) -> None:
        print(text, file=self._human, flush=True)

    def begin(self, total: int, start: int) -> None:
        self.emit("begin", {"total": total, "start": start})

    def step(self, step: Step) -> None:
        self.emit("step", asdict(step))

    def evaluation(self, when: str, metrics: Mapping[str, Any]) -> None:
        self.emit("evaluation", {"when": when, **metrics})


class TensorBoardReporter(Reporter):
    """Passes everything on to another reporter, and writes the curves for TensorBoard."""

    def __init__(self, inner: Reporter, directory: Path) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._inner = inner
        self._writer = SummaryWriter(str(directory))
        self._at = 0

    def info(self, text: str) -> None:
        self._inner.info(text)

    def begin(self, total: int, start: int) -> None:
        self._at = start
        self._inner.begin(total, start)

    def step(self, step: Step) -> None:
        self._at = step.step
        for name in ("loss", "lr", "seconds", "peak_memory_bytes"):
            self._writer.add_scalar(f"train/{name}", getattr(step, name), step.step)
        self._inner.step(step)

    def evaluation(self, when: str, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"eval/{name}", value, self._at)
        self._inner.evaluation(when, metrics)

    def end(self) -> None:
        self._writer.close()
        self._inner.end()


def check_tensorboard() -> None:
    """Raise InputError where TensorBoard is missing: called before the work begins."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard needs TensorBoard: pip install 'tinyft[tensorboard]', or leave the "
            "flag out (metrics.jsonl holds the same numbers)."
        )


def make_reporter(*, as_json: bool = False) -> Reporter:
    """The reporter that suits standard output: JSON if asked, else a bar or plain lines."""
    if as_json:
        return JsonReporter(sys.stdout, sys.stderr)
    terminal = False
    with suppress(ValueError):  # a closed stream
        terminal = sys.stdout.isatty()
    return BarReporter(sys.stdout) if terminal else LineReporter(sys.stdout)


def scores(metrics: Mapping[str, Any]) -> str:
    """`{"loss": 0.6931, "accuracy": 0.5, "n": 500}` -> `"loss 0.6931, accuracy 0.500, n 500"`."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:.4f}" if name == "loss" else f"{name} {value:.3f}")
        elif isinstance(value, int):
            parts.append(f"{name} {value:,}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """`95` -> `"1:35"`, `3700` -> `"1:01:40"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
