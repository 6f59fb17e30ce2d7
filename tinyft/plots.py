"""The loss plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INK, _FAINT, _BLUE, _ORANGE = "#22252b", "#b9c0cc", "#2563eb", "#ea580c"


def smooth(losses: Sequence[float], window: int) -> list[float]:
    """Weighted mean around each value, weights falling linearly to 0 over `window` / 2 to each
    side (both sides, so that nothing lags)."""
    half = max(1, window // 2)
    means = []
    for i in range(len(losses)):
        near = range(max(0, i - half + 1), min(len(losses), i + half))
        weights = [half - abs(i - j) for j in near]
        means.append(sum(w * losses[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
    return means


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
    # The object API: no global state, no display, and it works in threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=144, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.14, h_pad=0.14)
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
    axes.tick_params(colors=_INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    axes.set_title(title, loc="left", color=_INK, fontsize=13, fontweight="bold", pad=24)
    if subtitle:
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, color="#5b6472", fontsize=9.5)
    figure.savefig(path, format="png")
