"""Which tensors to train: the most importance that fits a FLOP limit and a byte limit.

Tensors are counted from the output toward the input. Training a set costs

    sum of dw over the set + sum of dy from the output to the deepest of the set

in FLOPs, and in bytes likewise (state of each tensor, activations down to the deepest). With the
deepest fixed what is left is a 0/1 knapsack over the shallower ones, and the table of those, filled
from the output inward, serves every choice of the deepest (GreenTrainer, ICLR 2024, section 3.3;
the published program keeps one flag a state instead, and misses the best set).

* One limit: a table over a grid of costs, which are rounded up, never down. Where the costs' common
  divisor is coarse enough the grid is that, and the answer is the best one.
* Two limits: the best set under one of them is the answer where it meets the other. Else the table
  is filled for weighted sums of both costs, the weights searched; and for few tensors there is a
  list of partial sets with both costs as they are, which is cut (to the best of each bucket of
  costs) only when it outgrows `_STATES`: up to 12 tensors never, so that it holds the best set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_CELLS, _FEWER_CELLS = 20_000, 5_000  # of the grid, and of each in a search over weights
_WEIGHTS, _REPAIRS = 6, 5  # tries in that search
_LISTED = 64  # tensors; with more of them the list is cut too often to be of use
_STATES = 4_096  # partial sets in the list before it is cut
_BUCKETS = 24  # along each of the two costs when it is


@dataclass(frozen=True, eq=False)
class Selection:
    """One evaluation and what came of it, over the N candidates.

    Attributes:
        step: steps done before it.
        importance: (N,) float64, averaged, the largest 1.
        mask: (N,) bool, what is trained.
        share: FLOPs of a step that trains it, over those of full fine-tuning.
        overhead: FLOPs of this evaluation, over those of a step of full fine-tuning.
    """

    step: int
    importance: Floats
    mask: Mask
    share: float
    overhead: float


def saved_flops(history: Sequence[Selection], steps: int) -> tuple[Integers, Floats]:
    """(steps, shares), both (steps,): of full fine-tuning's FLOPs up to a step, what was saved."""
    at = np.arange(1, steps + 1)
    spent = np.zeros(steps)
    for selection in history:
        spent[selection.step :] = selection.share
    for selection in history:
        spent[selection.step : selection.step + 1] += selection.overhead
    return at, 1 - np.cumsum(spent) / at


def cost_of(mask: Mask, own: Integers, way: Integers) -> int:
    """What a set costs: its own shares, and the way to its deepest."""
    if not mask.any():
        return 0
    return int(own[mask].sum() + way[: np.flatnonzero(mask)[-1] + 1].sum())


def select(
    importance: Floats,
    dw: Integers,
    dy: Integers,
    flops: int,
    *,
    state_bytes: Integers | None = None,
    saved_bytes: Integers | None = None,
    memory_bytes: int | None = None,
) -> Mask:
    """The set of most importance within the limits.

    Args:
        importance: (N,) of each tensor, from the output toward the input.
        dw: (N,) FLOPs of its own gradient.
        dy: (N,) FLOPs to carry the activations' gradient to it from where the one before it is.
        flops: the limit.
        state_bytes: (N,) what training it keeps beside the weights, e.g. moments.
        saved_bytes: (N,) activations kept on the way to it from where the one before it is.
        memory_bytes: the limit on both, or None.

    Returns:
        (N,) bool; nothing selected if nothing of positive importance fits.

    Example:
        >>> select(np.array([1.0, 3.0, 4.0]), np.array([1, 1, 1]), np.array([0, 1, 5]), 3)
        array([ True,  True, False])
    """
    mask = _by_one(importance, dw, dy, flops)
    if memory_bytes is None:
        return mask
    assert state_bytes is not None and saved_bytes is not None
    own, way = np.stack([dw, state_bytes]), np.stack([dy, saved_bytes])
    limits = np.array([flops, memory_bytes])
    if _fits(mask, own, way, limits):
        return mask
    mask = _by_one(importance, state_bytes, saved_bytes, memory_bytes)
    if _fits(mask, own, way, limits):
        return mask
    found = [_by_sums(importance, own, way, limits)]
    if len(importance) <= _LISTED:
        found.append(_by_list(importance, own, way, limits))
    return max(found, key=lambda mask: float(importance[mask].sum()))


def _fits(mask: Mask, own: Integers, way: Integers, limits: Integers) -> bool:
    return all(
        cost_of(mask, *costs) <= limit for *costs, limit in zip(own, way, limits, strict=True)
    )


