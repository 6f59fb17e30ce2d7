"""Quantisers, rotations, quantised layers and their search, against mathematics written again."""

from __future__ import annotations

import copy

import pytest
import torch
from test_zeroth import tiny_model
from torch import nn
from torch.nn.functional import linear

from tinyft.errors import InputError
from tinyft.kernels.hadamard import fwht_ref
from tinyft.rotated.layers import QuantLinear, QuantNorm, convert, rotate_and_round
from tinyft.rotated.quantisers import Int4Groups, PackedWeight, Quantiser, pack_codes, unpack_codes
from tinyft.rotated.rotation import (
    Rotation,
    add_ends,
    blocks_of,
    can_rotate,
    fuse,
    rotate_down,
    rotate_values,
)
from tinyft.rotated.search import Recipe, Rotated

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(n: int) -> torch.Tensor:
    """R of a place, from its own action on the identity."""
    return rotate_and_round(torch.eye(n, dtype=F64), None)


# Quantisers.


def grid_by_hand(row: list[float], bits: int, clip: float, symmetric: bool) -> tuple[float, int]:
    if symmetric:
        return clip * max(map(abs, row)) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    low, high = clip * min(*row, 0.0), clip * max(*row, 0.0)
    s = (high - low) / (2**bits - 1)
    return s, round(-low / s)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [0, 5])
def test_rounding_equals_the_formula_and_torchs_fake_quantisation(bits, symmetric, group):
    x = draw(7, 15) * torch.logspace(-3, 3, 7, dtype=F64).unsqueeze(1) + 0.3
    quantiser = Quantiser(bits, 0.9, symmetric, group)
    rows = x.view(-1, group or 15)
    grid = [grid_by_hand(row, bits, 0.9, symmetric) for row in rows.tolist()]
    s, z = (torch.tensor(values, dtype=F64) for values in zip(*grid, strict=True))
    expected = torch.stack(
        [
            torch.fake_quantize_per_tensor_affine(row.float(), float(a), int(b), 0, 2**bits - 1)
            for row, a, b in zip(rows, s, z, strict=True)
        ]
    )
    # torch multiplies by 1 / s in float32, so it may go the other way in the middle of a step.
    got, steps = quantiser.round(x).view(expected.shape), rows / s.unsqueeze(1)
    middle = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    assert int(middle.sum()) <= 2
    torch.testing.assert_close(got[~middle].float(), expected[~middle], rtol=1e-5, atol=1e-9)
    by_hand = (steps.round() + z.unsqueeze(1)).clamp(0, 2**bits - 1) - z.unsqueeze(1)
    torch.testing.assert_close(got, by_hand * s.unsqueeze(1))
    q, scales, zeros = quantiser.codes(x)
    assert q.dtype == zeros.dtype == torch.uint8 and max(int(q.max()), int(zeros.max())) < 2**bits
    torch.testing.assert_close(scales.flatten(), s)
    assert zeros.flatten().tolist() == z.tolist()


