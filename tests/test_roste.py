"""RoSTE as a method: what a step computes, what is written, and what runs on it."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch
from test_gradient_methods import batch_of, our_loop
from test_zeroth import tiny_model
from torch import nn
from torch.nn.functional import linear

import tinyft
from tinyft.config import TrainConfig
from tinyft.errors import InputError
from tinyft.library import merge, score
from tinyft.losses import objective
from tinyft.models import load
from tinyft.rotated import artefact
from tinyft.rotated.layers import QuantLinear
from tinyft.rotated.quantisers import Quantiser
from tinyft.rotated.rotation import blocks_of
from tinyft.train import run

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ROWS = [
    {
        "prompt": f"The film was {'great' if i % 2 else 'a bore'} {'x' * (i % 5)}. It was",
        "choices": [" terrible", " great"],
        "answer": i % 2,
    }
    for i in range(16)
]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch_of(7).input_ids).logits


# A step.


@pytest.mark.parametrize("rotations", ["all", "none"])
def test_a_step_is_adamw_on_the_straight_through_gradient(rotations):
    """Against a loop that everybody could write: parametrised weights and torch's optimizer. What
    a norm's scale went into steps by as much less."""
    ours = tiny_model("llama")
    for name, parameter in ours.named_parameters():
        if "layernorm" in name:
            parameter.data.mul_(0.1 if "input" in name else 0.3)
    start = copy.deepcopy(ours)
    optimizer = tinyft.RoSTE(ours, lr=1e-2, rotations=rotations, clip=0.95, kv=4)
    lm = objective("lm")
    optimizer.prepare(lambda batch: lm(ours, batch), [batch_of(0)])
    theirs = copy.deepcopy(start)
    copied = tinyft.RoSTE(theirs, rotations=rotations, clip=0.95, kv=4)
    copied.prepare(lambda batch: lm(theirs, batch), [batch_of(0)])

    class Detached(nn.Module):
        def forward(self, w):
            return w + (Quantiser(4, 0.95).round(w.detach()) - w).detach()

    for block in blocks_of(theirs):
        for layer in block.linears():
            assert layer.quantiser == Quantiser(4, 0.95)
            layer.quantiser = None
            nn.utils.parametrize.register_parametrization(layer, "weight", Detached())
    groups = []
    for name, parameter in theirs.named_parameters():
        gain = 1.0
        for part, norm in (("self_attn", "input"), ("mlp", "post_attention")):
            reads = part in name and "o_proj" not in name and "down_proj" not in name
            if reads and rotations == "all":
                scale = start.get_parameter(f"{name.split(f'.{part}')[0]}.{norm}_layernorm.weight")
                gain = scale.square().mean().sqrt().item()
        groups.append({"params": [parameter], "lr": 1e-2 * gain})
    plain = torch.optim.AdamW(groups, weight_decay=0.0)
    expected = []
    for step in range(4):
        loss = lm(theirs, batch_of(step)).mean()
        loss.backward()
        plain.step()
        plain.zero_grad()
        expected.append(loss.item())
    assert our_loop(optimizer, ours, map(batch_of, range(4))) == pytest.approx(expected, rel=1e-5)


def test_weights_are_rounded_once_a_step_whatever_the_accumulation(monkeypatch):
    model = tiny_model("llama", num_hidden_layers=1)
    optimizer = tinyft.RoSTE(model, lr=1e-3, activations=16, kv=16, grad_accumulation=2)
    lm = objective("lm")
    optimizer.prepare(lambda batch: lm(model, batch), [batch_of(0)])
    calls = []
    original = Quantiser.round
    monkeypatch.setattr(Quantiser, "round", lambda *a: calls.append(a[1].shape) or original(*a))
    for step in range(3):
        optimizer.step(lambda part: lm(model, part), batch_of(step))
    assert len(calls) == 3 * 7


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_recomputing_activations_changes_no_bit(mode, trainable):
    weights = []
    for checkpointing in ("none", mode):
        model = tiny_model("llama")
        optimizer = tinyft.RoSTE(model, 1e-3, trainable=trainable, checkpointing=checkpointing)
        our_loop(optimizer, model, map(batch_of, range(3)))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_clipped_gradients_are_another_way():
    losses = []
    for ste in ("identity", "clipped"):
        model = tiny_model("llama")
        optimizer = tinyft.RoSTE(model, 1e-2, ste=ste, clip=0.85, activations=4)
        losses.append(our_loop(optimizer, model, [batch_of(0)] * 5))
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    assert all(found[-1] < found[0] for found in losses)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_a_frozen_base_stays_and_what_is_beside_it_moves(family):
    model = tiny_model(family)
    optimizer = tinyft.RoSTE(model, lr=1e-2, trainable="lora")
    lm = objective("lm")
    optimizer.prepare(lambda batch: lm(model, batch), [batch_of(0)])
    packed = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    kinds = {name.rpartition("layers")[2].split(".", 2)[-1] for name in before}
    assert any("lora_B" in kind for kind in kinds) and any("input_scale" in kind for kind in kinds)
    assert any("norm" in kind for kind in kinds) and not any("embed" in kind for kind in kinds)
    losses = our_loop(optimizer, model, [batch_of(0)] * 6)
    assert losses[-1] < losses[0]
    for name, weight in packed.items():
        assert weight.dtype == torch.uint8
        assert torch.equal(weight, model.get_submodule(name).weight)
    moved = dict(model.named_parameters())
    for name, old in before.items():
        assert not torch.equal(old, moved[name]), name


