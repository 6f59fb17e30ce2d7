"""When freed memory goes back: by a script of what would be resident."""

import pytest

from tinyft import heap

MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch):
    """`machine["now"]`, MiB resident; a trim takes off `machine["holes"]` and is counted."""
    state = {"now": 100, "holes": 0, "trims": 0}

    def trim():
        state["now"] -= state["holes"]
        state["holes"], state["trims"] = 0, state["trims"] + 1

    monkeypatch.setattr(heap, "resident_bytes", lambda: state["now"] * MIB)
    monkeypatch.setattr(heap, "trim", trim)
    monkeypatch.setattr(heap, "SLACK_BYTES", 50 * MIB)
    return state


def test_trims_beyond_what_was_in_use_and_slack(machine):
    watch = heap.HeapWatch()
    machine["now"] = 150
    watch.check()
    assert machine["trims"] == 0
    machine.update(now=260, holes=60)  # in use: 200, so up to 250 is let alone from now on
    watch.check()
    assert machine["trims"] == 1 and machine["now"] == 200
    machine.update(now=250, holes=150)
    watch.check()
    assert machine["trims"] == 1
    machine.update(now=251, holes=151)
    watch.check()
    assert machine["trims"] == 2 and machine["now"] == 100
    machine["now"] = 250  # less was in use at that trim, but the peak is what counts
    watch.check()
    assert machine["trims"] == 2
