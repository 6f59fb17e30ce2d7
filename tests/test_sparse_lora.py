"""SparseLoRA against masked dense layers, dense LoRA and PEFT, and what it promises to save."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from test_gradient_methods import our_loop
from test_zeroth import tiny_model
from torch import nn
from torch.nn.functional import linear

import tinyft
from tinyft import adapters
from tinyft.config import TrainConfig
from tinyft.cost import FlopCounter
from tinyft.data import Batch, Batches, encode
from tinyft.errors import InputError
from tinyft.inputs import read_source
from tinyft.losses import check_head, objective
from tinyft.models import outline
from tinyft.packing import pack
from tinyft.pricing import Job, _traced
from tinyft.rotated.layers import convert
from tinyft.sparse.channels import top
from tinyft.sparse.layers import Context, SparseMLP, find
from tinyft.sparse.projection import Projection
from tinyft.sparse.schedule import LEVELS
from tinyft.sparse.tokens import Tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox"]
PARTS = ("ffn", "qk", "vo")
lm = objective("lm")


def batch_of(seed: int, rows: int = 4, width: int = 20, labelled: int = 5) -> Batch:
    """Rows padded on the right, the last `labelled` tokens of each with labels."""
    ids = torch.randint(3, 300, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        end = width - row
        mask[row, end:] = 0
        labels[row, end - labelled : end] = ids[row, end - labelled : end]
    return Batch(ids, mask, labels, tokens_per_example=float(labelled))


def schedule_file(path, sparsity, parts=("ffn", "qk", "vo"), layers=(0, 1)):
    lines = [f"{p}: {{{', '.join(f'{n}: {sparsity}' for n in layers)}}}" for p in parts]
    path.write_text("\n".join(lines))
    return str(path)


def sparse(model, path, **options):
    """A SparseLoRA whose adapters are not zero."""
    optimizer = tinyft.SparseLoRA(
        model, lr=1e-2, sparsity=path, rank=4, break_even=False, **options
    )
    for layer in adapters.adapters(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return optimizer


def gradients(optimizer, batch):
    """Loss and gradients of the adapters and, through the embeddings, of the input."""
    model = optimizer.model
    embeddings = model.get_input_embeddings().weight.requires_grad_(True)
    wanted = [*optimizer.param_groups[0]["params"], embeddings]
    optimizer.context.sparsity = optimizer.schedule
    with optimizer._sparse(lambda part: lm(model, part)) as inside:
        loss = inside(batch).mean()
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]


class Masked(Projection):
    """The same products, with whole weights and zeros."""

    def gather(self, index, dtype, keep):
        raise AssertionError("nothing is gathered here")

    def _low_rank(self, x):
        if self.adapter is None:
            return 0.0
        return linear(linear(x, self.adapter.lora_A.weight), self.adapter.lora_B.weight) * (
            self.adapter.scale
        )

    def scattered(self, x, index):
        mask = torch.zeros(self.n_out, dtype=x.dtype).index_fill(0, index, 1)
        y = linear(x, self.dense()) * mask + self._low_rank(x)
        return y if self.bias is None else y + self.bias

    def from_some(self, x, index):
        mask = torch.zeros(self.n_in, dtype=x.dtype).index_fill(0, index, 1)
        return linear(x * mask, self.dense(), self.bias) + self._low_rank(x)


def masked_mlp(self, x, tokens, index):
    x = x.flatten(0, 1)
    values = {
        key: linear(x, p.dense(), p.bias) + Masked._low_rank(p, x) for key, p in self.first.items()
    }
    kept = torch.ones(len(x), self.channels, dtype=x.dtype)
    kept[tokens.sparse] = torch.zeros(self.channels, dtype=x.dtype).index_fill(0, index, 1)
    h = self.inner(values) * kept
    return linear(h, self.down.dense(), self.down.bias) + Masked._low_rank(self.down, h)


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_equal_masked_dense_layers(family, targets, tmp_path, monkeypatch):
    path = schedule_file(tmp_path / "s.yaml", 0.6, ["ffn"] if family == "gpt_neox" else PARTS)
    model = tiny_model(family).double()
    optimizer, batch = sparse(model, path, targets=targets), batch_of(0)
    got = gradients(optimizer, batch)
    optimizer.schedule, schedule = {}, optimizer.schedule
    dense = gradients(optimizer, batch)
    assert not torch.allclose(got[0], dense[0], rtol=1e-6)
    optimizer.schedule = schedule
    monkeypatch.setattr(SparseMLP, "run", masked_mlp)
    for layer in optimizer._attentions:
        for projection in layer.projections.values():
            projection.__class__ = Masked
    for ours, masked in zip(got, gradients(optimizer, batch), strict=True):
        torch.testing.assert_close(ours, masked, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_products_that_read_rows_where_they_are(family, exact, tmp_path, monkeypatch):
    """What a GPU runs, with that kernel's torch reference."""
    model, batch = tiny_model(family).double(), batch_of(0)
    path = schedule_file(tmp_path / "s.yaml", 0.6)
    optimizer = sparse(model, path, exact_attention=exact)
    want = gradients(optimizer, batch)
    monkeypatch.setattr("tinyft.sparse.projection.choose", lambda *_: "triton")
    monkeypatch.setattr(Projection, "gather", None)
    for fused, gathered in zip(gradients(optimizer, batch), want, strict=True):
        torch.testing.assert_close(fused, gathered, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_under_autocast_it_is_the_same_up_to_rounding(family, tmp_path, monkeypatch):
    """On a GPU, too, where there are kernels that autocast does not know."""
    monkeypatch.setattr("tinyft.sparse.projection.choose", lambda *_: "triton")
    model, batch = tiny_model(family), batch_of(0)
    names = "input_ids", "attention_mask", "labels"
    inputs = {name: getattr(batch, name) for name in names}
    optimizer = sparse(model, schedule_file(tmp_path / "s.yaml", 1e-9))
    optimizer.context.sparsity = optimizer.schedule
    found = []
    for enabled in (False, True):
        with (
            optimizer._sparse(lambda: model(**inputs).loss) as inside,
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled),
        ):
            loss = inside()
        gradients = torch.autograd.grad(loss, optimizer.param_groups[0]["params"])
        found.append([loss.detach(), *gradients])
    for exact, ours in zip(*found, strict=True):
        assert ours.dtype == torch.float32 and not torch.equal(ours, exact)
        assert (ours - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("break_even", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_sparsity_it_is_lora_to_the_bit(family, break_even, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("ffn: {0: 0.0, 1: 0.0}")
    batches = [batch_of(seed) for seed in range(3)]
    weights = []
    for method in ("lora", "sparse_lora"):
        model = tiny_model(family)
        if method == "lora":
            optimizer = tinyft.LoRA(model, lr=1e-2)
        else:
            optimizer = tinyft.SparseLoRA(model, lr=1e-2, sparsity=str(path), break_even=break_even)
        our_loop(optimizer, model, batches)
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_all_channels_sliced_equal_dense_lora(tmp_path):
    """Through the sparse path with every channel: the same up to the order of sums."""
    path = schedule_file(tmp_path / "s.yaml", 1e-9)
    model, batch = tiny_model("llama").double(), batch_of(0)
    optimizer = sparse(model, path)
    got = gradients(optimizer, batch)
    optimizer.schedule = {}
    for ours, dense in zip(got, gradients(optimizer, batch), strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_gradcheck_of_an_mlp(family):
    model = tiny_model(family).double()
    adapters.inject(model, rank=2)
    for layer in adapters.adapters(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    mlps, _ = find(model, Context(None, {}))
    index = torch.tensor([1, 5, 6, 30])
    x = torch.randn(1, 3, mlps[0].width, dtype=torch.float64, requires_grad=True)
    tokens = Tokens((1, 3), torch.tensor([0, 2]), torch.tensor([1]), torch.ones(1, 3))
    assert torch.autograd.gradcheck(lambda x: mlps[0].run(x, tokens, index), x)


def test_the_guess_at_full_rank_chooses_as_the_products_do():
    model, batch = tiny_model("llama"), batch_of(0)
    optimizer = tinyft.SparseLoRA(model, estimator="svd", estimator_rank=32)
    optimizer._prepare()
    mlp, attention = optimizer._mlps[0], optimizer._attentions[0]
    tokens = Tokens.of_batch(batch)
    x = torch.randn(*tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    counted = tokens.counted.bool()
    mean = torch.stack([row[keep].mean(0) for row, keep in zip(x, counted, strict=True)])
    module = mlp.module
    inner = module.act_fn(module.gate_proj(mean)) * module.up_proj(mean)
    assert torch.equal(mlp.select(x, tokens, 0.6), top(inner.norm(dim=0), 0.6))
    v = attention.module.v_proj(x[counted]).norm(dim=0)
    assert torch.equal(attention.select(x, tokens, 0.5, 0.5)["v"], top(v, 0.5))


def test_a_sample_of_all_chooses_as_the_products_do(monkeypatch):
    monkeypatch.setattr("tinyft.sparse.tokens._EVERY", 1)
    optimizer = tinyft.SparseLoRA(tiny_model("llama"))
    mlp, attention = optimizer._mlps[0], optimizer._attentions[0]
    tokens = Tokens.of_batch(batch_of(0))
    x = torch.randn(*tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    some, module = x[tokens.counted.bool()], mlp.module
    inner = module.act_fn(module.gate_proj(some)) * module.up_proj(some)
    moved = [  # by each channel alone, summed over tokens
        (inner[:, c, None] * mlp.down.dense()[:, c]).norm() for c in range(mlp.channels)
    ]
    assert torch.equal(mlp.select(x, tokens, 0.6), top(torch.stack(moved), 0.6))
    v = attention.module.v_proj(some).norm(dim=0)
    assert torch.equal(attention.select(x, tokens, 0.5, 0.5)["v"], top(v, 0.5))


def test_a_sample_stands_for_all():
    tokens = Tokens.of_batch(batch_of(0, rows=3, width=90, labelled=7))
    at, stands = tokens.sample
    counted = tokens.counted.flatten().nonzero().flatten()
    assert len(at) == len(set(at.tolist())) < len(counted) / 8 and set(at.tolist()) <= set(
        counted.tolist()
    )
    assert abs(float(stands.sum()) - len(counted)) < 16
    assert {0, 90, 180} <= set(at.tolist()) and stands[:3].eq(1).all()


@pytest.mark.parametrize("estimator", ["sample", "svd"])
def test_padding_and_output_have_no_part_in_the_choice(estimator):
    optimizer = tinyft.SparseLoRA(tiny_model("llama"), estimator=estimator)
    optimizer._prepare()
    tokens = Tokens.of_batch(batch_of(0))
    x = torch.randn(*tokens.shape, 32, generator=torch.Generator().manual_seed(0))
    y = torch.where(tokens.counted.bool().unsqueeze(2), x, 100.0)
    mlp, attention = optimizer._mlps[0], optimizer._attentions[0]
    torch.testing.assert_close(mlp.scores(x, tokens), mlp.scores(y, tokens))
    one, other = (attention.select(z, tokens, 0.5, 0.5) for z in (x, y))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_without_exact_attention_the_base_of_attention_has_no_gradient(tmp_path):
    path = schedule_file(tmp_path / "s.yaml", 0.5, ("qk", "vo"))
    found = []
    for exact in (True, False):
        model = tiny_model("llama").double()
        found.append(gradients(sparse(model, path, exact_attention=exact), batch_of(0)))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][-1], found[1][-1])


@pytest.mark.parametrize("width", [64, 48])  # rows of whole blocks of 4 bits, and not
@pytest.mark.parametrize("bits", [8, 4])
def test_a_packed_base(bits, width, tmp_path):
    """Slices of the dequantised weight; estimators of that, too."""
    model = tiny_model("llama", hidden_size=width, intermediate_size=128)
    pack(model, bits, torch.float32, "cpu")
    optimizer = sparse(model, schedule_file(tmp_path / "s.yaml", 0.5))
    index = torch.tensor([3, 9, 14])
    for layer in (*optimizer._mlps, *optimizer._attentions):
        for p in (
            (*layer.first.values(), layer.down)
            if layer in optimizer._mlps
            else (layer.projections.values())
        ):
            dense = adapters.dense_weight(p.base)
            want = dense[index] if p.by == "rows" else dense[:, index].t()
            assert torch.equal(p.gather(index, torch.float32, False), want)
    losses = our_loop(optimizer, model, [batch_of(0)] * 6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_is_recomputed_changes_no_bit(checkpointing, tmp_path):
    path = schedule_file(tmp_path / "s.yaml", 0.6)
    weights = []
    for mode in ("none", checkpointing):
        model = tiny_model("llama")
        optimizer = sparse(model, path, checkpointing=mode, dropout=0.1)
        model.train()
        torch.manual_seed(0)
        our_loop(optimizer, model, [batch_of(seed) for seed in range(3)])
        weights.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def saved_bytes(model, optimizer, batch):
    """Bytes of what autograd keeps of a pass, weights apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def seen(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no address twice
        return tensor

    optimizer.context.sparsity = optimizer.schedule
    with (
        optimizer._sparse(lambda part: lm(model, part)) as inside,
        torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t),
    ):
        inside(batch).mean()
    return sum(n for n, _ in found.values())


def test_what_is_kept_for_the_backward_pass_shrinks(tmp_path):
    batch = batch_of(0, rows=8, width=60)
    kept = []
    for sparsity in (0.0, 0.5, 0.9):
        model = tiny_model("llama", intermediate_size=256)
        path = schedule_file(tmp_path / "s.yaml", sparsity, ["ffn"])
        optimizer = sparse(model, path)
        check_head(model)
        kept.append(saved_bytes(model, optimizer, batch))
    tokens = len(Tokens.of_batch(batch).sparse)
    inner = 4 * 256 * 2 * 4 * tokens  # gate, up, silu(gate) and the product, of two layers
    slices = 3 * 2 * 32 * 256 * 4
    for less, sparsity in ((kept[1], 0.5), (kept[2], 0.9)):
        assert kept[0] - less >= 0.9 * (inner * sparsity - slices * (1 - sparsity))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.9, 0.75])
def test_counted_flops_are_what_was_asked_for(family, share):
    model = tiny_model(family, **({"intermediate_size": 512} if family == "llama" else {}))
    if family == "llama":
        check_head(model)
    optimizer = tinyft.SparseLoRA(
        model,
        flops_share=share,
        break_even=False,
        calibration_batches=1,
        sparse_tokens="context",
    )
    check_head(model)
    batch = batch_of(0, rows=8, width=60, labelled=4)
    flops = []
    dense = tinyft.LoRA(tiny_model(family, **_wide(family)))
    check_head(dense.model)
    for method in (dense, optimizer, optimizer):
        with FlopCounter() as counter:
            our_loop(method, method.model, [batch])
        flops.append(counter.flops)
    assert optimizer.schedule and flops[1] > flops[0]  # the second one calibrated
    # What it does not foresee: estimates, and that the first layer's input needs no gradient.
    assert flops[2] / flops[0] == pytest.approx(share, abs=0.06)


def _wide(family):
    return {"intermediate_size": 512} if family == "llama" else {}


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_effects_are_the_gradients_of_gates(family, checkpointing):
    """A gate for every token, at 0, moves a module's output to what it is when sparse: what
    autograd gives for the gates, against what is found on the way through one backward pass."""
    model, batch = tiny_model(family), batch_of(0)
    optimizer = tinyft.SparseLoRA(model, break_even=False, checkpointing=checkpointing)
    closure = lambda part: lm(model, part)  # noqa: E731
    base = {optimizer.keys[0]: 0.5, optimizer.keys[-1]: LEVELS[0]}
    before = {name: p.clone() for name, p in model.named_parameters()}
    for so_far in ({}, base):
        optimizer._so_far = so_far
        found = optimizer._effects(closure, batch)
        layers = [*optimizer._mlps, *optimizer._attentions, *optimizer._attentions]
        model.eval()
        for i, (key, layer) in enumerate(zip(optimizer.keys, layers, strict=True)):
            for j, level in enumerate(LEVELS):
                more = {**so_far, key: max(level, so_far.get(key, 0.0))}
                want = gate_gradient(optimizer, closure, batch, layer.module, so_far, more)
                assert found[i, j] == pytest.approx(want, rel=1e-4, abs=1e-12)
        model.train()
    # Nothing depends on what the last MLP does to the context; all else matters.
    matters = [key for key, rises in zip(optimizer.keys, found, strict=True) if rises.max() > 1e-9]
    assert matters == [key for key in optimizer.keys if key != (1, "ffn")]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def gate_gradient(optimizer, closure, batch, module, base, more):
    """The sum of `(dL / dgate)^2` at 0 over tokens, for gates from `base` to `more` in a module."""
    tokens, gates = Tokens.of_batch(batch), []

    def gated(module, args, kwargs, out):
        y = out[0] if isinstance(out, tuple) else out
        with torch.no_grad():
            optimizer.context.sparsity = more
            moved = module.forward(*args, **kwargs)
            optimizer.context.sparsity = base
        moved = moved[0] if isinstance(moved, tuple) else moved
        gates.append(torch.zeros(*tokens.shape, 1, requires_grad=True))
        y = y + gates[0] * (moved - y.detach())
        return (y, *out[1:]) if isinstance(out, tuple) else y

    optimizer.context.sparsity = base
    with optimizer._sparse(closure) as inside:
        hook = module.register_forward_hook(gated, with_kwargs=True)
        try:
            loss = inside(batch).mean()
        finally:
            hook.remove()
        (gradient,) = torch.autograd.grad(loss, gates)
    return float(gradient.square().sum())


def test_the_planner_prices_a_sparse_step(tiny_model_dir, tmp_path):
    """Its dry run counts what a real step counts, at the schedule that it assumes."""
    base = tiny_model_dir("llama", intermediate_size=256)
    data = tmp_path / "train.jsonl"
    row = {"prompt": "The film was great and the actors were great. " * 4, "completion": " Yes."}
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    values = {"model": str(base), "data": str(data), "method": "sparse_lora", "batch_size": 8}
    config = TrainConfig.build(
        {**values, "lr": 1e-3, "dtype": "float32", "steps": 20, "flops_share": 0.8, "output": None}
    )
    outlined = outline(config.model)
    examples, _ = read_source(config.data, None, False)
    encoded = encode(examples, outlined.tokenizer, max_length=128)
    traced = _traced(config, Job(outlined, encoded, None))
    model = tinyft.load(str(base), dtype="float32").model
    optimizer = tinyft.SparseLoRA.attach(model, config)
    batch = Batches(encoded, 8, seed=0, pad_id=2)[0]
    optimizer.assume()
    flops = []
    for _ in range(2):
        with FlopCounter() as counter:
            optimizer.step(lambda part: lm(model, part), batch)
        flops.append(counter.flops)
    assert optimizer.schedule and flops[1] < flops[0]
    assert traced.step.flops == pytest.approx(flops[0] / 20 + flops[1] * 19 / 20)


def test_uniform_is_the_same_for_all_mlps():
    model = tiny_model("llama", intermediate_size=512)
    optimizer = tinyft.SparseLoRA(model, sparsity="uniform", flops_share=0.8, break_even=False)
    our_loop(optimizer, model, [batch_of(0, rows=8, width=60)] * 2)
    assert {part for _, part in optimizer.schedule} == {"ffn"}
    assert len(optimizer.schedule) == 2 and len(set(optimizer.schedule.values())) == 1


def test_a_share_out_of_reach_says_what_is_in_reach():
    model = tiny_model("llama")
    optimizer = tinyft.SparseLoRA(model, flops_share=0.1, calibration_batches=1)
    with pytest.raises(InputError, match=r"0\.1 cannot be reached.*it is 0\.\d"):
        our_loop(optimizer, model, [batch_of(0)])


def test_short_contexts_are_dense(tmp_path):
    path = schedule_file(tmp_path / "s.yaml", 0.5)
    model = tiny_model("llama")
    optimizer = tinyft.SparseLoRA(model, sparsity=path)
    for layer in optimizer._mlps:
        layer.run = None  # would fail if it were called
    our_loop(optimizer, model, [batch_of(0, rows=1, width=8)])


def test_first_steps_are_dense(tmp_path):
    path = schedule_file(tmp_path / "s.yaml", 0.9)
    batches = [batch_of(seed) for seed in range(3)]
    losses = []
    for start in (0, 2, None):
        model = tiny_model("llama")
        if start is None:
            optimizer = tinyft.LoRA(model, lr=1e-2)
        else:
            optimizer = tinyft.SparseLoRA(
                model, lr=1e-2, sparsity=path, start_step=start, break_even=False
            )
        losses.append(our_loop(optimizer, model, batches))
    assert losses[1][:2] == losses[2][:2] and losses[1][2] != losses[2][2]
    assert losses[0][0] != losses[2][0]


def test_steps_with_equal_cost_keys_cost_equal_flops():
    """Dense, calibrating and sparse ones: equal shapes alone are not enough, since padding is not
    sampled, and calibration measures more with every batch."""
    batches = [batch_of(seed) for seed in range(6)]
    for batch in batches[::2]:  # of the same shape and with as many labels, but without padding
        batch.attention_mask.fill_(1)
    assert len({batch.sizes for batch in batches}) == 1
    model = tiny_model("llama", intermediate_size=512)
    check_head(model)
    optimizer = tinyft.SparseLoRA(model, flops_share=0.9, start_step=3, break_even=False)
    costs: dict = {}
    for batch in batches:
        key = optimizer.cost_key(batch)
        with FlopCounter() as counter:
            optimizer.step(lambda part: lm(model, part), batch)
        costs.setdefault(key, set()).add(counter.flops)
    assert all(len(flops) == 1 for flops in costs.values())
    assert len(costs) == 5  # one dense, two calibrating, and sparse ones of two kinds


def test_closures_with_labels_and_without(tmp_path):
    path = schedule_file(tmp_path / "s.yaml", 0.9)
    batch = batch_of(0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    optimizer = tinyft.SparseLoRA(tiny_model("llama"), sparsity=path, break_even=False)
    model = optimizer.model
    by_hook = optimizer.step(lambda: model(**inputs, labels=batch.labels).loss)
    again = tinyft.SparseLoRA(tiny_model("llama"), sparsity=path, break_even=False)
    told = again.step(lambda part: again.model(**part).loss, {**inputs, "labels": batch.labels})
    assert torch.equal(by_hook, told)
    with pytest.raises(InputError, match="which tokens are context"):
        optimizer.step(lambda: model(**inputs).logits.float().mean())
    with pytest.raises(InputError, match="changes the forward pass"):
        optimizer.step()


def test_outside_of_steps_the_model_is_dense_and_unpatched(tmp_path):
    model, plain = tiny_model("llama"), tiny_model("llama")
    optimizer = tinyft.SparseLoRA(
        model, lr=0.0, sparsity=schedule_file(tmp_path / "s.yaml", 0.9), break_even=False
    )
    forwards = [module.forward for module in model.modules()]
    our_loop(optimizer, model, [batch_of(0)])
    assert [module.forward for module in model.modules()] == forwards
    ids = batch_of(0).input_ids
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    adapters.remove(model)
    for ours, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, its)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_result_is_an_adapter_for_peft(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path / "base")
    path = schedule_file(tmp_path / "s.yaml", 0.8)
    optimizer = tinyft.SparseLoRA(model, lr=1e-2, sparsity=path, break_even=False)
    our_loop(optimizer, model, [batch_of(seed) for seed in range(3)])
    optimizer.save_artefact(model, None, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "adapter").eval()
    ids = batch_of(0).input_ids
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
        adapters.merge(model)
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [1, 3])
def test_state_resumes_to_the_same_bits(stop):
    def fresh():
        model = tiny_model("llama")
        check_head(model)  # which the first step would do, and count
        return model, tinyft.SparseLoRA(
            model, lr=1e-2, flops_share=0.9, start_step=2, break_even=False
        )

    batches = [batch_of(seed, rows=8, width=40) for seed in range(6)]
    model, optimizer = fresh()
    our_loop(optimizer, model, batches)
    assert optimizer.schedule
    first, stopped = fresh()
    our_loop(stopped, first, batches[:stop])
    for way in ("tensors", "dict"):
        second, resumed = fresh()
        second.load_state_dict(first.state_dict())
        if way == "tensors":
            resumed.load_state_tensors(copy.deepcopy(stopped.state_tensors()))
        else:
            resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
        our_loop(resumed, second, batches[stop:])
        assert resumed.schedule == optimizer.schedule
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True)
        )


def test_what_it_refuses(caplog):
    with pytest.raises(InputError, match=r"OPTForCausalLM has none.*--method lora"):
        tinyft.SparseLoRA(tiny_model("opt"))
    with pytest.raises(InputError, match="BertForSequenceClassification has none"):
        tinyft.SparseLoRA(tiny_model("bert"))
    gated = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.BitNetConfig(vocab_size=400, num_hidden_layers=1, **gated)
    with pytest.raises(InputError, match="BitNetMLP does more than its layers"):  # a norm inside
        tinyft.SparseLoRA(transformers.BitNetForCausalLM(config))
    rotated = tiny_model("llama")
    convert(rotated)
    with pytest.raises(InputError, match=r"rotations.*mix them.*--method lora"):
        tinyft.SparseLoRA(rotated)
    tinyft.SparseLoRA(tiny_model("gpt_neox"))
    assert "attention of this form stays dense" in caplog.text
    with pytest.raises(InputError, match=r"flops_share.*2.*estimator_rank"):
        tinyft.SparseLoRA(tiny_model("llama"), flops_share=2, estimator_rank=0)