def test_another_process_goes_on_from_both_state_dicts():
    lm, models = objective("lm"), (tiny_model("llama"), tiny_model("llama"))
    first, second = (tinyft.RoSTE(model, lr=1e-3) for model in models)
    our_loop(first, models[0], [batch_of(0), batch_of(1)])
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, model in zip((first, second), models, strict=True):
        optimizer.step(lambda b, model=model: lm(model, b), batch_of(2))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_a_packed_base_s_state_is_refused_by_one_that_is_not():
    first, second = (tinyft.RoSTE(tiny_model("llama"), trainable="lora") for _ in range(2))
    second.load_state_dict(first.state_dict())  # before the first step nothing is packed
    first.step(lambda: first.rotated.model(input_ids=batch_of(0).input_ids).logits.mean())
    with pytest.raises(InputError, match="is not packed"):
        second.load_state_dict(first.state_dict())
    first.load_state_dict(first.state_dict())


def test_zeroth_order_needs_no_loop():
    model = tiny_model("llama")
    optimizer = tinyft.RoSTEMeZO(model, lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    our_loop(optimizer, model, [batch_of(0)])
    assert all(layer.is_packed for layer in model.modules() if isinstance(layer, QuantLinear))
    moved = {
        name for name, p in model.named_parameters() if not torch.equal(p, before.get(name, p))
    }
    assert moved == set(before)


def test_modes_are_as_before_when_the_calibration_fails():
    model = tiny_model("llama").train()
    optimizer = tinyft.RoSTE(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.prepare(lambda: 1 / 0, [])
    assert all(module.training for module in model.modules())


# The artefact.


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt"])
@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("kv", [8, 4])
def test_the_artefact_is_the_training_model(family, trainable, kv, tmp_path):
    model = tiny_model(family)
    optimizer = tinyft.RoSTE(model, lr=1e-3, trainable=trainable, activations=kv, kv=kv)
    our_loop(optimizer, model, map(batch_of, range(3)))
    expected = logits(model)
    artefact.save(optimizer.rotated, None, tmp_path)
    again, _ = artefact.load(tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-5)
    assert all(m.is_packed for m in again.modules() if isinstance(m, QuantLinear))
    assert logits(model).equal(expected)  # writing left it as it was


def test_the_artefact_is_small(tmp_path):
    model = tiny_model("llama", **WIDE)
    model.to(torch.bfloat16)
    linear_bytes = sum(
        2 * m.weight.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.lm_head
    )
    embedding_bytes = 2 * model.get_input_embeddings().weight.numel()
    optimizer = tinyft.RoSTE(model, lr=1e-3)
    our_loop(optimizer, model, [batch_of(0)])
    sizes = artefact.save(optimizer.rotated, None, tmp_path)
    assert sizes["embedding"] == embedding_bytes
    assert sizes["linear"] < 0.30 * linear_bytes
    assert (tmp_path / artefact.WEIGHTS).stat().st_size < sum(sizes.values()) + 16384


def test_packed_weights_are_integers_that_multiply_to_the_logits(tmp_path):
    """One layer of the file, by hand: codes, scale and zero point against the module's output."""
    from safetensors.torch import load_file

    model = tiny_model("llama")
    optimizer = tinyft.RoSTE(model, lr=1e-3)
    our_loop(optimizer, model, [batch_of(0)])
    artefact.save(optimizer.rotated, None, tmp_path)
    tensors = load_file(tmp_path / artefact.WEIGHTS)
    name = "model.layers.0.self_attn.q_proj"
    codes, scales, zeros = (tensors[f"{name}.{part}"] for part in ("codes", "scales", "zeros"))
    q = torch.stack([codes & 15, codes >> 4], 1).flatten(1)  # low half of the columns, high half
    dense = (q.float() - zeros.float()) * scales
    x = torch.randn(3, 32)
    torch.testing.assert_close(model.get_submodule(name)(x), linear(x, dense))
    manifest = json.loads((tmp_path / artefact.MANIFEST).read_text())
    assert manifest["recipe"]["weights"] == 4 and len(manifest["blocks"]) == 2


@pytest.mark.parametrize("break_it", ["cut", "missing", "format"])
def test_a_broken_artefact_says_so(break_it, tmp_path):
    model = tiny_model("llama")
    optimizer = tinyft.RoSTE(model)
    our_loop(optimizer, model, [batch_of(0)])
    artefact.save(optimizer.rotated, None, tmp_path)
    if break_it == "cut":
        data = (tmp_path / artefact.WEIGHTS).read_bytes()
        (tmp_path / artefact.WEIGHTS).write_bytes(data[: len(data) // 2])
    elif break_it == "missing":
        (tmp_path / "config.json").unlink()
    else:
        manifest = json.loads((tmp_path / artefact.MANIFEST).read_text())
        (tmp_path / artefact.MANIFEST).write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(InputError, match=r"packed model in .* cannot be read"):
        artefact.load(tmp_path)


# Runs.


@pytest.fixture
def configured(tiny_model_dir, tmp_path):
    """`configured(method, **fields)` -> the resolved configuration of a small run."""
    base = str(tiny_model_dir("llama", **WIDE))
    for name, n in (("train", 16), ("dev", 6)):
        rows = "".join(json.dumps(row) + "\n" for row in ROWS[:n])
        (tmp_path / f"{name}.jsonl").write_text(rows)

    def make(method="roste", **fields):
        return TrainConfig.build(
            {
                "model": base,
                "data": str(tmp_path / "train.jsonl"),
                "eval_data": str(tmp_path / "dev.jsonl"),
                "method": method,
                "output": str(tmp_path / "out"),
                "steps": 3,
                "batch_size": 4,
                **fields,
            }
        )

    return make


@pytest.mark.parametrize(
    "method, fields",
    [
        ("roste", {"lr": 1e-3}),
        ("roste", {"trainable": "lora", "activations": 4, "kv": 4}),
        ("roste", {"rotations": "none"}),
        ("roste_mezo", {"lr": 1e-3}),
    ],
)
@pytest.mark.pictures
def test_a_run_is_scored_as_what_is_loaded(configured, tmp_path, method, fields):
    report = run(configured(method, **fields)).report
    out = tmp_path / "out"
    assert (out / "rotations.png").read_bytes().startswith(b"\x89PNG")
    loaded = load(out)
    assert loaded.base_bits == 4
    found = score(str(out), str(tmp_path / "dev.jsonl"), batch_size=4)
    assert found["loss"] == pytest.approx(report["eval"]["after"]["loss"], rel=1e-4)
    assert found["loss"] != pytest.approx(report["eval"]["before"]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="as it was packed"):
        load(out, dtype="bfloat16")


@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("method", ["lora", "mezo"])
def test_other_methods_train_on_the_artefact(configured, tmp_path, method, trainable):
    """On one with adapters of its own they train those on."""
    run(configured(steps=1, trainable=trainable))
    packed = str(tmp_path / "out")
    config = configured(
        method, model=packed, trainable="lora", output=str(tmp_path / "more"), lr=1e-2
    )
    report = run(config).report
    again = load(tmp_path / "more")
    assert again.base_bits == 4
    found = score(again, str(tmp_path / "dev.jsonl"), batch_size=4)
    assert found["loss"] == pytest.approx(report["eval"]["after"]["loss"], rel=1e-4)
    assert found["loss"] != pytest.approx(report["eval"]["before"]["loss"], rel=1e-4)
    with pytest.raises(InputError, match="frozen"):
        run(configured("full", model=packed, output=str(tmp_path / "no")))
    for folder in ("out", "more"):
        with pytest.raises(InputError, match=r"rotated and quantised .* --format packed"):
            merge(tmp_path / folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_generated_answer_is_what_teacher_forcing_gives():
    """With a cache, keys and values are rounded as they are without."""
    model = tiny_model("llama")
    optimizer = tinyft.RoSTE(model, lr=1e-3, kv=4)
    our_loop(optimizer, model, [batch_of(0)])
    model.eval()
    ids = batch_of(1, rows=1).input_ids
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        forced = model(input_ids=out).logits.argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], forced[:, ids.shape[1] - 1 : -1])


def test_export_packs_without_training(configured, tmp_path, capsys):
    from tinyft.cli import main

    config = configured()
    packed, copied = tmp_path / "packed", tmp_path / "copied"
    command = ["export", "--format", "packed", "--json", "--model"]
    flags = ["--data", config.data, "--activations", "4", "--rotations", "all"]
    assert main([*command, config.model, *flags, "--output", str(packed)]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert (packed / artefact.WEIGHTS).stat().st_size > sizes["linear"] + sizes["embedding"]
    recipe = json.loads((packed / artefact.MANIFEST).read_text())["recipe"]
    assert (recipe["weights"], recipe["activations"], recipe["rotations"]) == (4, 4, "all")
    assert main([*command, str(packed), "--output", str(copied)]) == 0
    assert (copied / artefact.WEIGHTS).read_bytes() == (packed / artefact.WEIGHTS).read_bytes()
    assert not (copied / "rotations.png").exists()
    assert torch.equal(logits(load(copied).model), logits(load(packed).model))
    assert main([*command, config.model, *flags, "--output", str(packed)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", "--model", config.model, "--data", config.data]) == 2
    assert "--target is missing" in capsys.readouterr().err
    for source in (config.model, str(packed)):
        more = ["--target", "rtx-3060", "--output", str(tmp_path / "more")]
        assert main([*command, source, *more]) == 2
        assert "--target" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, fields",
    [("roste", {}), ("roste", {"trainable": "lora"}), ("roste_mezo", {})],
)
def test_the_planner_prices_the_real_step(configured, tmp_path, monkeypatch, method, fields):
    from tinyft import pricing
    from tinyft.data import encode, read_examples
    from tinyft.models import outline

    monkeypatch.setattr(pricing, "cache_directory", lambda: tmp_path)
    config = configured(method, dtype="float32", **fields)
    model = outline(config.model)
    encoded = encode(read_examples(config.data), model.tokenizer, max_length=512)
    job = pricing.Job(model, encoded, encoded)
    found = pricing.trace(config, job)
    parameters = sum(p.numel() for p in model.build("float32").parameters())
    embedding = model.config.vocab_size * model.config.hidden_size
    assert found.step.flops > 2 * 4 * parameters
    if method == "roste" and config.trainable == "all":
        # A latent weight, its moments, and what it is rounded to.
        assert found.bytes_by_kind["optimizer"] >= 8 * parameters
        assert found.peak_bytes > 4 * (4 * parameters - 2 * embedding)
    else:
        # Whole until they are packed, which such a small model's steps do not exceed.
        assert 4 * parameters <= found.peak_bytes < 4 * 2 * parameters
        attaching, preparing, *steps = pricing._look(config, job, model.config).peaks
        assert min(attaching["weights"], preparing["weights"]) >= 4 * parameters
        assert all(4 * embedding < kinds["weights"] < 4 * parameters for kinds in steps)


def test_a_frozen_base_lets_go_of_what_it_was_made_from(tiny_model_dir):
    folder = tiny_model_dir()
    model = load(folder, dtype="float32").model  # mapped from its file
    assert str(folder) in Path("/proc/self/maps").read_text()
    latent = [weakref.ref(linear.weight) for b in blocks_of(model) for linear in b.linears()]
    optimizer = tinyft.RoSTE(model, lr=1e-2, trainable="lora")
    batch = batch_of(0)
    optimizer.prepare(lambda b: objective("lm")(model, b), [batch])
    assert not any(reference() is not None for reference in latent)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    optimizer.step(lambda b: objective("lm")(model, b), batch)


def test_a_step_without_a_closure_before_calibration_is_refused():
    with pytest.raises(InputError, match="by a calibration batch"):
        tinyft.RoSTE(tiny_model("llama")).step()


def test_what_cannot_be_asked_for(configured):
    with pytest.raises(InputError, match=r"activations takes 2 to 8 bits"):
        configured(activations=9)
    with pytest.raises(InputError, match=r"packs the base itself.*leave base_bits at 16"):
        configured(base_bits=4, trainable="lora")
    with pytest.raises(InputError, match=r"frozen base have 4 bits"):
        run(configured(trainable="lora", weights=8, overwrite=True))
