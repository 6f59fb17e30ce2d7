"""The Triton passes of the head's cross-entropy against float64, and against what torch makes of
them; torch's own passes are tested in test_chunked_cross_entropy.py."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_good_as, needs_triton, random

from tinyft.kernels.chunked_cross_entropy import (
    chunked_cross_entropy,
    chunked_cross_entropy_ref,
    postpone,
)

pytestmark = needs_triton


def inputs(n, d, v, dtype, bias, scale=1.0):
    generator = torch.Generator().manual_seed(v)
    labels = torch.randint(0, v, (n,), generator=generator).to(DEVICE)
    labels[n // 2] = -100
    tensors = [random(n, d, seed=1, scale=scale), random(v, d, seed=2)]
    if bias:
        tensors.append(random(v, seed=3))
    return [t.to(dtype) for t in tensors], labels


def losses_and_gradients(function, tensors, labels, dtype=None, **options):
    live = [t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    losses = function(*live[:2], labels, bias=live[2] if len(live) > 2 else None, **options)
    row_weights = torch.linspace(0.5, 2.0, len(labels), device=DEVICE).to(losses.dtype)
    return [losses.detach(), *torch.autograd.grad((losses * row_weights).sum(), live)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_bytes"),
    [
        ((64, 2, 2), 1 << 24),
        ((37, 8, 193), 1),
        ((21, 16, 700), 1 << 24),
        ((19, 31, 1300), 19 * 4 * 600),
    ],
)
def test_losses_and_gradients(dtype, softcap, bias, shape, block_bytes):
    """One block and many, blocks wider than a program's columns, and a last block of a few."""
    tensors, labels = inputs(*shape, dtype, bias)

    def run(function, dtype=None, **options):
        return losses_and_gradients(function, tensors, labels, dtype, softcap=softcap, **options)

    exact = run(chunked_cross_entropy_ref, torch.float64)
    in_torch = run(chunked_cross_entropy, block_bytes=block_bytes, impl="torch")
    found = run(chunked_cross_entropy, block_bytes=block_bytes, impl="triton")
    for one, same_dtype, truth in zip(found, in_torch, exact, strict=True):
        assert_as_good_as(one, same_dtype, truth, atol=3e-6)
    assert found[0][len(labels) // 2] == 0 and (found[1][len(labels) // 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_head_and_a_sure_model(dtype):
    tensors, labels = inputs(7, 24, 300, dtype, bias=False, scale=4.0)
    labels[:3] = (tensors[0][:3] @ tensors[1].T).argmax(1)
    hidden, weight = tensors

    def gradient(function, cast, **options):
        leaf = hidden.to(cast).requires_grad_()
        return torch.autograd.grad(function(leaf, weight.to(cast), labels, **options).sum(), leaf)[
            0
        ]

    found = gradient(chunked_cross_entropy, dtype, impl="triton", block_bytes=1)
    in_torch = gradient(chunked_cross_entropy_ref, dtype)
    exact = gradient(chunked_cross_entropy_ref, torch.float64)
    assert_as_good_as(found, in_torch, exact, atol=1e-6)


def test_no_gradient_wanted():
    (hidden, weight), labels = inputs(6, 5, 150, torch.float32, bias=False)
    found = chunked_cross_entropy(hidden, weight, labels, impl="triton", block_bytes=1)
    expected = chunked_cross_entropy(hidden, weight, labels, impl="torch")
    torch.testing.assert_close(found, expected)


def test_a_postponed_head():
    (hidden, weight), labels = inputs(6, 5, 150, torch.float32, bias=False)
    grads = []
    for impl in ("torch", "triton"):
        leaf = weight.clone().requires_grad_()
        head, _, later = postpone(leaf)
        chunked_cross_entropy(hidden, head, labels, later=later, impl=impl).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
