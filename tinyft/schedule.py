"""What follows from a step's number: its learning rate, its random numbers, whether to save."""

from __future__ import annotations

import math
from time import monotonic

from tinyft.config import TrainConfig

_SAVING_SHARE = 0.05  # of the time, where nothing else was asked for
_FIRST_SAVE_S = 20.0


def learning_rate(step: int, total: int, config: TrainConfig, spent: float = 0.0) -> float:
    """Of step `step` (from 0) of `total`: linear warm-up, then constant or half a cosine to 0.

    Args:
        spent: share of the limit on FLOPs. Where that ends the run before `total`, the cosine
            follows it, so that it comes down to 0 all the same.
    """
    peak = config.lr or 0.0
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.schedule == "constant":
        return peak
    share = max(spent, (step - config.warmup) / max(1, total - config.warmup))
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))


def step_seed(seed: int, step: int) -> int:
    """Seed of torch's generators for one step, so that dropout, too, survives a resume."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 1) % 2**63


class SavingClock:
    """When to save a checkpoint: every so many steps, or often but at little cost.

    Args:
        every: steps between checkpoints; None saves as often as keeps saving under 5% of the time.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._last = monotonic()
        self._wait_s = _FIRST_SAVE_S

    def due(self, step: int) -> bool:
        """Whether to save after step `step` (from 1)."""
        if self._every:
            return step % self._every == 0
        return monotonic() - self._last >= self._wait_s

    def saved(self, seconds: float) -> None:
        """A checkpoint has just been written, and took this long."""
        self._last = monotonic()
        self._wait_s = max(_FIRST_SAVE_S, seconds / _SAVING_SHARE)
