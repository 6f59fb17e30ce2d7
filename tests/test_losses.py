"""Objectives against transformers' own losses and logits, and against scikit-learn's arithmetic."""

import logging

import pytest
import torch
import transformers
from tiny_models import CAUSAL, config_of
from torch import nn

from tinyft.batches import Batch
from tinyft.errors import InputError
from tinyft.losses import HeadPlan, check_head, choice_scores, macro_f1, objective, row_losses
from tinyft.optim.base import call_per_example

SCALED = {
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
}


def build(family, **changes):
    torch.manual_seed(0)
    if family in SCALED:
        name, fields = SCALED[family]
        common = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64}
        common |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
        config = getattr(transformers, name)(**common, **fields, **special)
    else:
        config = config_of(family, **changes)
    if family == "bert":
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms away from 0 and 1, logits apart
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def forward(model, batch, **labels):
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **labels)


def lm_batch(rows=3, width=9, copies=1):
    gen = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 400, (rows, width), generator=gen)
    lengths = torch.tensor([width - 2 * i for i in range(rows)])
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    ids = ids.masked_fill(mask == 0, 2)
    count = int((labels[:, 1:] != -100).sum())
    return Batch(ids, mask, labels, tokens_per_example=count / rows).repeat(copies)


@pytest.mark.parametrize("family", [*CAUSAL, *SCALED])
@pytest.mark.parametrize("grad", [False, True])
def test_lm_is_transformers_loss(family, grad, caplog):
    model, batch = build(family), lm_batch()
    if family == "gemma2":
        model.config.final_logit_softcapping = 2.0
    with torch.set_grad_enabled(grad):
        losses = objective("lm")(model, batch)
        want = forward(model, batch, labels=batch.labels).loss
    assert losses.shape == (3,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), want, rtol=2e-6, atol=0)
    assert not check_head(model).whole
    assert all(record.name != "tinyft.losses" for record in caplog.records)
    if grad:
        got = torch.autograd.grad(losses.mean(), list(model.parameters()))
        true = torch.autograd.grad(want, list(model.parameters()))
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lm", "choice", "accuracy"])
def test_copies_come_back_copy_by_copy(name):
    model = build("llama")
    batch = lm_batch() if name == "lm" else one_token_choices()
    with torch.no_grad():
        once = objective(name)(model, batch)
        thrice = objective(name)(model, batch.repeat(3))
    torch.testing.assert_close(thrice, once.repeat(3))


@pytest.mark.parametrize("name", ["lm", "choice"])
def test_head_module_sees_all_copies_of_its_positions(name, monkeypatch):
    monkeypatch.setattr("tinyft.losses.PIECE_BYTES", 2 * 2 * 400 * 4)  # two positions a piece
    model = build("llama", tie_word_embeddings=False)
    batch = lm_batch() if name == "lm" else one_token_choices()
    double = torch.tensor([1.0, 2.0])

    def second_copy_doubled(head, args, out):
        return (out.view(2, -1, 400) * double[:, None, None]).view_as(out)

    with torch.no_grad():
        check_head(model)
        plain = objective(name)(model, batch)
        hook = model.lm_head.register_forward_hook(second_copy_doubled)
        both = objective(name)(model, batch.repeat(2)).view(2, -1)
        hook.remove()
        model.lm_head.weight *= 2
        doubled = objective(name)(model, batch)
    torch.testing.assert_close(both[0], plain)
    torch.testing.assert_close(both[1], doubled)


