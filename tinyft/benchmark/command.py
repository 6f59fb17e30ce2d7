"""`tinyft bench` as a function."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyft.benchmark import grid, page, pictures, rows, summary, tasks
from tinyft.benchmark.runner import Bench, Settings
from tinyft.benchmark.store import Store, table
from tinyft.checkpoint import write_atomic
from tinyft.errors import InputError
from tinyft.optim import METHODS


def bench(
    *,
    model: str,
    data: Sequence[str],
    output: Path,
    flops: Sequence[str] = (),
    memory: Sequence[str] = (),
    methods: Sequence[str] = ("all",),
    seeds: int = 1,
    lr_search: Sequence[float] = (1.0, 4.0, 16.0),
    search_share: float = 0.3,
    eval_rows: int = 500,
    batch_size: int = 16,
    max_length: int = 128,
    epochs: float = 10.0,
    dtype: str = "auto",
    threads: int | None = None,
    watts_per_core: float = rows.WATTS_PER_CORE,
    grams_per_kwh: float = rows.GRAMS_PER_KWH,
) -> int:
    """Run, or go on with, a benchmark; the flags of `tinyft bench --help` are its arguments.

    Returns:
        The exit code: 1 if runs broke, which the next call repeats.

    Raises:
        InputError: bad arguments, or a folder with another benchmark.
    """
    problems = []
    if not 0 < search_share <= 1:
        problems.append(f"--search-share {search_share:g} is no share: above 0, at most 1")
    if min(lr_search) <= 0:
        problems.append("--lr-search takes factors above 0")
    if problems:
        raise InputError("; ".join(problems) + ".")
    common = {
        "batch_size": batch_size,
        "max_length": max_length,
        "epochs": epochs,
        "dtype": dtype,
        "threads": threads,
    }
    folder = Path(model).expanduser()
    settings = Settings(
        model=str(folder.resolve()) if folder.exists() else model,
        sources=tasks.names(data),
        limits=grid.budgets(flops, memory),
        methods=grid.parse_methods(methods, list(METHODS)),
        seeds=seeds,
        common={k: v for k, v in common.items() if v is not None},
        factors=lr_search,
        share=search_share,
        eval_rows=eval_rows,
        watts_per_core=watts_per_core,
        grams_per_kwh=grams_per_kwh,
    )
    store = Store(output)
    store.open(settings.fixed)
    live = _Live()
    work = Bench(settings, store, say=live.say, live=live.show, changed=lambda: write_tables(store))
    broken = work.work()
    live.show("")
    write_report(store)
    if (output / "report.html").is_file():
        print(f"{output / 'report.html'}; its rows are in results.csv, its pictures in *.png")
    else:
        print(f"Nothing could be run: {output / 'results.csv'} says why")
    if broken:
        print(f"{len(broken)} broke; the same command tries them again", file=sys.stderr)
    return 1 if broken else 0


def write_tables(store: Store) -> None:
    """The rows of all runs that are over, and the planner's choices."""
    with store.waiting("tables"):
        found = store.rows()
        choices = summary.choices(store.plans(), summary.points(found))
        for name, text in (
            ("results.csv", table(found, rows.COLUMNS)),
            ("planner.csv", table([vars(choice) for choice in choices], summary.CHOICE)),
        ):
            write_atomic(store.directory / name, text)


def write_report(store: Store) -> None:
    """Tables, the page and the pictures."""
    write_tables(store)
    with store.waiting("report"):
        found = store.rows()
        points = summary.points(found)
        if points:
            choices = summary.choices(store.plans(), points)
            write_atomic(store.directory / "report.html", page.html(found, points, choices))
            for name, draw in pictures.drawings(points, choices).items():
                write_atomic(store.directory / name, draw)


class _Live:
    """Lines that stay, and on a terminal below them one that changes."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()

    def say(self, text: str) -> None:
        self.show("")
        print(text, flush=True)

    def show(self, text: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", flush=True)
