"""Drawings of a report as SVG text: quality against a cost, and a ranking inside a budget.

A hue is a method, a shape a variant of it, a hollow mark somebody else's tool. Colours are the
page's CSS variables, so that they suit its light and its dark form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tinyft.benchmark.grid import family
from tinyft.benchmark.summary import HIGHER, PEERS, Point, front

HUES = {
    "full": "#2f74d8",
    "lora": "#e2711d",
    "mezo": "#8659c9",
    "green_trainer": "#1a9763",
    "sparse_lora": "#a8850b",
    "roste": "#d23c6b",
    "roste_mezo": "#0e93a3",
}
OTHER = "#737b88"  # a method that came after this palette
SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Style:
    """How a method is drawn, everywhere in a report."""

    color: str
    shape: str
    hollow: bool


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """By label. A peer has the shape of what it repeats."""
    found: dict[str, Style] = {}
    variants: dict[str, list[str]] = {}
    for label in sorted(set(methods), key=lambda label: (label in PEERS, ":" in label, label)):
        name = family(label)
        if label not in PEERS:
            variants.setdefault(name, []).append(label)
        shape = SHAPES[max(0, len(variants.get(name, [])) - 1) % len(SHAPES)]
        found[label] = Style(HUES.get(name, OTHER), shape, label in PEERS)
    return {label: found[label] for label in methods}


def mark(style: Style, x: float, y: float, r: float = 5.0) -> str:
    """One mark, with a rim of the page's colour, so that overlapping ones stay apart."""
    if style.hollow:
        how = f'fill="var(--page)" stroke="{style.color}" stroke-width="2"'
    else:
        how = f'fill="{style.color}" stroke="var(--page)" stroke-width="1.5"'
    if style.shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {how}/>'
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.2), (1.2, 0.95), (-1.2, 0.95)),
    }[style.shape]
    path = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners)
    return f'<polygon points="{path}" {how}/>'


def _marked(style: Style, x: float, y: float, *, arrow: str) -> str:
    """A mark, and beside it an arrow to what an axis leaves out."""
    if not arrow:
        return mark(style, x, y)
    tips = {"down": ((-4, 7), (4, 7), (0, 13)), "left": ((-7, -4), (-7, 4), (-13, 0))}[arrow]
    path = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in tips)
    return mark(style, x, y) + f'<polygon points="{path}" fill="{style.color}"/>'


def key(style: Style) -> str:
    """A mark for a legend or a table."""
    return f'<svg class="key" viewBox="0 0 16 16" aria-hidden="true">{mark(style, 8, 8)}</svg>'


def number(value: float, metric: str = "") -> str:
    """A value of a metric, as a person reads it."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3g}"


def tick(value: float, metric: str) -> str:
    """A value beside an axis."""
    return f"{value:.0%}" if metric == "accuracy" else f"{value:g}"


def power(value: float) -> str:
    """`3e12` -> `3·10¹²`."""
    exponent = math.floor(math.log10(value))
    digits = str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    factor = f"{value / 10.0**exponent:.2g}"
    return f"10{digits}" if factor == "1" else f"{factor}·10{digits}"


def mib(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def duration(value: float) -> str:
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.3g} min"


@dataclass(frozen=True)
class Cost:
    """What quality is drawn against: `of` a point, in `unit`s of which round numbers are marked.
    A line joins what a method made of budgets that differ in this cost: of the same `other` limit.
    """

    of: Callable[[Point], float]
    text: Callable[[float], str]
    other: Callable[[Point], float]
    unit: float = 1.0

    def range(self, points: Sequence[Point]) -> tuple[float, float]:
        values = [self.of(p) for p in points]
        return min(values) / 1.12, max(values) * 1.12

    def ticks(self, low: float, high: float) -> list[float]:
        return [self.unit * n for n in ticks(low / self.unit, high / self.unit, log=True)]

    def lines(self, points: Sequence[Point]) -> list[list[Point]]:
        """One method's points, a line each."""
        found: dict[float, list[Point]] = {}
        for p in points:
            found.setdefault(self.other(p), []).append(p)
        return list(found.values())


COSTS = {
    "FLOPs of training": Cost(lambda p: p.flops, power, lambda p: p.memory_limit_bytes),
    "peak memory": Cost(lambda p: p.peak_memory_bytes, mib, lambda p: p.flops_limit, unit=2**20),
    "time of training": Cost(lambda p: p.train_s, duration, lambda p: p.memory_limit_bytes),
}


