"""Adapters: which layers, PEFT's files both ways, and errors that say what to do."""

import json

import peft
import pytest
import torch
import transformers
from test_losses import build
from torch import nn

import tinyft
from tinyft import adapters
from tinyft.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # PEFT's
IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def saved_by_peft(path, family="llama", **options):
    """A model with PEFT's adapter on it, B not zero, and the adapter in `path`."""
    model = build(family)
    model.config.save_pretrained(path / "base")  # PEFT looks at it when it saves
    model.name_or_path = str(path / "base")
    options = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **options}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(path / "adapter")
    return theirs


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_all_linear_means_peft_s_layers(family):
    ours, theirs = build(family), build(family)
    names = adapters.inject(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules="all-linear"))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(names) == wrapped


def test_attention_and_named_layers():
    parts = {n.rpartition(".")[2] for n in adapters.inject(build("llama"), targets="attention")}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj"}
    names = adapters.inject(build("llama"), targets=["layers.1.mlp.up_proj", "q_proj"])
    assert len(names) == 3
    with pytest.raises(InputError, match=r"called c_attn.*has: .*q_proj"):
        adapters.inject(build("llama"), targets=["q_proj", "c_attn"])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 40}, "rank_pattern": {"layers.0.self_attn.v_proj": 7}},
        {"target_modules": r".*layers\.1.*_proj"},
    ],
    ids=["rslora", "patterns", "regular expression"],
)
def test_peft_s_variants_are_read(options, tmp_path):
    theirs, ours = saved_by_peft(tmp_path, **options), build("llama")
    adapters.load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    adapters.save_adapter(ours, tmp_path / "again", str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)
    adapters.merge(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


def test_what_is_not_plain_lora_is_refused(tmp_path):
    saved_by_peft(tmp_path, use_dora=True)
    with pytest.raises(InputError, match=r"DoRA.*merge_and_unload"):
        adapters.load_adapter(build("llama"), tmp_path / "adapter")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "olora.*path_initial_model_for_weight_conversion"),
        (
            {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"},
            r"alora_invocation_tokens \[7, 8\].*train without",
        ),
    ],
)
def test_what_is_no_update_of_the_base_is_refused(options, message, tmp_path):
    saved_by_peft(tmp_path, **options)
    with pytest.raises(InputError, match=message):
        adapters.load_adapter(build("llama"), tmp_path / "adapter")


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="No readable adapter"):
        adapters.load_adapter(build("llama"), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        adapters.load_adapter(build("llama"), tmp_path)


def test_an_adapter_for_another_model_leaves_the_model_alone(tmp_path):
    saved_by_peft(tmp_path)
    model = build("llama", hidden_size=64)
    with pytest.raises(InputError, match="does not fit this LlamaForCausalLM"):
        adapters.load_adapter(model, tmp_path / "adapter")
    assert not adapters.adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_new_head_is_trained_and_saved(tmp_path):
    model = build("bert", num_labels=3)
    optimizer = tinyft.LoRA(model)
    names = optimizer.param_groups[0]["param_names"]
    assert {"classifier.weight", "classifier.bias"} <= set(names)
    assert all("lora" in name or "classifier" in name for name in names)
    nn.init.normal_(model.classifier.weight)
    adapters.save_adapter(model, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    back = build("bert", num_labels=3)
    adapters.load_adapter(back, tmp_path)
    assert torch.equal(logits(back), logits(model))


def test_a_second_set_of_adapters_is_refused_but_training_goes_on():
    model = build("llama")
    tinyft.LoRA(model, rank=4)
    assert len(tinyft.LoRA(model, rank=8).param_groups[0]["params"]) == 2 * 14
    assert {m.rank for m in adapters.adapters(model).values()} == {4}
    with pytest.raises(InputError, match="adapters already"):
        adapters.inject(model)


def test_half_precision_bases_have_float32_adapters():
    model = build("llama").bfloat16()
    optimizer = tinyft.LoRA(model, lr=1e-2)
    assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {torch.float32}
    out = model(input_ids=IDS)
    assert out.logits.dtype == torch.bfloat16
    before = float(optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss))
    for _ in range(5):
        after = float(optimizer.step(lambda: model(input_ids=IDS, labels=IDS).loss))
    assert after < before


def test_under_autocast_the_products_are_torchs(tmp_path):
    theirs, ours = saved_by_peft(tmp_path), build("llama")
    adapters.load_adapter(ours, tmp_path / "adapter")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = theirs(input_ids=IDS).logits
        got = ours(input_ids=IDS).logits
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    got.float().square().mean().backward()
    assert all(m.lora_A.weight.grad is not None for m in adapters.adapters(ours).values())


def test_a_bias_of_the_base_that_is_trained_gets_its_gradient():
    model = build("gpt_neox")
    adapters.inject(model)
    layer = next(m for m in adapters.adapters(model).values() if m.base.bias is not None)
    layer.base.bias.requires_grad_(True)
    model(input_ids=IDS).logits.square().mean().backward()
    assert layer.base.bias.grad is not None and layer.base.bias.grad.any()


def test_inside_the_trainer_equals_its_own_loop(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    models = [build("llama"), build("llama")]
    first, second = (tinyft.LoRA(model, lr=1e-2) for model in models)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        models[0],
        arguments,
        train_dataset=rows,
        data_collator=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
        optimizers=(first, None),
    )
    trainer.train()
    for _ in range(3):
        second.step(lambda: models[1](input_ids=IDS, labels=IDS).loss)
    for mine, its in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
