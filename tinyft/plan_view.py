"""What `tinyft plan` prints: the chosen configuration and its prices, and every verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from tinyft.checkpoint import write_atomic
from tinyft.planner import Verdict, amount, duration
from tinyft.planning import Planned

# What a plan decides, in the order in which it is read; methods' own options follow.
_SHOWN = (
    *("trainable", "base_bits", "dtype", "rank", "batch_size", "grad_accumulation"),
    *("max_length", "checkpointing", "optimizer", "lr", "schedule", "steps"),
)


def show(planned: Planned, file: TextIO | None = None) -> None:
    """Print a plan for people."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, highlight=False, markup=False, emoji=False)
    console.print(limits(planned), soft_wrap=True)
    if chosen := planned.plan.chosen:
        for line in _chosen(planned, chosen):
            console.print(line, soft_wrap=True)
    console.print()
    console.print(_table(planned))
    for name, reason in planned.left_out.items():
        console.print(f"{name}: left out. {reason}", soft_wrap=True)


def as_json(planned: Planned) -> str:
    """One object, with everything that is known of every candidate."""
    return json.dumps(planned.as_dict())


def plot(planned: Planned, path: Path) -> None:
    """Write a PNG of the candidates in the plane of memory and FLOPs."""
    from tinyft.plots import plan_plot

    verdicts, budget = planned.plan.verdicts, planned.plan.budget
    totals = [verdict.totals for verdict in verdicts]
    chosen = planned.plan.chosen
    write_atomic(
        path,
        lambda part: plan_plot(
            part,
            names=[verdict.candidate.name for verdict in verdicts],
            memory_bytes=[of["memory_bytes"] for of in totals],
            flops=[of["flops"] for of in totals],
            fits=[verdict.fits for verdict in verdicts],
            chosen=0 if chosen else None,
            limits=(budget.memory_bytes, budget.flops),
            title=f"chosen: {chosen.candidate.name}" if chosen else "nothing fits",
            subtitle=limits(planned),
        ),
    )


def limits(planned: Planned) -> str:
    """The budget and whose it is."""
    limits_ = planned.plan.budget.limits.items()
    amounts = ", ".join(amount(name, value) for name, value in limits_)
    return f"budget on {planned.machine.name}: {amounts}"


def _chosen(planned: Planned, verdict: Verdict) -> list[str]:
    config, cost, totals = planned.config, verdict.cost, verdict.totals
    own = planned.knobs(verdict.candidate.method)
    settings = [
        f"{name.replace('_', ' ')} {config[name]}"
        for name in (*_SHOWN, *own)
        if config.get(name) is not None
    ]
    parts = ", ".join(
        f"{amount('memory_bytes', n)} {kind}" for kind, n in cost.breakdown.items() if n
    )
    energy = amount("energy_j", totals["energy_j"]) if "energy_j" in totals else "unknown"
    return [
        f"Chosen: {verdict.candidate.name}: {verdict.reason}.",
        f"  {', '.join(settings)}",
        f"  peak memory {amount('memory_bytes', cost.peak_memory_bytes)}: {parts}",
        f"  FLOPs {cost.flops_per_step:.3g} a step, {totals['flops']:.3g} in all",
        f"  time {duration(cost.step_s)} a step, {duration(totals['time_s'])} in all; "
        f"energy {energy}",
    ]


def _table(planned: Planned) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("candidate", no_wrap=True)
    for title in ("peak", "FLOPs", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for verdict in planned.plan.verdicts:
        is_chosen = verdict is planned.plan.chosen
        totals = verdict.totals
        table.add_row(
            verdict.candidate.name,
            amount("memory_bytes", verdict.cost.peak_memory_bytes),
            f"{totals['flops']:.2g}",
            duration(totals["time_s"]),
            "chosen" if is_chosen else verdict.reason,
        )
    return table
