"""A prefix against the definition (real tokens before the text) and against PEFT."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from test_zeroth import tiny_model

import tinyft
from tinyft import prefix
from tinyft.errors import InputError
from tinyft.optim.base import METHODS
from tinyft.optim.mezo import MeZOOptions

# PEFT and transformers of different ages; nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
decoders = pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox", "qwen3"])
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@decoders
def test_it_starts_as_real_tokens_before_the_text(architecture):
    model, plain = tiny_model(architecture), tiny_model(architecture)
    prefix.inject(model, tokens=3, seed=4)
    tokens = torch.randint(400, (1, 3), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        got = model(input_ids=IDS, attention_mask=mask).logits
        expected = plain(input_ids=torch.cat((tokens.expand(2, -1), IDS), 1)).logits[:, 3:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@decoders
def test_peft_reads_what_we_write(architecture, tmp_path):
    model = tiny_model(architecture)
    prefix.inject(model, tokens=3)
    model.prefix.weight.data += 0.1 * torch.randn_like(model.prefix.weight)
    prefix.save(model, tmp_path, "base")
    theirs = PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    ours = tiny_model(architecture)
    prefix.load(ours, tmp_path)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=mask).logits
        for ours_ in (model, ours):
            got = ours_(input_ids=IDS, attention_mask=mask).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_generation_sees_the_prefix_once():
    model, plain = tiny_model("llama"), tiny_model("llama")
    prefix.inject(model, tokens=3, seed=4)
    tokens = torch.randint(400, (1, 3), generator=torch.Generator().manual_seed(4))
    longer = torch.cat((tokens, IDS[:1]), 1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    got = model.generate(IDS[:1], attention_mask=torch.ones(1, 5), **options)
    expected = plain.generate(longer, attention_mask=torch.ones(1, 8), **options)
    assert got[0, 5:].tolist() == expected[0, 8:].tolist()


def test_mezo_moves_the_prefix_and_nothing_else():
    model = tiny_model("llama")
    prefix.inject(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = tinyft.MeZO(model, lr=1.0, eps=0.1)

    def losses(batch):
        ids = batch["input_ids"]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        ).mean(1)

    optimizer.step(losses, {"input_ids": IDS})
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert moved == ["prefix.weight"]
    assert METHODS["mezo"].default_lr["prefix"]


def test_training_goes_on_from_a_saved_prefix(tmp_path):
    mask = torch.ones_like(IDS)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=IDS, attention_mask=mask).logits

    first = tiny_model("llama")
    prefix.inject(first, tokens=3)
    first.prefix.weight.data += 0.1 * torch.randn_like(first.prefix.weight)
    (tmp_path / "first").mkdir()
    prefix.save(first, tmp_path / "first", "base")
    second = tiny_model("llama")
    prefix.load(second, tmp_path / "first")
    config = SimpleNamespace(
        trainable="prefix", lr=1.0, weight_decay=0.0, seed=0, options=MeZOOptions(eps=0.1)
    )
    optimizer = tinyft.MeZO.attach(second, config)
    assert optimizer.names == ["prefix.weight"] and torch.equal(logits(second), logits(first))
    optimizer.step(lambda: second(input_ids=IDS, labels=IDS, attention_mask=mask).loss)
    assert not torch.allclose(logits(second), logits(first), atol=1e-3)
    (tmp_path / "second").mkdir()
    prefix.save(second, tmp_path / "second", str(tmp_path / "first"))
    bare = tiny_model("llama")
    for base in (bare, first):  # the latter as what is loaded comes upon its base
        prefix.load(base, tmp_path / "second")
        assert torch.equal(logits(base), logits(second))


def test_misfits_are_refused(tmp_path):
    model = tiny_model("llama")
    prefix.inject(model)
    prefix.save(model, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_layers": 9}))
    with pytest.raises(InputError, match="does not fit"):
        prefix.load(tiny_model("llama"), tmp_path)
    with pytest.raises(InputError, match="key-value cache"):
        prefix.inject(tiny_model("bert"))
    with pytest.raises(InputError, match="prefix already"):
        prefix.inject(model)
