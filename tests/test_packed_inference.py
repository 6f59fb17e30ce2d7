"""A model that RoSTE packed as a graph of its logits: its weights, its roundings, its memory."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from test_gradient_methods import batch_of, our_loop
from test_zeroth import tiny_model

import tinyft
from tinyft.cli import main
from tinyft.errors import InputError
from tinyft.kernels.hadamard_quant import rotate_ref
from tinyft.kernels.int4_linear import EVERY, pack_int4
from tinyft.models import load
from tinyft.rotated import artefact
from tinyft.rotated.quantisers import PackedWeight, Quantiser
from tinyft.rotated.rotation import Rotation
from tinyft.targets import gate, rotated_graph
from tinyft.targets.packed_inference import compare, export_packed, still_packed

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch's exporter

WITHOUT_TORCH = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
ids = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], session.run(None, {"input_ids": ids})[0])
assert "torch" not in sys.modules
"""


def pack(directory, tokenizer, family="llama", dtype=torch.float32, **fields):
    """What a step of RoSTE leaves, of a model of one layer."""
    model = tiny_model(family, num_hidden_layers=1).to(dtype)
    optimizer = tinyft.RoSTE(model, lr=1e-3, **fields)
    our_loop(optimizer, model, [batch_of(0)])
    artefact.save(optimizer.rotated, tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """The folders of a packed model in bfloat16 and of its graph, whose head has several parts."""
    root = tmp_path_factory.mktemp("exported")
    folder = pack(root / "packed", tiny_tokenizer, dtype=torch.bfloat16, rotations="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotated_graph, "WIDENED_ELEMENTS", 32 * 128)
        export_packed(folder, root / "out")
    return folder, root / "out"


def held(path):
    """Layers, and the bits that a weight takes, of a graph that the runtime optimised."""
    graph = gate.optimised(path)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    sizes = [{a.name: a.i for a in node.attribute} for node in nodes]
    numbers = sum(size["K"] * size["N"] for size in sizes)
    codes = [onnx.numpy_helper.to_array(tensors[node.input[1]]).nbytes for node in nodes]
    return len(nodes), 8 * sum(codes) / numbers


def check_logits(folder, graph, tmp_path):
    """Against torch, on another size than the graph was made with, in a process without torch."""
    ids = np.arange(2, 32).reshape(2, 15)
    np.save(tmp_path / "ids.npy", ids)
    files = [str(path) for path in (graph, tmp_path / "ids.npy", tmp_path / "got.npy")]
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_TORCH, *files], check=True)
    got = np.load(tmp_path / "got.npy")
    with torch.no_grad():
        want = load(folder).model.float()(torch.from_numpy(ids)).logits.numpy()
    # An activation between two codes moves the tokens that see it; most see none.
    errors = np.abs(got - want).max(-1) / np.abs(want).max()
    assert np.median(errors) <= 1e-5 and errors.max() < 0.1


@pytest.mark.parametrize(
    "family, dtype, fields, layers",
    [
        ("gpt_neox", torch.float32, {"activations": 4, "kv": 4, "clip": 0.9}, 4),
        ("opt", torch.float16, {"rotations": "none", "group": 16}, 6),
        ("llama", torch.float32, {"symmetric": True, "group": 32, "kv": 16}, 7),
        ("qwen3", torch.bfloat16, {"trainable": "lora", "activations": 4, "kv": 4}, 7),
    ],
)
def test_logits_are_torchs_and_weights_have_four_bits(
    tmp_path, tiny_tokenizer, capsys, family, dtype, fields, layers
):
    folder = pack(tmp_path / "packed", tiny_tokenizer, family, dtype, **fields)
    words = ["export", "--model", str(folder), "--format", "inference", "--json"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["logit_error"] <= 1e-5 and found["flips"] < 1e-3
    assert held(tmp_path / "out" / "model.onnx") == (layers, 4)
    check_logits(folder, tmp_path / "out" / "model.onnx", tmp_path)


def test_a_table_in_16_bits_stays_one(exported, tmp_path):
    folder, out = exported
    check_logits(folder, out / "model.onnx", tmp_path)
    assert held(out / "model.onnx") == (7, 4)
    wide = [t for t in gate.optimised(out / "model.onnx").initializer if 400 in t.dims]
    assert [t.data_type for t in wide] == [onnx.TensorProto.BFLOAT16]


def test_a_graph_whose_weights_become_floats_is_refused(exported, tmp_path):
    graph = onnx.load(exported[1] / "model.onnx")
    (table,) = [t.name for t in graph.graph.initializer if 400 in t.dims]
    for node in graph.graph.node:
        if node.op_type == "Reshape" and node.input[0] == table:  # not after anything
            node.op_type = "Identity"
            del node.input[1:]
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"makes [\d,]+ bytes of [\d,]+ of weights"):
        still_packed(tmp_path / "model.onnx", {})


