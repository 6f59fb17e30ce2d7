"""The planner against brute force: fake prices, every budget."""

from __future__ import annotations

import itertools
import random

import pytest

from tinyft.budget import Budget
from tinyft.planner import TOLERANCE, Candidate, Cost, Setting, amount, duration, nearest, plan

GROUPS, RUNGS = 3, 4


def ladder(name: str, rng: random.Random, n_groups: int) -> tuple[Candidate, dict[int, Cost]]:
    """A candidate whose groups need less and less memory, every one or, where parts of a batch may
    need more than all of it, every second one; and what each of its settings costs."""
    costs, groups = {}, []
    memory = rng.randint(500, 1000)
    n_leanest = rng.choice((1, 2))
    apart = rng.choice((-150, 150)) if n_leanest == 2 else 0
    for g in range(n_groups):
        group = []
        # A group begins leaner than the one before of its kind, and ends leaner too.
        top = memory - 40 * g + apart * (g % 2)
        for r in range(rng.randint(1, RUNGS)):
            setting = Setting({"group": g, "rung": r}, steps=rng.randint(5, 50), examples=8)
            costs[id(setting)] = Cost(
                peak_memory_bytes=top - 7 * r - 60 * g,
                breakdown={},
                flops_per_step=rng.uniform(1, 10),
                step_s=rng.uniform(1, 3) + g,
                fixed_s=rng.uniform(0, 2),
                power_w=5.0,
            )
            group.append(setting)
        groups.append(tuple(group))
    return Candidate(name, name, tuple(groups), n_leanest), costs


def worlds(n: int):
    for seed in range(n):
        rng = random.Random(seed)
        candidates, costs = [], {}
        for i in range(rng.randint(1, 5)):
            candidate, prices = ladder(f"method {i}", rng, rng.randint(1, GROUPS))
            leanest = min(prices.values(), key=lambda c: c.peak_memory_bytes)
            last = [prices[id(group[-1])] for group in candidate.groups[-candidate.n_leanest :]]
            assert leanest in last  # as `Candidate` promises
            candidates.append(candidate)
            costs |= prices
        rates = {c.name: rng.choice((None, rng.uniform(0, 1))) for c in candidates}
        budget = Budget(
            memory_bytes=rng.choice((None, rng.randint(300, 1000))),
            flops=rng.choice((None, rng.uniform(0, 300))),
            time_s=rng.choice((None, rng.uniform(0, 100))),
            energy_j=rng.choice((None, rng.uniform(0, 500))),
        )
        yield candidates, costs, rates, budget


def worth_of(rates):
    def worth(candidate: Candidate, examples: int) -> float | None:
        rate = rates[candidate.name]
        return None if rate is None else rate * examples / (examples + 100)

    return worth


def first_that_fits(candidate, costs, limit):
    """By looking at every setting in order of preference."""
    for group in candidate.groups:
        for setting in group:
            if limit is None or costs[id(setting)].peak_memory_bytes <= limit:
                return setting
    return None


def most_steps(setting, cost, budget):
    """By counting."""
    for steps in range(setting.steps, 0, -1):
        used = cost.of_steps(steps)
        if all(
            limit is None or used[name] <= limit * (1 + 1e-9)
            for name, limit in vars(budget).items()
        ):
            return steps
    return 0