def one_token_choices():
    batch = lm_batch()
    return Batch(
        batch.input_ids,
        batch.attention_mask,
        answers=torch.tensor([0, 2, 1]),
        choice_ids=torch.tensor([[5, 6, 7], [9, 5, 8], [11, 12, 11]]),
        choice_mask=torch.tensor([[True] * 3, [True] * 3, [True, True, False]]),
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2"])
def test_one_token_choices(family, grad):
    model, batch = build(family), one_token_choices()
    with torch.set_grad_enabled(grad):
        scores = choice_scores(model, batch)
        losses = objective("choice")(model, batch)
        logits = forward(model, batch).logits
    last = logits[torch.arange(3), batch.attention_mask.sum(1) - 1]
    want = last.gather(1, batch.choice_ids)
    want[2, 2] = float("-inf")
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    true = -want.log_softmax(1)[torch.arange(3), batch.answers]
    torch.testing.assert_close(losses, true, rtol=1e-5, atol=1e-5)


def test_long_choices_agree_with_one_token_choices():
    """The same choices written out as rows score the same, up to the vocabulary's normaliser."""
    model, fast = build("llama"), one_token_choices()
    rows, labels, masks = [], [], []
    for ids, mask, choices in zip(
        fast.input_ids, fast.attention_mask, fast.choice_ids, strict=True
    ):
        n = int(mask.sum())
        for choice in choices:
            row = torch.cat([ids[:n], choice[None], ids[n:]])
            rows.append(row)
            labels.append(torch.full_like(row, -100).index_fill(0, torch.tensor([n]), int(choice)))
            masks.append((torch.arange(len(row)) <= n).long())
    slow = Batch(
        torch.stack(rows),
        torch.stack(masks),
        torch.stack(labels),
        answers=fast.answers,
        choice_mask=fast.choice_mask,
    )
    with torch.no_grad():
        for name in ("choice", "accuracy", "f1"):
            got, want = (objective(name)(model, b.repeat(2)) for b in (slow, fast))
            torch.testing.assert_close(got, want)


def test_classes_accuracy_and_f1():
    model, batch = build("bert", num_labels=3), lm_batch()
    batch = Batch(batch.input_ids, batch.attention_mask, answers=torch.tensor([0, 2, 1])).repeat(2)
    want = forward(model, batch, labels=batch.answers)
    torch.testing.assert_close(objective("class")(model, batch).mean(), want.loss)
    wrong = want.logits.argmax(1) != batch.answers
    torch.testing.assert_close(objective("accuracy")(model, batch), wrong.float())
    got = objective("f1")(model, batch)
    want = f1_by_hand(want.logits.argmax(1).tolist(), batch.answers.tolist())
    assert got.shape == () and float(got) == pytest.approx(1 - want)


def f1_by_hand(guesses, answers):
    scores = []
    for c in {*guesses, *answers}:
        right = sum(g == a == c for g, a in zip(guesses, answers, strict=True))
        scores.append(2 * right / (guesses.count(c) + answers.count(c)))
    return sum(scores) / len(scores)


def test_macro_f1_by_hand():
    # Class 0: precision 1, recall 1/2; class 1: precision 1/2, recall 1; class 2 nowhere.
    guesses, answers = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    torch.testing.assert_close(macro_f1(guesses, answers, 3), torch.tensor(2 / 3))


class Odd(transformers.LlamaForCausalLM):
    """Its logits are not its head's alone."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.sin()
        return out


@pytest.mark.parametrize("batch", [lm_batch(copies=2), one_token_choices()], ids=["lm", "choice"])
def test_a_head_we_cannot_rebuild_makes_whole_logits_and_says_so(batch, caplog):
    torch.manual_seed(0)
    model = Odd(config_of("llama"))
    name = "lm" if batch.answers is None else "choice"
    with caplog.at_level(logging.WARNING):
        losses = objective(name)(model, batch)
        objective(name)(model, batch)
    assert check_head(model) == HeadPlan(whole=True)
    assert len(caplog.records) == 1
    logits = forward(model, batch).logits
    if name == "lm":
        want = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        )
        torch.testing.assert_close(losses.mean(), want)
    else:
        last = logits[torch.arange(3), batch.attention_mask.sum(1) - 1]
        torch.testing.assert_close(
            choice_scores(model, batch)[:2], last.gather(1, batch.choice_ids)[:2]
        )


def test_head_with_adapters_is_heard_with_gradients(monkeypatch):
    monkeypatch.setattr("tinyft.losses.PIECE_BYTES", 4 * 400 * 4)
    model, batch = build("llama", tie_word_embeddings=False), lm_batch()
    check_head(model)
    want = objective("lm")(model, batch)
    want_grad = torch.autograd.grad(want.sum(), model.lm_head.weight)[0]
    model.lm_head.forward = lambda h: nn.functional.linear(h, model.lm_head.weight)  # not plain
    got = objective("lm")(model, batch)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), model.lm_head.weight)[0], want_grad)


def test_mode_is_kept_and_rows_without_labels_lose_nothing():
    model, batch = build("gpt2").train(), lm_batch()
    model.transformer.h[0].eval()
    check_head(model)
    assert (
        model.training and not model.transformer.h[0].training and model.transformer.h[1].training
    )
    batch.labels[1] = -100
    losses = row_losses(model, batch)
    assert losses[1] == 0 and losses[0] > 0
    call_per_example(lambda b: objective("lm")(model, b), batch)


def test_unknown_objective():
    with pytest.raises(InputError, match="Choose from: lm, choice"):
        objective("perplexity")
