"""What a benchmark runs. Pure: names and numbers in, units of work out.

For every task, budget and method a `Search` finds the configuration and the learning rate, and
then there is a `Run` for every seed. Peers (`peft`, `torch-full`) are not searched: each repeats
our run of the same job, its counterpart, with that one's learning rate, seed and steps.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tinyft.budget import Budget
from tinyft.errors import InputError

# Labels that stand for a method and fields of it.
_ALIASES = {"mezo-exact": "mezo:trainable=all,exact=true"}
# Other people's tools, by label, and the run of ours that each repeats.
COUNTERPARTS = {"peft": "lora:base_bits=16", "torch-full": "full"}
GROUPS = {"peers": (*COUNTERPARTS, *_ALIASES)}


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        label: as it was asked for, e.g. `"lora:base_bits=16"`.
        name: the registered method, or of a peer that of its counterpart.
        fields: of the configuration, which are then not the planner's to choose.
        counterpart: of a peer, the label of the run that it repeats.
    """

    label: str
    name: str
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    counterpart: str | None = None

    @property
    def slug(self) -> str:
        """As the name of a folder."""
        return re.sub(r"[^\w.]+", "-", self.label)


@dataclass(frozen=True)
class Limits:
    """A budget, as it was written.

    Attributes:
        flops, memory: None is no limit.
    """

    flops: str | None = None
    memory: str | None = None

    @property
    def budget(self) -> Budget:
        return Budget.parse(flops=self.flops, memory=self.memory, spell=lambda name: f"--{name}")

    @property
    def slug(self) -> str:
        parts = [f"{float(self.budget.flops):.4g}".replace("+", "")] if self.flops else []
        return "-".join([*parts, self.memory or ""]).strip("-") or "no-limit"

    def __str__(self) -> str:
        flops = f"{self.budget.flops:.3g} FLOPs".replace("e+", "e") if self.flops else ""
        return ", ".join(part for part in (flops, self.memory) if part) or "no limit"


@dataclass(frozen=True)
class Search:
    """The configuration of a method inside a budget, and its learning rate."""

    task: str
    limits: Limits
    method: Method

    @property
    def search(self) -> Search:
        """Itself, as every unit of work has one."""
        return self

    def inside(self, limits: Limits) -> Search:
        """The same inside other limits."""
        return replace(self, limits=limits)

    def __str__(self) -> str:
        return f"{self.task}, {self.limits}, {self.method.label}"


@dataclass(frozen=True)
class Run:
    """One seed of it."""

    search: Search
    seed: int

    def inside(self, limits: Limits) -> Run:
        """The same inside other limits."""
        return replace(self, search=self.search.inside(limits))

    def __str__(self) -> str:
        return f"{self.search}, seed {self.seed}"


def parse_methods(words: Iterable[str], registered: Sequence[str]) -> list[Method]:
    """Methods from what `--methods` names, counterparts of peers before them.

    Args:
        words: `all`, `peers`, names, or `NAME:FIELD=VALUE,...`.
        registered: the names of our own methods.

    Raises:
        InputError: naming all that is unknown.
    """
    groups = {"all": tuple(registered), **GROUPS}
    labels: dict[str, None] = {}
    for word in words:
        for label in groups.get(word, (word,)):
            if counterpart := COUNTERPARTS.get(label):
                labels.setdefault(counterpart)
            labels.setdefault(label)
    found = [_method(label) for label in labels]
    unknown = sorted({m.name for m in found} - set(registered))
    if unknown:
        known = ", ".join(("all", "peers", *registered, *COUNTERPARTS, *_ALIASES))
        raise InputError(f"--methods {', '.join(unknown)}: unknown; there are {known}.")
    return found


def _method(label: str) -> Method:
    counterpart = COUNTERPARTS.get(label)
    name, _, rest = (counterpart or _ALIASES.get(label, label)).partition(":")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    bad = [before for before, equals, _ in pairs if not equals]
    if bad:
        raise InputError(f"--methods {label}: {bad[0]} has no value; write NAME:FIELD=VALUE,...")
    return Method(label, name, {key: _value(text) for key, _, text in pairs}, counterpart)


def _value(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def family(label: str) -> str:
    """The registered method behind a label; of a peer, that of its counterpart."""
    return _method(label).name


def budgets(flops: Sequence[str], memory: Sequence[str]) -> list[Limits]:
    """Every limit on FLOPs with every limit on memory, the smallest first.

    Raises:
        InputError: a limit that cannot be read.
    """
    found = [Limits(f, m) for f in flops or [None] for m in memory or [None]]
    amounts = {limits: limits.budget for limits in found}

    def size(limits: Limits) -> tuple[float, float]:
        return amounts[limits].flops or 0.0, amounts[limits].memory_bytes or 0

    return sorted(dict.fromkeys(found), key=size)


def units(
    tasks: Sequence[str], limits: Sequence[Limits], methods: Sequence[Method], seeds: int
) -> list[Search | Run]:
    """All work, in an order in which nothing waits for what comes later: whole budgets first, so
    that an interrupted benchmark has compared something."""
    found: list[Search | Run] = []
    for one, task, method in itertools.product(limits, tasks, methods):
        search = Search(task, one, method)
        found += [] if method.counterpart else [search]
        found += [Run(search, seed) for seed in range(seeds)]
    return found


def rates(default: float, factors: Sequence[float]) -> list[float]:
    """Learning rates to try, from the smallest."""
    return sorted({float(f"{default * factor:.6g}") for factor in factors})
