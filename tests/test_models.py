"""References and loading, against transformers' own `from_pretrained`."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from tiny_models import CAUSAL, CONFIGS, SPECIAL, config_of
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tinyft import models
from tinyft.adapters import adapters
from tinyft.data import Example, Examples, encode
from tinyft.errors import InputError
from tinyft.references import is_hub_id, locate, quiet

IDS = torch.tensor([[5, 17, 300, 9, 2, 41, 7], [8, 8, 120, 3, 399, 0, 1]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_families_equal_transformers(family, tiny_model_dir, capfd):
    folder = tiny_model_dir(family)
    capfd.readouterr()
    loaded = models.load(folder)
    assert capfd.readouterr().err == ""  # no progress bars, no warnings
    assert loaded.kind == models.kind_of(folder) == "causal"
    assert not loaded.model.training
    assert loaded.base_ref == str(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded.model), logits(expected))
    hidden = models.base_model(loaded.model)(input_ids=IDS)[0]
    scores = models.head(loaded.model)(hidden)
    if family != "gemma2":  # which caps its logits after the head
        torch.testing.assert_close(scores, logits(expected))


def test_encoder_gets_a_head_from_the_seed(tiny_model_dir, tmp_path):
    folder = tiny_model_dir("bert")
    one, again, other = (models.load(folder, num_labels=3, seed=seed) for seed in (1, 1, 2))
    assert one.kind == models.kind_of(folder) == "encoder"
    assert logits(one.model).shape == (2, 3)
    assert torch.equal(logits(one.model), logits(again.model))
    assert not torch.equal(models.head(one.model).weight, models.head(other.model).weight)
    with pytest.raises(InputError, match="without a classification head"):
        models.load(folder)

    models.save_model(one.model, one.tokenizer, tmp_path / "trained")
    same = models.load(tmp_path / "trained")
    assert same.num_labels == 3
    assert torch.equal(logits(same.model), logits(one.model))
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(same.model), logits(peer))
    assert logits(models.load(tmp_path / "trained", num_labels=2).model).shape == (2, 2)


def test_loading_leaves_the_global_generator_alone(tiny_model_dir):
    folder = tiny_model_dir("bert")
    torch.manual_seed(5)
    models.load(folder, num_labels=2)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "float32"),  # on a CPU
        ("float16", "float16", "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float64", "float64"),
    ],
)
@pytest.mark.parametrize("says_so", [True, False])
def test_dtype(tiny_model_dir, stored, asked, expected, says_so):
    folder = tiny_model_dir("llama", dtype=getattr(torch, stored))
    if not says_so:  # as old checkpoints: the weights' own header decides
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype")
        (folder / "config.json").write_text(json.dumps(config))
    loaded = models.load(folder, dtype=asked)
    assert loaded.dtype == expected
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, expected)}


def test_weights_are_mapped_not_copied(tiny_model_dir):
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/maps")
    folder = tiny_model_dir("llama")
    loaded = models.load(folder)
    address = next(loaded.model.parameters()).data_ptr()
    mappings = [
        line.split()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "model.safetensors" in line
    ]
    assert any(
        int(start, 16) <= address < int(end, 16)
        for start, end in (mapping[0].split("-") for mapping in mappings)
    )
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():  # writing to the weights leaves the file alone
        for parameter in loaded.model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_base(tiny_model_dir, family, bits):
    import bitsandbytes as bnb

    # Rows of 64, the block of nf4: smaller layers would be quantised across rows.
    size = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64}
    size |= {"opt": {"word_embed_proj_dim": 64}, "llama": {"head_dim": 16}}.get(family, {})
    folder = tiny_model_dir(family, **size)
    labels = {"num_labels": 2} if family == "bert" else {}
    plain = models.load(folder, **labels).model
    packed = models.load(folder, base_bits=bits, **labels).model
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, kind)}
    assert len(layers) == {"llama": 14, "gpt2": 8, "opt": 12, "bert": 12}[family]
    assert not any(name.endswith(("head", "classifier")) for name in layers)
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.detach()
        weight = weight.T if family == "gpt2" else weight
        assert layer.weight.dtype in (torch.int8, torch.uint8)
        assert not layer.weight.requires_grad
        identity = torch.eye(weight.shape[1])
        bias = 0 if layer.bias is None else layer.bias.detach()
        with torch.no_grad():
            error = ((layer(identity) - bias).T - weight).abs().amax(dim=1)
        # int8: half a step of the row's largest / 127, twice (identity rows are rounded as well,
        # and by float16); nf4: its widest gap, 0.304 of the block's largest, and double quant.
        bound = weight.abs().amax(dim=1) * (0.012 if bits == 8 else 0.17)
        assert (error <= bound).all(), name
    difference = (logits(packed) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < difference < (0.05 if bits == 8 else 0.4)
    with pytest.raises(InputError, match="--base-bits 16"):
        models.save_model(packed, None, folder / "out")


def write_gguf(path, model, tokenizer):
    """A tiny Llama as GGUF, by the rules of that format: names, and q and k in pairs of rows."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(SPECIAL["bos_token_id"])
    writer.add_eos_token_id(SPECIAL["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if n := next((n for part, n in heads.items() if part in name), None):
            tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stem = name.removesuffix(".weight")
        writer.add_tensor(names.get_name(stem) + ".weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tiny_model_dir, tmp_path, tiny_tokenizer, capfd):
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "tiny.gguf"
    write_gguf(file, original, tiny_tokenizer)
    capfd.readouterr()
    for ref in (file, file.parent):
        loaded = models.load(ref)
        assert loaded.path == file
        torch.testing.assert_close(logits(loaded.model), logits(original))
    assert capfd.readouterr().err == ""
    text = "The film was great."
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "plain")
    plain = models.load(tmp_path / "plain")
    assert torch.equal(logits(plain.model), logits(loaded.model))
    assert plain.tokenizer(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    packed = models.load(file, base_bits=8).model
    torch.testing.assert_close(logits(packed), logits(original), atol=0.05, rtol=0.1)
    (file.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"several GGUF files.*other\.gguf, tiny\.gguf"):
        models.load(file.parent)
    with pytest.raises(InputError, match="Cannot read"):
        models.load(file.parent / "other.gguf")


# Saving.


def test_save_into_a_folder_that_exists(tiny_model_dir, tmp_path):
    loaded = models.load(tiny_model_dir("llama"))
    out = tmp_path / "run"
    out.mkdir()
    (out / "report.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_text("of an older model")
    models.save_model(loaded.model, loaded.tokenizer, out)
    assert (out / "report.json").read_text() == "{}"
    assert [p.name for p in out.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(out.glob(".*"))
    assert (out / "model.safetensors").stat().st_mode & 0o777 == (
        (out / "report.json").stat().st_mode & 0o777
    )
    assert torch.equal(logits(models.load(out).model), logits(loaded.model))
    # Over itself, while its weights are mapped from the very file.
    again = models.load(out)
    models.save_model(again.model, again.tokenizer, out)
    assert torch.equal(logits(models.load(out).model), logits(again.model))


def test_a_full_disk_leaves_nothing(tiny_model_dir, tmp_path, monkeypatch):
    loaded = models.load(tiny_model_dir("llama"))

    def full(directory):
        (directory / "model.safetensors").write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loaded.tokenizer, "save_pretrained", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="No space left on device"):
        models.save_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "model_type", ["gpt2", "gpt_bigcode", "openai-gpt", "opt", "biogpt", "bert", "roberta", "llama"]
)
@torch.no_grad()
def test_positions_are_as_many_as_the_model_can_read(model_type):
    """As long a row goes through, and one that is longer by a token does not."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    limit = {"n_positions": 12} if model_type == "openai-gpt" else {"max_position_embeddings": 12}
    config = AutoConfig.for_model(model_type, **small, **limit, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    found = models.n_positions(model)
    if model_type == "llama":
        assert found is None
        return

    def read(n):
        model(input_ids=torch.full((1, n), 5), attention_mask=torch.ones(1, n, dtype=torch.long))

    read(found)
    with pytest.raises((IndexError, RuntimeError)):
        read(found + 1)


# What was trained.


def make_peft_adapter(folder, base):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    with quiet():  # PEFT uses names that transformers has deprecated
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(folder)
    return model


def test_peft_adapter(tiny_model_dir, tmp_path):
    base = tiny_model_dir("llama")
    peft_model = make_peft_adapter(tmp_path / "adapter", base)
    loaded = models.load(tmp_path / "adapter")
    assert loaded.base_ref == str(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.model), logits(peft_model))
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(loaded.model))
    assert models.kind_of(tmp_path / "adapter") == "causal"


def test_peft_classifier_on_a_bare_encoder(tiny_tokenizer, tmp_path):
    """How many classes it has is known from the head that is saved with the adapter."""
    from peft import LoraConfig, TaskType, get_peft_model

    bare = AutoModel.from_config(config_of("bert"))
    bare.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, task_type=TaskType.SEQ_CLS
    )
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        model = get_peft_model(model, config)
        model.save_pretrained(tmp_path / "adapter")
    loaded = models.load(tmp_path / "adapter")
    assert (loaded.kind, loaded.num_labels) == ("encoder", 3)
    torch.testing.assert_close(logits(loaded.model), logits(model))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_stays_beside_a_packed_base(tiny_model_dir, tmp_path, bits):
    base = tiny_model_dir("llama")
    make_peft_adapter(tmp_path / "adapter", base)
    packed = models.load(tmp_path / "adapter", base_bits=bits).model
    assert len(adapters(packed)) == 14
    full = models.load(tmp_path / "adapter").model
    difference = (logits(packed) - logits(full)).norm() / logits(full).norm()
    assert difference < (0.05 if bits == 8 else 0.5)


def test_seed_log_is_replayed_as_it_was_written(tiny_model_dir, tmp_path, monkeypatch):
    """In the dtype of the run, with the head of its seed; only then cast to what is asked."""
    base = models.load(tiny_model_dir("bert"), num_labels=3, seed=7, dtype="bfloat16")
    run = tmp_path / "run"
    run.mkdir()
    manifest = {"format": 1, "kind": "seed_log", "method": "mezo", **base.recipe()}
    (run / "tinyft.json").write_text(json.dumps(manifest))
    calls = []

    def replay(model, path):
        calls.append((model.dtype, path))
        with torch.no_grad():
            models.head(model).bias.add_(1)
        return 1

    monkeypatch.setattr("tinyft.optim.mezo.replay", replay, raising=False)
    loaded = models.load(run, dtype="float32")
    assert calls == [(torch.bfloat16, run / "steps.seedlog")]
    assert (loaded.dtype, loaded.num_labels, loaded.base_ref) == ("float32", 3, str(run))
    assert torch.equal(models.head(loaded.model).weight, models.head(base.model).weight.float())
    assert torch.equal(models.head(loaded.model).bias, models.head(base.model).bias.float() + 1)
    assert models.load(run).dtype == "bfloat16"


def test_a_base_that_is_gone(tiny_model_dir, tmp_path):
    for kind in ("adapter", "seed_log"):
        manifest = {"format": 1, "kind": kind, "base": str(tmp_path / "gone"), "method": "x"}
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "tinyft.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=r"was trained on .*gone, which cannot be loaded"):
            models.load(tmp_path / kind)
    del manifest["base"]
    (tmp_path / kind / "tinyft.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not say which model"):
        models.load(tmp_path / kind)


def test_output_of_kind_model(tiny_model_dir):
    folder = tiny_model_dir("llama")
    manifest = {"format": 1, "kind": "model", "base": "gone", "method": "full"}
    (folder / "tinyft.json").write_text(json.dumps(manifest))
    assert models.load(folder).base_ref == str(folder)
    (folder / "tinyft.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(InputError, match="reads format 1"):
        models.load(folder)


# Bad input.


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"There is no model at .*built-in name: smollm2-135m"):
        models.load(tmp_path / "nothing")
    with pytest.raises(InputError, match="There is no model"):
        models.load("model.gguf")

    def no_hub(*arguments, **options):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    with pytest.raises(InputError, match=r"no hub gave it .*smollm2-135m, minilm-l6"):
        models.load("owner/name")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has nothing"),
        (["notes.txt"], r"has notes\.txt"),
        (["config.json", "pytorch_model.bin"], "pickles.*safetensors"),
        (["run.json", "config.json", "model.safetensors"], "--resume"),
        (["adapter_config.json", "adapter_model.bin"], "pickled"),
        (["tinyft.json"], "format None"),
    ],
)
def test_folders_without_a_model(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        models.load(tmp_path)


def test_single_files(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="give its folder"):
        models.load(tiny_model_dir("llama") / "model.safetensors")
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="run code"):
        models.load(tmp_path / "model.bin")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "of-tomorrow"}, "Cannot read its configuration.*of-tomorrow"),
        ({"model_type": "t5"}, "is a t5 model"),
        ({"num_hidden_layers": 3}, "lacks .* tensors.*layers.2"),
        ({"hidden_size": 16}, "Cannot read its weights"),
        ({"vocab_size": 401}, "Cannot read its weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantised .gptq"),
    ],
)
def test_broken_configurations(tiny_model_dir, changes, message):
    folder = tiny_model_dir("llama")
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        models.load(folder)


def test_repository_code_is_never_run(tiny_model_dir):
    folder = tiny_model_dir("llama")
    (folder / "code.py").write_text("raise SystemExit('ran')")
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "code.C"})
    with pytest.raises(InputError, match="Cannot read its configuration"):
        models.load(folder)


def test_broken_weights_and_tokenizers(tiny_model_dir):
    folder = tiny_model_dir("llama")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="Cannot read its weights"):
        models.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        models.load(folder)


def test_a_tokenizer_of_another_model(tiny_model_dir, tiny_tokenizer):
    folder = tiny_model_dir("llama", vocab_size=300)
    with pytest.raises(InputError, match=f"ids up to {len(tiny_tokenizer) - 1}, its model 300"):
        models.load(folder)


def test_tokens_beyond_the_embeddings(tiny_model_dir, tiny_tokenizer):
    """Of which a model may have some, as long as nobody uses them."""
    folder, tokenizer = tiny_model_dir("llama"), copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(400 - len(tokenizer))])
    tokenizer.add_tokens(["<image>"])
    assert tokenizer.convert_tokens_to_ids("<image>") == 400  # which is the embeddings' number
    tokenizer.save_pretrained(folder)
    loaded = models.load(folder)

    def check(**row):
        row = Example(7, prompt="The film was", **row)
        models.check_rows(loaded.model, encode(Examples([row]), loaded.tokenizer, max_length=64))

    check(kind="completion", completion=" great <unused9>")
    for row in (
        {"kind": "completion", "completion": " <image>"},
        {"kind": "choices", "choices": (" great", "<image>"), "answer": 0},
    ):
        with pytest.raises(InputError, match=r"line 7: .* the id 400, .* has 400 embed"):
            check(**row)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="ids up to 400, its model 400"):
        models.load(folder)


def test_all_wrong_options_at_once(tmp_path):
    with pytest.raises(InputError) as error:
        models.load(tmp_path, dtype="int3", base_bits=3)
    assert "--dtype int3" in str(error.value)
    assert "--base-bits 3" in str(error.value)


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id("gpt2")
    assert is_hub_id("HuggingFaceTB/SmolLM2-135M")
    for ref in ("here", "./there", "/a/b", "a/b/c", "tiny.gguf", "~/models"):
        assert not is_hub_id(ref)


def test_quiet_restores_logging(capfd):
    with quiet():
        logging.getLogger("any").warning("hidden")
    logging.getLogger("any").warning("shown")
    assert "hidden" not in capfd.readouterr().err
    assert logging.root.manager.disable == logging.NOTSET


def test_an_outline_downloads_no_weights(tiny_model_dir, tmp_path, monkeypatch):
    whole, snapshot = tiny_model_dir("llama"), tmp_path / "snapshot"
    snapshot.mkdir()

    def hub(ref, allow_patterns, ignore_patterns):
        for path in whole.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    assert models.outline("owner/name").dtype == "float32"
    assert not (snapshot / "model.safetensors").exists()
    assert torch.equal(logits(models.load("owner/name").model), logits(models.load(whole).model))


@pytest.mark.hub
def test_hub_id():
    try:
        loaded = models.load("hf-internal-testing/tiny-random-LlamaForCausalLM")
    except InputError as error:
        pytest.skip(str(error))
    assert loaded.kind == "causal"
    assert locate("hf-internal-testing/tiny-random-LlamaForCausalLM").form == "folder"


def test_every_family_has_a_configuration():
    assert {config_of(name).model_type for name in CONFIGS} == set(CONFIGS)
