"""Choosing channels: against loops over heads, and estimators against the products themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tinyft.errors import InputError
from tinyft.sparse import schedule
from tinyft.sparse.channels import kept, qk_channels, top, vo_channels
from tinyft.sparse.estimator import Estimator, decompose, estimators
from tinyft.sparse.tokens import Tokens

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def norms(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 0.99])
def test_heads_of_queries_and_keys_against_a_loop(rotary, sparsity):
    q, k = norms(HEADS * HEAD_DIM), norms(KV_HEADS * HEAD_DIM, 1)
    half = HEAD_DIM // 2
    scores = {}
    for head in range(HEADS):  # each query head looks at the keys of its own key head
        kv_head = head // (HEADS // KV_HEADS)
        for d in range(HEAD_DIM):
            unit = (kv_head, d % half if rotary else d)
            product = float(q[head * HEAD_DIM + d] * k[kv_head * HEAD_DIM + d])
            scores[unit] = scores.get(unit, 0.0) + product
    best = sorted(scores, key=scores.get)[-kept(len(scores), sparsity) :]
    k_rows = {
        kv_head * HEAD_DIM + d
        for kv_head, unit in best
        for d in ((unit, unit + half) if rotary else (unit,))
    }
    q_rows = {
        head * HEAD_DIM + d
        for head in range(HEADS)
        for d in range(HEAD_DIM)
        if (head // (HEADS // KV_HEADS)) * HEAD_DIM + d in k_rows
    }
    got_q, got_k = qk_channels(q, k, HEAD_DIM, sparsity, rotary=rotary)
    assert got_q.tolist() == sorted(q_rows) and got_k.tolist() == sorted(k_rows)


def test_values_and_the_inputs_of_the_output_against_a_loop():
    v = norms(KV_HEADS * HEAD_DIM)
    v_rows, o_columns = vo_channels(v, HEADS, HEAD_DIM, 0.6)
    assert set(v_rows.tolist()) == set(v.topk(kept(len(v), 0.6)).indices.tolist())
    want = [
        head * HEAD_DIM + d
        for head in range(HEADS)
        for d in range(HEAD_DIM)
        if (head // (HEADS // KV_HEADS)) * HEAD_DIM + d in v_rows.tolist()
    ]
    assert o_columns.tolist() == want


def test_blocks_stay_together():
    scores = norms(21)
    chosen = top(scores, 0.5, block=4)
    by_block = [float(scores[i : i + 4].sum()) for i in range(0, 21, 4)]
    best = sorted(sorted(range(6), key=by_block.__getitem__)[-3:])
    assert chosen.tolist() == [i for b in best for i in range(4 * b, min(4 * b + 4, 21))]


@pytest.mark.parametrize("bias", [False, True])
def test_a_predictor_of_full_rank_is_the_projection(bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 10, generator=generator)
    b = torch.randn(24, generator=generator) if bias else None
    estimator = Estimator(*decompose(weight, 10), b)
    x, counted = torch.randn(30, 10, generator=generator), torch.ones(30, 1)
    counted[20:] = 0  # padding
    want = torch.nn.functional.linear(x, weight, b)
    torch.testing.assert_close(estimator.outputs(x), want, rtol=1e-4, atol=1e-5)
    found = estimator.norms(x, counted)
    torch.testing.assert_close(found, want[:20].norm(dim=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(top(found, 0.5), top(want[:20].norm(dim=0), 0.5))


def test_low_rank_is_the_best_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.diag(0.8 ** torch.arange(80.0))
    weight = torch.randn(90, 80, generator=generator) @ spectrum
    A, B = decompose(weight, 4)
    best = torch.linalg.svdvals(weight)[4:].norm()
    assert (A @ B - weight.t()).norm() <= 1.001 * best
    state = torch.random.get_rng_state()
    again = decompose(weight, 4)
    assert torch.equal(again[0], A) and torch.equal(torch.random.get_rng_state(), state)


def test_no_device_but_the_weights_is_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # would fail if it were called
    decompose(torch.ones(90, 80), 4)


def test_estimators_are_kept_and_found_again(tmp_path, monkeypatch):
    weights = {"a": lambda: torch.eye(6), "b": lambda: torch.ones(4, 6)}
    made = estimators(weights, {"a": None, "b": None}, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("tinyft.sparse.estimator.decompose", None)
    again = estimators(weights, {"a": None, "b": None}, 2, tmp_path)
    assert all(torch.equal(made[n].A, again[n].A) for n in weights)
    monkeypatch.undo()
    estimators(weights | {"b": lambda: torch.zeros(4, 6)}, {"a": None, "b": None}, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unreadable_cache_is_made_anew(tmp_path):
    weights = {"a": lambda: torch.eye(6)}
    estimators(weights, {"a": None}, 2, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"half a fi")
    assert estimators(weights, {"a": None}, 2, tmp_path)["a"].A.shape == (6, 2)
    assert path.stat().st_size > 9


def test_which_tokens_are_context():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 4, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    tokens = Tokens.of(labels, mask)
    assert tokens.dense.tolist() == [1, 2, 3, 5, 6]  # labelled, and before a label
    assert tokens.sparse.tolist() == [0, 4, 7, 8, 9]
    assert tokens.counted.tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    for of_rows in (None, torch.tensor([0, 1])):
        assert Tokens.of(of_rows, mask).dense.tolist() == [3, 9]  # a row's last token
    assert len(Tokens.of(labels, mask, "all").dense) == 0


def test_the_schedule_costs_least():
    """As much as the dual problem's best: no mixture of levels costs less."""
    rng = np.random.default_rng(0)
    n, steps = 12, np.array([0, *schedule.LEVELS])
    cost = np.sort(rng.random((n, len(schedule.LEVELS))), axis=1)
    saved = rng.integers(1, 9, n).astype(float)
    with_none = np.concatenate([np.zeros((n, 1)), cost], axis=1)
    rise = with_none[:, :, None] - with_none[:, None]
    run = (steps[:, None] - steps) * saved[:, None, None]
    prices = (rise[run > 0] / run[run > 0]).clip(min=0)  # where the dual bends

    def dual(price, need):
        return (with_none - price * saved[:, None] * steps).min(1).sum() + price * need

    for need in (0.1, 3.0, 20.0, 0.96 * saved.sum()):
        found = schedule.solve(cost, saved, need)
        assert found @ saved == pytest.approx(need)
        spent = [
            np.interp(s, steps, [0, *_hull(steps[1:], row)])
            for s, row in zip(found, cost, strict=True)
        ]
        assert sum(spent) == pytest.approx(max(dual(price, need) for price in prices))
    assert schedule.solve(cost, saved, 0.98 * saved.sum()) is None
    assert not schedule.solve(cost, saved, 0.0).any()


