"""Products by other ways than torch's, against float64 and torch's own kernels."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from tinyft.cost import FlopCounter
from tinyft.heap import Shelf, Shelved
from tinyft.kernels import cpu_products, dispatch

HALVES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(
    not hasattr(torch.library, "get_kernel"), reason="torch before 2.9 has no get_kernel"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Installed for both dtypes, with blocks that tests' matrices exceed."""
    for name, size in (("ROWS", 5), ("COLUMNS", 7), ("SHARED", 11), ("BATCH_ELEMENTS", 64)):
        monkeypatch.setattr(cpu_products, name, size)
    cpu_products.remove()
    for name in ("slow_in_attention", "slow_in_mkl"):
        monkeypatch.setattr(cpu_products, name, lambda: ())
    assert cpu_products.install(tuple(HALVES))
    torch.manual_seed(0)  # whatever tests came before
    yield
    cpu_products.remove()


def random(*shape, dtype=torch.float32, transposed=False):
    x = torch.randn(*shape[:-2], *reversed(shape[-2:])).mT if transposed else torch.randn(*shape)
    return x.to(dtype)


def check(got, exact, dtype):
    """Rounded once, beside float32's own error."""
    assert got.dtype == dtype and got.shape == exact.shape
    largest = exact.abs().max() if exact.numel() else 0
    bound = torch.finfo(dtype).eps * exact.abs() + 1e-5 * largest
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("m, k, n", [(3, 4, 5), (13, 31, 17), (1, 12, 9), (5, 7, 1), (4, 0, 3)])
def test_products_are_rounded_once(m, k, n, transposed, dtype):
    a = random(m, k, dtype=dtype, transposed=transposed[0])
    b = random(k, n, dtype=dtype, transposed=transposed[1])
    into, bias = random(m, n, dtype=dtype), random(n, dtype=dtype)
    exact = a.double() @ b.double()
    check(a @ b, exact, dtype)
    check(torch.addmm(bias, a, b), exact + bias.double(), dtype)
    wanted = 0.5 * into.double() - 2 * exact
    check(torch.addmm(into, a, b, beta=0.5, alpha=-2), wanted, dtype)
    out = torch.empty(0, dtype=dtype)
    assert torch.mm(a, b, out=out) is out
    check(out, exact, dtype)
    check(torch.addmm(into, a, b, beta=0.5, alpha=-2, out=out), wanted, dtype)
    check(into.clone().addmm_(a, b, beta=0.5, alpha=-2), wanted, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("limit", [1 << 20, 64, 1])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_batches_of_products(batch, limit, dtype, monkeypatch):
    monkeypatch.setattr(cpu_products, "BATCH_ELEMENTS", limit)
    a, b = random(batch, 5, 6, dtype=dtype), random(batch, 6, 7, dtype=dtype, transposed=True)
    into = random(batch, 5, 7, dtype=dtype)
    exact = a.double() @ b.double()
    check(torch.bmm(a, b), exact, dtype)
    check(torch.bmm(a, b, out=torch.empty(0, dtype=dtype)), exact, dtype)
    wanted = into.double() * 3 + exact
    check(torch.baddbmm(into, a, b, beta=3), wanted, dtype)
    check(into.clone().baddbmm_(a, b, beta=3), wanted, dtype)


@pytest.fixture
def through_onednn(monkeypatch):
    """float32's products, small ones too, in blocks that tests' matrices exceed."""
    monkeypatch.setattr(cpu_products, "MANY", 1)
    cpu_products.remove()
    assert cpu_products.install((), (), (torch.float32,))


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("m, k, n", [(3, 4, 5), (70, 33, 40), (1, 12, 9), (4, 0, 3), (0, 4, 3)])
def test_float32_through_onednn(m, k, n, transposed, through_onednn):
    a, b = random(m, k, transposed=transposed[0]), random(k, n, transposed=transposed[1])
    into, bias = random(m, n), random(n)
    exact = a.double() @ b.double()
    check(a @ b, exact, torch.float32)
    check(torch.addmm(bias, a, b), exact + bias.double(), torch.float32)
    check(torch.addmm(into, a, b), exact + into.double(), torch.float32)
    wanted = 0.5 * into.double() - 2 * exact
    check(torch.addmm(into, a, b, beta=0.5, alpha=-2), wanted, torch.float32)
    out = torch.empty(0)
    assert torch.mm(a, b, out=out) is out
    check(out, exact, torch.float32)
    wider = torch.zeros(m, n + 3)
    torch.addmm(into, a, b, out=wider[:, :n])
    check(wider[:, :n], exact + into.double(), torch.float32)
    assert not wider[:, n:].any()
    check(into.clone().addmm_(a, b, beta=0.5, alpha=-2), wanted, torch.float32)
    check(torch.addmm(into * float("nan"), a, b, beta=0), exact, torch.float32)


def test_float32_of_any_strides_and_of_weights_that_learn(through_onednn):
    a, b = random(40, 100)[:, 20:60], random(80, 100)[::2, ::2]
    check(a @ b, a.double() @ b.double(), torch.float32)
    check(a @ b.t()[:40], a.double() @ b.t()[:40].double(), torch.float32)
    tensors = random(2, 39, 42), random(48, 42), random(48)
    exact = [t.double().requires_grad_() for t in tensors]
    x, w, bias = (t.requires_grad_() for t in tensors)
    grad = random(2, 39, 48)
    got = torch.autograd.grad(linear(x, w, bias), (x, w, bias), grad)
    wanted = torch.autograd.grad(linear(*exact), exact, grad.double())
    for mine, right in zip(got, wanted, strict=True):
        check(mine, right, torch.float32)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        random(3, 4) @ random(5, 6)


def test_float32_says_so_and_leaves_small_products_alone(through_onednn, monkeypatch):
    assert "oneDNN" in dispatch.ran["float32 products"] and "products" not in dispatch.ran
    monkeypatch.undo()
    a, b, c = random(4, 30), random(30, 40), random(300, 300)
    got = a @ b, c[:2] @ c, c @ c
    cpu_products.remove()
    assert "float32 products" not in dispatch.ran
    assert torch.equal(got[0], a @ b) and torch.equal(got[1], c[:2] @ c)
    check(got[2], c.double() @ c.double(), torch.float32)


@pytest.mark.parametrize(
    "name, more, found",
    [
        ("AMD EPYC", {"avx512_f": True, "avx_vnni": True}, True),
        ("AMD EPYC", {"avx512_f": True}, False),
        ("AMD Ryzen", {}, False),
        ("Intel(R) Xeon(R)", {"avx512_f": True, "avx_vnni": True}, False),
    ],
    ids=["Zen 5", "Zen 4", "Zen 3", "Sapphire Rapids"],
)
def test_whose_float32_is_slow(name, more, found, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": name, **more}, raising=False
    )
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert (torch.float32 in cpu_products.slow_in_mkl()) == found


def test_infinite_and_nan_come_through():
    a = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    got = a @ torch.ones(2, 4, dtype=torch.bfloat16)
    assert got[0].isinf().all() and got[1].isnan().all() and (got[2] == 2).all()
    # beta 0 ignores what is there, as torch's own does
    into = torch.full((3, 4), float("nan"), dtype=torch.bfloat16)
    assert (torch.addmm(into, a, torch.ones(2, 4, dtype=a.dtype), beta=0)[2] == 2).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_linear_layer_learns_as_in_float64(dtype):
    x, w, bias = random(2, 9, 12), random(8, 12), random(8)
    x, w, bias = (t.to(dtype).requires_grad_() for t in (x, w, bias))
    exact = [t.detach().double().requires_grad_() for t in (x, w, bias)]
    grad = random(2, 9, 8, dtype=dtype)
    got = torch.autograd.grad(linear(x, w, bias), (x, w, bias), grad)
    wanted = torch.autograd.grad(linear(*exact), exact, grad.double())
    for a, b in zip(got[:2], wanted[:2], strict=True):
        check(a, b, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "same for all"])
