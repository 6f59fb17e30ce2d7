"""The plots of a run: its loss, and what a selective method trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT, _BLUE, _ORANGE = "#22252b", "#b9c0cc", "#2563eb", "#ea580c"
_ROWS = 56  # labels that find room one above the other


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Weighted mean around each value, weights falling linearly to 0 over `window` / 2 to each
    side (both sides, so that nothing lags)."""
    import numpy as np

    half = max(1, window // 2)

    def summed(values: Any) -> Any:
        """Of every `half` neighbours, beyond both ends, too."""
        sums = np.cumsum(np.pad(values, (0, half - 1)))
        sums[half:] = sums[half:] - sums[:-half]
        return sums

    def weighted(values: Any) -> Any:  # two sums of equals make a triangle
        return summed(summed(values))[half - 1 : half - 1 + len(losses)]

    return (weighted(np.asarray(losses, float)) / weighted(np.ones(len(losses)))).tolist()


def loss_plot(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    title: str,
    subtitle: str = "",
    evaluations: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Write a PNG: the loss of each step, a smooth curve, and the held-out loss where known.

    Args:
        path: the file, ending in `.png`.
        steps: step numbers from 1, `(N,)`.
        losses: training loss before each step, `(N,)`.
        evaluations: `{steps done: {"loss": ...}}`.
    """
    from matplotlib.ticker import MaxNLocator

    figure = blank(8, 4.5)
    axes = figure.subplots()
    dots = len(steps) < 60
    axes.plot(
        steps,
        losses,
        color=_FAINT,
        linewidth=0 if dots else 0.8,
        marker="o" if dots else None,
        markersize=3,
        label="training, each step",
    )
    if len(steps) > 4:
        mean = smooth(losses, max(4, len(steps) // 8))
        axes.plot(steps, mean, color=_BLUE, linewidth=2, label="training, smoothed")
    known = evaluations or {}
    held_out = {at: scores["loss"] for at, scores in known.items() if "loss" in scores}
    if held_out:
        at, values = list(held_out), list(held_out.values())
        axes.plot(at, values, color=_ORANGE, marker="o", markersize=6, linewidth=1.2, linestyle=":")
        axes.lines[-1].set_label("held-out")
        axes.lines[-1].set_clip_on(False)  # the first point stands on the axis
    if losses:
        # Spikes of single steps must not squash the curve: 2% of them may leave the frame.
        ordered = sorted(losses)
        cut = len(ordered) // 50
        shown = ordered[cut : len(ordered) - cut] + list(held_out.values())
        low, high = min(shown), max(shown)
        pad = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - pad, high + pad)
        axes.set_xlim(0, max(steps) * 1.01)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#eceff4", linewidth=0.8)
    axes.set_axisbelow(True)
    plain(axes)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    _title(axes, title, subtitle)
    figure.savefig(path, format="png")


def selection_plot(
    path: Path,
    *,
    names: Sequence[str],
    starts: Sequence[int],
    end: int,
    importance: Any,
    chosen: Any,
    saved: tuple[Any, Any],
    title: str,
) -> None:
    """Write a PNG: which tensors were trained from when to when, how important they were, and the
    FLOPs saved so far.

    Args:
        path: the file, ending in `.png`.
        names: of the tensors, from the output toward the input, `(N,)`.
        starts: steps done before each evaluation, `(E,)`.
        end: steps done.
        importance: `(N, E)`, the largest of an evaluation 1.
        chosen: `(N, E)` bool.
        saved: steps and the share of full fine-tuning's FLOPs saved up to each.
        title: of the figure.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    n = len(names)
    figure = blank(8, min(11.0, 4.0 + 0.16 * n))
    upper, lower = figure.subplots(
        2, 1, sharex=True, height_ratios=[max(1.0, figure.get_figheight() - 2.6), 1.4]
    )
    # Two hues say whether, the depth of either how important. The root keeps small ones apart.
    shade = np.sqrt(np.clip(importance, 0, 1))
    blues, grays = (
        LinearSegmentedColormap.from_list("", [pale, to_rgb(deep)])(shade)
        for pale, deep in (("#dbe6ff", "#123f9e"), ("#f6f7f9", "#a3abb8"))
    )
    edges = [*starts, end]
    cells = np.where(np.asarray(chosen)[..., None], blues, grays)
    upper.pcolormesh(edges, np.arange(n + 1), cells, edgecolors="white", linewidth=0.4)
    upper.invert_yaxis()
    labels = [_short(name) for name in names]
    shown = list(range(0, n, -(-n // _ROWS)))
    if n > _ROWS:  # a label where a layer begins is enough
        layers = [label.partition(".")[0] for label in labels]
        first = [k for k in range(n) if layers[k].isdigit() and layers.index(layers[k]) == k]
        shown = first[:: -(-len(first) // _ROWS)] if first else shown
        labels = [f"layer {x}" if x.isdigit() else y for x, y in zip(layers, labels, strict=True)]
    upper.set_yticks([k + 0.5 for k in shown], [labels[k] for k in shown], fontsize=6.5)
    upper.set_ylabel("from output to input", color=_INK)
    upper.legend(
        handles=[Patch(color="#3f6fd1", label="trained"), Patch(color="#cdd2da", label="frozen")],
        **{"frameon": False, "labelcolor": _INK, "fontsize": 9, "ncols": 2},
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
    )
    trained = np.asarray(chosen).sum(0)
    count = (
        f"{trained[0]}" if (trained == trained[0]).all() else f"{trained.min()} to {trained.max()}"
    )
    _title(upper, title, f"{count} of {n} tensors; the darker, the more important")

    steps, shares = saved
    lower.axhline(0, color=_FAINT, linewidth=0.8)
    lower.plot(steps, shares, color=_BLUE, linewidth=2, marker="o" if len(steps) < 2 else None)
    lower.annotate(
        f"{shares[-1]:.0%}",
        (steps[-1], shares[-1]),
        textcoords="offset points",
        xytext=(-4, 6),
        ha="right",
        color=_BLUE,
        fontweight="bold",
    )
    lower.set_ylim(min(0.0, float(np.min(shares[len(shares) // 20 :]))) - 0.03, 0.8)
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set_ylabel("FLOPs saved", color=_INK)
    lower.set_xlabel("step", color=_INK)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlim(0, end)
    lower.grid(axis="y", color="#eceff4", linewidth=0.8)
    for axes in (upper, lower):
        plain(axes)
    figure.savefig(path, format="png")


def rotation_plot(
    path: Path,
    *,
    ranges: Mapping[str, Sequence[tuple[float, float]]],
    chosen: Mapping[str, Sequence[bool]],
    title: str,
) -> None:
    """Write a PNG: how far activations reach in each layer, before and after rotation, and which
    rotations were chosen.

    Args:
        path: the file, ending in `.png`.
        ranges: by place, for each layer the largest magnitude over the root mean square, as it is
            and rotated.
        chosen: by rotation, for each layer whether it is used.
        title: of the figure.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = blank(10, 7)
    grid = figure.add_gridspec(3, 3, height_ratios=[3, 3, 0.4 + 0.3 * len(chosen)])
    n_layers = len(next(iter(ranges.values())))
    for i, (place, pairs) in enumerate(ranges.items()):
        axes = figure.add_subplot(grid[i // 3, i % 3])
        for k, (color, label) in enumerate(((_ORANGE, "as it is"), (_BLUE, "rotated"))):
            values = [pair[k] for pair in pairs]
            axes.plot(range(n_layers), values, color=color, marker="o", markersize=3, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(place.replace("_", " "), loc="left", color=_INK, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#eceff4", linewidth=0.8)
        plain(axes)
        if i == 0:
            axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
            axes.set_ylabel("largest / root mean square", color=_INK, fontsize=9)
    axes = figure.add_subplot(grid[2, :])
    axes.pcolormesh(
        range(n_layers + 1),
        range(len(chosen) + 1),
        [[float(on) for on in row] for row in chosen.values()],
        cmap=_two_colors("#eceff4", _BLUE),
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=1,
    )
    axes.set_yticks([i + 0.5 for i in range(len(chosen))], list(chosen), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("layer (blue: rotated by a Hadamard matrix)", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    figure.suptitle(title, x=0.02, ha="left", color=_INK, fontsize=13, fontweight="bold")
    figure.savefig(path, format="png")


def _two_colors(low: str, high: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([low, high])


def _short(name: str) -> str:
    """The end of a tensor's name, with its layer's number."""
    parts = name.removesuffix(".weight").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[max(number, 0) :])


def plan_plot(
    path: Path,
    *,
    names: Sequence[str],
    memory_bytes: Sequence[float],
    flops: Sequence[float],
    fits: Sequence[bool],
    chosen: int | None,
    limits: tuple[float | None, float | None],
    title: str,
    subtitle: str = "",
) -> None:
    """Write a PNG: candidates in the plane of peak memory and FLOPs, and the budget in it.

    Args:
        path: the file, ending in `.png`.
        names: of the candidates, `(N,)`; the points are numbered in this order.
        memory_bytes, flops: of each, of the whole run, `(N,)`.
        fits: whether each stays within every limit, `(N,)`.
        chosen: its index, None if nothing fits.
        limits: of memory in bytes and of FLOPs, None where there is none.
        title: of the figure.
    """
    figure = blank(8, 4.8)
    axes = figure.subplots()
    mib = [n / 2**20 for n in memory_bytes]
    axes.set_xscale("log")
    axes.set_yscale("log")
    for i, (x, y) in enumerate(zip(mib, flops, strict=True)):
        color = _ORANGE if i == chosen else _BLUE if fits[i] else _FAINT
        style = {"ms": 15, "color": color, "markeredgecolor": "white", "zorder": 30 - i}
        axes.plot(x, y, "o", label=f"{i + 1}  {names[i]}", **style)
        axes.annotate(
            str(i + 1), (x, y), color="white", ha="center", va="center", fontsize=7, zorder=30 - i
        )
    memory, most = limits
    within = {"memory": memory and memory / 2**20, "FLOPs": most}
    low_x, high_x = _room([*mib, within["memory"]])
    low_y, high_y = _room([*flops, within["FLOPs"]])
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.fill_between(
        [low_x, within["memory"] or high_x],
        low_y,
        within["FLOPs"] or high_y,
        color="#eef3ff",
        zorder=0,
        label="within the budget",
    )
    _log_labels(axes.xaxis, low_x, high_x, lambda value: f"{value:,.0f}")
    _log_labels(axes.yaxis, low_y, high_y, lambda value: f"{value:.2g}".replace("e+", "e"))
    axes.set_xlabel("predicted peak memory of the process, MiB", color=_INK)
    axes.set_ylabel("FLOPs of the run", color=_INK)
    plain(axes)
    figure.legend(
        loc="outside right upper", frameon=False, fontsize=7.5, labelcolor=_INK, markerscale=0.45
    )
    _title(axes, title, subtitle)
    figure.savefig(path, format="png")


def _room(values: Sequence[float | None]) -> tuple[float, float]:
    """Limits of a logarithmic axis that holds all of them."""
    known = [value for value in values if value]
    return min(known) / 1.35, max(known) * 1.35


def _log_labels(axis: Any, low: float, high: float, text: Callable[[float], str]) -> None:
    """Round numbers along a logarithmic axis that may span less than a decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks = [
        m * 10.0**e for e in range(25) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10.0**e <= high
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def blank(width: float, height: float) -> Any:
    """An empty figure, by the object API: no global state, no display, and it works in threads."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14)
    return figure


def plain(axes: Any) -> None:
    axes.tick_params(colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=24)
    if subtitle:
        axes.annotate(
            subtitle,
            (0, 1),
            xycoords="axes fraction",
            textcoords="offset points",
            xytext=(0, 7),
            color="#5b6472",
            fontsize=9.5,
        )
