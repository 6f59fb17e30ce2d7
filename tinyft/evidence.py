"""What is known of how much each method learns: curves that the benchmarks measured.

`evidence.json` holds, for each task, the held-out loss of every method after so many training
examples. What they are worth is a share of the way: 0 where the untrained model stands, 1 at the
lowest loss that any method reached on that task.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean
from typing import Any

_FILE = Path(__file__).with_name("evidence.json")


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        task, kind, model, seed: what was learned, of which kind its rows are once encoded ("lm",
            "choice" or "class"), by what, and the run's seed.
        config: the fields that set the run apart: the method, what it trained, the precision.
        examples: seen in training when `loss` was measured, from 0 on, `(N,)`.
        loss: held out, `(N,)`.
    """

    task: str
    kind: str
    model: str
    seed: int
    config: Mapping[str, Any]
    examples: tuple[int, ...]
    loss: tuple[float, ...]

    @cached_property
    def expected(self) -> tuple[float, ...]:
        """`loss` without its ups and downs: of all that never rise the nearest (isotonic
        regression). What a hundred held-out rows say of one run wobbles by more than methods
        differ."""
        level: list[tuple[float, int]] = []
        for value in self.loss:
            level.append((value, 1))
            while len(level) > 1 and level[-2][0] < level[-1][0]:
                (a, n), (b, m) = level[-2:]
                level[-2:] = [((n * a + m * b) / (n + m), n + m)]
        return tuple(value for value, n in level for _ in range(n))

    def loss_after(self, n: int) -> float:
        """Expected after `n` examples; between points linear in the logarithm of `n`, after the
        last one nothing more is learned."""
        here = [math.log1p(x) for x in self.examples]
        x = min(math.log1p(max(n, 0)), here[-1])
        i = max(1, next(i for i, at in enumerate(here) if at >= x))
        part = (x - here[i - 1]) / (here[i] - here[i - 1])
        return self.expected[i - 1] + part * (self.expected[i] - self.expected[i - 1])


def parse(text: str) -> tuple[Curve, ...]:
    """The curves of `evidence.json`'s text."""
    rows: list[dict[str, Any]] = json.loads(text)["curves"]
    tuples = {"examples", "loss"}
    return tuple(
        Curve(**{k: tuple(v) if k in tuples else v for k, v in row.items()}) for row in rows
    )


@cache
def curves() -> tuple[Curve, ...]:
    """The repository's own."""
    return parse(_FILE.read_text())


def worth(
    config: Mapping[str, Any],
    examples: int,
    known: Sequence[Curve] | None = None,
    *,
    kind: str | None = None,
) -> float | None:
    """Mean over the tasks of what so many examples are worth to a method.

    Of the runs in which the method trained the same (all, adapters) those on rows of the same kind
    count, if there are any: what learns a text best is not what learns to choose best. Of these
    those that have most in common with `config`, in the order in which the fields stand in a curve:
    the base's bits first, then the precision.

    Args:
        config: flat; holds `method`.
        examples: seen in training, repetitions counted.
        known: curves; the repository's if None.
        kind: of the rows; None: any.

    Returns:
        None if no such run was measured.
    """
    known = curves() if known is None else known
    of_method = [
        curve
        for curve in known
        if all(curve.config.get(name) == config.get(name) for name in ("method", "trainable"))
    ]
    alike = [curve for curve in of_method if curve.kind == kind] or of_method
    by_task: dict[str, list[float]] = {}
    for task in dict.fromkeys(curve.task for curve in alike):
        best = min(min(curve.expected) for curve in known if curve.task == task)
        for curve in _nearest(config, [curve for curve in alike if curve.task == task]):
            # Of the model as it came: a base in few bits begins behind it.
            start = min(one.loss[0] for one in known if (one.task, one.seed) == (task, curve.seed))
            by_task.setdefault(task, []).append(
                (start - curve.loss_after(examples)) / (start - best)
            )
    return mean(map(mean, by_task.values())) if by_task else None


def _nearest(config: Mapping[str, Any], known: Sequence[Curve]) -> Sequence[Curve]:
    """Those that agree with `config` in most fields, early fields first."""
    for name in dict.fromkeys(name for curve in known for name in curve.config):
        same = [c for c in known if name in c.config and c.config[name] == config.get(name)]
        known = same or known
    return known
