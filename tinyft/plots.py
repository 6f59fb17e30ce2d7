"""The loss plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT, _BLUE, _ORANGE = "#22252b", "#b9c0cc", "#2563eb", "#ea580c"


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Mean over the `window` values around each (fewer at the ends, so nothing lags)."""
    half = window // 2
    spans = (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))
    return [sum(span) / len(span) for span in spans]


def loss_plot(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    title: str,
    subtitle: str = "",
    evaluations: Mapping[int, Mapping[str, Any]] | None = None,
) -> None:
    """Write a PNG: the loss of each step, its running mean, and the held-out loss where known.

    Args:
        path: the file, ending in `.png`.
        steps: step numbers from 1, `(N,)`.
        losses: training loss before each step, `(N,)`.
        evaluations: `{steps done: {"loss": ...}}`.
    """
    # The object API: no global state, no display, and it works in threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=144, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
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
        window = max(3, len(steps) // 12)
        mean = smooth(losses, window)
        label = f"training, mean of {window}"
        axes.plot(steps, mean, color=_BLUE, linewidth=2, label=label, solid_capstyle="round")
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
    axes.tick_params(colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=24)
    if subtitle:
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, color="#5b6472", fontsize=9.5)
    figure.savefig(path, format="png")
