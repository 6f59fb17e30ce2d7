"""When freed memory goes back, by a script of what would be resident; and where results lie."""

import weakref

import pytest
import torch

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


def test_a_limit_is_not_broken_by_holes(machine):
    watch = heap.HeapWatch()
    watch.hold_below(120 * MIB)
    machine.update(now=121, holes=10)
    watch.check()
    assert machine["trims"] == 1
    watch.check(coming_bytes=20 * MIB)  # 131 to come
    assert machine["trims"] == 2
    machine.update(now=200, holes=0)  # all of it in use: looked at once, ...
    watch.check()
    machine["now"] = 212
    watch.check()
    assert machine["trims"] == 3
    machine.update(now=213, holes=13)  # ... and again when a quarter of the slack has come
    watch.check()
    assert machine["trims"] == 4


def test_looks_before_each_layer_runs(machine):
    layer, watch = torch.nn.Linear(2, 2), heap.HeapWatch()
    with watch.before([layer]):
        machine.update(now=200, holes=60)
        layer(torch.ones(2))
    assert machine["trims"] == 1
    machine.update(now=400, holes=200)
    layer(torch.ones(2))
    assert machine["trims"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shelf_changes_no_value(dtype):
    x = torch.randn(300, 260, generator=torch.Generator().manual_seed(0)).to(dtype)
    row, square = x[:1], x[:260].contiguous()
    whole = torch.arange(1 << 15)
    cases = [
        lambda: x @ x.t(),
        lambda: torch.addmm(x[0, :260], square, square),
        lambda: torch.add(x, x, alpha=0.3),
        lambda: x + 1,
        lambda: row + x[:, :1],  # both operands are broadcast
        lambda: x * row,
        lambda: x * torch.tensor(2.0, dtype=torch.float64),
        lambda: torch.nn.functional.silu(x),
        lambda: torch.nn.functional.gelu(x, approximate="tanh"),
        lambda: -x.t(),
        lambda: torch.cat([x, x[:3]]),
        lambda: torch.cat([x, x], -1),
        lambda: x.pow(2),
        lambda: x.float() * x.double(),
        lambda: whole * 0.5,
    ]
    shelf = heap.Shelf()
    for case in cases:
        want = case()
        for _ in range(2):  # the second time in the block of the first
            with heap.Shelved(shelf):
                got = case()
            assert got.dtype == want.dtype and torch.equal(got, want)
            assert got.stride() == want.stride()


def test_a_block_is_used_again_when_its_tensor_is_dead():
    x, shelf = torch.ones(1 << 15), heap.Shelf()
    with heap.Shelved(shelf):
        kept, view = x * 2, (x * 3)[:5]
        places = {kept.data_ptr(), view.data_ptr()}
        passing = x * 4
        third = passing.data_ptr()
        del passing
        again, other, small = x * 5, x * 6, x[:8] * 7
    assert again.data_ptr() == third and len({*places, third, other.data_ptr()}) == 4
    assert torch.equal(kept, x * 2) and torch.equal(view, x[:5] * 3)
    assert small.untyped_storage().nbytes() == small.nbytes
    with heap.Shelved(shelf):
        del again
        freed = [weakref.ref(block.base) for blocks in shelf._free.values() for block in blocks]
        shelf.empty()
        assert len(freed) == 1 and freed[0]() is None
        again = x * 7
        del again, kept
        assert (x * 8).data_ptr() in places
        again = x * 9
    freed = weakref.ref(again.untyped_storage())
    shelf.close()
    del again
    assert freed() is None and torch.equal(other, x * 6)
    assert not any(shelf._free.values())


def test_autograd_keeps_what_lies_on_a_shelf():
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    want, got = (x.clone().requires_grad_() for _ in range(2))

    def loss(w):
        y = x
        for _ in range(4):
            y = torch.nn.functional.silu(y @ w) * 0.5 + y
        return (y**2).mean()

    loss(want).backward()
    shelf = heap.Shelf()
    with heap.Shelved(shelf):
        value = loss(got)
    shelf.close()
    value.backward()
    assert torch.equal(got.grad, want.grad)
