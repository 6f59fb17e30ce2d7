"""What few layers tell of many, against a dry run of them all."""

from __future__ import annotations

import json

import pytest
from tiny_models import config_of

from tinyft.config import TrainConfig
from tinyft.depth import few_layers, with_layers
from tinyft.models import outline
from tinyft.pricing import Job, _look, _traced

LAYERS = 11
WIDE = {  # the first with an embedding whose update is most of a backward pass's operations
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 160_000},
    "gemma2": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32},  # two kinds of layers
    "gpt2": {"n_embd": 128},
    "bert": {"hidden_size": 128, "intermediate_size": 512},
}
WAYS = [
    {"method": "lora", "checkpointing": "selective"},
    {"method": "lora", "checkpointing": "full", "batch_size": 2, "grad_accumulation": 4},
    {"method": "full", "checkpointing": "none", "optimizer": "sgd"},
    {"method": "full", "checkpointing": "selective"},
    {"method": "full", "checkpointing": "selective", "dtype": "bfloat16"},
    {"method": "mezo"},
]


@pytest.fixture(scope="module", params=WIDE)
def job(request, tmp_path_factory, tiny_tokenizer):
    from tinyft.data import encode
    from tinyft.inputs import read_source

    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param, num_hidden_layers=LAYERS, **WIDE[request.param])
    config.architectures = ["BertForMaskedLM" if request.param == "bert" else "X"]
    config.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    rows = [
        {"prompt": "The film was great. " * (1 + i % 3), "choices": [" a", " b"], "answer": i % 2}
        for i in range(16)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = outline(folder)
    examples, _ = read_source(str(folder / "rows.jsonl"), None, False)
    encoder = model.kind == "encoder"
    encoded = encode(examples, model.tokenizer, objective="auto", max_length=128, encoder=encoder)
    values = {"model": str(folder), "data": str(folder / "rows.jsonl"), "dtype": "float32"}
    return Job(model, encoded, encoded), values


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_few_layers_tell_what_many_take(job, way):
    job, values = job
    assert job.few_layers is not None
    config = TrainConfig.build({**values, **way, "steps": 1})
    found = _traced(config, job)
    whole = _look(config, job, job.outline.config).as_trace()
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=2e-3)
    assert found.eval_bytes == pytest.approx(whole.eval_bytes, rel=2e-3)
    for one, other in ((found.step, whole.step), (found.evaluation, whole.evaluation)):
        assert one.flops == pytest.approx(other.flops, rel=1e-6)
        assert one.operations == pytest.approx(other.operations, rel=1e-2)
        assert one.other_bytes == pytest.approx(other.other_bytes, rel=1e-2)
        assert one.product_bytes == pytest.approx(other.product_bytes, rel=1e-2)


def test_rounds_of_different_layers():
    config = config_of("gemma2", num_hidden_layers=LAYERS)
    assert len(set(config.layer_types)) == 2
    few, more = few_layers(config, lambda c: 7 + 3 * c.num_hidden_layers)
    assert (more - few) % 2 == (LAYERS - few) % 2 == 0
    shorter = with_layers(config, few)
    assert shorter.layer_types == config.layer_types[:few]
    assert config.num_hidden_layers == LAYERS


@pytest.mark.parametrize(
    "n_parameters", [lambda c: c.num_hidden_layers**2, lambda c: min(c.num_hidden_layers, 8)]
)
def test_layers_that_differ_are_all_looked_at(n_parameters):
    config = config_of("llama", num_hidden_layers=LAYERS)
    assert few_layers(config, lambda c: 7 + 3 * c.num_hidden_layers)
    assert few_layers(config, n_parameters) is None
    assert few_layers(config_of("llama"), lambda c: c.num_hidden_layers) is None