class Quality:
    """An axis of a metric on which up is better, from 0 to 1; perplexities on their logarithm.

    Of shares it shows all. Of what knows no worst it ends where the untrained model stands, or
    earlier where the better half of the points would take less than a twelfth of it; what is worse
    (a run that diverged, say) stands below that.

    Attributes:
        worst, best: the metric at 0 and at 1.
        below: where marks of what is worse stand, as a value of the metric.
        untrained: the mean over all points of what it was before.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.metric = points[0].metric
        self.log = self.metric == "perplexity"
        self.untrained = sum(p.before for p in points) / len(points)
        untrained = self._height(self.untrained)
        heights = sorted((self._height(p.value) for p in points), reverse=True)
        half = heights[(len(heights) - 1) // 2]
        spreads = [p.spread or 0.0 for p in points]
        up = 1 if self.metric in HIGHER else -1
        ends = [
            [self._height(p.value + sign * up * s) for p, s in zip(points, spreads, strict=True)]
            for sign in (1, -1)
        ]
        top = max(untrained, *ends[0])
        are_shares = self.metric in HIGHER
        span = top - min(untrained, half, *(h for h in ends[1] if are_shares or h > untrained))
        if heights[0] > max(half, untrained) and not are_shares:
            span = min(span, 12 * (heights[0] - half))
        pad = 0.07 * span or 0.05
        self._shown = top - span - pad
        some_beyond = heights[-1] < self._shown
        self._low, self._high = self._shown - some_beyond * 1.5 * pad, top + pad
        self.worst, self.best = self._value(self._low), self._value(self._high)
        self.below = self._value(self._shown - 0.7 * pad)

    def _height(self, value: float) -> float:
        if self.log:
            return -math.log(max(value, 1.0))  # no perplexity is smaller, only a mean less spread
        return value if self.metric in HIGHER else -value

    def _value(self, height: float) -> float:
        if self.log:
            return math.exp(-height)
        return height if self.metric in HIGHER else -height

    def at(self, value: float) -> float:
        """Where a value stands, or that which stands for it."""
        height = self._height(self.shown(value))
        return min(1.0, max(0.0, (height - self._low) / (self._high - self._low)))

    def beyond(self, value: float) -> bool:
        """Whether a value is worse than all that the axis shows."""
        return self._height(value) < self._shown

    def shown(self, value: float) -> float:
        """The value, or what stands for it."""
        return self.below if self.beyond(value) else value

    def ticks(self) -> list[float]:
        return ticks(*sorted((self.worst, self.best)), log=self.log)

    def text(self, value: float) -> str:
        return tick(value, self.metric)


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Some four round numbers inside; of a logarithmic axis too, if it spans little."""
    if log and high / low > 3:
        powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))]
        for factors in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            found = [m * p for p in powers for m in factors if low <= m * p <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 5)]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * step) <= 5)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scatter(points: Sequence[Point], cost: str, style: dict[str, Style]) -> str:
    """Quality against a cost for one task: a line a method over its budgets, the spread over seeds,
    and the front that no method is above and left of."""
    of, text, quality = COSTS[cost].of, COSTS[cost].text, Quality(points)
    width, height, left, right, top, bottom = 360, 300, 50, 16, 12, 40
    low_x, high_x = COSTS[cost].range(points)

    def at_x(value: float) -> float:
        share = math.log(value / low_x) / math.log(high_x / low_x)
        return left + share * (width - left - right)

    def at_y(value: float) -> float:
        return top + (1 - quality.at(value)) * (height - top - bottom)

    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{quality.metric} by {cost}">'
    ]
    for value in quality.ticks():
        y = at_y(value)
        out.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{quality.text(value)}</text>"
        )
    for value in COSTS[cost].ticks(low_x, high_x):
        x, y = at_x(value), height - bottom
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>')
        out.append(
            f'<text class="tick" x="{x:.1f}" y="{y + 17}" text-anchor="middle">{text(value)}</text>'
        )
    y = height - bottom
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
    out.append(
        f'<text class="label" x="{width - right}" y="{height - 6}" text-anchor="end">{cost}</text>'
    )
    y, said = at_y(quality.untrained), "untrained"
    if quality.beyond(quality.untrained):
        said += f" {number(quality.untrained, quality.metric)} ↓"
    else:
        out.append(
            f'<line class="before" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    out.append(
        f'<text class="tick" x="{width - right}" y="{y - 5:.1f}" text-anchor="end">{said}</text>'
    )

    ends = front([p for p in points if p.fits], of)
    if ends:
        path = f"M{at_x(of(ends[0])):.1f},{at_y(ends[0].value):.1f}"
        for p in ends[1:]:
            path += f"H{at_x(of(p)):.1f}V{at_y(p.value):.1f}"
        out.append(f'<path class="front" d="{path}H{width - right}"/>')
    for label, look in style.items():
        dash = ' stroke-dasharray="3 3"' if look.hollow else ""
        for own in COSTS[cost].lines([p for p in points if p.method == label]):
            line = " ".join(f"{at_x(of(p)):.1f},{at_y(p.value):.1f}" for p in own)
            if len(own) > 1:
                out.append(f'<polyline class="run" stroke="{look.color}"{dash} points="{line}"/>')
    for label, look in style.items():
        for p in points:
            if p.method == label:
                x, y = at_x(of(p)), at_y(p.value)
                faint = "" if p.fits else ' opacity="0.35"'
                out.append(f"<g{faint}><title>{escape(described(p))}</title>")
                if p.spread:
                    ys = (at_y(p.value - p.spread), at_y(p.value + p.spread))
                    out.append(
                        f'<line stroke="{look.color}" stroke-width="1.5" x1="{x:.1f}" x2="{x:.1f}" '
                        f'y1="{ys[0]:.1f}" y2="{ys[1]:.1f}"/>'
                    )
                out.append(_marked(look, x, y, arrow="down" if quality.beyond(p.value) else ""))
                out.append("</g>")
    return "".join([*out, "</svg>"])