def _by_one(
    importance: Floats, own: Integers, way: Integers, limit: int, cells: int = _CELLS
) -> Mask:
    """The knapsack over a grid of one cost."""
    n, room = len(own), limit - np.cumsum(way)  # what the way to each tensor leaves
    unit = max(math.gcd(*map(int, own)), -(-limit // cells), 1)
    weight, room = -(-own // unit), room // unit
    best = np.zeros(max(limit // unit, 0) + 1)  # of the tensors so far, within a cost
    taken = np.zeros((n, len(best)), dtype=bool)
    value, deepest, left = 0.0, -1, 0
    for k in range(n):
        if room[k] < 0:
            break  # and less than nothing for the deeper ones
        if importance[k] <= 0 or (rest := int(room[k] - weight[k])) < 0:
            continue
        if best[rest] + importance[k] > value:
            value, deepest, left = best[rest] + importance[k], k, rest
        # Costs over `room[k]` no deeper tensor will ask for.
        with_it = best[: rest + 1] + importance[k]
        without = best[weight[k] : room[k] + 1]
        np.greater(with_it, without, out=taken[k, weight[k] : room[k] + 1])
        best[weight[k] : room[k] + 1] = np.maximum(with_it, without)
    mask = np.zeros(n, dtype=bool)
    if deepest >= 0:
        mask[deepest] = True
        for k in range(deepest - 1, -1, -1):
            if taken[k, left]:
                mask[k] = True
                left -= weight[k]
    return mask


def _by_sums(importance: Floats, own: Integers, way: Integers, limits: Integers) -> Mask:
    """The better of what the table finds for weighted sums of both costs, within both limits."""
    best, low, high = np.zeros(len(importance), dtype=bool), 0.0, 1.0
    # Both limits become this. Sums are rounded to the nearest: the limits are checked as they are.
    scale = _FEWER_CELLS

    def find(weight: float, limit: int) -> Mask:
        weights = np.array([[weight], [1 - weight]]) * scale / np.maximum(limits, 1)[:, None]
        sums = (np.rint((weights * costs).sum(0)).astype(np.int64) for costs in (own, way))
        return _by_one(importance, *sums, limit)

    for turn in range(_WEIGHTS + _REPAIRS):
        if turn < _WEIGHTS:  # more weight to the limit that the last set broke
            weight, limit = (low + high) / 2, scale
        mask = find(weight, limit)
        spent = np.array([cost_of(mask, *costs) for costs in zip(own, way, strict=True)])
        if (spent <= limits).all():
            best = max(best, mask, key=lambda mask: float(importance[mask].sum()))
            if turn >= _WEIGHTS:
                break
        over = spent / np.maximum(limits, 1)
        if over[0] > over[1]:
            low = weight
        else:
            high = weight
        if turn >= _WEIGHTS - 1:
            limit = limit * 994 // 1000
    return best


def _by_list(importance: Floats, own: Integers, way: Integers, limits: Integers) -> Mask:
    """The knapsack with both costs, each argument's first dimension."""
    n, rooms = len(importance), limits[:, None] - np.cumsum(way, axis=1)
    costs, values = np.zeros((2, 1), dtype=np.int64), np.zeros(1)
    # Of each state after each tensor: 2 * its state before, + 1 if the tensor is in it.
    origins: list[Integers] = []
    value, deepest, state = 0.0, -1, 0
    for k in range(n):
        room = rooms[:, k : k + 1]
        if (room < 0).any():
            break
        alive = np.flatnonzero((costs <= room).all(0))
        origin = 2 * alive
        costs, values = costs[:, alive], values[alive]
        if importance[k] > 0:
            more = costs + own[:, k : k + 1]
            fits = np.flatnonzero((more <= room).all(0))
            if len(fits):
                top = fits[np.argmax(values[fits])]
                if values[top] + importance[k] > value:
                    value, deepest, state = values[top] + importance[k], k, int(alive[top])
                origin = np.concatenate([origin, 2 * alive[fits] + 1])
                costs = np.concatenate([costs, more[:, fits]], axis=1)
                values = np.concatenate([values, values[fits] + importance[k]])
        if len(values) > _STATES:
            kept = _best_of_buckets(costs, values, room)
            origin, costs, values = origin[kept], costs[:, kept], values[kept]
        origins.append(origin)
    mask = np.zeros(n, dtype=bool)
    if deepest >= 0:
        mask[deepest] = True
        for k in range(deepest - 1, -1, -1):
            state, mask[k] = divmod(int(origins[k][state]), 2)
    return mask


def _best_of_buckets(costs: Integers, values: Floats, room: Integers) -> Integers:
    """Indices of the state of most value in each bucket of the two costs."""
    bucket = costs * _BUCKETS // (room + 1)
    key = bucket[0] * _BUCKETS + bucket[1]
    order = np.argsort(values)
    slots = np.full(_BUCKETS * _BUCKETS, -1)
    slots[key[order]] = order  # of several the last one stays: the best
    return slots[slots >= 0]
