"""What is recomputed gives the same gradients, bit for bit, and is really not kept."""

import pytest
import torch
import transformers
from tiny_models import CAUSAL, config_of
from torch import nn

from tinyft.activations import MODES, keeping
from tinyft.adapters import inject
from tinyft.heap import HeapWatch


def build(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if family == "bert":
        auto = transformers.AutoModelForSequenceClassification
    # No dropout: two runs must see the same model.
    return auto.from_config(config_of(family, **changes)).to(dtype).eval()


def run(model, mode):
    """Loss, gradients, and the bytes of distinct storages that autograd still holds."""
    ids = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(1))
    with keeping(model, mode, HeapWatch()):
        out = model(input_ids=ids)
        loss = out.logits.float().square().mean()
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
    for got, want in zip(run(model, mode), run(model, "none"), strict=True):
        assert torch.equal(got, want)
    assert [module.forward for module in model.modules()] == forwards


def held_bytes(forward, mode):
    """Bytes of the distinct storages that a graph keeps alive, parameters apart."""
    model = nn.Module()
    with keeping(model, mode, HeapWatch()):
        out = forward()
    storages, seen, todo = {}, set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, tuple) else (raw,):
                    value = saved.data
                    tensors = [value] if isinstance(value, torch.Tensor) else value.tensors()
                    for tensor in tensors:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def mlp(n=64, d=32):
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    up, gate, down = (
        nn.Linear(d, 2 * d, bias=False),
        nn.Linear(d, 2 * d, bias=False),
        nn.Linear(2 * d, d, bias=False),
    )
    norm = nn.RMSNorm(d)
    return x, lambda: down(nn.functional.silu(gate(norm(x))) * up(norm(x))).sum()