def _hull(levels, row):
    """The costs of mixtures: the lower convex hull of (0, 0) and the levels."""
    x, y = np.array([0, *levels]), np.array([0, *row])
    return [
        min(
            y[i] + (y[j] - y[i]) * (x[k] - x[i]) / (x[j] - x[i])
            for i in range(k)
            for j in range(k, len(x))
        )
        for k in range(1, len(x))
    ]


def test_costs_never_fall():
    cost = schedule.costs(np.array([[0.1, 0.2, 0.3], [0.3, 0.1, 0.5], [0.0, 0.0, 0.0]]))
    assert (np.diff(cost, axis=1) > 0).all() and (cost[:, 0] > 0).all()
    assert cost == pytest.approx(
        np.array([[0.1, 0.2, 0.3], [0.3, 0.3, 0.5], [0.0, 0.0, 0.0]]), abs=1e-8
    )


def test_schedules_are_written_and_read(tmp_path):
    keys = [(0, "ffn"), (1, "ffn"), (1, "qk")]
    found = {(1, "ffn"): 0.97, (1, "qk"): 0.25}
    schedule.write(tmp_path / "s.yaml", {**found, (0, "ffn"): 0.0})
    assert schedule.read(tmp_path / "s.yaml", keys) == found
    for text, message in (
        ("ffn: {2: 0.5}", "ffn 2.*0 to 1"),
        ("ffn: {1: 1.5}", "ffn 1: 1.5"),
        ("ffn: 0.5", "no mapping"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            schedule.read(tmp_path / "bad.yaml", keys)
