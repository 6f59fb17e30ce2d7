"""From what a person has and wants to a plan: candidates, their prices, and the choice among them.

`make_plan` takes what `TrainConfig.build` takes, and leaves free what is not given. Everything that
is given is kept: the method, the precision, the examples of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from tinyft.budget import Budget
from tinyft.config import LIMITS, TrainConfig
from tinyft.data import Encoded, encode, encode_held_out
from tinyft.errors import BudgetError, InputError
from tinyft.evidence import worth
from tinyft.inputs import read_source
from tinyft.machine import Machine, import_libraries, this_machine
from tinyft.memory import anonymous_bytes, trim
from tinyft.models import check_rows, outline
from tinyft.optim import METHODS
from tinyft.parallel import in_parallel
from tinyft.planner import (
    TOLERANCE,
    Candidate,
    Cost,
    Plan,
    Setting,
    Verdict,
    amount,
    choose,
    judge,
    nearest,
)
from tinyft.pricing import Job, Trace, trace
from tinyft.targets.profiles import profile

# What a run's process takes beyond what `Machine` and `Trace` know of: scratch memory of the
# library's products, the programs that it compiles for those of 16-bit numbers, holes that
# unpacked weights and moments leave in the heap, and others (`HeapWatch` would let be more).
# Measured over `bench/plan_accuracy.py`; a small model needs less.
_SCRATCH_BYTES, _COMPILED_BYTES, _UNPACKED_BYTES = 28 << 20, 32 << 20, 32 << 20
_HOLES_BYTES = 48 << 20
_ROOM_TO_FORK_BYTES = 1 << 30
_MANY = 10**9  # examples: all that a curve tells
# Fields that a plan chooses where they are not given, and the shortest rows that it proposes.
_CHOICES = (
    *("method", "trainable", "base_bits", "dtype", "batch_size", "grad_accumulation"),
    *("checkpointing", "optimizer"),
)
_SHORTEST = 16
_LASTING = ("weights", "optimizer")  # kinds of memory that leave no holes
Each = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Planned:
    """A plan for a job on a machine.

    Attributes:
        plan: the verdicts.
        machine: that it is for.
        left_out: candidates that what was given rules out, and why.
        ways_out: where nothing fits, what else than a larger budget would help.
        rows: fields that were given as rows, which `config` leaves out.
    """

    plan: Plan
    machine: Machine
    left_out: Mapping[str, str]
    ways_out: tuple[str, ...] = ()
    rows: frozenset[str] = frozenset()

    @cached_property
    def config(self) -> dict[str, Any]:
        """Flat values for `TrainConfig.build`, also on top of those that were planned for, with the
        limits that were given.

        Raises:
            BudgetError: nothing fits; it says what comes nearest.
        """
        if self.plan.chosen is None:
            raise BudgetError(self._nothing_fits())
        chosen = self.plan.chosen
        config = {**chosen.setting.config, "steps": chosen.steps, "epochs": None}
        return {k: v for k, v in config.items() if k not in self.rows}

    def _nothing_fits(self) -> str:
        """What comes nearest, and what would be enough."""
        lines = ["Nothing fits the budget."]
        for verdict, name, need, limit in itertools.islice(nearest(self.plan), 3):
            lines.append(
                f"{verdict.candidate.name} needs {amount(name, need)}, "
                f"{amount(name, need - limit)} more than the {amount(name, limit)} given."
            )
        if self.ways_out:
            ways = "; ".join(self.ways_out)
            lines.append(f"{ways[:1].upper()}{ways[1:]}.")
        return " ".join(lines)

    @staticmethod
    def knobs(method: str) -> tuple[str, ...]:
        """The method's own options that a plan decides."""
        return tuple(_knobs(METHODS[method]))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `tinyft plan --json` prints them."""
        chosen = self.plan.chosen
        return {
            "machine": self.machine.name,
            "budget": self.plan.budget.limits,
            "method": chosen and chosen.candidate.method,
            "config": chosen and self.config,
            "predicted": chosen and _predicted(chosen),
            "candidates": [
                {
                    "name": verdict.candidate.name,
                    "method": verdict.candidate.method,
                    "config": dict(verdict.setting.config),
                    "fits": verdict.fits,
                    "reason": verdict.reason,
                    "least_budget": dict(verdict.least),
                    "predicted": _predicted(verdict),
                }
                for verdict in self.plan.verdicts
            ],
            "left_out": dict(self.left_out),
            "ways_out": list(self.ways_out),
        }


def _predicted(verdict: Verdict) -> dict[str, Any]:
    totals = verdict.totals
    return {
        "peak_memory_bytes": verdict.cost.peak_memory_bytes,
        "breakdown": dict(verdict.cost.breakdown),
        "steps": verdict.steps,
        "flops_per_step": verdict.cost.flops_per_step,
        "total_flops": totals["flops"],
        "step_s": verdict.cost.step_s,
        "wall_s": totals["time_s"],
        "energy_j": totals.get("energy_j"),
        "worth": verdict.worth,
    }


def make_plan(
    values: Mapping[str, Any],
    budget: Budget | None = None,
    *,
    target: str | None = None,
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    spell: Callable[[str], str] = str,
    may_fork: bool = False,
) -> Planned:
    """Plan a run.

    Args:
        values: flat, as for `TrainConfig.build`; `method` may be `"auto"` or missing.
        budget: the limits; those among `values` if None. Memory without one is what the machine
            has free.
        target: a device profile's name; this machine if None.
        rows: `{"data": rows, "eval_data": rows}` in place of the files.
        spell: how errors name a field.
        may_fork: whether this process has no threads of its own (`tinyft.parallel`): planning is
            then shared among processes, where the memory has room for them.

    Raises:
        InputError: bad input, or values that no method can do together.
    """
    given = {k: v for k, v in values.items() if v is not None and (k, v) != ("method", "auto")}
    if budget is not None:  # as fields, so that a run of what is planned has its limits
        given = {k: v for k, v in given.items() if k not in LIMITS} | budget.written
    first = _first_valid(given, spell)
    budget = first.budget
    machine = Machine.of_target(profile(target)) if target else this_machine()
    if budget.memory_bytes is None:
        budget = replace(budget, memory_bytes=machine.memory_bytes)
    if budget.energy_j and machine.power_w is None:
        why = "" if target else ": its counters (RAPL) are missing or may not be read"
        raise InputError(
            f"{spell('energy')} needs to know what the machine draws, and of {machine.name} that "
            f"is not known{why}. Limit the time instead ({spell('time')})."
        )
    job = _job(first, rows or {})
    roomy = target or budget.memory_bytes >= _ROOM_TO_FORK_BYTES
    each = in_parallel if may_fork and roomy else map
    found = _planned(given, budget, machine, job, spell, each)
    if found.plan.chosen is None:
        found = replace(found, ways_out=_ways_out(found, given, job, rows or {}, spell, each))
    return replace(found, rows=frozenset(rows or {}))


def _planned(
    given: Mapping[str, Any],
    budget: Budget,
    machine: Machine,
    job: Job,
    spell: Callable[[str], str],
    each: Each,
    *,
    leanest: bool = False,
) -> Planned:
    """`leanest`: of every candidate ask for the settings alone of which one needs least."""
    candidates, left_out = _candidates(given, job, machine, spell)
    if leanest:
        candidates = [
            replace(one, groups=tuple((setting,) for setting in one.leanest)) for one in candidates
        ]
    _ = job.few_layers  # found out once, for all processes

    def price(setting: Setting) -> Cost:
        config = TrainConfig.build(setting.config, spell=spell)
        return _cost(trace(config, job), config, job, machine)

    def judged(candidate: Candidate, examples: int) -> float | None:
        return worth(candidate.groups[0][0].config, examples, kind=job.encoded.kind)

    def verdict(candidate: Candidate) -> Verdict | str:
        try:
            found = judge(candidate, price, judged, budget)
            config = TrainConfig.build(found.setting.config, spell=spell)
            lr = config.with_lr(job.outline.config, found.steps).lr
            setting = replace(found.setting, config={**found.setting.config, "lr": lr})
            return replace(found, setting=setting)
        except InputError as error:  # of the method, about this model or these data
            return str(error)

    found = [*zip(candidates, each(verdict, candidates), strict=True)]
    left_out |= {one.name: said for one, said in found if isinstance(said, str)}
    verdicts = [said for _, said in found if not isinstance(said, str)]
    if not verdicts:
        raise InputError(next(iter(left_out.values())))
    return Planned(choose(verdicts, budget), machine, left_out)


def _ways_out(
    found: Planned,
    given: Mapping[str, Any],
    job: Job,
    rows: Mapping[str, Any],
    spell: Callable[[str], str],
    each: Each,
) -> tuple[str, ...]:
    """Single changes to what is given that would let something fit."""

    def fitting(changed: Mapping[str, Any], job: Job | None = job) -> str | None:
        try:
            if job is None:
                job = _job(_first_valid(changed, spell), rows)
            budget, machine = found.plan.budget, found.machine
            plan = _planned(changed, budget, machine, job, spell, each, leanest=True).plan
        except InputError:
            return None
        return plan.chosen and plan.chosen.candidate.name

    ways = []
    for name in _CHOICES:  # none of them changes what is to be learned
        if name in given and (fits := fitting({k: v for k, v in given.items() if k != name})):
            ways.append(f"without {spell(name)} {given[name]}, {fits} fits")
    length = max(item.length for item in job.encoded.items)
    while (length := length // 2) >= _SHORTEST:
        if fits := fitting({**given, "max_length": length}, job=None):
            ways.append(f"with {spell('max_length')} {length}, {fits} fits")
            break
    return tuple(ways)


def _names(given: Mapping[str, Any]) -> list[str]:
    """The methods to choose among."""
    return [given["method"]] if "method" in given else list(METHODS)


def _first_valid(given: Mapping[str, Any], spell: Callable[[str], str]) -> TrainConfig:
    """A configuration that what is given allows, of the first method that can do it."""
    error = None
    for name in _names(given):
        try:
            return TrainConfig.build({**given, "method": name}, spell=spell)
        except InputError as found:
            error = error or found
    assert error is not None
    raise error


def _job(config: TrainConfig, rows: Mapping[str, Any]) -> Job:
    """Model and data, and what holding them takes."""
    import_libraries()  # which `Machine.process_bytes` counts
    trim()
    before = anonymous_bytes()
    model = outline(config.model)
    shape = {"max_length": config.max_length, "encoder": model.kind == "encoder"}

    def read(name: str, encode: Callable[..., Encoded], **more: Any) -> Encoded | None:
        examples, _ = read_source(getattr(config, name), rows.get(name), config.skip_bad_rows)
        more |= {"objective": config.objective, **shape}
        return examples and encode(examples, model.tokenizer, **more)

    encoded = read("data", encode)
    held_out = read("eval_data", encode_held_out, trained=encoded)
    trim()
    process_bytes = max(0, anonymous_bytes() - before)
    with torch.device("meta"):
        shapes = model.build(model.dtype)
    for part in filter(None, (encoded, held_out)):
        check_rows(shapes, part, for_prefix=config.trainable == "prefix")
    return Job(model, encoded, held_out, process_bytes=process_bytes)


def _cost(found: Trace, config: TrainConfig, job: Job, machine: Machine) -> Cost:
    """On this machine, of a mean step of the run."""
    process = machine.process_bytes + job.process_bytes
    in_pieces = config.base_bits < 16 or config.optimizer == "adamw8bit"
    process += machine.packing_bytes if in_pieces else 0
    passing = sum(n for kind, n in found.bytes_by_kind.items() if kind not in _LASTING)
    scratch = _SCRATCH_BYTES
    scratch += _COMPILED_BYTES if config.dtype in machine.compiled_dtypes else 0
    packed = METHODS[config.method].packs_base and config.trainable == "lora"
    scratch += _UNPACKED_BYTES if in_pieces or packed else 0
    scratch = min(scratch, found.bytes_by_kind["weights"] // 2)
    library = scratch + min(_HOLES_BYTES, passing)
    per_step = config.batch_size * config.grad_accumulation
    share = job.tokens_per_step(per_step, config.seed) / found.step.tokens
    fixed_s = machine.startup_s
    if found.evaluation:  # before and after
        passes = 2 * job.held_out_tokens / found.evaluation.tokens
        fixed_s += passes * machine.seconds(found.evaluation)
    return Cost(
        peak_memory_bytes=process + library + found.peak_bytes,
        breakdown={"process": process, "library": library, **found.bytes_by_kind},
        flops_per_step=share * found.step.flops,
        step_s=share * machine.seconds(found.step),
        fixed_s=fixed_s,
        power_w=machine.power_w,
    )


# Candidates.


def _candidates(
    given: Mapping[str, Any],
    job: Job,
    machine: Machine,
    spell: Callable[[str], str],
) -> tuple[list[Candidate], dict[str, str]]:
    """Every way that what is given leaves open, and the methods that it rules out."""
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    for name in _names(given):
        if reason := METHODS[name].obstacle(job.outline.config):
            left_out[name] = reason
            continue
        variants = _variants(METHODS[name], given, machine, job.encoded.kind)
        for variant in (v | own for own in _settings(METHODS[name], given) for v in variants):
            base = {**given, **variant, "method": name}
            try:
                config = TrainConfig.build(base, spell=spell)
            except InputError as error:
                left_out.setdefault(name, str(error))
                continue
            found.append(_candidate(config, base, given, job))
    for candidate in found:
        left_out.pop(candidate.method, None)
    if not found:
        raise InputError(next(iter(left_out.values())))
    return found, left_out


def _variants(
    method: Any, given: Mapping[str, Any], machine: Machine, kind: str
) -> list[dict[str, Any]]:
    """What is trained, on a base of how many bits, in which precision."""
    sets = [method.needs] if method.needs else list(method.default_lr)
    if method.uses_gradients and not method.packs_base:
        sets = sets[:1]
    found = []
    for trainable in [given["trainable"]] if "trainable" in given else sets:
        if trainable == "prefix" and "trainable" not in given:
            continue
        # Adapters without gradients are for what a packed base alone makes possible.
        packed = (8, 4) if method.uses_gradients else (4,)
        plain = (16,) if method.uses_gradients or trainable == "all" else ()
        bits = (*plain, *packed) if trainable == "lora" and not method.packs_base else (16,)
        for base_bits in [given["base_bits"]] if "base_bits" in given else bits:
            variant = {"trainable": trainable, "base_bits": int(base_bits)}
            dtypes = [given.get("dtype", "auto")]
            if dtypes == ["auto"]:
                dtypes = _dtypes({"method": method.name, **variant}, machine, kind)
            found += [{**variant, "dtype": dtype} for dtype in dtypes]
    return found


def _dtypes(config: Mapping[str, Any], machine: Machine, kind: str) -> list[str]:
    """Those of which either may be the better choice, for rows of a kind."""
    fastest = max(("float32", "bfloat16"), key=lambda d: machine.flops_per_s.get(d, 0.0))
    if config["base_bits"] < 16:
        return [fastest]  # packed weights are multiplied in it
    if fastest == "float32":
        return ["float32", "bfloat16"]  # the other is smaller
    learned = {d: worth({**config, "dtype": d}, _MANY, kind=kind) for d in ("float32", fastest)}
    precise, fast = (learned[d] or 0.0 for d in ("float32", fastest))
    return [fastest, "float32"] if precise > fast + TOLERANCE else [fastest]


def _knobs(method: Any) -> dict[str, tuple[Any, ...]]:
    """The options of a method that a plan decides, with the values that it may choose from."""
    return {f.name: f.metadata["plan"] for f in fields(method.Options) if "plan" in f.metadata}


def _settings(method: Any, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of those options, of which the given ones are fixed."""
    free = {name: values for name, values in _knobs(method).items() if name not in given}
    return [dict(zip(free, values, strict=True)) for values in itertools.product(*free.values())]


