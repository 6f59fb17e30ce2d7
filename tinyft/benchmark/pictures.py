"""The report's drawings as PNGs, for where a page does not go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyft.benchmark.charts import COSTS, Quality, Style, number, styles, tick
from tinyft.benchmark.summary import HIGHER, Choice, Point, front
from tinyft.plots import blank, plain

_INK, _FAINT = "#22252b", "#b9c0cc"
_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^"}


def drawings(
    points: Sequence[Point], choices: Sequence[Choice]
) -> dict[str, Callable[[Path], None]]:
    """`{file name: function that draws it there}`."""
    found: dict[str, Callable[[Path], None]] = {"quality.png": lambda path: quality(path, points)}
    if any(choice.value is not None for choice in choices):
        found["planner.png"] = lambda path: planner(path, choices)
    return found


def quality(path: Path, points: Sequence[Point]) -> None:
    """Write a PNG: a task a line, quality against FLOPs, memory and time, spreads and fronts."""
    tasks = list(dict.fromkeys(p.task for p in points))
    style = styles(list(dict.fromkeys(p.method for p in points)))
    figure = blank(12, 3.6 * len(tasks) + 0.7)
    grid = figure.subplots(len(tasks), len(COSTS), squeeze=False)
    known: dict[str, Any] = {}
    for task, line in zip(tasks, grid, strict=True):
        here = [p for p in points if p.task == task]
        for axes, cost in zip(line, COSTS, strict=True):
            _scatter(axes, here, cost, style)
        line[0].set_ylabel(f"{here[0].metric}, {task}", color=_INK)
        handles, labels = line[0].get_legend_handles_labels()
        known |= zip(labels, handles, strict=True)  # a task may have methods that another lacks
    figure.legend(
        known.values(),
        known.keys(),
        loc="outside upper left",
        **{"ncols": min(6, len(known)), "frameon": False, "fontsize": 9, "labelcolor": _INK},
    )
    figure.savefig(path, format="png")


def _scatter(axes: Any, points: Sequence[Point], cost: str, style: Mapping[str, Style]) -> None:
    of, text = COSTS[cost].of, COSTS[cost].text
    quality = Quality(points)
    axes.set_xscale("log")
    if quality.log:
        axes.set_yscale("log")
    axes.axhline(quality.untrained, color=_FAINT, linewidth=1, linestyle=":")
    ends = front([p for p in points if p.fits], of)
    low, high = COSTS[cost].range(points)
    axes.step(
        [*(of(p) for p in ends), high],
        [*(p.value for p in ends), *(p.value for p in ends[-1:])] or [quality.untrained],
        where="post",
        color="#dfe3ea",
        linewidth=6,
        solid_capstyle="butt",
        zorder=0,
    )
    for label, look in style.items():
        for own in COSTS[cost].lines([p for p in points if p.method == label]):
            axes.errorbar(
                [of(p) for p in own],
                [quality.shown(p.value) for p in own],
                yerr=[0.0 if quality.beyond(p.value) else p.spread or 0.0 for p in own],
                color=look.color,
                marker=_MARKERS[look.shape],
                markerfacecolor="white" if look.hollow else look.color,
                markeredgecolor=look.color if look.hollow else "white",
                markersize=8,
                linewidth=1.3,
                linestyle="--" if look.hollow else "-",
                label=label,
            )
        for p in points:
            if p.method == label and quality.beyond(p.value):
                axes.annotate(
                    "",
                    (of(p), quality.worst),
                    xytext=(of(p), quality.below),
                    arrowprops={"arrowstyle": "-|>", "color": look.color, "shrinkB": 0},
                )
    axes.set_xlim(low, high)
    axes.set_xticks(marks := COSTS[cost].ticks(low, high), [text(value) for value in marks])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(cost, color=_INK)
    axes.set_ylim(quality.worst, quality.best)
    axes.set_yticks(marks := quality.ticks(), [quality.text(value) for value in marks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", color="#eceff4", linewidth=0.8)
    axes.set_axisbelow(True)
    plain(axes)


def planner(path: Path, choices: Sequence[Choice]) -> None:
    """Write a PNG: in each budget the planner's choice and the best method, and between them what
    the choice cost."""
    known = [choice for choice in choices if choice.value is not None]
    style = styles([*(c.method for c in known), *(c.best for c in known)])
    metrics = list(dict.fromkeys(c.metric for c in known))
    figure = blank(8, 1.4 + 0.5 * len(known))
    grid = figure.subplots(
        len(metrics),
        1,
        squeeze=False,
        height_ratios=[sum(c.metric == m for c in known) for m in metrics],
    )
    for metric, (axes,) in zip(metrics, grid, strict=True):
        here = [c for c in known if c.metric == metric]
        for i, c in enumerate(here):
            axes.plot([c.value, c.best_value], [i, i], color="#dfe3ea", linewidth=6, zorder=0)
            for label, value, size in ((c.best, c.best_value, 11), (c.method, c.value, 7)):
                look = style[label]
                marker = _MARKERS[look.shape]
                axes.plot(value, i, marker, color=look.color, ms=size, markeredgecolor="white")
            said = f"chose {c.method}"
            said += (
                " (best)" if c.regret == 0 else f", best {c.best} {number(c.best_value, metric)}"
            )
            axes.annotate(
                said,
                (c.best_value, i),  # the better, hence on the right
                textcoords="offset points",
                xytext=(10, -3),
                fontsize=8.5,
                color=_INK,
            )
        axes.set_yticks(range(len(here)), [f"{c.task}, {c.budget}" for c in here], fontsize=9)
        axes.invert_yaxis()
        axes.set_ylim(len(here) - 0.5, -0.5)
        axes.margins(x=0.35)
        axes.set_xlabel(metric, color=_INK)
        axes.xaxis.set_major_formatter(lambda value, _, metric=metric: tick(value, metric))
        if metric not in HIGHER:
            axes.invert_xaxis()
        plain(axes)
    figure.savefig(path, format="png")
