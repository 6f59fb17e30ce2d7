"""Which method, and how it is set, for a budget. Pure: candidates and their costs in, a plan out.

A `Candidate` is a way to train, with its settings from the most comfortable to the leanest. Memory
decides how lean it must be, FLOPs and time how many steps are left, and measured learning curves
what those steps are worth. Of what is worth the same within `TOLERANCE` the quickest is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinyft.budget import Budget

TOLERANCE = 0.01  # of the whole way from the untrained model to the best known


@dataclass(frozen=True)
class Cost:
    """What one setting takes.

    Attributes:
        peak_memory_bytes: of steps and evaluations.
        breakdown: of the peak of a step, by kind; sums to `peak_memory_bytes` unless an evaluation
            takes more.
        flops_per_step, step_s: of a mean step.
        fixed_s: whatever the number of steps: starting, evaluating before and after.
        power_w: under load, None if unknown.
    """

    peak_memory_bytes: int
    breakdown: Mapping[str, int]
    flops_per_step: float
    step_s: float
    fixed_s: float = 0.0
    power_w: float | None = None

    def of_steps(self, steps: int) -> dict[str, float]:
        """Each limited quantity, by the name of its field in `Budget`, after so many steps."""
        wall_s = self.fixed_s + steps * self.step_s
        found = {
            "memory_bytes": float(self.peak_memory_bytes),
            "flops": steps * self.flops_per_step,
            "time_s": wall_s,
        }
        return found if self.power_w is None else {**found, "energy_j": wall_s * self.power_w}


@dataclass(frozen=True)
class Setting:
    """A flat configuration, the steps wanted of it, and the examples that each of them sees."""

    config: Mapping[str, Any]
    steps: int
    examples: int


@dataclass(frozen=True)
class Candidate:
    """A way to train.

    Attributes:
        name: of the method and what sets it apart, e.g. `"lora, 4-bit base, bfloat16"`.
        method: its name alone.
        groups: of settings; earlier groups are preferred. In each the first needs least time, and
            every setting needs less memory than the one before.
        n_leanest: of the last so many groups one's last setting needs least of all.
    """

    name: str
    method: str
    groups: tuple[tuple[Setting, ...], ...]
    n_leanest: int = 1

    @property
    def leanest(self) -> tuple[Setting, ...]:
        """One of these needs least of all."""
        return tuple(group[-1] for group in self.groups[-self.n_leanest :])


@dataclass(frozen=True)
class Verdict:
    """What became of a candidate.

    Attributes:
        setting: the most comfortable one that fits; where none does, the leanest.
        cost: of that.
        steps: at most those wanted, that the limits afford which it keeps to; 1 where not even
            one is afforded.
        worth: of them, from 0 (untrained) to 1 (the best known); None without evidence.
        fits: whether it could be chosen.
        least: of each limit that it broke, what would have let it in.
        reason: why it was chosen, or not.
    """

    candidate: Candidate
    setting: Setting
    cost: Cost
    steps: int
    worth: float | None
    fits: bool
    least: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def totals(self) -> dict[str, float]:
        """Memory, FLOPs, time and energy of so many steps."""
        return self.cost.of_steps(self.steps)


@dataclass(frozen=True)
class Plan:
    """The choice (None if nothing fits), and all verdicts: the chosen, what fits, what does not."""

    budget: Budget
    chosen: Verdict | None
    verdicts: tuple[Verdict, ...]


Price = Callable[[Setting], Cost]
Worth = Callable[[Candidate, int], float | None]


def plan(candidates: Sequence[Candidate], price: Price, worth: Worth, budget: Budget) -> Plan:
    """Choose among the candidates.

    Args:
        candidates: at least one; with equal worth and time the earlier one wins.
        price: the cost of a setting; asked for few, since it takes time to find out.
        worth: what a candidate has learned from so many examples.
        budget: the limits.
    """
    return choose([judge(candidate, price, worth, budget) for candidate in candidates], budget)


def choose(verdicts: Sequence[Verdict], budget: Budget) -> Plan:
    """The plan that follows from each candidate's own verdict, from `judge`."""
    fitting = sorted((v for v in verdicts if v.fits), key=lambda v: -(v.worth or 0.0))
    others = sorted((v for v in verdicts if not v.fits), key=lambda v: _excess(v, budget))
    if not fitting:
        return Plan(budget, None, tuple(others))
    best = fitting[0].worth or 0.0
    equal = [v for v in fitting if (v.worth or 0.0) >= best - TOLERANCE]
    chosen = min(equal, key=lambda v: v.totals["time_s"])
    rest = [replace(v, reason=_why_not(v, chosen)) for v in fitting if v is not chosen]
    chosen = replace(chosen, reason=_why(chosen, equal, fitting))
    return Plan(budget, chosen, (chosen, *rest, *others))


