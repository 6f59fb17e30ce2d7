"""The report as one HTML page that needs nothing else: styles, drawings and numbers are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tinyft.benchmark import charts
from tinyft.benchmark.charts import Style, key, mib, number, power
from tinyft.benchmark.grid import COUNTERPARTS
from tinyft.benchmark.summary import Choice, Comparison, Point, best, comparisons

Row = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #20242b; --soft: #5d6673; --line: #e3e7ed;
  --card: #f7f8fa; --accent: #2f74d8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e8ebf0; --soft: #9aa4b2;
  --line: #2b313a; --card: #1b1f26; --accent: #6ea4f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 32px 20px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; }
h1 { font-size: 30px; line-height: 1.15; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 0 0 10px; max-width: 74ch; }
.soft, figcaption { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 18px 0 0; padding: 0;
  list-style: none; font-size: 14px; }
.key { width: 16px; height: 16px; vertical-align: -3px; margin-right: 5px; }
.grid3 { display: grid; gap: 16px; margin-top: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; --page: var(--card); }
.big { font-size: 23px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.2; }
.big small { font-size: 14px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.key { display: inline-block; width: 16px; }
svg text { font-size: 12px; fill: var(--ink); }
svg text.tick, svg text.label { font-size: 11.5px; fill: var(--soft); }
svg text.first { font-weight: 650; }
svg tspan.flag { fill: var(--accent); font-weight: 400; font-size: 11px; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); stroke-opacity: 0.6; }
svg .before { stroke: var(--soft); stroke-dasharray: 2 4; }
svg .run { fill: none; stroke-width: 1.6; stroke-opacity: 0.75; }
svg .front { fill: none; stroke: var(--ink); stroke-opacity: 0.22; stroke-width: 6;
  stroke-linejoin: round; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; font-size: 13px; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td.text, th.text { text-align: left; }
td.wrap { white-space: normal; min-width: 260px; }
tr.first td { font-weight: 650; }
details { margin-top: 18px; } summary { cursor: pointer; color: var(--accent); }
code { font-size: 12px; overflow-wrap: anywhere; }
"""