def described(point: Point) -> str:
    """All of it, for a pointer that rests on a mark."""
    spread = f" ± {number(point.spread, point.metric)}" if point.spread is not None else ""
    over = "" if point.fits else " (over the limit on memory)"
    return (
        f"{point.method}, {point.budget}\n{point.metric} {number(point.before, point.metric)} → "
        f"{number(point.value, point.metric)}{spread}, n = {len(point.values)}\n"
        f"{power(point.flops)} FLOPs, {point.steps:.0f} steps, {duration(point.train_s)}, "
        f"{mib(point.peak_memory_bytes)}{over}"
    )


def ranking(points: Sequence[Point], style: dict[str, Style], chosen: str | None) -> str:
    """Methods inside one budget, the best first: from the untrained model's quality to the trained
    one's. The planner's choice is marked."""
    quality = Quality(points)
    metric = quality.metric
    order = sorted(points, key=lambda p: -p.score)
    row, top, width, left, right = 26, 4, 360, 142, 58

    def at(value: float) -> float:
        return left + quality.at(value) * (width - left - right - 12) + 6

    out = [
        f'<svg viewBox="0 0 {width} {top + row * len(order)}" role="img" '
        f'aria-label="ranking by {metric}">'
    ]
    for i, p in enumerate(order):
        y, look = top + row * i + row / 2, style[p.method]
        faint = "" if p.fits else ' opacity="0.4"'
        out.append(f"<g{faint}><title>{escape(described(p))}</title>")
        weight = ' class="first"' if i == 0 else ""
        planner = '<tspan class="flag"> ◂ plan</tspan>' if p.method == chosen else ""
        name = escape(p.method.replace("base_bits=", ""))
        out.append(f'<text x="0" y="{y + 4:.1f}"{weight}>{name}{planner}</text>')
        a, b = at(p.before), at(p.value)
        out.append(
            f'<line stroke="{look.color}" stroke-width="3" stroke-opacity="0.35" '
            f'x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="axis" x1="{a:.1f}" x2="{a:.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/>'
        )
        if p.spread:
            ends = at(p.value - p.spread), at(p.value + p.spread)
            out.append(
                f'<line stroke="{look.color}" stroke-width="1.5" x1="{ends[0]:.1f}" '
                f'x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        out.append(_marked(look, b, y, arrow="left" if quality.beyond(p.value) else ""))
        out.append(
            f'<text x="{width}" y="{y + 4:.1f}" text-anchor="end"{weight}>'
            f"{number(p.value, metric)}</text></g>"
        )
    return "".join([*out, "</svg>"])
