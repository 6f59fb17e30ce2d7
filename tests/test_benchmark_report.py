"""What a benchmark's report says, against the rows that it is made of."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tinyft.benchmark import charts, page, pictures, summary
from tinyft.benchmark.command import write_report
from tinyft.benchmark.store import Store, read, write
from tinyft.plots import blank

METHODS = {"full": 0.9, "lora": 1.0, "lora:base_bits=16": 0.97, "mezo": 0.3, "peft": 0.95}
BUDGETS = (1e12, 3e12, 1e13)
SEEDS = 3


def rows() -> list[dict]:
    """Of two tasks, one scored by accuracy and one by perplexity; all figures are made up."""
    rng, found = random.Random(0), []
    for task, flops in itertools.product(("films", "prose"), BUDGETS):
        accuracy = task == "films"
        for (method, skill), seed in itertools.product(METHODS.items(), range(SEEDS)):
            learned = skill * math.log10(flops / 3e11) / 1.6 + rng.uniform(-0.03, 0.03)
            memory = {"mezo": 500, "peft": 900}.get(method, 700) + rng.uniform(0, 20)
            found.append(
                {
                    "stage": "run",
                    "status": "done",
                    "reason": None,
                    "task": task,
                    "model": "/a/folder/tiny",
                    "budget": f"{flops:.0e} FLOPs",
                    "flops_limit": flops,
                    "memory_limit_bytes": 800 * 2**20,
                    "method": method,
                    "seed": seed,
                    "lr": 1e-3,
                    "lr_at_edge": method == "mezo",
                    "metric": "accuracy" if accuracy else "perplexity",
                    "before": 0.5 if accuracy else 30.0,
                    "after": 0.5 + 0.3 * learned if accuracy else 30.0 - 10 * learned,
                    "steps": 100,
                    "flops": flops * rng.uniform(0.97, 1),
                    "train_s": flops / 1e11 * {"peft": 2.0}.get(method, 1.0),
                    "elapsed_s": flops / 1e11 + 9,
                    "peak_memory_bytes": int(memory * 2**20),
                    "loaded_memory_bytes": 400 * 2**20,
                    "energy_j": 100.0,
                    "energy_source": "estimate, 12 W",
                    "co2_g": 100.0 / 3.6e6 * 436,
                    "search_flops": 0.9 * flops,
                    "trainable": "all" if method in ("full", "mezo") else "lora",
                    "dtype": "bfloat16",
                    "base_bits": 4 if method == "lora" else 16,
                    "scored_rows": 500,
                    "commit": "0123456789ab",
                    "versions": "python=3.11",
                    "cpu": "<a processor>",
                    "cores": 2,
                    "threads": 1,
                    "command": "tinyft train --lr=0.001",
                }
            )
        found.append(
            {
                **{"stage": "run", "status": "left out", "task": task, "method": "roste"},
                **{"reason": "no room for <b>", "budget": f"{flops:.0e} FLOPs", "seed": 0},
            }
        )
    return found


def plans() -> list[dict]:
    return [
        {
            "task": task,
            "budget": f"{flops:.0e} FLOPs",
            "method": method,
            "candidate": f"{method}, bf16",
            "config": {"trainable": "all", "dtype": "bfloat16", "base_bits": 16},
        }
        for task, (flops, method) in itertools.product(
            ("prose", "films"), zip(BUDGETS, ("mezo", "lora", "sparse_lora"), strict=True)
        )
    ]


ROWS = rows()
POINTS = summary.points(ROWS)
CHOICES = summary.choices(plans(), POINTS)


def of(task: str, flops: float, method: str, name: str) -> list[float]:
    return [
        row[name]
        for row in ROWS
        if (row["task"], row.get("flops_limit"), row["method"]) == (task, flops, method)
    ]


def test_names_are_no_html():
    named = [{**row, "task": f"<u>{row['task']}"} for row in ROWS]
    points = summary.points(named)
    choices = summary.choices(
        [{**p, "task": f"<u>{p['task']}", "candidate": "<u>"} for p in plans()], points
    )
    text = page.html(named, points, choices)
    assert "<u>" not in text and "&lt;u&gt;films" in text


def test_points_are_means_over_seeds():
    assert len(POINTS) == 2 * len(BUDGETS) * len(METHODS)
    for p in POINTS:
        flops = float(p.budget.split()[0])
        after = of(p.task, flops, p.method, "after")
        assert p.value == pytest.approx(sum(after) / SEEDS)
        variance = sum((x - sum(after) / SEEDS) ** 2 for x in after) / (SEEDS - 1)
        assert p.spread == pytest.approx(math.sqrt(variance))
        assert p.peak_memory_bytes == max(of(p.task, flops, p.method, "peak_memory_bytes"))
        assert p.fits == (p.method != "peft")


@pytest.mark.parametrize("task", ["films", "prose"])
@pytest.mark.parametrize("cost", charts.COSTS)
def test_front_is_what_nothing_beats(task, cost):
    """Against its definition, over all pairs."""
    here, of_ = [p for p in POINTS if p.task == task], charts.COSTS[cost].of

    def beaten(p):
        return any(
            of_(q) <= of_(p) and q.score >= p.score and (of_(q), q.score) != (of_(p), p.score)
            for q in here
        )

    front = summary.front(here, of_)
    assert {(p.budget, p.method) for p in front} == {
        (p.budget, p.method) for p in here if not beaten(p)
    }
    assert [of_(p) for p in front] == sorted(of_(p) for p in front)


def test_regret():
    """Of peers and of what broke the limit nothing can be best; more perplexity is worse."""
    assert [(c.task, float(c.budget.split()[0])) for c in CHOICES] == [
        (task, flops) for task in ("films", "prose") for flops in BUDGETS
    ]
    for c in CHOICES:
        flops = float(c.budget.split()[0])
        sign = 1 if c.task == "films" else -1
        mean = {
            method: statistics.mean(of(c.task, flops, method, "after"))
            for method in METHODS
            if method != "peft"
        }
        best = max(mean, key=lambda method: sign * mean[method])
        assert (c.best, c.best_value) == (best, pytest.approx(mean[best]))
        if c.method == "sparse_lora":  # was not run
            assert c.value is None and c.regret is None
        else:
            assert c.regret == pytest.approx(sign * (mean[best] - mean[c.method]))


def test_a_variant_stands_for_the_same_choice():
    """LoRA on 16 bits is not LoRA on 4; nor does a peer stand for the planner's choice."""
    plan = {**plans()[0], "task": "films", "method": "lora"}
    without = [p for p in POINTS if p.method != "lora"]
    for bits, own in ((16, "lora:base_bits=16"), (4, None)):
        plan["config"] = {"trainable": "lora", "dtype": "bfloat16", "base_bits": bits}
        (choice,) = summary.choices([plan], without)
        assert (choice.value is not None) == (own is not None)
        assert choice.method == (own or "lora")


