"""What few layers tell of many, against a dry run of them all."""

from __future__ import annotations

import json

import pytest
import transformers
from tiny_models import config_of

from tinyft.config import TrainConfig
from tinyft.cost import FlopCounter
from tinyft.data import encode
from tinyft.depth import few_layers, with_layers
from tinyft.inputs import read_source
from tinyft.losses import check_head, objective_of
from tinyft.models import outline
from tinyft.optim import METHODS
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
    config = config_of(request.param, num_hidden_layers=LAYERS, **WIDE[request.param])
    config.architectures = ["BertForMaskedLM" if request.param == "bert" else "X"]
    return job_of(config, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


def job_of(config, folder, tiny_tokenizer):
    """A job for a model of a configuration, and the fields of its runs."""
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


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_a_language_model_inside_another_and_experts(family, method, tmp_path, tiny_tokenizer):
    """Layers are those of the nested configuration; a step's FLOPs are the model's own."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
    text |= {"vocab_size": 400, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * LAYERS
        vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32}
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        config = transformers.Gemma3Config(
            text_config={**text, "head_dim": 8, "layer_types": kinds[:LAYERS]},
            vision_config={**vision, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    else:
        config = transformers.MixtralConfig(**text, num_local_experts=4, num_experts_per_tok=2)
    job, values = job_of(config, tmp_path, tiny_tokenizer)
    assert job.few_layers is not None
    run = TrainConfig.build({**values, "method": method, "steps": 1}).with_lr(config)
    found = _traced(run, job)
    whole = _look(run, job, config).as_trace()
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=2e-3)
    assert found.step.flops == pytest.approx(whole.step.flops, rel=1e-6)
    optimizer = METHODS[method].attach(job.outline.build("float32"), run)
    check_head(optimizer.model)
    loss = objective_of(run.objective, job.encoded.kind)
    with FlopCounter() as counter:
        optimizer.step(lambda part: loss(optimizer.model, part), job.batches(8, 0)[0])
    assert found.step.flops == pytest.approx(counter.flops, rel=1e-3)


def test_a_model_without_layers_is_looked_at_as_it_is():
    config = config_of("llama")
    config.num_hidden_layers = 0
    assert few_layers(config, lambda c: 1) is None


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
