"""What the rows say: means and spreads, Pareto fronts, and the planner's regret. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyft.benchmark.grid import COUNTERPARTS, family

PEERS = frozenset(COUNTERPARTS)  # other people's tools
HIGHER = frozenset({"accuracy"})  # metrics of which more is better

_SETTING = ("trainable", "dtype", "base_bits")


@dataclass(frozen=True)
class Point:
    """All seeds of a method inside a budget.

    Attributes:
        flops_limit, memory_limit_bytes: of the budget, 0 where there is none.
        values: the metric after training, a seed each.
        before: its mean before.
        flops, train_s, elapsed_s, energy_j, co2_g: means; `train_s` is of the steps alone.
        peak_memory_bytes: the largest.
        search_flops: of the search that set the learning rate, once for all seeds.
        lr, lr_at_edge: that rate, and whether it was the smallest or largest tried.
        fits: whether every seed stayed within the limit on memory.
        setting: what was trained, in which precision, on a base of how many bits.
    """

    task: str
    budget: str
    flops_limit: float
    memory_limit_bytes: float
    method: str
    metric: str
    values: tuple[float, ...]
    before: float
    steps: float
    flops: float
    train_s: float
    elapsed_s: float
    energy_j: float
    co2_g: float
    peak_memory_bytes: float
    loaded_memory_bytes: float
    search_flops: float
    lr: float
    lr_at_edge: bool
    fits: bool
    setting: tuple[Any, ...]

    @property
    def value(self) -> float:
        return statistics.mean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def score(self) -> float:
        """The value, or its negative: more is better."""
        return self.value if self.metric in HIGHER else -self.value


@dataclass(frozen=True)
class Choice:
    """What the planner chooses by itself, and what that costs in quality.

    Attributes:
        candidate: as the planner calls it.
        method: of ours, whose runs inside the budget stand for the choice.
        value, best_value: the metric of both; None where the method was not run.
        regret: how much better the best was, in units of the metric.
    """

    task: str
    budget: str
    candidate: str
    method: str
    metric: str
    value: float | None
    best: str
    best_value: float
    regret: float | None


CHOICE = tuple(Choice.__dataclass_fields__)


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Of the finished runs, in the order of budgets and methods."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["stage"] == "run" and row["status"] == "done":
            groups.setdefault((row["task"], row["budget"], row["method"]), []).append(row)
    found = [_point(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda p: (p.task, p.flops_limit, p.memory_limit_bytes))


def _point(task: str, budget: str, method: str, rows: Sequence[Mapping[str, Any]]) -> Point:
    def mean(name: str) -> float:
        return statistics.mean(row[name] for row in rows)

    first = rows[0]
    limit = first["memory_limit_bytes"] or 0.0
    peak = max(row["peak_memory_bytes"] for row in rows)
    names = ("before", "steps", "flops", "train_s", "elapsed_s", "energy_j", "co2_g")
    return Point(
        task,
        budget,
        first["flops_limit"] or 0.0,
        limit,
        method,
        metric=first["metric"],
        values=tuple(row["after"] for row in rows),
        **{name: mean(name) for name in names},
        peak_memory_bytes=peak,
        loaded_memory_bytes=max(row["loaded_memory_bytes"] for row in rows),
        search_flops=first["search_flops"] or 0,
        lr=first["lr"],
        lr_at_edge=bool(first["lr_at_edge"]),
        fits=not limit or peak <= limit,
        setting=tuple(first[name] for name in _SETTING),
    )


def front(points: Sequence[Point], cost: Callable[[Point], float]) -> list[Point]:
    """Those that no other beats at no more cost, the cheapest first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (cost(p), -p.score)):
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def best(points: Sequence[Point]) -> Point | None:
    """The best of ours within the limits."""
    ours = [p for p in points if p.fits and p.method not in PEERS]
    return max(ours, key=lambda p: p.score, default=None)


def choices(plans: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> list[Choice]:
    """The planner's choice of every budget in which something was run."""
    found = []
    for plan in plans:
        here = [p for p in points if (p.task, p.budget) == (plan["task"], plan["budget"])]
        top = best(here)
        if top is None or "method" not in plan:
            continue
        own = _own(plan, here)
        found.append(
            Choice(
                plan["task"],
                plan["budget"],
                plan["candidate"],
                own.method if own else plan["method"],
                top.metric,
                own and own.value,
                top.method,
                top.value,
                None if own is None else max(0.0, top.score - own.score),
            )
        )
    order = list(dict.fromkeys((p.task, p.budget) for p in points))
    return sorted(found, key=lambda c: order.index((c.task, c.budget)))


def _own(plan: Mapping[str, Any], here: Sequence[Point]) -> Point | None:
    """The runs of what the planner chose: of the method by itself, or of a variant that is the
    same."""
    setting = tuple(plan["config"][name] for name in _SETTING)
    same = [
        p
        for p in here
        if p.method not in PEERS and family(p.method) == plan["method"] and p.setting == setting
    ]
    return next((p for p in here if p.method == plan["method"]), next(iter(same), None))


@dataclass(frozen=True)
class Comparison:
    """A peer and our run of the same job, in one budget.

    Attributes:
        time, memory, beyond: our share of the peer's time a step, peak of the process, and peak
            beyond the loaded model.
        ours_value, value: the metric of both.
    """

    task: str
    budget: str
    peer: str
    ours: str
    time: float
    memory: float
    beyond: float
    metric: str
    ours_value: float
    value: float


def comparisons(points: Sequence[Point], counterparts: Mapping[str, str]) -> list[Comparison]:
    """Peers beside the runs that they repeat."""
    by_key = {(p.task, p.budget, p.method): p for p in points}
    found = []
    for p in points:
        ours = by_key.get((p.task, p.budget, counterparts.get(p.method, "")))
        if ours is None:
            continue
        found.append(
            Comparison(
                *(p.task, p.budget, p.method, ours.method),
                time=(ours.train_s / ours.steps) / (p.train_s / p.steps),
                memory=ours.peak_memory_bytes / p.peak_memory_bytes,
                beyond=(ours.peak_memory_bytes - ours.loaded_memory_bytes)
                / max(1.0, p.peak_memory_bytes - p.loaded_memory_bytes),
                metric=p.metric,
                ours_value=ours.value,
                value=p.value,
            )
        )
    return found
