"""The generator in Triton and in ONNX: the same bits as the torch reference."""

from __future__ import annotations

import onnx_ir
import onnxruntime
import pytest
import torch
from kernel_checks import DEVICE, needs_triton

from tinyft.kernels import philox
from tinyft.targets import graphs, zeroth_graph

SEEDS = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFFFFFFFFFF)


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 255, 1031])
def test_words(seed, n):
    generator = torch.Generator().manual_seed(n)
    counter = torch.randint(0, 2**32, (4, n), generator=generator).to(DEVICE)
    counter[:, 0] = 2**32 - 1
    found = philox.philox(counter, seed, impl="triton")
    assert torch.equal(found, philox.philox(counter, seed, impl="torch"))


@needs_triton
@pytest.mark.parametrize("kind", philox.PER_BLOCK)
@pytest.mark.parametrize("cols", [1, 8, 129, 576])
def test_matrix(kind, cols):
    """Rows in any order, columns that end within a block, words that are negative as int32, and an
    index that is no one piece of memory."""
    rows = torch.tensor([7, 0, 49151, *range(20, 40), 3], device=DEVICE).repeat_interleave(2)[::2]
    point = dict(seed=2**64 - 3, tensor=2**32 - 1, step=2**31, stream=2**32 - 8)
    found = philox.matrix(kind, rows, cols, impl="triton", **point)
    assert found.dtype == torch.float32
    assert torch.equal(found, philox.matrix(kind, rows, cols, impl="torch", **point))


@needs_triton
@pytest.mark.parametrize("kind", philox.PER_BLOCK)
def test_blocks_beyond_the_sign_of_int32(kind):
    rows = torch.tensor([2**31 + 1, 2**32 - 1], device=DEVICE)
    point = dict(seed=1, tensor=0, step=0, stream=0)
    found = philox.matrix(kind, rows, 8, impl="triton", **point)
    assert torch.equal(found, philox.matrix(kind, rows, 8, impl="torch", **point))


@pytest.mark.filterwarnings("ignore")  # those of torch's exporter
def test_onnx(tmp_path):
    """Words and what they make, in stock onnxruntime; seed and step are inputs of the graph."""
    rows, cols, tensor = torch.tensor([7, 0, 49151, 3]), 150, 2**32 - 1
    counters = {
        kind: philox.matrix_counters(rows, -(-cols // per), tensor, 0, 2**32 - 8)
        for kind, per in philox.PER_BLOCK.items()
    }

    constants = counters | {"16": philox.table("levels"), "65536": philox.table("gaussians")}

    def draw(tensors):
        def words(kind):
            block, tensor, _, stream = tensors[kind].unbind(0)
            counter = torch.stack((block, tensor, tensors["step"].expand_as(block), stream))
            return philox.philox(counter, tensors["seed"])

        return {
            "words": words("signs"),
            "signs": zeroth_graph.signs(words("signs")),
            "levels": philox.levels(words("levels"), tensors["16"]),
            "gaussians": philox.gaussians(words("gaussians"), tensors["65536"]),
        }

    point = {"seed": torch.tensor(SEEDS[2]), "step": torch.tensor(2**31)}
    onnx_ir.save(graphs.trace(draw, constants, point), tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    for seed in (0, 0x80000000, 2**63 - 1):
        values = {"seed": torch.tensor(seed), "step": torch.tensor(2**31)}
        found = session.run(None, {name: value.numpy() for name, value in values.items()})
        found = dict(zip([o.name for o in session.get_outputs()], found, strict=True))
        assert (found["words"] == draw(constants | values)["words"].numpy()).all()
        for kind in philox.PER_BLOCK:
            options = dict(seed=seed, tensor=tensor, step=2**31, stream=2**32 - 8)
            expected = philox.matrix(kind, rows, cols, impl="torch", **options)
            drawn = torch.from_numpy(found[kind]).view(len(rows), -1)[:, :cols]
            assert torch.equal(drawn, expected), kind