def test_every_verdict_is_brute_forces():
    chosen = refused = 0
    for candidates, costs, rates, budget in worlds(400):
        worth = worth_of(rates)
        found = plan(candidates, lambda s, costs=costs: costs[id(s)], worth, budget)
        assert sorted(v.candidate.name for v in found.verdicts) == [c.name for c in candidates]
        best = 0.0
        for verdict in found.verdicts:
            setting = first_that_fits(verdict.candidate, costs, budget.memory_bytes)
            steps = setting and most_steps(setting, costs[id(setting)], budget)
            assert verdict.fits == bool(steps)
            if verdict.fits:
                assert (verdict.setting, verdict.steps) == (setting, steps)
                assert verdict.worth == worth(verdict.candidate, steps * 8)
                best = max(best, verdict.worth or 0.0)
            else:
                # What is said to be enough is enough, and less is not.
                least = {k: v for k, v in vars(budget).items() if v is not None} | verdict.least
                again = plan(
                    [verdict.candidate], lambda s, c=costs: c[id(s)], worth, Budget(**least)
                )
                assert again.chosen is not None
                assert again.chosen.steps >= 1
                for name, value in verdict.least.items():
                    assert value > getattr(budget, name)
                if "memory_bytes" in verdict.least:
                    settings = itertools.chain(*verdict.candidate.groups)
                    needs = min(costs[id(s)].peak_memory_bytes for s in settings)
                    assert verdict.least["memory_bytes"] == needs
                # What it is shown with is what it would take if it had just the memory.
                roomy = Budget(**(vars(budget) | {"memory_bytes": None}))
                steps = most_steps(verdict.setting, costs[id(verdict.setting)], roomy)
                assert verdict.steps == max(1, steps)
                assert bool(steps) == (set(verdict.least) == {"memory_bytes"})
                refused += 1
        fitting = [v for v in found.verdicts if v.fits]
        if not fitting:
            assert found.chosen is None
            continue
        equal = [v for v in fitting if (v.worth or 0.0) >= best - TOLERANCE]
        assert found.chosen in equal
        assert found.chosen.totals["time_s"] == min(v.totals["time_s"] for v in equal)
        assert found.verdicts[0] is found.chosen
        chosen += 1
    assert chosen > 100
    assert refused > 100


def test_few_prices_are_asked_for():
    """A trace takes time: one where the first setting fits; where nothing does, it and the
    leanest."""
    for candidates, costs, rates, _ in worlds(50):
        for limit, leanest in ((10_000, False), (1, True)):
            asked: list[int] = []

            def price(setting, asked=asked, costs=costs):
                asked.append(id(setting))
                return costs[id(setting)]

            for candidate in candidates:
                asked.clear()
                plan([candidate], price, worth_of(rates), Budget(memory_bytes=limit))
                most = 1 + leanest * candidate.n_leanest
                assert len(asked) == len(set(asked)) <= most


def test_reasons_say_what_decided():
    def candidate(name, memory, seconds, rate):
        setting = Setting({}, steps=10, examples=8)
        return Candidate(name, name, ((setting,),)), Cost(memory, {}, 1.0, seconds), rate

    rows = [
        candidate("good", 100, 2.0, 0.9),
        candidate("as good and quicker", 100, 1.0, 0.895),
        candidate("poor", 100, 0.1, 0.5),
        candidate("unknown", 100, 0.1, None),
        candidate("large", 300 << 20, 0.1, 1.0),
    ]
    prices = {id(c.groups[0][0]): cost for c, cost, _ in rows}
    rates = {c.name: rate for c, _, rate in rows}
    found = plan(
        [c for c, _, _ in rows],
        lambda s: prices[id(s)],
        lambda c, _: rates[c.name],
        Budget(memory_bytes=200),
    )
    assert found.verdicts[0].candidate.name == "as good and quicker"
    reasons = {v.candidate.name: v.reason for v in found.verdicts}
    assert reasons == {
        "as good and quicker": "learns most: 90% of the best known, the quickest of 2 such",
        "good": "takes 2x the time",
        "poor": "learns less: 50%",
        "unknown": "no evidence of what it learns",
        "large": "needs 300 MiB",
    }


def test_nearest_lists_what_is_missing():
    rows = {}
    candidates = []
    for name, memory in (("far", 900), ("near", 400), ("middle", 600)):
        setting = Setting({}, 1, 1)
        rows[id(setting)] = Cost(memory, {}, 50.0, 1.0)
        candidates.append(Candidate(name, name, ((setting,),)))
    found = plan(
        candidates, lambda s: rows[id(s)], lambda *_: None, Budget(memory_bytes=300, flops=49.0)
    )
    assert found.chosen is None
    lacks = [(v.candidate.name, name, need) for v, name, need, _ in nearest(found)]
    assert lacks == [
        *itertools.chain.from_iterable(
            ((name, "memory_bytes", memory), (name, "flops", 50.0))
            for name, memory in (("near", 400), ("middle", 600), ("far", 900))
        )
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory_bytes", 1 << 30, "1,024 MiB"),
        ("flops", 1.5e15, "1.5e+15 FLOPs"),
        ("time_s", 95, "1 min 35 s"),
        ("time_s", 3.14159, "3.1 s"),
        ("time_s", 7260, "2 h 1 min"),
        ("energy_j", 3600, "1 Wh"),
    ],
)
def test_amounts_are_readable(name, value, text):
    assert amount(name, value) == text
    if name == "time_s":
        assert duration(value) == text
