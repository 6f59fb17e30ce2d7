"""Counted FLOPs against closed forms and against torch's own counter where that one counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

import tinyft
from tinyft.cost import FlopCounter, FlopMeter


def llama_forward_flops(config, rows, width):
    """Products and attention of a Llama, from its configuration."""
    d, f, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    linear = d * (2 * q + 2 * kv + 3 * f) * config.num_hidden_layers + d * config.vocab_size
    attention = 2 * config.num_attention_heads * head * width * config.num_hidden_layers
    return 2 * rows * width * (linear + attention)


@pytest.fixture
def llama():
    from test_zeroth import tiny_model

    return tiny_model("llama")


def test_forward_equals_the_closed_form(llama):
    ids = torch.randint(3, 300, (3, 7))
    with torch.no_grad(), FlopCounter() as counter:
        llama(input_ids=ids)
    # The rotary table is a product as well: (head_dim / 2) x 1 x width, once.
    rotary = 2 * llama.config.head_dim // 2 * 7
    assert counter.flops == pytest.approx(llama_forward_flops(llama.config, 3, 7) + rotary, abs=200)


def test_equals_torch_s_counter_where_attention_is_made_of_products(llama):
    ids = torch.randint(3, 300, (3, 7))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounter() as ours:
            llama(input_ids=ids, labels=ids).loss.backward()
        with FlopCounterMode(display=False) as theirs:
            llama(input_ids=ids, labels=ids).loss.backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_fused_attention_counts_what_its_products_would():
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    counts = []
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend), FlopCounter() as counter:
            out = scaled_dot_product_attention(q, k, v)
        forward = counter.flops
        with sdpa_kernel(backend), FlopCounter() as counter:
            out.sum().backward()
        counts.append((forward, counter.flops))
    (forward, backward), (fused_forward, fused_backward) = counts
    assert fused_forward == forward
    assert fused_backward == backward * 5 // 4  # the fused kernel forms the scores again


@pytest.mark.parametrize("name", ["MixtralConfig", "OlmoeConfig"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "fallback"])
def test_experts_count_for_the_tokens_that_they_see(name, implementation, monkeypatch):
    """By hand, and as the loop over experts that is made of ordinary products."""
    import transformers
    from transformers.integrations import moe

    d, f, layers, k = 32, 64, 2, 3
    shape = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": k}
    config = getattr(transformers, name)(**shape, vocab_size=400, eos_token_id=2, num_experts=5)
    ids = torch.randint(3, 300, (3, 7))
    if implementation == "fallback":
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)

    def counted(experts):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, experts_implementation=experts
        )
        with FlopCounter() as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        return counter

    found = counted("grouped_mm")
    experts = sum(n for name, n in found.by_operator.items() if "grouped_mm" in name)
    # Gate, up and down; forward, and backward for the rows and for the weights.
    assert experts == 3 * 2 * ids.numel() * k * 3 * d * f * layers
    assert found.flops == counted("eager").flops


@pytest.mark.parametrize("estimator, passes", [("two-sided", 2), ("one-sided", 5), ("centred", 5)])
def test_a_zeroth_order_step_costs_its_forward_passes(llama, estimator, passes):
    ids = torch.randint(3, 300, (4, 7))
    optimizer = tinyft.MeZO(llama, estimator=estimator)

    def losses(batch):
        return llama(input_ids=batch["x"]).logits.mean((1, 2))

    optimizer.prepare(losses, [{"x": ids}])
    with torch.no_grad(), FlopCounter() as forward:
        llama(input_ids=ids)
    with FlopCounter() as step:
        optimizer.step(losses, {"x": ids})
    perturbing = sum(step.by_operator[name] for name in ("mv", "addr_"))
    assert step.flops - perturbing == pytest.approx(passes * forward.flops, rel=1e-3)


class Steps:
    """Takes steps of a cost that is given, and knows which of them were counted."""

    def __init__(self):
        self.meter, self.counted, self.spent = FlopMeter(), [], 0

    def take(self, kind, sizes, rows):
        self.counted.append(self.meter.step(kind, sizes, lambda: self.product(rows)))
        self.spent += 2 * rows * 3

    @staticmethod
    def product(rows):
        torch.ones(rows, 3) @ torch.ones(3)
        modes = _get_current_dispatch_mode_stack()
        return any(isinstance(mode, FlopCounter) for mode in modes)


def test_the_meter_counts_equal_steps_once():
    steps = Steps()
    for _ in range(4):
        steps.take("a", (7,), 2)
    steps.take("b", (7,), 1)
    assert steps.counted == [True, False, False, False, True]
    assert steps.meter.flops == steps.spent == 4 * 12 + 6


def test_the_meter_works_out_what_is_linear_after_two_checks():
    steps = Steps()
    for rows, length in [(2, 3), (5, 3), (2, 7), (9, 9), (4, 4)]:
        steps.take("a", (1, rows, length), 4 + 3 * rows + 5 * length)
    assert all(steps.counted)  # three to know, two to check
    for rows, length in [(100, 3), (1, 1), (8, 1000)]:
        steps.take("a", (1, rows, length), 4 + 3 * rows + 5 * length)
    assert steps.counted[5:] == [False] * 3
    steps.take("b", (1, 8, 9), 4)
    assert steps.counted[-1], "a kind of its own"
    assert steps.meter.flops == steps.spent


def test_the_meter_counts_on_where_costs_are_not_linear():
    steps = Steps()
    for rows in (3, 5, 2, 8, 4, 11, 3):
        steps.take("a", (1, rows), rows**2)
    assert steps.counted == [True] * 6 + [False]  # the last is as the first
    assert steps.meter.flops == steps.spent


def test_the_meter_finds_out_late_that_costs_are_not_linear():
    steps = Steps()
    for rows in range(1, 200):
        steps.take("a", (1, rows), max(rows, 30))
    assert steps.counted[:4] == [True] * 4 and not any(steps.counted[4:60])
    assert all(steps.counted[100:])
