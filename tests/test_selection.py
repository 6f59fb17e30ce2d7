"""The selection against brute force, and where that is out of reach against an upper bound."""

import itertools

import numpy as np
import pytest

from tinyft.selection import _by_one, cost_of, select


def best_value(importance, dw, dy, flops, own=None, way=None, limit=None):
    """The most importance of all 2^N sets within the limits, each looked at."""
    masks = np.array(list(itertools.product([False, True], repeat=len(dw))))

    def costs(share, on_the_way):
        reached = masks[:, ::-1].cumsum(1)[:, ::-1] > 0  # k counts if anything from k on is in
        return masks @ share + reached @ on_the_way

    fits = costs(dw, dy) <= flops
    if limit is not None:
        fits &= costs(own, way) <= limit
    return (masks @ importance)[fits].max()


def random_case(rng, n, high):
    """Costs of which some are 0, as norms' and biases' are, and limits from nothing to all."""
    dw, dy, own, way = rng.integers(0, high, (4, n)) * (rng.random((4, n)) < 0.8)
    dy, way = (x // rng.choice([1, 4]) for x in (dy, way))
    importance = rng.normal(1.0, 1.0, n) * (rng.random(n) < 0.9)
    limits = [
        int(rng.choice([rng.random(), 0.4]) * (x + y).sum()) for x, y in ((dw, dy), (own, way))
    ]
    return importance, dw, dy, own, way, limits


@pytest.mark.parametrize("high", [6, 1000])
def test_one_limit_is_brute_force(high):
    rng = np.random.default_rng(high)
    for _ in range(250):
        importance, dw, dy, *_, (flops, _) = random_case(rng, rng.integers(1, 13), high)
        mask = select(importance, dw, dy, flops)
        assert cost_of(mask, dw, dy) <= flops
        assert importance[mask].sum() == pytest.approx(best_value(importance, dw, dy, flops))


@pytest.mark.parametrize("high", [6, 1000])
def test_two_limits_are_brute_force(high):
    rng = np.random.default_rng(high + 1)
    both_bind = 0
    for _ in range(250):
        importance, dw, dy, own, way, limits = random_case(rng, rng.integers(1, 13), high)
        flops, memory = limits
        both = {"state_bytes": own, "saved_bytes": way, "memory_bytes": memory}
        mask = select(importance, dw, dy, flops, **both)
        assert cost_of(mask, dw, dy) <= flops and cost_of(mask, own, way) <= memory
        want = best_value(importance, dw, dy, flops, own, way, memory)
        assert importance[mask].sum() == pytest.approx(want)
        alone = best_value(importance, dw, dy, flops), best_value(importance, own, way, memory)
        both_bind += want < min(alone) - 1e-9
    assert both_bind > 20  # the case that needs a search of its own


def test_costs_too_fine_for_the_grid_are_rounded_up():
    """The limit holds on a grid of any coarseness, and little is lost on the usual one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        dw, dy = rng.integers(1, 10**10, (2, 10)) | 1
        importance, flops = rng.random(10), int(rng.random() * 10**11)
        for cells in (10, 100):
            assert cost_of(_by_one(importance, dw, dy, flops, cells), dw, dy) <= flops
        mask = select(importance, dw, dy, flops)
        assert cost_of(mask, dw, dy) <= flops
        assert importance[mask].sum() >= 0.97 * best_value(importance, dw, dy, flops * 0.999)


def seven_billion():
    """dw, dy, state bytes, saved bytes of a Llama-shaped model, written down layer by layer."""
    width, inner, vocabulary, tokens, context = 4096, 11008, 32000, 2048, 512
    products = 2 * 2 * tokens * context * width
    rows = [(width * vocabulary, 0, 1), (0, vocabulary * width, 1)]  # the head, the last norm
    for _ in range(32):
        rows += [(inner * width, 0, 1), (inner * width, inner * width, 2), (inner * width, 0, 0)]
        rows += [(0, 2 * inner * width, 1), (width * width, 0, 1)]
        rows += [(width * width, width * width + products // tokens, 3)]
        rows += [(width * width, 0, 0), (width * width, 0, 0), (0, 3 * width * width, 1)]
    own, way, saved = np.array(rows, dtype=np.int64).T
    return (
        2 * tokens * own,
        2 * tokens * way,
        8 * np.maximum(own, width),
        4 * tokens * width * saved,
    )


def fractional(importance, cost, room):
    """The knapsack's bound: the last item may be cut."""
    order = np.argsort(-importance / np.maximum(cost, 1e-12))
    spent = np.cumsum(cost[order])
    whole = np.searchsorted(spent, room, side="right")
    value = importance[order][:whole].sum()
    if whole < len(order):
        item = order[whole]
        before = spent[whole - 1] if whole else 0.0
        value += importance[item] * (room - before) / cost[item]
    return value


def bound(importance, costs):
    """No set within all limits is worth more: for each deepest tensor the least bound, over
    weights, of the knapsack whose one cost is the weighted sum of all costs."""
    ways = [np.cumsum(way) / limit for _, way, limit in costs]
    best = 0.0
    for k in range(len(importance)):
        rooms = [1 - way[k] for way in ways]
        if min(rooms) < 0:
            break
        shares = np.linspace(0, 1, 41) if len(costs) > 1 else [1.0]
        best = max(
            best,
            min(
                fractional(
                    importance[: k + 1],
                    sum(
                        w * own[: k + 1] / limit
                        for w, (own, _, limit) in zip((u, 1 - u), costs, strict=False)
                    ),
                    sum(w * room for w, room in zip((u, 1 - u), rooms, strict=False)),
                )
                for u in shares
            ),
        )
    return best


@pytest.mark.parametrize("rho, memory", [(0.3, None), (0.3, 0.15), (0.5, 0.4), (0.4, 0.33)])
def test_a_model_of_7_billion(rho, memory):
    dw, dy, own, way = seven_billion()
    assert len(dw) == 290
    importance = np.random.default_rng(0).exponential(size=len(dw)) * np.sqrt(own)
    flops = int(rho * (dw + dy).sum())
    limit = memory and int(memory * (own + way).sum())
    both = {"state_bytes": own, "saved_bytes": way, "memory_bytes": limit} if memory else {}
    mask = select(importance, dw, dy, flops, **both)
    costs = [(dw, dy, flops)] + ([(own, way, limit)] if memory else [])
    assert all(cost_of(mask, *cost) <= at_most for *cost, at_most in costs)
    assert importance[mask].sum() > 0.985 * bound(importance, costs)


def test_nothing_fits_and_nothing_is_worth_it():
    one = np.array([1])
    assert not select(np.array([1.0]), one, one, 1).any()
    assert not select(np.array([1.0]), one, one, -5).any()
    assert not select(np.array([-1.0]), one, one, 10).any()
    both = {"state_bytes": one, "saved_bytes": one}
    assert select(np.array([1.0]), one, one, 2, **both, memory_bytes=2).all()
    assert not select(np.array([1.0]), one, one, 2, **both, memory_bytes=1).any()