def test_peers_are_beside_what_they_repeat():
    found = summary.comparisons(POINTS, {"peft": "lora:base_bits=16"})
    assert len(found) == 6
    for c in found:
        assert c.time == pytest.approx(0.5)
        flops = float(c.budget.split()[0])
        ours, theirs = (
            max(of(c.task, flops, m, "peak_memory_bytes")) for m in ("lora:base_bits=16", "peft")
        )
        assert c.memory == pytest.approx(ours / theirs)
        assert c.beyond == pytest.approx((ours - 400 * 2**20) / (theirs - 400 * 2**20))


class Reader(HTMLParser):
    """The cells of a page's tables, whatever it refers to, and whether its tags match."""

    def __init__(self):
        super().__init__()
        self.tables, self.references, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag == "meta":
            return
        self.open.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_the_page_says_what_the_rows_say():
    text = page.html(ROWS, POINTS, CHOICES)
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.references  # whole, and it loads nothing
    assert "http" not in text and "@import" not in text and "<script" not in text
    assert "<a processor>" not in text and "no room for &lt;b&gt;" in text
    planner, peers, numbers, left_out = reader.tables
    assert len(numbers) == 1 + len(POINTS)
    head = numbers[0]
    for line in numbers[1:]:
        cell = dict(zip(head, line, strict=True))
        flops = float(cell["budget"].split()[0])
        after = of(cell["task"], flops, cell["method"], "after")
        mean, spread = statistics.mean(after), statistics.stdev(after)
        style = "{:.1%}" if cell["task"] == "films" else "{:.3g}"
        assert cell["quality"] == f"{style.format(mean)} ± {style.format(spread)}"
        peak = max(of(cell["task"], flops, cell["method"], "peak_memory_bytes"))
        over = " (over)" if cell["method"] == "peft" else ""
        assert cell["peak memory"] == f"{peak / 2**20:.0f} MiB{over}"
        assert ("(edge)" in cell["learning rate"]) == (cell["method"] == "mezo")
    regrets = dict(
        zip([tuple(line[:2]) for line in planner], [x[-1] for x in planner], strict=True)
    )
    for c in CHOICES:
        said = regrets[c.task, c.budget]
        if c.regret is None:
            assert said == "?"
        else:
            assert said == (
                f"{100 * c.regret:.1f} points" if c.task == "films" else f"{c.regret:.3g}"
            )
    assert len(peers) == 7 and all(line[4] == "0.50x" for line in peers[1:])
    assert [line[0] for line in left_out[1:]] == ["roste"]


