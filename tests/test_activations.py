"""What is recomputed gives the same gradients, bit for bit, and is really not kept."""

import gc
from contextlib import nullcontext

import pytest
import torch
import transformers
from kernel_checks import DEVICE, needs_triton, random
from tiny_models import CAUSAL, config_of
from torch import nn

from tinyft.activations import MODES, Rematerialise, keeping
from tinyft.adapters import inject
from tinyft.heap import HeapWatch
from tinyft.kernels.hadamard_quant import hadamard_quant
from tinyft.kernels.sparse_linear import sparse_gate_up


def build(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if family == "bert":
        auto = transformers.AutoModelForSequenceClassification
    return auto.from_config(config_of(family, **changes)).to(dtype)


def run(model, mode):
    """Loss and gradients."""
    ids = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)  # of dropout
    with keeping(model, mode, HeapWatch()):
        loss = model(input_ids=ids).logits.float().square().mean()
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits(family, mode, lora, dtype):
    model = build(family, dtype)
    if lora:
        inject(model, rank=2)
        for layer in model.modules():
            if hasattr(layer, "lora_B"):
                nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(2))
    forwards = [module.forward for module in model.modules()]
    want = run(model, "none")
    for ours, plain in zip(run(model, mode), want, strict=True):
        assert torch.equal(ours, plain)
    assert [module.forward for module in model.modules()] == forwards


class Mlp(nn.Module):
    """RMSNorm and a gated MLP, as in most language models."""

    def __init__(self, d=32):
        super().__init__()
        self.gate, self.up = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, 3 * d, bias=False)
        self.down, self.weight = nn.Linear(3 * d, d, bias=False), nn.Parameter(torch.ones(d))

    def forward(self, x):
        h = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def kept_bytes(mode):
    """Bytes of the distinct storages, weights apart, that a pass of `Mlp` keeps for backward."""
    model, x = Mlp(), torch.randn(64, 32, requires_grad=True)
    with keeping(model, mode, HeapWatch()):
        loss = model(x).sum()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages, seen, todo = {}, set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for name in (name for name in dir(node) if name.startswith("_raw_saved")):
            saved = getattr(node, name)
            kept = saved.data if mode == "selective" else getattr(node, name[4:])
            leaves = [kept] if isinstance(kept, torch.Tensor) else [t for t, _ in kept.leaves]
            for tensor in leaves:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(n for address, n in storages.items() if address not in weights)


def test_only_what_cannot_be_made_again_is_kept():
    row = 64 * 4  # bytes of one column of 64 float32
    # x, gate and up, and the mean square of each row on its way to rsqrt.
    assert kept_bytes("selective") <= (32 + 96 + 96 + 2) * row
    # torch: also the normalised x, before and after its weight, silu(gate), and the product.
    assert kept_bytes("none") >= (32 + 96 + 96 + 32 + 32 + 96 + 96) * row


@needs_triton
def test_what_comes_of_a_kernel_is_made_again_rightly():
    """Recipes before a kernel, which reads what they make, and after it, which begin from it."""
    model, blocks = Mlp(64).to(DEVICE), torch.tensor([2, 0], device=DEVICE)
    gate, up = random(48, 64, seed=1).float(), random(48, 64, seed=2).float()

    def loss_of(x):
        y = hadamard_quant(nn.functional.silu(x) * 2, 8, impl="triton")
        h = sparse_gate_up(model(y.sigmoid() * y), gate, up, blocks, 16, impl="triton")
        return (h.tanh() * h).square().mean()

    x, found = random(4, 64).float().requires_grad_(), []
    for keep in (nullcontext(), Rematerialise()):
        with keep:
            loss = loss_of(x)
        found.append([loss.detach(), *torch.autograd.grad(loss, (x, *model.parameters()))])
    assert all(torch.equal(ours, plain) for plain, ours in zip(*found, strict=True))


def test_nothing_waits_for_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model, x = Mlp(), torch.randn(64, 32, requires_grad=True)
        with keeping(model, "selective", HeapWatch()):
            loss = model(model(x)).sum()
        loss.backward()
        del loss
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "_Recipe"]
    finally:
        gc.enable()


def test_in_place_changes_between_the_passes():
    """Of a kept operand: torch's own semantics, on the value that was saved. Never a wrong one."""
    x = torch.randn(64, 32, requires_grad=True)
    scale = torch.full((64, 32), 2.0)
    with keeping(nn.Module(), "selective", HeapWatch()):
        y = x.exp() * scale  # not a leaf of autograd: nothing saves `x` itself
        loss = (y * y).sum()
    scale.add_(1)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "in place" in str(error) or "modified" in str(error)
    else:
        torch.testing.assert_close(x.grad, 8 * (2 * x.detach()).exp())


def test_results_that_are_written_again_are_kept():
    def grads(mode):
        x = torch.linspace(0.1, 1, 64).view(2, 32).requires_grad_()
        with keeping(nn.Module(), mode, HeapWatch()):
            y = x.exp().clone()  # `y` is saved by the square, after it was written to in place
            z = (y * 2).mul_(3)
            with torch.no_grad():
                scratch = torch.empty(2, 32)
                torch.mul(x, 2, out=scratch)
                torch.mul(scratch, scratch, out=scratch)
            loss = (z * z * scratch).sum()
        return torch.autograd.grad(loss, x)[0]

    assert torch.equal(grads("selective"), grads("none"))
