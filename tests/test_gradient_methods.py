"""LoRA and full fine-tuning against PEFT and plain torch, and what the gradient engine promises."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from test_zeroth import tiny_model
from torch import nn

import tinyft
from tinyft import adapters
from tinyft.data import Batch
from tinyft.kernels.chunked_cross_entropy import chunked_cross_entropy
from tinyft.losses import objective
from tinyft.optim.gradient import GradientOptimizer
from tinyft.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # PEFT's
STEPS = 20


def batch_of(seed: int, rows: int = 4, width: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (rows, width), generator=generator)
    labels = ids.clone()
    labels[:, : width // 2] = -100
    return Batch(
        ids,
        torch.ones_like(ids),
        labels,
        tokens_per_example=float((labels[:, 1:] != -100).sum()) / rows,
    )


def plain_loop(model, parameters, lr, batches):
    """The loop that everybody writes; returns its losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_loop(optimizer, model, batches):
    lm = objective("lm")
    return [optimizer.step(lambda part: lm(model, part), batch).item() for batch in batches]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_follows_peft_from_the_same_adapter(architecture, tmp_path):
    ours = tiny_model(architecture)
    optimizer = tinyft.LoRA(ours, lr=1e-2, rank=4, alpha=8)
    adapters.save_adapter(ours, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path, is_trainable=True)
    batches = [batch_of(step) for step in range(STEPS)]
    expected = plain_loop(
        theirs, [p for p in theirs.parameters() if p.requires_grad], 1e-2, batches
    )
    assert our_loop(optimizer, ours, batches) == pytest.approx(expected, rel=1e-4)
    for layer in adapters.adapters(ours).values():
        assert layer.lora_B.weight.abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
def test_full_follows_a_plain_torch_loop(architecture):
    ours, theirs = tiny_model(architecture), tiny_model(architecture)
    batches = [batch_of(step) for step in range(STEPS)]
    expected = plain_loop(theirs, theirs.parameters(), 1e-3, batches)
    optimizer = tinyft.Full(ours, lr=1e-3)
    assert our_loop(optimizer, ours, batches) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_adapters_cross_to_peft_and_back(architecture, tmp_path):
    ours = tiny_model(architecture)
    tinyft.LoRA(ours, rank=4, alpha=8)
    for layer in adapters.adapters(ours).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    ids = batch_of(0).input_ids
    ours.config.save_pretrained(tmp_path / "base")  # PEFT looks at it when it saves
    adapters.save_adapter(ours, tmp_path / "ours", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "ours").eval()
    ours.eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = tiny_model(architecture)
        adapters.load_adapter(back, tmp_path / "theirs")
        torch.testing.assert_close(back(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
        adapters.merge(back)
        torch.testing.assert_close(back(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        assert not adapters.adapters(back)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(architecture, mode):
    weights = []
    for checkpointing in ("none", mode):
        model = tiny_model(architecture)
        optimizer = tinyft.Full(model, lr=1e-3, checkpointing=checkpointing)
        our_loop(optimizer, model, [batch_of(step) for step in range(3)])
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox"])  # not tied: last
@pytest.mark.parametrize(
    ("rule", "dtype"), [("adamw", torch.float32), ("sgd", torch.float32), ("sgd", torch.bfloat16)]
)
def test_a_head_is_updated_by_rows(architecture, rule, dtype, monkeypatch):
    """As by its whole gradient, which clipping keeps; 16-bit weights within their rounding."""
    monkeypatch.setitem(chunked_cross_entropy.__kwdefaults__, "block_bytes", 1)
    weights, rows = [], []
    use_rows = GradientOptimizer._use_rows

    def watched(self, parameter, group, row, grad):
        rows.append(row)
        use_rows(self, parameter, group, row, grad)

    monkeypatch.setattr(GradientOptimizer, "_use_rows", watched)
    for grad_clip in (None, 1e9):
        rows.clear()
        model = tiny_model(architecture).to(dtype)
        optimizer = tinyft.Full(model, lr=1e-3, optimizer=rule, grad_clip=grad_clip)
        n_steps = 1 if dtype == torch.bfloat16 else 3
        our_loop(optimizer, model, [batch_of(step) for step in range(n_steps)])
        assert any(rows) == (grad_clip is None)
        weights.append([p.detach().clone() for p in model.parameters()])
        counts = {float(s["step"]) for s in optimizer.state.values() if s}
        assert counts <= {float(n_steps)}
    tolerance = {"rtol": 2**-7, "atol": 0} if dtype == torch.bfloat16 else {}
    for ours, whole in zip(*weights, strict=True):
        torch.testing.assert_close(ours, whole, **tolerance)


@pytest.mark.parametrize("grad_clip", [None, 0.1])
def test_accumulation_equals_the_whole_batch(grad_clip):
    weights = []
    for parts in (1, 2):
        model = tiny_model("llama").double()
        optimizer = tinyft.Full(
            model, lr=1e-3, optimizer="sgd", grad_accumulation=parts, grad_clip=grad_clip
        )
        our_loop(optimizer, model, [batch_of(step) for step in range(3)])
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_accumulation_over_parts_narrower_than_the_batch():
    """Rows of one length each: a part loses the padding that all its rows share."""
    weights, whole = [], batch_of(0)
    for row, length in enumerate((12, 11, 9, 8)):
        whole.labels[row, length:] = -100
        whole.attention_mask[row, length:] = 0
    for parts in (1, 2):
        model = tiny_model("llama").double()
        optimizer = tinyft.Full(model, lr=1e-3, optimizer="sgd", grad_accumulation=parts)
        our_loop(optimizer, model, [whole])
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", ["adamw", "sgd", "adamw8bit"])
def test_state_resumes_to_the_same_bits(rule):
    def fresh():
        model = tiny_model(
            "llama",
        )
        return model, tinyft.Full(model, lr=1e-3, optimizer=rule)

    batches = [batch_of(step) for step in range(6)]
    model, optimizer = fresh()
    our_loop(optimizer, model, batches)
    first, stopped = fresh()
    our_loop(stopped, first, batches[:3])
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_tensors(copy.deepcopy(stopped.state_tensors()))
    our_loop(resumed, second, batches[3:])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_a_packed_base_trains_and_stays(bits, method):
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    pack(model, bits, torch.float32, "cpu")
    optimizer = tinyft.LoRA(model, lr=1e-2)
    if method == "mezo":
        optimizer = tinyft.MeZO(model, lr=1e-2)
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    assert packed
    losses = our_loop(optimizer, model, [batch_of(0)] * 8)
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in packed.items())
    moved = optimizer.param_groups[0]["params"]
    assert any(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    if method == "lora":
        assert losses[-1] < losses[0]


def test_removing_adapters_gives_the_model_back():
    model, plain = tiny_model("llama"), tiny_model("llama")
    tinyft.LoRA(model)
    adapters.remove(model)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