def judge(candidate: Candidate, price: Price, worth: Worth, budget: Budget) -> Verdict:
    """Whether a candidate fits, how comfortably, and for how many steps; of no other's concern.

    Args: as for `plan`.
    """
    setting, cost = _roomiest(candidate, price, budget.memory_bytes)
    limits = budget.limits
    none, one = cost.of_steps(0), cost.of_steps(1)
    least = {k: one[k] for k, limit in limits.items() if one.get(k, 0.0) > limit}
    steps = setting.steps
    for name in ("flops", "time_s", "energy_j"):
        if name in limits and one.get(name):
            room = (limits[name] - none[name]) / (one[name] - none[name])
            steps = min(steps, max(1, int(room + 1e-9)))
    if not least:
        return Verdict(
            candidate, setting, cost, steps, worth(candidate, steps * setting.examples), True
        )
    needs = " and ".join(amount(name, value) for name, value in least.items())
    step = "" if set(least) == {"memory_bytes"} else " for one step"
    return Verdict(candidate, setting, cost, steps, None, False, least, f"needs {needs}{step}")


def _roomiest(candidate: Candidate, price: Price, limit: int | None) -> tuple[Setting, Cost]:
    """The first setting that stays in `limit`; where none does, the one that needs least."""
    asked: dict[int, Cost] = {}

    def cost(setting: Setting) -> Cost:
        if id(setting) not in asked:
            asked[id(setting)] = price(setting)
        return asked[id(setting)]

    def fits(setting: Setting) -> bool:
        return limit is None or cost(setting).peak_memory_bytes <= limit

    found = candidate.groups[0][0]
    if not fits(found):
        if any(map(fits, candidate.leanest)):
            group = next(group for group in candidate.groups if fits(group[-1]))
            low, high = 0, len(group) - 1  # group[high] fits, and so does all after what fits
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if fits(group[middle]) else (middle + 1, high)
            found = group[high]
        else:
            found = min(candidate.leanest, key=lambda one: cost(one).peak_memory_bytes)
    return found, cost(found)


def _excess(verdict: Verdict, budget: Budget) -> float:
    """How many times the budget it needs of what it lacks most."""
    limits = vars(budget)
    return max(value / limits[name] for name, value in verdict.least.items())


def _why(chosen: Verdict, equal: Sequence[Verdict], fitting: Sequence[Verdict]) -> str:
    if len(fitting) == 1:
        return "the only one that fits"
    if chosen.worth is None:
        return "the quickest of those that fit; nothing is known of how much they learn"
    quickest = "" if len(equal) == 1 else f", the quickest of {len(equal)} such"
    return f"learns most: {_percent(chosen.worth)} of the best known{quickest}"


def _why_not(verdict: Verdict, chosen: Verdict) -> str:
    if verdict.worth is None and chosen.worth is not None:
        return "no evidence of what it learns"
    if verdict.worth is None or verdict.worth >= (chosen.worth or 0.0) - TOLERANCE:
        ratio = verdict.totals["time_s"] / max(chosen.totals["time_s"], 1e-9)
        return f"takes {ratio:.2g}x the time"
    return f"learns less: {_percent(verdict.worth)}"


def _percent(share: float) -> str:
    return f"{share:.0%}"


def amount(name: str, value: float) -> str:
    """A quantity of `Budget`, by the name of its field, for people."""
    if name == "memory_bytes":
        return f"{value / 2**20:,.0f} MiB"
    if name == "flops":
        return f"{value:.3g} FLOPs"
    return duration(value) if name == "time_s" else f"{value / 3600:.3g} Wh"


def duration(seconds: float) -> str:
    """`95` -> `"1 min 35 s"`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def nearest(plan: Plan) -> Iterator[tuple[Verdict, str, float, float]]:
    """Of a plan in which nothing fits, nearest first: what lacks, which limit, the need, the
    limit."""
    for verdict in plan.verdicts:
        for name, value in verdict.least.items():
            yield verdict, name, value, getattr(plan.budget, name)