def _candidate(
    config: TrainConfig, base: Mapping[str, Any], given: Mapping[str, Any], job: Job
) -> Candidate:
    """With its settings, by how much they are recomputed and how finely the batch is split."""
    n = config.batch_size * config.grad_accumulation
    method = METHODS[config.method]
    parts = [k for k in range(1, n + 1) if n % k == 0]
    if "grad_accumulation" in given and "batch_size" in given:
        parts = [config.grad_accumulation]

    def setting(values: Mapping[str, Any], examples: int) -> Setting:
        flat = TrainConfig.build({**base, **values}).flat()
        epochs = config.epochs or 1.0
        steps = config.steps or max(1, round(epochs * -(-len(job.encoded.items) // examples)))
        return Setting(flat, steps, examples)

    if not method.uses_gradients:  # fewer examples a step, the same in all
        sizes = [n] if "batch_size" in given else [n // k for k in parts]
        steps = {} if config.steps is None else {"steps": config.steps}
        group = tuple(setting({"batch_size": size, **steps}, size) for size in sizes)
        return Candidate(_title(config), config.method, (group,))
    optimizers = [config.optimizer]
    # Leaner in all models but those of a few million parameters.
    if "optimizer" not in given and config.trainable == "all":
        optimizers.append("adamw8bit")
    modes = [given["checkpointing"]] if "checkpointing" in given else ["selective", "full"]
    # A whole batch frees each gradient as it comes. Parts keep them: with those of all weights they
    # may need more than it, so they are no steps of the same ladder.
    ladders = [parts]
    if config.trainable == "all" and config.grad_clip is None and 1 in parts and len(parts) > 1:
        ladders = [parts[:1], parts[1:]]
    groups = tuple(
        tuple(
            setting(
                {
                    "optimizer": optimizer,
                    "checkpointing": mode,
                    "batch_size": n // k,
                    "grad_accumulation": k,
                },
                n,
            )
            for k in ladder
        )
        for optimizer in optimizers
        for mode in modes
        for ladder in ladders
    )
    return Candidate(_title(config), config.method, groups, len(ladders))


def _title(config: TrainConfig) -> str:
    words = [config.method]
    method = METHODS[config.method]
    if method.needs is None and config.trainable != next(iter(method.default_lr)):
        words.append(f"of {config.trainable}")
    if config.base_bits < 16:
        words.append(f"on {config.base_bits} bits")
    words += [f"{name} {getattr(config.options, name):g}" for name in _knobs(method)]
    return f"{' '.join(words)}, {_SHORT[config.dtype]}"
