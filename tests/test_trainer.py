"""MeZO inside the Hugging Face Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import config_of

import tinyft
from tinyft.errors import InputError
from tinyft.trainer import make_trainer

ROWS = [
    {"input_ids": [5 + i, 17, 30, 9], "attention_mask": [1] * 4, "labels": [5 + i, 17, 30, 9]}
    for i in range(8)
]


def a_model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_of("llama"))


def arguments(tmp_path, **changes):
    values = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    return transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="linear",
        dataloader_pin_memory=False,
        **{**values, **changes},
    )


def test_mezo_equals_its_own_loop(tmp_path):
    model, twin = a_model(), a_model()
    optimizer = tinyft.MeZO(model, lr=1e-3, seed=7)
    trainer = make_trainer(model, arguments(tmp_path), optimizer, train_dataset=ROWS)
    prepare, seen = trainer._prepare_inputs, []

    def prepare_and_note(inputs):
        seen.append((prepare(inputs), optimizer.param_groups[0]["lr"]))
        return seen[-1][0]

    trainer._prepare_inputs = prepare_and_note
    assert trainer.train().global_step == optimizer.steps_taken == 3
    # The Trainer's schedule arrives at the method.
    assert [lr for _, lr in seen] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])

    own = tinyft.MeZO(twin, lr=1e-3, seed=7)
    for batch, lr in seen:
        own.param_groups[0]["lr"] = lr
        own.step(lambda batch=batch: twin(**batch).loss)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_one_loss_an_example_gives_the_same_step(tmp_path):
    def objective(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none"
        )
        return losses.mean(1)

    weights = []
    for chosen in (None, objective):
        model = a_model()
        optimizer = tinyft.MeZO(model, lr=1e-4)
        args = arguments(tmp_path, max_steps=1)
        make_trainer(model, args, optimizer, objective=chosen, train_dataset=ROWS).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_accumulation_is_refused(tmp_path):
    model = a_model()
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="set it to 1"):
        make_trainer(model, args, tinyft.MeZO(model), train_dataset=ROWS)
