"""What is printed of a run, by audience."""

from __future__ import annotations

import io
import json

import pytest

from tinyft import progress
from tinyft.errors import InputError
from tinyft.progress import BarReporter, JsonReporter, LineReporter, Step, duration, scores


def a_step(number, total=100):
    return Step(number, total, 0.5, 1e-3, 400, 0.5, 1 << 30, 2 << 30)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: now[0])
    return now


def lines_of(seconds_per_step, clock, total=100):
    stream = io.StringIO()
    reporter = LineReporter(stream)
    reporter.begin(total, 0)
    for number in range(1, total + 1):
        clock[0] += seconds_per_step
        reporter.step(a_step(number, total))
    reporter.end()
    return stream.getvalue().splitlines()


def test_plain_lines_are_few(clock):
    fast, slow = lines_of(0.01, clock), lines_of(10.0, clock)
    assert len(fast) == 2  # the first and the last
    assert len(slow) == 21
    assert fast[0] == (
        "step 1/100  loss 0.5000  800 tokens/s  memory 1.0 GiB, peak 2.0 GiB  0:50 left"
    )
    assert fast[-1].startswith("step 100/100")


def test_a_resumed_run_reports_its_first_step(clock):
    stream = io.StringIO()
    reporter = LineReporter(stream)
    reporter.begin(100, 40)
    reporter.step(a_step(41))
    assert stream.getvalue().startswith("step 41/100")


def test_the_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    reporter = BarReporter(stream)
    reporter.info("[not markup]")
    reporter.begin(10, 2)
    for number in range(3, 11):
        reporter.step(a_step(number, 10))
    reporter.evaluation("step 5", {"loss": 0.25})
    reporter.end()
    shown = stream.getvalue()
    assert "[not markup]" in shown and "held-out step 5: loss 0.2500" in shown


def test_json_keeps_words_off_standard_output():
    out, err = io.StringIO(), io.StringIO()
    reporter = JsonReporter(out, err)
    reporter.info("for a person")
    reporter.begin(3, 0)
    reporter.step(a_step(1, 3))
    reporter.evaluation("after", {"accuracy": 0.5})
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", "step", "evaluation"]
    assert events[1]["peak_memory_bytes"] == 2 << 30
    assert err.getvalue() == "for a person\n"


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    inner = JsonReporter(io.StringIO(), io.StringIO())
    reporter = progress.TensorBoardReporter(inner, tmp_path / "tensorboard")
    reporter.begin(3, 0)
    reporter.step(a_step(1, 3))
    reporter.evaluation("after", {"accuracy": 0.5, "n": 3})
    reporter.end()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_without_tensorboard(monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tinyft.tensorboard.'"):
        progress.check_tensorboard()


def test_words():
    assert [duration(s) for s in (0, 59.6, 95, 3700)] == ["0:00", "1:00", "1:35", "1:01:40"]
    assert scores({"loss": 0.69314, "accuracy": 0.5, "n": 1500, "samples": []}) == (
        "loss 0.6931, accuracy 0.500, n 1,500"
    )
