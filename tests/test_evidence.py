"""What is known of learning: curves between their points, and which of them count."""

from __future__ import annotations

import json
import math
from statistics import mean

import pytest

from tinyft.evidence import Curve, curves, parse, worth


def curve(loss, task="reviews", seed=0, kind="choice", **config):
    return Curve(task, kind, "m", seed, config, tuple(range(0, 100 * len(loss), 100)), tuple(loss))


def test_a_curve_between_its_points():
    one = curve([2.0, 1.0, 0.5], method="lora")
    assert [one.loss_after(n) for n in (0, 100, 200, 10**9)] == [2.0, 1.0, 0.5, 0.5]
    n = round(math.exp((math.log1p(100) + math.log1p(200)) / 2) - 1)  # half-way in the logarithm
    assert one.loss_after(n) == pytest.approx(0.75, abs=5e-3)
    falling = [one.loss_after(n) for n in range(0, 201, 10)]
    assert falling == sorted(falling, reverse=True)


def test_ups_and_downs_are_levelled():
    assert curve([2.0, 1.5, 1.5, 1.0]).expected == (2.0, 1.5, 1.5, 1.0)
    assert curve([2.0, 1.0, 1.2, 0.8]).expected == pytest.approx((2.0, 1.1, 1.1, 0.8))
    loss = [1.0, 0.7, 0.9, 0.95, 0.6, 0.65, 0.1, 0.3, 0.2]
    best = [  # isotonic regression's min-max formula
        min(max(mean(loss[a : b + 1]) for b in range(i, len(loss))) for a in range(i + 1))
        for i in range(len(loss))
    ]
    assert curve(loss).expected == pytest.approx(best)


def test_worth_is_a_share_of_the_way_over_tasks():
    known = [
        curve([2.0, 1.0], method="lora"),
        curve([2.0, 1.5], method="mezo"),
        curve([5.0, 4.0], task="e2e", method="lora"),
        curve([5.0, 3.0], task="e2e", method="full"),
    ]
    assert worth({"method": "lora"}, 100, known) == pytest.approx((1.0 + 0.5) / 2)
    assert worth({"method": "mezo"}, 100, known) == pytest.approx(0.5)
    assert worth({"method": "mezo"}, 0, known) == 0.0
    assert worth({"method": "roste"}, 100, known) is None


def test_a_damaged_base_does_not_begin_anew():
    known = [
        curve([2.0, 1.0], method="lora", base_bits=16),
        curve([3.0, 1.5], method="lora", base_bits=4),
        curve([2.4, 1.2], method="lora", base_bits=16, seed=1),
    ]
    assert worth({"method": "lora", "base_bits": 4}, 100, known) == pytest.approx(0.5)
    both = (1.0 + (2.4 - 1.2) / (2.4 - 1.0)) / 2
    assert worth({"method": "lora", "base_bits": 16}, 100, known) == pytest.approx(both)


def test_what_is_most_alike_counts():
    known = [
        curve([2.0, 1.0], method="lora", base_bits=16, dtype="float32"),
        curve([2.0, 1.2], method="lora", base_bits=16, dtype="bfloat16"),
        curve([2.0, 1.6], method="lora", base_bits=4, dtype="bfloat16"),
    ]

    def after(**config):
        return worth({"method": "lora", **config}, 100, known)

    assert after(base_bits=16, dtype="bfloat16") == pytest.approx(0.8)
    assert after(base_bits=4, dtype="float32") == pytest.approx(0.4)  # the bits come first
    assert after(base_bits=8, dtype="float32") == pytest.approx(1.0)
    assert after(base_bits=8, dtype="float16") == pytest.approx((1.0 + 0.8 + 0.4) / 3)


def test_what_was_trained_elsewhere_is_no_evidence():
    known = [curve([2.0, 1.0], method="roste", trainable="all")]
    assert worth({"method": "roste", "trainable": "all"}, 100, known) == 1.0
    assert worth({"method": "roste", "trainable": "lora"}, 100, known) is None


def test_curves_of_the_same_kind_of_rows_come_first():
    known = [
        curve([2.0, 1.0], method="lora"),
        curve([2.0, 1.5], method="full"),
        curve([2.0, 1.8], task="e2e", kind="lm", method="lora"),
        curve([2.0, 1.0], task="e2e", kind="lm", method="full"),
        curve([2.0, 1.6], task="e2e", kind="lm", method="mezo"),
    ]

    def after(method, kind):
        return worth({"method": method}, 100, known, kind=kind)

    assert [after("lora", kind) for kind in ("choice", "lm")] == pytest.approx([1.0, 0.2])
    assert [after("full", kind) for kind in ("choice", "lm")] == pytest.approx([0.5, 1.0])
    assert after("mezo", "choice") == pytest.approx(0.4)  # there are none
    assert after("lora", "class") == after("lora", None) == pytest.approx(0.6)


def test_the_repositorys_curves_are_sound():
    for one in curves():
        assert len(one.examples) == len(one.loss) >= 2
        assert one.examples[0] == 0
        assert list(one.examples) == sorted(set(one.examples))
        assert all(math.isfinite(loss) for loss in one.loss)
        assert one.kind in ("lm", "choice", "class")
        assert {"method", "trainable", "base_bits", "dtype"} <= one.config.keys()


def test_curves_are_read_as_written():
    row = {"task": "t", "kind": "lm", "model": "m", "seed": 1, "config": {"method": "lora"}}
    text = json.dumps({"curves": [row | {"examples": [0, 8], "loss": [2.0, 1.5]}]})
    assert parse(text) == (Curve("t", "lm", "m", 1, {"method": "lora"}, (0, 8), (2.0, 1.5)),)