def test_marks_stand_where_their_values_are():
    """Every mark of a drawing, in both directions, by the distances between them."""
    here = [p for p in POINTS if p.task == "prose"]
    style = charts.styles(list(METHODS))
    svg = charts.scatter(here, "FLOPs of training", style)
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5.0" fill="#2f74d8"', svg)
    own = [p for p in here if p.method == "full"]
    assert len(circles) == len(own) == 3
    x, y = zip(*((float(a), float(b)) for a, b in circles), strict=True)
    logs, values = [math.log(p.flops) for p in own], [math.log(p.value) for p in own]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(
        (logs[1] - logs[0]) / (logs[2] - logs[0]), abs=2e-3
    )
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(
        (values[1] - values[0]) / (values[2] - values[0]), abs=2e-3
    )
    assert values[2] < values[0] and y[2] < y[0]  # less perplexity is up


def outlier(value: float) -> list:
    """The prose's points, MeZO's at `value`."""
    here = [p for p in POINTS if p.task == "prose"]
    return [replace(p, values=(value,)) if p.method == "mezo" else p for p in here]


@pytest.mark.parametrize("value", [30.5, 1e3, 1e8])
def test_a_run_that_diverged_squeezes_no_axis(value):
    axis, usual = charts.Quality(outlier(value)), charts.Quality(outlier(30.0))
    learned = [p.value for p in outlier(value) if p.method != "mezo"]
    span = axis.at(min(learned)) - axis.at(max(learned))
    assert span > 0.75 * (usual.at(min(learned)) - usual.at(max(learned)))
    assert axis.beyond(value) == (value > 30.5) and not any(map(axis.beyond, learned))
    assert 0 < axis.at(value) < axis.at(30.0)
    svg = charts.scatter(outlier(value), "peak memory", charts.styles(list(METHODS)))
    arrows = re.findall(r'<polygon points="[^"]*" fill="#8659c9"/>', svg)
    assert len(arrows) == (len(BUDGETS) if value > 30.5 else 0)


def test_the_better_half_is_told_apart():
    """Where training began far away: its end, not its beginning, fills the axis."""
    values = (2.1, 2.3, 2.6, 5.0)
    points = [replace(p, before=1e5, values=(v,)) for p, v in zip(POINTS[-4:], values, strict=True)]
    axis = charts.Quality(points)
    assert axis.beyond(1e5) and not any(map(axis.beyond, values))
    assert axis.at(2.1) - axis.at(2.3) > 0.05
    assert charts.Quality([replace(p, values=(2.0,)) for p in points]).at(2.0) > 0.9  # all alike


def test_of_shares_all_is_shown():
    values = (0.93, 0.92, 0.9, 0.25, 0.15)
    points = [
        replace(p, before=0.17, values=(v,), metric="accuracy")
        for p, v in zip(POINTS[-5:], values, strict=True)
    ]
    axis = charts.Quality(points)
    assert not any(map(axis.beyond, (*values, 0.17)))
    assert axis.at(0.15) < axis.at(0.17) < axis.at(0.25) < 0.2 < axis.at(0.9)


def test_lines_join_budgets_of_one_limit():
    both = [replace(p, memory_limit_bytes=m) for p in POINTS[:3] for m in (1.0, 2.0)]
    by_flops, by_memory, _ = (cost.lines(both) for cost in charts.COSTS.values())
    assert [len({p.memory_limit_bytes for p in line}) for line in by_flops] == [1, 1]
    assert [len({p.flops_limit for p in line}) for line in by_memory] == [1] * len(by_memory)


@pytest.mark.pictures
def test_a_legend_names_what_only_a_later_task_has(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "blank", lambda *size: figures.append(blank(*size)) or figures[0])
    fewer = [p for p in POINTS if (p.task, p.method) != ("films", "lora")]
    pictures.quality(tmp_path / "a.png", fewer)
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == set(METHODS)


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.48, 0.83, False), (9e11, 1.1e13, True), (430, 690, True), (12, 300, True), (3, 3e6, True)],
)
def test_ticks(low, high, log):
    found = charts.ticks(low, high, log=log)
    assert 2 <= len(found) <= 6
    assert all(low <= x <= high for x in found) and found == sorted(set(found))
    assert all(float(f"{x:.3g}") == pytest.approx(x) for x in found)


def test_styles_tell_methods_apart():
    labels = [*charts.HUES, "lora:base_bits=16", "mezo-exact", "peft", "torch-full", "tomorrows"]
    style = charts.styles([label for label in labels if label != "tomorrows"])
    assert len(set(style.values())) == len(style)
    assert style["peft"].color == style["lora"].color and style["peft"].hollow


@pytest.mark.pictures
def test_a_folder_gets_its_report(tmp_path):
    store = Store(tmp_path)
    for i, row in enumerate(ROWS):
        write(tmp_path / f"runs/{row['task']}/b/m/{i:03}/row.json", row)
    for i, plan in enumerate(plans()):
        write(tmp_path / f"runs/{plan['task']}/{i}/plan.json", plan)
    write_report(store)
    assert (tmp_path / "report.html").read_text() == page.html(ROWS, POINTS, CHOICES)
    for name in pictures.drawings(POINTS, CHOICES):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert json.dumps(read(tmp_path / "runs/films/b/m/000/row.json")) == json.dumps(ROWS[0])
