"""The head's cross-entropy against autograd and float64, at odd shapes."""

import pytest
import torch

from tinyft.kernels.chunked_cross_entropy import (
    TiedLookup,
    chunked_cross_entropy,
    chunked_cross_entropy_ref,
    postpone,
    using_rows,
)

SHAPES = [(1, 1, 2), (7, 5, 11), (13, 8, 193), (64, 24, 257), (3, 16, 1000)]  # (N, D, V)


def make(n, d, v, dtype=torch.float64, bias=False, scale=1.0):
    gen = torch.Generator().manual_seed(n * 1009 + v)
    hidden = torch.randn(n, d, generator=gen, dtype=torch.float64) * scale
    weight = torch.randn(v, d, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, v, (n,), generator=gen)
    labels[n // 2] = -100 if n > 1 else labels[n // 2]
    offset = torch.randn(v, generator=gen, dtype=torch.float64) if bias else None
    return (
        hidden.to(dtype),
        weight.to(dtype),
        labels,
        offset.to(dtype) if bias else None,
    )


def gradients(fn, tensors, weights):
    live = [t.detach().clone().requires_grad_() for t in tensors]
    losses = fn(*live)
    (losses * weights).sum().backward()
    return [losses.detach(), *(t.grad for t in live)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 1 << 24])
def test_losses_and_gradients_equal_autograd(shape, softcap, bias, block_bytes):
    hidden, weight, labels, offset = make(*shape, bias=bias)
    row_weights = torch.linspace(0.5, 2.0, shape[0], dtype=torch.float64)
    tensors = [hidden, weight] + ([offset] if bias else [])

    def ours(h, w, b=None):
        return chunked_cross_entropy(h, w, labels, bias=b, softcap=softcap, block_bytes=block_bytes)

    def reference(h, w, b=None):
        return chunked_cross_entropy_ref(h, w, labels, bias=b, softcap=softcap)

    got, want = gradients(ours, tensors, row_weights), gradients(reference, tensors, row_weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    # A frozen head takes the other path: gradient made in the forward pass.
    frozen = gradients(lambda h: ours(h, weight, offset), [hidden], row_weights)
    torch.testing.assert_close(frozen[1], want[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    hidden, weight, labels, offset = make(5, 3, 70, bias=True)
    live = [t.requires_grad_() for t in (hidden, weight, offset)]

    def everything(h, w, b):
        return chunked_cross_entropy(h, w, labels, bias=b, softcap=softcap, block_bytes=1)

    assert torch.autograd.gradcheck(everything, live)
    assert torch.autograd.gradcheck(
        lambda h: everything(h, weight.detach(), offset.detach()), [hidden]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale", [0.3, 3.0])  # unsure and sure models
def test_error_within_twice_torchs_own(dtype, frozen, scale):
    hidden, weight, labels, _ = make(61, 32, 1031, dtype, scale=scale)
    tensors = [hidden] if frozen else [hidden, weight]
    row_weights = torch.full((61,), 1 / 61)

    def run(fn, cast):
        head = weight.to(cast)
        body = (lambda h: fn(h, head, labels)) if frozen else (lambda h, w: fn(h, w, labels))
        return gradients(body, [t.to(cast) for t in tensors], row_weights.to(cast))

    def blocks(h, w, y):
        return chunked_cross_entropy(h, w, y, block_bytes=1 << 16)

    exact = run(chunked_cross_entropy_ref, torch.float64)
    for ours, torchs, true in zip(
        run(blocks, dtype), run(chunked_cross_entropy_ref, dtype), exact, strict=True
    ):
        error = (ours.double() - true).norm()
        assert error <= 2 * (torchs.double() - true).norm() + 1e-7 * true.norm()


def test_sure_predictions_keep_their_gradient():
    # p_y is within a float32 rounding of 1: computed as `p_y - 1` the gradient would be 0.
    hidden = torch.tensor([[18.0, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labels = torch.tensor([0])
    (_, got) = gradients(
        lambda h: chunked_cross_entropy(h, weight, labels), [hidden], torch.ones(1)
    )
    (_, want) = gradients(
        lambda h: chunked_cross_entropy_ref(h, weight.double(), labels),
        [hidden.double()],
        torch.ones(1),
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_postponed_gradients_are_the_same_and_come_last(bias):
    hidden, weight, labels, offset = make(7, 5, 193, bias=bias)
    order = []

    def run(postponed):
        live = [t.clone().requires_grad_() for t in (weight, hidden, *([offset] if bias else []))]
        w, h, b = live if bias else (*live, None)
        w.register_hook(lambda grad: order.append("head"))
        h.register_hook(lambda grad: order.append("body"))
        head, later = (w, b), None
        if postponed:
            *head, later = postpone(w, b)
        # The head is used twice, and by something else too: a tied embedding.
        body = h.sin() + w[:7]
        losses = chunked_cross_entropy(body, head[0], labels, bias=head[1], later=later)
        again = chunked_cross_entropy(body.cos(), head[0], labels, bias=head[1], later=later)
        (losses.sum() + 2 * again.sum()).backward()
        return [t.grad for t in live]

    want = run(False)
    order.clear()
    for ours, theirs in zip(run(True), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert order == ["body", "head"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("by_rows", [False, True])
def test_lookups_of_a_tied_embedding(bias, padding_idx, by_rows):
    """Against torch's embedding and whole logits; used a block of rows at a time, or whole."""
    _, weight, labels, offset = make(9, 5, 193, bias=bias)
    tokens = torch.tensor([[3, 0, 192], [64, 63, 3], [64, 64, 128]])  # at the ends of blocks

    def leaves():
        return [t.clone().requires_grad_() for t in (weight, *([offset] if bias else []))]

    want, ours = leaves(), leaves()
    hidden = torch.nn.functional.embedding(tokens, want[0], padding_idx).flatten(0, 1).sin()
    losses = chunked_cross_entropy_ref(hidden, want[0], labels, bias=want[1] if bias else None)
    losses.sum().backward()

    head, head_bias, later = postpone(ours[0], ours[1] if bias else None)
    hidden = TiedLookup.apply(tokens, ours[0], padding_idx, later).flatten(0, 1).sin()
    losses = chunked_cross_entropy(hidden, head, labels, bias=head_bias, later=later, block_bytes=1)
    used = []
    users = {ours[0]: lambda row, grad: used.append((row, grad.clone()))} if by_rows else {}
    with using_rows(users):
        losses.sum().backward()
    got = ours[0].grad
    if by_rows:
        assert got is None and [row for row, _ in used] == [0, 64, 128, 192]
        got = torch.cat([grad for _, grad in used])
    torch.testing.assert_close(got, want[0].grad, rtol=1e-12, atol=1e-14)
    if bias:
        torch.testing.assert_close(ours[1].grad, want[1].grad, rtol=1e-12, atol=1e-14)


def test_a_lookup_that_no_head_waits_for():
    weight = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    tokens = torch.tensor([4, 0, 4])
    _, _, later = postpone(weight)
    TiedLookup.apply(tokens, weight, None, later).sum().backward()
    assert weight.grad.sum(1).tolist() == [3, 0, 0, 0, 6]


def test_nothing_labelled():
    hidden, weight, _, _ = make(4, 3, 9)
    hidden.requires_grad_()
    losses = chunked_cross_entropy(hidden, weight, torch.full((4,), -100))
    losses.sum().backward()
    assert not losses.any() and not hidden.grad.any()
    assert chunked_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.long)).shape == (0,)