def html(
    rows: Sequence[Row],
    points: Sequence[Point],
    choices: Sequence[Choice],
) -> str:
    """The page.

    Args:
        rows: of the table.
        points, choices: from `tinyft.benchmark.summary`, of those rows.
    """
    style = charts.styles(list(dict.fromkeys(p.method for p in points)))
    found = comparisons(points, COUNTERPARTS)
    parts = [
        _head(rows, points),
        _legend(style),
        _answers(points, choices, style),
        _curves(points, style),
        _planner(choices, style),
        _peers(found, style) if found else "",
        _table(points, style),
        _left_out(rows),
        _trials(rows),
        _method(rows),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tinyft bench</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _head(rows: Sequence[Row], points: Sequence[Point]) -> str:
    row = _done(rows)[0]
    seeds = max(len(p.values) for p in points)
    machine = (
        f"{row['cpu']}, {row['threads']} thread{'s' if row['threads'] != 1 else ''} of "
        f"{row['cores']} cores"
    )
    what = (
        f"{_model(row)} on {', '.join(dict.fromkeys(p.task for p in points))}: "
        f"{len(_done(rows))} runs, {_plural(seeds, 'seed')} each"
    )
    return (
        "<h1>Given this budget, which method gives the best model?</h1>"
        f'<p class="soft">{escape(what)}. {escape(machine)}; commit {escape(row["commit"])}.</p>'
    )


def _legend(style: Mapping[str, Style]) -> str:
    items = "".join(f"<li>{key(look)}{escape(label)}</li>" for label, look in style.items())
    hollow = any(look.hollow for look in style.values())
    note = '<li class="soft">hollow: tools of others</li>' if hollow else ""
    return f'<ul class="legend">{items}{note}</ul>'


def _answers(points: Sequence[Point], choices: Sequence[Choice], style: Mapping[str, Style]) -> str:
    """A card a budget: what wins, and everything else below it."""
    cards = []
    by_budget = {(c.task, c.budget): c for c in choices}
    several = len({p.task for p in points}) > 1
    for task, budget in dict.fromkeys((p.task, p.budget) for p in points):
        here = [p for p in points if (p.task, p.budget) == (task, budget)]
        top, choice = best(here), by_budget.get((task, budget))
        if top is None:
            continue
        spread = f" ± {number(top.spread, top.metric)}" if top.spread is not None else ""
        title = f"{task}, {budget}" if several else budget
        cards.append(
            f'<div class="card"><h3>{escape(title)}</h3>'
            f'<div class="big">{key(style[top.method])}{escape(top.method)} '
            f"<small>{top.metric} {number(top.value, top.metric)}{spread}</small></div>"
            f"{charts.ranking(here, dict(style), choice and choice.method)}</div>"
        )
    chance = "The bar begins where the untrained model stands."
    marked = " <i>plan</i> marks what the planner would have chosen." if choices else ""
    return f'<h2>What wins where</h2><p class="soft">{chance}{marked}</p>' + _grid(cards)


def _curves(points: Sequence[Point], style: Mapping[str, Style]) -> str:
    out = [
        "<h2>Quality against what it costs</h2>",
        '<p class="soft">Up and to the left is better. The broad line is the front: nothing known '
        "is better at no more cost. A line joins what a method made of more and more FLOPs (or "
        "memory) under one limit on the other, a bar is one standard deviation over seeds, pale "
        "marks broke the limit on memory, and marks with an arrow are worse than the axis shows."
        "</p>",
    ]
    for task in dict.fromkeys(p.task for p in points):
        here = [p for p in points if p.task == task]
        panels = [
            f'<figure class="card"><h3>{escape(task)}: {here[0].metric} by {cost}</h3>'
            f"{charts.scatter(here, cost, dict(style))}</figure>"
            for cost in charts.COSTS
        ]
        out.append(_grid(panels))
    return "".join(out)


def _planner(choices: Sequence[Choice], style: Mapping[str, Style]) -> str:
    lines = []
    for c in choices:
        value = "not run" if c.value is None else number(c.value, c.metric)
        regret = "?" if c.regret is None else _difference(c.regret, c.metric)
        lines.append(
            _cells(
                [*map(escape, (c.task, c.budget, c.candidate)), _marked(c.best, style)],
                [value, number(c.best_value, c.metric), regret],
                raw=True,
            )
        )
    if not lines:
        return ""
    known = {c.metric: c.regret for c in sorted(choices, key=lambda c: c.regret or 0.0)}
    largest = [f"{_difference(r, m)} of {m}" for m, r in known.items() if r is not None]
    worst = f" The largest: {', '.join(largest)}." if largest else ""
    return (
        "<h2>What the planner would have chosen</h2>"
        f'<p class="soft">By itself, from the curves that it knows, before any of these runs; '
        f"regret is what the best method of the budget has over it.{worst}</p>"
        + _rows(["task", "budget", "its choice", "best"], ["its quality", "best", "regret"], lines)
    )


def _peers(found: Sequence[Comparison], style: Mapping[str, Style]) -> str:
    lines = [
        _cells(
            [escape(c.task), escape(c.budget), *(_marked(m, style) for m in (c.ours, c.peer))],
            [
                f"{c.time:.2f}x",
                f"{c.memory:.2f}x",
                f"{c.beyond:.2f}x",
                number(c.ours_value, c.metric),
                number(c.value, c.metric),
            ],
            raw=True,
        )
        for c in found
    ]
    return (
        "<h2>Beside the tools that people use</h2>"
        '<p class="soft">The same model, batches, seeds, steps and learning rate. Ours as a '
        "multiple of theirs: less than 1&times; is less time or memory.</p>"
        + _rows(
            ["task", "budget", "ours", "theirs"],
            ["time a step", "peak memory", "beyond the model", "our quality", "theirs"],
            lines,
        )
    )


def _table(points: Sequence[Point], style: Mapping[str, Style]) -> str:
    lines = []
    for p in points:
        here = [q for q in points if (q.task, q.budget) == (p.task, p.budget)]
        spread = f" ± {number(p.spread, p.metric)}" if p.spread is not None else ""
        edge = " (edge)" if p.lr_at_edge else ""
        lines.append(
            _cells(
                [escape(p.task), escape(p.budget), _marked(p.method, style)],
                [
                    f"{number(p.value, p.metric)}{spread}",
                    number(p.before, p.metric),
                    f"{p.lr:g}{edge}",
                    f"{p.steps:.0f}",
                    power(p.flops) + (f" + {power(p.search_flops)}" if p.search_flops else ""),
                    f"{p.train_s:.0f} of {p.elapsed_s:.0f} s",
                    mib(p.peak_memory_bytes) + ("" if p.fits else " (over)"),
                    f"{p.energy_j / 3600:.2g} Wh, {p.co2_g:.2g} g",
                ],
                raw=True,
                first=p is best(here),
            )
        )
    numbers = [
        *("quality", "untrained", "learning rate", "steps", "FLOPs + search"),
        *("training", "peak memory", "energy, CO₂"),
    ]
    return "<h2>All numbers</h2>" + _rows(["task", "budget", "method"], numbers, lines)


def _left_out(rows: Sequence[Row]) -> str:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["stage"] == "run" and row["status"] != "done":
            where = f"{row['task']}, {row['budget']}"
            reasons.setdefault((row["method"], row["status"], row["reason"]), []).append(where)
    if not reasons:
        return ""
    lines = [
        f'<tr><td class="text">{escape(method)}</td><td class="text">{escape(status)}</td>'
        f'<td class="text wrap">{escape("; ".join(dict.fromkeys(where)))}</td>'
        f'<td class="text wrap">{escape(reason)}</td></tr>'
        for (method, status, reason), where in reasons.items()
    ]
    return "<h2>What was not run, and why</h2>" + _rows(
        ["method", "", "where", "reason"], [], lines
    )


def _trials(rows: Sequence[Row]) -> str:
    trials = [row for row in rows if row["stage"] == "search"]
    if not trials:
        return ""
    lines = [
        _cells(
            [row["task"], row["budget"], row["method"]],
            [
                f"{row['lr']:g}",
                f"{row['loss_after']:.4f}" if row["status"] == "done" else row["status"],
                f"{row['steps']}" if row["status"] == "done" else "",
            ],
        )
        for row in trials
    ]
    return (
        f"<details><summary>The search: {len(trials)} trials</summary>"
        + _rows(["task", "budget", "method"], ["learning rate", "loss", "steps"], lines)
        + "</details>"
    )


def _method(rows: Sequence[Row]) -> str:
    runs = [row for row in rows if row["stage"] == "run" and row["status"] == "done"]
    row = runs[0]
    sources = ", ".join(dict.fromkeys(r["energy_source"] for r in runs))
    grams = 3.6e6 * sum(r["co2_g"] for r in runs) / sum(r["energy_j"] for r in runs)
    counted = "held-out rows" if row["metric"] == "accuracy" else "held-out tokens"
    said = [
        "Every run is a process of its own, held to its budget; within it, the planner sets what "
        "is not given (precision, parts of a batch, recomputation). Learning rates: the same "
        "multiples of each method's own were tried with a share of the steps each, on other rows "
        "than those scored, with seed 0; the lowest loss won. <i>(edge)</i>: it was the smallest "
        "or largest of them, so a better one may lie beyond. The search's FLOPs are on top of the "
        "budget.",
        f"FLOPs are those of training steps, counted. Quality is measured on "
        f"{row['scored_rows']:,} {counted}. Memory is the peak of the whole process, evaluations "
        "included. Time of training is that of the steps; a whole run includes loading and two "
        "evaluations.",
        f"Energy: {escape(sources)}, over the whole run. CO₂ at {grams:.0f} g/kWh.",
        f"{escape(row['versions'])}.",
    ]
    command = (
        f"<p>Again, from the benchmark's folder, e.g.: <code>{escape(row['command'])}</code></p>"
    )
    return "<h2>How it was measured</h2>" + "".join(f"<p>{text}</p>" for text in said) + command


def _done(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["stage"] == "run" and row["status"] == "done"]


def _model(row: Row) -> str:
    return row["model"].rstrip("/").rpartition("/")[2]


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _difference(value: float, metric: str) -> str:
    return f"{100 * value:.1f} points" if metric == "accuracy" else f"{value:.3g}"


def _marked(label: str, style: Mapping[str, Style]) -> str:
    return (key(style[label]) if label in style else "") + escape(label)


def _grid(parts: Sequence[str]) -> str:
    return f'<div class="grid3">{"".join(parts)}</div>'


def _cells(
    texts: Sequence[str], numbers: Sequence[str], *, raw: bool = False, first: bool = False
) -> str:
    """A line of a table; `raw` texts are HTML already."""
    left = "".join(f'<td class="text">{t if raw else escape(t)}</td>' for t in texts)
    right = "".join(f"<td>{escape(n)}</td>" for n in numbers)
    return f"<tr{' class=first' if first else ''}>{left}{right}</tr>"


def _rows(texts: Sequence[str], numbers: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f'<th class="text">{t}</th>' for t in texts)
    head += "".join(f"<th>{n}</th>" for n in numbers)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
