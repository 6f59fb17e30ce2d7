"""A trained model as a graph of its logits."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_models import save_tiny_model

from tinyft import adapters
from tinyft.cli import main
from tinyft.models import load

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch's exporter


@pytest.mark.parametrize("form, family", [("inference", "llama"), ("inference-int8", "gpt2")])
def test_logits_of_an_adapter_merged(form, family, tmp_path, tiny_tokenizer, capsys):
    base = save_tiny_model(tmp_path / "base", family, tiny_tokenizer)
    model = load(base).model
    adapters.inject(model, rank=2)
    for layer in adapters.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    adapters.save_adapter(model, tmp_path / "adapter", str(base))
    out = tmp_path / "out"
    words = ["export", "--model", str(tmp_path / "adapter"), "--format", form, "--json"]
    assert main([*words, "--output", str(out)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])

    packed = [n for n, _ in adapters.adapters(model).items()]
    adapters.merge(model)
    options = onnxruntime.SessionOptions()
    if form == "inference-int8":  # by rows, in numpy; the runtime not to round activations, too
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        for name in packed:
            weight = model.get_submodule(name).weight.detach().numpy()  # GPT-2's are (in, out)
            scale = np.abs(weight).max(0, keepdims=True) / np.float32(127)
            weight[:] = np.round(weight / scale) * scale
        assert found["int8_weights"] == sum(
            model.get_submodule(name).weight.numel() for name in packed
        )
    ids = np.arange(2, 32).reshape(2, 15)  # another size than the graph was made with
    with torch.no_grad():
        want = model.eval()(torch.from_numpy(ids)).logits.numpy()
    session = onnxruntime.InferenceSession(out / "model.onnx", options)
    (got,) = session.run(None, {"input_ids": ids})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert main([*words, "--output", str(out)]) == 2
    assert "must be a new folder" in capsys.readouterr().err