def test_backward_of_attention(mask, dtype):
    q, k, v = (random(3, 2, 9, 8, dtype=dtype).requires_grad_() for _ in range(3))
    more = {"is_causal": mask == "causal"}
    if mask in ("padding", "same for all"):
        keep = torch.ones(3 if mask == "padding" else 1, 1, 9, 9, dtype=torch.bool).tril()
        keep[0, ..., 4] = False
        keep[..., 0] = True
        more["attn_mask"] = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -1e4)
    grad = random(3, 2, 9, 8, dtype=dtype)
    got = torch.autograd.grad(scaled_dot_product_attention(q, k, v, **more), (q, k, v), grad)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    if "attn_mask" in more:
        more["attn_mask"] = more["attn_mask"].double()
    wanted = torch.autograd.grad(scaled_dot_product_attention(*exact, **more), exact, grad.double())
    cpu_products.remove()
    native = torch.autograd.grad(
        scaled_dot_product_attention(q, k, v, **{**more, **_in(more, dtype)}), (q, k, v), grad
    )
    for mine, torchs, right in zip(got, native, wanted, strict=True):
        assert mine.dtype == dtype
        # In the mean: which rounding is the worst of all is chance (1 draw in 100 has 1.4 of it).
        assert (mine.double() - right).norm() <= 1.25 * (torchs.double() - right).norm() + 1e-6