def test_int8_and_folders_that_exist_are_refused(exported, tmp_path, capsys):
    words = ["export", "--model", str(exported[0]), "--output"]
    assert main([*words, str(tmp_path / "out"), "--format", "inference-int8"]) == 2
    assert "use --format inference" in capsys.readouterr().err
    assert main([*words, str(exported[1]), "--format", "inference"]) == 2
    assert "must be a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["nothing", "code", "scale", "clip", "bits", "rotation"])
def test_a_graph_that_differs_is_refused(exported, wrong):
    """The model that it is compared with is made another one."""
    folder, out = exported
    model = load(folder).model.float()
    ids = torch.arange(3 * 17).view(3, 17) * 7919 % 375
    layer = model.model.layers[0].mlp.down_proj
    if wrong == "nothing":
        assert compare(model, out / "model.onnx", ids)["logit_error"] <= 1e-5
        return
    if wrong == "code":
        layer.weight.data[0, 0] ^= 1
    elif wrong == "scale":
        layer.scales[3] *= 1.001
    elif wrong == "rotation":
        layer.rotate_input = False
    else:
        quantiser = Quantiser(8, 0.8) if wrong == "clip" else Quantiser(7)
        layer.input_quantiser = quantiser
    with pytest.raises(InputError, match=r"(logits are off|down_input as torch does not)"):
        compare(model, out / "model.onnx", ids)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns, group", [(576, 0), (576, 64), (96, 48), (33, 0), (20, 0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_are_the_same_numbers(bits, columns, group, symmetric):
    torch.manual_seed(0)
    weight = PackedWeight.of(torch.randn(5, columns) + 0.3, Quantiser(bits, 0.9, symmetric, group))
    found = rotated_graph.BlockWeight.of(weight)
    assert (found.zeros is None) == (symmetric and bits != 3)
    assert torch.equal(by_hand(found), weight.dequantize(torch.float32))


@pytest.mark.parametrize("columns, group", [(96, 64), (128, 32), (40, 64)])
def test_blocks_of_a_frozen_base_are_the_same_numbers(columns, group):
    torch.manual_seed(0)
    weight = pack_int4(torch.randn(5, columns), group)
    found = by_hand(rotated_graph.BlockWeight.of(weight))
    assert torch.equal(found, weight.dequantize(torch.float32, EVERY, EVERY))


def by_hand(weight):
    """What a `BlockWeight` means, by the operator's description."""
    rows, blocks, size = weight.codes.shape

    def codes(packed):
        if weight.bits == 8:
            return packed.reshape(rows, -1)
        return torch.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)

    q = codes(weight.codes).view(rows, blocks, -1).float()
    z = 2 ** (weight.bits - 1) if weight.zeros is None else codes(weight.zeros)[:, :blocks, None]
    assert size * 8 // weight.bits in (16, 32, 64, 128, 256)
    return ((q - z) * weight.scales.unsqueeze(2)).flatten(1)[:, : weight.in_features]


def test_groups_that_are_not_made_of_blocks_are_refused():
    weight = PackedWeight.of(torch.randn(5, 72), Quantiser(4, group=24))
    with pytest.raises(InputError, match=r"groups of 24 columns.*multiple of 16"):
        rotated_graph.BlockWeight.of(weight)


@pytest.mark.parametrize("quantiser", [Quantiser(4, 0.9), Quantiser(8), Quantiser(3, 0.8, True)])
def test_rounding_is_the_quantisers(quantiser):
    x = torch.randn(4, 7, 33) * torch.logspace(-3, 3, 7).unsqueeze(1)
    x[0, 0], x[1, 1] = 0, x[1, 1].abs()
    heard = {}
    got = rotated_graph.Rounding(quantiser, heard, "here")(x)
    assert torch.equal(got, quantiser.round(x)) and heard["here"] is got


@pytest.mark.parametrize("n", [12, 64, 576, 1536])
@pytest.mark.parametrize("transposed", [False, True])
def test_turning_is_the_rotation(n, transposed):
    x = torch.randn(3, 5, n)
    want = rotate_ref(x.double(), transposed=transposed).float()
    got = rotated_graph.Turn(n, transposed=transposed)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    r1 = Rotation.random(n, seed=1)
    want = (r1.undo if transposed else r1.apply)(x.double()).float()
    got = rotated_graph.Turn(n, r1.signs, transposed=transposed)(x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
