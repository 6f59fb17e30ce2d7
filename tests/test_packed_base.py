"""Packed bases in graphs: their weights, their backward pass, and that no runtime unpacks them."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import save_tiny_model

from tinyft.errors import InputError
from tinyft.models import load
from tinyft.targets import packed_base
from tinyft.targets.gate import still_packed

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def wide(tmp_path, tiny_tokenizer):
    return save_tiny_model(tmp_path / "wide", "llama", tiny_tokenizer, **WIDE)


@pytest.mark.parametrize("bits, step", [(8, 1 / 240), (4, 0.16)])
def test_converted(wide, bits, step):
    """Against the weights that were packed: off by at most half the gap between two levels (of int8
    1/127, and rounding through float16; the widest of nf4 is 0.3); forward and backward."""
    plain = load(wide, dtype="float32").model
    model = load(wide, dtype="float32", base_bits=bits).model
    names = packed_base.convert(model)
    assert len(names) == 14
    for name in names:
        path = name.removesuffix(".packed")
        layer, want = model.get_submodule(path), plain.get_submodule(path).weight.detach()
        weight = layer.dense(*layer.tensors()).detach()
        rows = want.reshape(-1, want.shape[1] if bits == 8 else 64)  # what shares a scale
        error = (weight.view_as(rows) - rows).abs() / rows.abs().amax(1, keepdim=True)
        assert float(error.max()) <= step * 1.05
        x = torch.randn(3, want.shape[1], requires_grad=True)
        g = torch.randn(3, want.shape[0])
        with packed_base.recomputing():
            y = layer(x)
            (got,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(y, x @ weight.t())
        torch.testing.assert_close(got, g @ weight)


def test_rows_that_bitsandbytes_may_dequantise_wrongly(tmp_path, tiny_tokenizer):
    """With AVX-512 rows of 32 get another block's scale, without they are right: refused, or as
    `test_converted` has them."""
    narrow = save_tiny_model(tmp_path / "narrow", "llama", tiny_tokenizer)
    plain = load(narrow, dtype="float32").model
    model = load(narrow, dtype="float32", base_bits=4).model
    path = "model.layers.0.self_attn.q_proj"
    try:
        packed_base.convert(model)
    except InputError as error:
        said = rf"{path}: bitsandbytes makes another weight .* rows of 32"
        assert re.search(said, str(error))
        return
    layer, want = model.get_submodule(path), plain.get_submodule(path).weight.detach()
    rows = want.reshape(-1, 64)
    error = layer.dense(*layer.tensors()).detach().view_as(rows) - rows
    assert float((error.abs() / rows.abs().amax(1, keepdim=True)).max()) <= 0.16 * 1.05


@pytest.mark.filterwarnings("ignore")  # those of torch's exporter
@pytest.mark.parametrize("tied", [True, False])
def test_narrow_ends(tied, tmp_path, tiny_tokenizer, monkeypatch):
    """Embeddings and logits of a table in float16, in parts, in torch and in the runtime, against
    numpy in float64."""
    folder = save_tiny_model(tmp_path / "m", "llama", tiny_tokenizer, tie_word_embeddings=tied)
    model = load(folder, dtype="float32").model
    monkeypatch.setattr(packed_base, "WIDENED_ELEMENTS", 100 * model.config.hidden_size)
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    tables = [p.detach().numpy().astype(np.float16).astype(np.float64) for p in ends]
    packed_base.narrow_ends(model, torch.float16)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.weight is table.weight) == tied and len(tables[1]) > 200  # three parts
    ids = torch.arange(3 * 5).view(3, 5)
    assert np.array_equal(table(ids).detach(), tables[0][ids])
    x = torch.randn(4, model.config.hidden_size)
    want = x.numpy().astype(np.float64) @ tables[1].T
    torch.onnx.export(head.eval(), (x,), tmp_path / "head.onnx", dynamo=True, verbose=False)
    (found,) = onnxruntime.InferenceSession(tmp_path / "head.onnx").run(None, {"x": x.numpy()})
    for got in (head(x).detach().numpy(), found):
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def graph_of(inside, path):
    """`x (q s)'`, the int8 q held by the graph, or its input."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Cast", ["q"], ["float"], to=onnx.TensorProto.FLOAT),
        make("Mul", ["float", "s"], ["w"]),
        make("MatMul", ["x", "w"], ["y"]),
    ]
    q = onnx.helper.make_tensor("q", onnx.TensorProto.INT8, (64, 64), [3] * 64 * 64)
    s = onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, (1,), [0.5])
    inputs = [info("x", onnx.TensorProto.FLOAT, (2, 64))]
    if not inside:
        inputs.append(info("q", onnx.TensorProto.INT8, (64, 64)))
    # What stays packed, whatever becomes of q.
    inputs.append(info("other", onnx.TensorProto.INT8, (16, 16)))
    nodes.append(make("Cast", ["other"], ["z"], to=onnx.TensorProto.FLOAT))
    outputs = [info(name, onnx.TensorProto.FLOAT, None) for name in ("y", "z")]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, [q, s] if inside else [s])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_folded_weight_is_refused(tmp_path):
    assert still_packed(graph_of(False, tmp_path / "g.onnx"), ["q", "other"]) == 2
    with pytest.raises(InputError, match="q in 8 or 4 bits"):
        still_packed(graph_of(True, tmp_path / "g.onnx"), ["q"])
    with pytest.raises(InputError, match=r"\(64, 64\) once it is optimised"):
        still_packed(graph_of(True, tmp_path / "g.onnx"), ["other"])
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]