def test_rows_of_zeros_of_one_sign_and_of_one_number():
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0], [-2.0, -1.0], [5.0, 5.0]], dtype=F64)
    assert torch.equal(Quantiser(8).round(x)[0], x[0])
    torch.testing.assert_close(Quantiser(8).round(x), x, rtol=0, atol=3 / 255 / 2 + 1e-9)
    q, _, zeros = Quantiser(4).codes(x)
    assert zeros.flatten().tolist() == [0, 0, 15, 0]
    assert q[1].tolist() == [5, 15]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_is_exact(bits, n, dtype):
    codes = torch.randint(0, 2**bits, (5, n), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape[1] == (n if bits == 8 else -(-n // 2))
    assert torch.equal(unpack_codes(packed, n), codes)
    w = draw(5, n).to(dtype)
    weight = PackedWeight.of(w, Quantiser(bits, 0.95))
    assert torch.equal(weight.dequantize(dtype), Quantiser(bits, 0.95).round(w))


def test_gradients_pass_straight_through_and_stop_where_clipped():
    x = draw(6, 32).requires_grad_()
    g = draw(6, 32, seed=1)
    (grad,) = torch.autograd.grad(Quantiser(4, 0.7)(x), x, g)
    assert torch.equal(grad, g)
    (grad,) = torch.autograd.grad(Quantiser(4, 0.7, clipped=True)(x), x, g)
    rows = x.detach().tolist()
    grids = [grid_by_hand(row, 4, 0.7, False) for row in rows]
    within = [
        [0 <= round(v / s) + z <= 15 for v in row] for row, (s, z) in zip(rows, grids, strict=True)
    ]
    within = torch.tensor(within)
    assert 0 < int((~within).sum()) < within.numel() // 2
    assert torch.equal(grad, g * within)


def test_the_best_clip_is_the_best():
    x = draw(64, 256)
    found, error = Quantiser(2).best_clip(x, (1.0, 0.8, 0.5, 0.3))
    errors = {
        c: float((Quantiser(2, c).round(x) - x).square().sum() / x.square().sum())
        for c in (1.0, 0.8, 0.5, 0.3)
    }
    assert found.clip == min(errors, key=errors.get) != 1.0
    assert error == pytest.approx(errors[found.clip], rel=1e-5)


# Rotations.


@pytest.mark.parametrize("n", [2, 12, 20, 28, 64, 576, 1536])
def test_rotations_are_orthogonal(n):
    r = Rotation.random(n, seed=1)
    matrix = r.apply(torch.eye(n, dtype=F64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-10)
    x = draw(3, n)
    torch.testing.assert_close(r.apply(x), x @ matrix, rtol=0, atol=1e-10)
    torch.testing.assert_close(r.undo(r.apply(x)), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, n**-0.5))


@pytest.mark.parametrize("n", [128, 256, 2048])
def test_fast_transform_equals_sylvesters_matrix(n):
    h = torch.ones(1, 1, dtype=F64)
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64), h)
    x = draw(3, n)
    torch.testing.assert_close(fwht_ref(x), x @ h, rtol=0, atol=1e-10)


def test_a_size_without_a_matrix_is_refused():
    assert not can_rotate(6) and not can_rotate(172 * 3)
    with pytest.raises(InputError, match=r"hidden size is 6.*--rotations none"):
        Rotation.random(6, seed=0)


FAMILIES = [
    ("llama", {}),
    ("llama", {"hidden_size": 48, "intermediate_size": 96, "attention_bias": True}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gpt_neox", {}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("opt", {}),
]


def make_norms_double(model: nn.Module) -> None:
    """transformers' RMSNorm computes in float32 whatever comes; torch's does not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=F64)
            norm.weight = module.weight
            norm.variance_epsilon = module.variance_epsilon
            model.set_submodule(name, norm)


@pytest.mark.parametrize("family, changes", FAMILIES)
@pytest.mark.parametrize("dtype, atol", [(F64, 1e-8), (torch.float32, 1e-4)])
def test_the_rotated_model_is_the_original(family, changes, dtype, atol):
    model = tiny_model(family, **changes).to(dtype).eval()
    for parameter in model.parameters():  # norms, biases: nothing stays at its initial value
        parameter.data += 0.1 * draw(*parameter.shape, seed=parameter.numel()).to(dtype)
    if dtype == F64:
        make_norms_double(model)
    ids = torch.randint(3, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
        convert(model)
        r1 = Rotation.random(model.config.hidden_size, seed=0)
        fuse(model, r1)
        add_ends(model, r1)
        before = [block.output.weight.clone() for block in blocks_of(model)]
        for block in blocks_of(model):
            rotate_values(block)
            rotate_down(block)
            block.attention.kv_quantiser.rotate = True
        got = model(input_ids=ids, attention_mask=mask)
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], rtol=0, atol=atol)
    # What heads and losses read is the original's, so that they need to know nothing.
    head = model.get_output_embeddings()
    torch.testing.assert_close(head(hidden)[real], expected.logits[real], rtol=0, atol=atol)
    for block, old in zip(blocks_of(model), before, strict=True):
        assert not torch.allclose(block.output.weight, old)
        assert isinstance(block.mlp_norm, QuantNorm) and torch.all(block.mlp_norm.weight == 1)
        assert not block.mlp_norm.centred and block.mlp_norm.bias is None


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_model_that_cannot_be_rotated_says_what_can(family):
    with pytest.raises(InputError, match=rf"This is a {family} model.*llama.*gpt_neox, opt"):
        Rotated(tiny_model(family), Recipe())


def test_opt_with_norms_after_its_blocks_is_refused():
    with pytest.raises(InputError, match="norms after its blocks"):
        Rotated(tiny_model("opt", do_layer_norm_before=False), Recipe())


# Layers.


def quantised_layer(rotate: bool, bits: int = 4) -> QuantLinear:
    layer = QuantLinear(nn.Parameter(draw(10, 24)), nn.Parameter(draw(10, seed=2)))
    layer.quantiser, layer.input_quantiser = Quantiser(bits, 0.95), Quantiser(8)
    layer.rotate_input = rotate
    return layer


@pytest.mark.parametrize("rotate", [False, True])
def test_a_layer_equals_integer_arithmetic(rotate):
    layer, x = quantised_layer(rotate), draw(6, 24, seed=3)
    turned = x @ dense(24) if rotate else x
    (qx, sx, zx), (qw, sw, zw) = Quantiser(8).codes(turned), Quantiser(4, 0.95).codes(layer.weight)
    counted = (qx.long() - zx.long()) @ (qw.long() - zw.long()).T  # int64: exact
    torch.testing.assert_close(layer(x), counted * sx * sw.T + layer.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotate", [False, True])
def test_the_backward_pass_is_the_papers(rotate):
    layer, x = quantised_layer(rotate), draw(6, 24, seed=3).requires_grad_()
    r = dense(24) if rotate else torch.eye(24, dtype=F64)
    dy = draw(6, 10, seed=4)
    dx, dw = torch.autograd.grad(layer(x), (x, layer.weight), dy)
    # The layer's own weight is W R already: d(W R) R' is the gradient of the original.
    rounded = Quantiser(4, 0.95).round(layer.weight.detach())
    torch.testing.assert_close(dx, dy @ rounded @ r.T, rtol=1e-6, atol=1e-6)
    expected = dy.T @ Quantiser(8).round(x.detach() @ r) @ r.T
    torch.testing.assert_close(dw @ r.T, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pack", ["rows", "groups", "int4"])
def test_a_packed_layer_is_the_latent_one(pack):
    layer = QuantLinear(nn.Parameter(draw(200, 128).float()), None)
    layer.input_quantiser = Quantiser(8)
    layer.quantiser = Quantiser(4, 0.95, group=0 if pack == "rows" else 64)
    packed = copy.deepcopy(layer)
    if pack == "int4":
        packed.freeze_int4(64)
        dense_weight = packed.packed().dequantize(torch.float32, slice(None), slice(None))
        latent = layer.weight.detach()
        error = float((dense_weight - latent).square().sum() / latent.square().sum())
        assert Int4Groups(64).error(latent) == pytest.approx(error, rel=1e-5)
    else:
        packed.set_packed(layer.packed())
        dense_weight = layer.rounded_weight().detach()
    x = draw(9, 128, seed=5).float().requires_grad_()
    dy = draw(9, 200, seed=6).float()
    expected = linear(Quantiser(8)(x), dense_weight)
    torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(packed(x), x, dy)
    torch.testing.assert_close(got, dy @ dense_weight, rtol=1e-5, atol=1e-4)


def test_blocks_of_a_packed_weight_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr("tinyft.rotated.layers._BLOCK_ELEMENTS", 128)  # a row
    layer = QuantLinear(nn.Parameter(draw(400, 128).bfloat16()), None)
    layer.quantiser = Quantiser(4)
    layer.set_packed(layer.packed())
    x = draw(50, 128, seed=5).bfloat16().requires_grad_()
    dy = draw(50, 400, seed=6).bfloat16()
    exact = dy.double() @ layer.packed().dequantize(torch.bfloat16).double()
    (got,) = torch.autograd.grad(layer(x), x, dy)
    error = float((got - exact).norm() / exact.norm())
    assert error < 3e-3  # 2.3e-3; 2.2e-2 when each sum is rounded


def test_scales_of_inputs_have_autograds_gradient():
    layer = QuantLinear(nn.Parameter(draw(30, 64).float()), nn.Parameter(draw(30).float()))
    layer.freeze_int4(64)
    weight = layer.packed().dequantize(torch.float32, slice(None), slice(None))
    layer.input_scale = nn.Parameter(1 + 0.1 * draw(64, seed=1).float())
    scale = layer.input_scale.detach().clone().requires_grad_()
    x = draw(2, 9, 64, seed=5).float().requires_grad_()
    dy = draw(2, 9, 30, seed=6).float()
    expected = torch.autograd.grad(linear(x, weight * scale, layer.bias), (x, scale), dy)
    got = torch.autograd.grad(layer(x), (x, layer.input_scale), dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_are_torchs(norm):
    theirs = (nn.LayerNorm if norm == "layer" else nn.RMSNorm)(16, eps=1e-3, dtype=F64)
    for parameter in theirs.parameters():
        parameter.data = draw(16, seed=parameter.numel())
    x = draw(3, 5, 16) + 2
    torch.testing.assert_close(QuantNorm.of(theirs)(x), theirs(x))


def test_the_rounded_weight_follows_the_weight():
    """To another dtype, too; and what evaluation rounded can be trained with."""
    layer, x, dy = quantised_layer(False), draw(6, 24, seed=3), draw(6, 10, seed=4).float()
    layer(x)
    layer.float()
    with torch.inference_mode():
        layer(x.float())
    x = x.float().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    torch.testing.assert_close(dx, dy @ Quantiser(4, 0.95).round(layer.weight.detach()))


# Search.


def run_model(model):
    return lambda ids: model(input_ids=ids)


def test_an_outlier_is_rotated_away_and_padding_does_not_vote():
    """One channel of the down projection's input is large where tokens count, so Hadamard wins
    (were it larger still, it would be all that counts, and round to itself unrotated); where there
    is only padding, what happens changes nothing."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 12))
    keep = torch.ones_like(ids)
    keep[:, 6:] = 0
    other = ids.clone()
    other[:, 6:] = torch.randint(3, 300, (2, 6))
    found = []
    for tokens in (ids, other):
        model = tiny_model("llama")
        model.model.layers[0].mlp.up_proj.weight.data[5] *= 10
        rotated = Rotated(model, Recipe(activations=4))
        rotated.calibrate(run_model(model), [(tokens, keep)])
        found.append(rotated.choices)
    assert found[0][0].down
    plain, turned = found[0][0].ranges["down_input"]
    assert plain > 3 and turned < plain / 1.5
    for one, two in zip(*found, strict=True):
        assert one.clips == two.clips
        for place, pair in one.errors.items():
            assert pair == pytest.approx(two.errors[place])


def test_the_choice_is_the_lesser_relative_error():
    model = tiny_model("qwen3")
    rotated = Rotated(model, Recipe(weights=4, activations=4, kv=4, clip=0.95))
    ids = torch.randint(3, 300, (4, 12))
    original = copy.deepcopy(model)
    inputs = {}
    for i, block in enumerate(blocks_of(original)):
        block.down.register_forward_pre_hook(lambda m, args, i=i: inputs.update({i: args[0]}))
    with torch.no_grad():
        original(input_ids=ids)
    rotated.calibrate(run_model(model), [(ids, None)])
    quantiser = Quantiser(4, 0.95)
    for i, block in enumerate(blocks_of(original)):
        errors = []
        for r in (torch.eye(64), dense(64).float()):
            total = 0.0
            for x in (inputs[i].flatten(0, 1) @ r, block.down.weight.detach() @ r):
                total += float((quantiser.round(x) - x).square().sum() / x.square().sum())
            errors.append(total)
        assert rotated.choices[i].errors["down"] == pytest.approx(errors, rel=1e-3)
        assert rotated.choices[i].down == (errors[1] < errors[0])


def test_batches_do_not_outvote_weights():
    """The same rows once or four times: the same errors, though weights are rounded but once."""
    found = []
    for times in (1, 4):
        model = tiny_model("llama")
        rotated = Rotated(model, Recipe(activations=4))
        ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
        rotated.calibrate(run_model(model), [(ids, None)] * times)
        found.append(rotated.choices)
    for one, four in zip(*found, strict=True):
        assert one.clips == four.clips
        for place, pair in one.errors.items():
            assert pair == pytest.approx(four.errors[place])


@pytest.mark.parametrize("rotations, on", [("all", True), ("none", False)])
def test_all_and_none_are_what_they_say(rotations, on):
    model = tiny_model("opt")
    rotated = Rotated(model, Recipe(rotations=rotations))
    rotated.calibrate(run_model(model), [(torch.randint(3, 300, (2, 8)), None)])
    assert (rotated.r1 is not None) == on
    assert all((c.values, c.keys, c.down) == (on,) * 3 for c in rotated.choices)
    assert all(block.attention_norm.centred != on for block in blocks_of(model))


def test_bad_recipes_name_all_that_is_wrong():
    with pytest.raises(InputError, match=r"weights takes 2 to 8.*rotations must be.*clip must be"):
        Rotated(tiny_model("llama"), Recipe(weights=1, rotations="some", clip=2.0))
    with pytest.raises(InputError, match="frozen base must be one of 32, 64, 128; found 16"):
        Rotated(tiny_model("llama"), Recipe(group=16, int4_base=True))
    model = tiny_model("gpt_neox")
    with pytest.raises(InputError, match="group 33 does not divide"):
        Rotated(model, Recipe(group=33))
    assert not any(isinstance(module, (QuantNorm, QuantLinear)) for module in model.modules())
