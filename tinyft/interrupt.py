"""Stopping on request: a signal asks, the loop finishes its step and saves, then the run ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from tinyft.errors import TinyFTError


class Stopped(TinyFTError):
    """The run ended early because somebody asked; exit code 128 + signal, as shells have it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignals:
    """While entered, SIGINT and SIGTERM only set `number`; a second one stops at once.

    In a thread other than the main one, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