def _in(more, dtype):
    return {"attn_mask": more["attn_mask"].to(dtype)} if "attn_mask" in more else {}


def test_other_dtypes_are_torchs():
    a, b, into = random(20, 30), random(30, 40), random(20, 40)
    got = (a @ b, torch.addmm(into, a, b), torch.bmm(a[None], b[None]))
    cpu_products.remove()
    wanted = (a @ b, torch.addmm(into, a, b), torch.bmm(a[None], b[None]))
    assert all(map(torch.equal, got, wanted))
    assert "products" not in dispatch.ran


@pytest.mark.parametrize("dtype", HALVES)
def test_wrong_arguments_get_torchs_error(dtype):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        random(3, 4, dtype=dtype) @ random(5, 6, dtype=dtype)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(random(3, 4, dtype=dtype), random(4, 6))
    with pytest.raises(RuntimeError):
        random(2, 2, dtype=dtype).addmm_(random(3, 4, dtype=dtype), random(4, 6, dtype=dtype))


def test_counters_and_the_heap_see_one_product():
    x, w = random(300, 200, dtype=torch.bfloat16), random(400, 200, dtype=torch.bfloat16)
    with FlopCounter() as counter, Shelved(Shelf()):
        y = linear(x, w)
    check(y, x.double() @ w.double().t(), torch.bfloat16)
    assert counter.flops == 2 * 300 * 200 * 400


def test_says_so_and_is_done_once():
    assert "bfloat16 and float16" in dispatch.ran["products"]
    before = cpu_products._library
    assert cpu_products.install() and cpu_products._library is before


def test_only_models_of_16_bits_ask_for_it(monkeypatch):
    cpu_products.remove()
    monkeypatch.setattr(cpu_products, "missing", lambda: tuple(HALVES))
    cpu_products.install_for(torch.nn.Linear(2, 2))
    assert cpu_products._library is None
    cpu_products.install_for(torch.nn.Linear(2, 2).bfloat16())
    assert dispatch.ran["products"].endswith("none of bfloat16)")
    cpu_products.install_for(torch.nn.Linear(2, 2).half())
    assert dispatch.ran["products"].endswith("none of bfloat16 and float16)")
    cpu_products.remove()
    monkeypatch.setattr(cpu_products, "missing", lambda: (torch.float16,))
    cpu_products.install_for(torch.nn.Linear(2, 2).bfloat16())  # which this CPU multiplies
    assert cpu_products._library is None


def test_attention_alone_where_rows_are_short(monkeypatch):
    """Beside torch's own products of the same dtype, and its attention of longer rows."""
    cpu_products.remove()
    monkeypatch.setattr(cpu_products, "missing", lambda: ())
    monkeypatch.setattr(cpu_products, "slow_in_attention", lambda: (torch.bfloat16,))
    monkeypatch.setattr(cpu_products, "HEAD_ELEMENTS", 9 * 8)
    a, b = random(13, 31, dtype=torch.bfloat16), random(31, 17, dtype=torch.bfloat16)

    def gradients(length, dtype):
        torch.manual_seed(length)
        q, k, v = (random(3, 2, length, 8, dtype=dtype).requires_grad_() for _ in range(3))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y.square().sum(), (q, k, v))

    native = a @ b, gradients(9, torch.bfloat16), gradients(10, torch.bfloat16)
    cpu_products.install_for(torch.nn.Linear(2, 2))
    assert cpu_products._library is None
    cpu_products.install_for(torch.nn.Linear(2, 2).bfloat16())
    assert "products" not in dispatch.ran and "attention's backward pass" in dispatch.ran
    assert torch.equal(a @ b, native[0])
    assert all(map(torch.equal, gradients(10, torch.bfloat16), native[2]))
    short, exact = gradients(9, torch.bfloat16), gradients(9, torch.float64)
    assert not all(map(torch.equal, short, native[1]))
    for mine, torchs, right in zip(short, native[1], exact, strict=True):
        right = right.double()
        assert (mine.double() - right).norm() <= 1.1 * (torchs.double() - right).norm()


@pytest.mark.parametrize(
    "name, has_mkl, found",
    [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel(R) Xeon(R)", True, False)],
)
def test_whose_attention_is_slow(name, has_mkl, found, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(cpu_products, "missing", lambda: ())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert (torch.bfloat16 in cpu_products.slow_in_attention()) == found


@pytest.mark.parametrize(
    "avx512, instructions, found",
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["Skylake", "Cooper Lake", "AVX2 with its own"],
)
def test_what_is_only_emulated_is_missing(avx512, instructions, found, monkeypatch):
    """oneDNN says that it supports bfloat16 on all of these."""
    monkeypatch.setattr(cpu_products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    assert (torch.bfloat16 in cpu_products.missing()) == found
