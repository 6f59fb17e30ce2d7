"""Products on CPUs where torch's own are slow.

Of 16-bit numbers, on a CPU that has no instructions for them, and of float32, on an AMD one whose
AVX-512 the library that torch gives them to leaves alone. `install` puts better ways into torch's
own operators, so that every product of the process takes them: a model's, an adapter's, those of a
backward pass.

*Widened, a block at a time.* Without instructions for bfloat16 (AVX-512 BF16 or AMX, so most
laptops and every AVX2 server) torch multiplies bfloat16 by loops that reach 1 to 8 GFLOP/s a core
where float32 reaches 50 or, with the first AVX-512, by an emulation that reaches 18 where float32
reaches 80. Here both operands are widened in blocks, multiplied in float32 and rounded once: as
fast as float32, no less exact, and the weights stay at two bytes.

*Through oneDNN.* float32's products torch gives to MKL, which on AMD's processors uses AVX2: 118 of
the 270 GFLOP/s a core that oneDNN, which torch has too, reaches where AVX-512 is 512 bits wide
(Zen 5). It wants its left operand contiguous and gives a new tensor: what would copy much goes in
blocks, and what is small stays with MKL, which starts sooner.

*Attention's backward pass* is a case of its own. Its products torch leaves to MKL, whose bfloat16
is quick on Intel's processors alone: on an AMD one that has the instructions it takes two to eight
times as long as float32 where rows are short, and as long where they are not.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from tinyft.kernels.dispatch import ran

# Rows of the left operand and columns of the right one and of what they share, at a time: 8 MB of
# float32 in all. An element that is widened serves for a thousand operations.
ROWS, COLUMNS, SHARED = 512, 1024, 1024
# So few rows times a weight as a layer holds it are bound by reading the weight, and torch's loops
# read two bytes an element.
FEW_ROWS = 2
BATCH_ELEMENTS = 1 << 20  # of a batched product's largest operand, at a time
HEAD_ELEMENTS = 1 << 13  # of a head whose row counts as short: 128 tokens of 64 channels
# Multiplications in a float32 product from which on oneDNN makes up for MKL's earlier start.
MANY = 1 << 20

Dtypes = tuple[torch.dtype, ...]
_HALVES = (torch.bfloat16, torch.float16)
_NONE: tuple[Dtypes, Dtypes, Dtypes] = (), (), ()
_library: torch.library.Library | None = None
_installed = _NONE  # of products, of short rows' attention, and of products through oneDNN


def missing() -> Dtypes:
    """The 16-bit dtypes of whose products this CPU has none, or oneDNN only an emulation; measured
    on x86-64 alone, and empty elsewhere."""
    mkldnn = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return ()
    has = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    found = [dtype for dtype, is_supported in has.items() if not is_supported()]
    if torch.bfloat16 not in found and _emulates_bfloat16():
        found.insert(0, torch.bfloat16)
    return tuple(found)


def _emulates_bfloat16() -> bool:
    """Whether oneDNN, which wants AVX-512 for bfloat16, has to do without its instructions for it
    (Skylake, Cascade Lake, Ice Lake, laptops up to Rocket Lake)."""
    names = ("_is_avx512_supported", "_is_avx512_bf16_supported")  # which older versions lack
    has = [getattr(torch.cpu, name, None) for name in names]
    return all(has) and has[0]() and not has[1]()


def slow_in_attention() -> Dtypes:
    """The 16-bit dtypes of which this CPU has products, but MKL, which attention's backward pass
    goes through, has no quick ones; measured on an EPYC with AVX-512 BF16 (`bench/cpu_products.py`
    `--attention`)."""
    return (torch.bfloat16,) if _mkl_is_a_guest() and torch.bfloat16 not in missing() else ()


def slow_in_mkl() -> Dtypes:
    """float32 where oneDNN's products are more than twice as fast as MKL's: on AMD's processors
    whose vectors are of 512 bits, which AVX-VNNI tells from earlier ones. On those oneDNN gained
    less than a tenth of a step (`bench/cpu_products.py --float32`)."""
    has = _capabilities().get("avx512_f") and _capabilities().get("avx_vnni")
    return (torch.float32,) if has and _mkl_is_a_guest() and _has_onednn() else ()


def _mkl_is_a_guest() -> bool:
    """Whether torch multiplies by Intel's library on another maker's processor."""
    is_intel = "Intel" in _capabilities().get("cpu_name", "Intel")
    return not is_intel and torch.backends.mkl.is_available()


def _capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # which older versions lack


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def install(
    dtypes: Dtypes | None = None,
    in_attention: Dtypes | None = None,
    through_onednn: Dtypes | None = None,
) -> bool:
    """From now on, products of these dtypes on the CPU go other ways; returns whether any do.

    Replaces torch's CPU kernels of `mm`, `addmm`, `bmm`, `baddbmm` and of attention's backward
    pass, which are handed all other dtypes. For the whole process, beside what is installed
    already; needs torch 2.9, and does nothing before it.

    Args:
        dtypes: of 16 bits, which are widened; default: those `missing` on this CPU.
        in_attention: of which only attention's backward pass is, where rows are short; default:
            those `slow_in_attention`.
        through_onednn: `(float32,)` or none; default: what is `slow_in_mkl`.
    """
    global _library, _installed
    asked = (
        missing() if dtypes is None else dtypes,
        slow_in_attention() if in_attention is None else in_attention,
        slow_in_mkl() if through_onednn is None else through_onednn,
    )
    products, short, through = wanted = tuple(
        tuple(dtype for dtype in (*_HALVES, torch.float32) if dtype in (*new, *old))
        for new, old in zip(asked, _installed, strict=True)
    )
    if wanted != _installed and hasattr(torch.library, "get_kernel"):
        remove()
        library = torch.library.Library("aten", "IMPL")

        def replace(name: str, make: Callable[..., Any], *its: Any) -> None:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            library.impl(name, make(kernel, *its), "CPU", with_keyset=True)

        with warnings.catch_warnings():  # that kernels are replaced is the purpose
            warnings.simplefilter("ignore")
            for name in _PRODUCTS:
                its = (*products, *(through if "bmm" not in name else ()))
                if its:
                    replace(name, _products, name, its)
            if products or short:
                replace(_ATTENTION, _attention_backward, products, short)
        _library, _installed = library, wanted
        for what, these, how in (
            (_WIDENED, products, "float32, a block at a time (this CPU has none of {})"),
            (_SHORT, short, "float32, where rows are short ({} is slower here)"),
            (_COMPILED, through, "oneDNN (MKL leaves this CPU's AVX-512 alone)"),
        ):
            if these:
                ran[what] = how.format(" and ".join(str(dtype)[6:] for dtype in these))
    return _library is not None


def install_for(model: nn.Module) -> None:
    """`install`, for those dtypes that the model has parameters of on the CPU."""
    used = {p.dtype for p in model.parameters() if p.device.type == "cpu"}
    if used:
        found = missing(), slow_in_attention(), slow_in_mkl()
        install(*(tuple(dtype for dtype in dtypes if dtype in used) for dtypes in found))


def remove() -> None:
    """The inverse of `install`."""
    global _library, _installed
    if _library is not None:
        _library._destroy()
        _library, _installed = None, _NONE
        for what in (_WIDENED, _SHORT, _COMPILED):
            ran.pop(what, None)


def widened(
    a: Tensor, b: Tensor, out: Tensor, into: Tensor | None = None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`out = alpha a b + beta into`, rounded once.

    Args:
        a: (m, k), 16 bits, of any strides.
        b: (k, n), likewise.
        out: (m, n), written; it may be `into`.
        into: broadcasts to (m, n).
    """
    into = into.expand_as(out) if into is not None and beta else None
    for rows in _blocks(len(a), ROWS):
        for columns in _blocks(b.shape[1], COLUMNS):
            y = None if into is None else _wide(into[rows, columns], beta)
            for shared in _blocks(len(b), SHARED):
                left, right = _wide(a[rows, shared], alpha), b[shared, columns].float()
                y = left @ right if y is None else y.addmm_(left, right)
            out[rows, columns] = 0 if y is None else y  # nothing to sum over
    return out


def _wide(x: Tensor, scale: float) -> Tensor:
    """`scale x` in float32."""
    x = x.float()
    return x if scale == 1 else x.mul_(scale)


def _blocks(size: int, largest: int) -> Iterator[slice]:
    """Slices of about one size that cover `range(size)`."""
    length = ceil(size / max(1, ceil(size / largest)))
    return (slice(start, start + length) for start in range(0, size, max(1, length)))


def widened_batch(
    a: Tensor, b: Tensor, out: Tensor, into: Tensor | None = None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`widened` of each pair of matrices in a batch (the first dimension)."""
    into = into.expand_as(out) if into is not None and beta else None
    largest = max(t[:1].numel() for t in (a, b, out))
    if largest > BATCH_ELEMENTS:
        for i in range(len(out)):
            widened(a[i], b[i], out[i], None if into is None else into[i], beta, alpha)
        return out
    for batch in _blocks(len(a), max(1, BATCH_ELEMENTS // max(1, largest))):
        left, right = _wide(a[batch], alpha), b[batch].float()
        if into is None:
            out[batch] = left @ right
        else:
            out[batch] = _wide(into[batch], beta).baddbmm_(left, right)
    return out


def compiled(
    a: Tensor, b: Tensor, out: Tensor | None, into: Tensor | None, beta: float = 1, alpha: float = 1
) -> Tensor:
    """`alpha a b + beta into` of float32 by oneDNN, which compiles one program for each shape.

    Args: as of `widened`; without `out` into a new tensor.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    into = into if beta else None
    is_bias = into is None or (beta == 1 and into.shape == (b.shape[1],))
    if out is None and is_bias and alpha == 1 and a.is_contiguous():
        return linear(a, b.t(), into, "none", [], "")
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    into = None if into is None else into.expand_as(out)
    # Of a right operand whose rows lie together oneDNN takes no columns alone, and what it adds to
    # it copies unless it is dense.
    by_columns = into is None and b.t().is_contiguous()
    for columns in _blocks(b.shape[1], COLUMNS if by_columns else b.shape[1]):
        right = b[:, columns].t()
        for rows in _blocks(len(a), max(32, ROWS * COLUMNS // max(COLUMNS, len(right)))):
            left = a[rows] if alpha == 1 else a[rows] * alpha
            if into is None:
                out[rows, columns] = linear(left, right, None, "none", [], "")
            else:
                add = into[rows, columns] if beta == 1 else into[rows, columns] * beta
                out[rows, columns] = linear.binary(left, add, right, None, "add")
    return out


# What takes the place of torch's kernels: each gets the one it replaces, and hands it what it does
# not take, wrong arguments among them.


def _products(kernel: Callable[..., Any], name: str, dtypes: Dtypes) -> Callable[..., Tensor]:
    """For `mm(a, b)`, `addmm(into, a, b)` and `bmm` and `baddbmm`, with `out` and in place."""
    dims, in_place = (3 if "bmm" in name else 2), name.endswith("_")
    widen = widened_batch if dims == 3 else widened

    def run(keys: Any, *args: Any, out: Tensor | None = None, **scales: Any) -> Tensor:
        more = {} if out is None else {"out": out}
        into, a, b = args if len(args) == 3 else (None, *args)
        if b.dtype not in dtypes:
            return kernel(keys, *args, **scales, **more)
        shape = (*a.shape[:-1], b.shape[-1])
        fits = a.dim() == b.dim() == dims and a.shape[:-2] == b.shape[:-2]
        fits = fits and a.shape[-1] == b.shape[-2] and not (in_place and into.shape != shape)
        if not fits or _is_torchs(a, b) or not _is_one_of(dtypes, into, a, b, out):
            return kernel(keys, *args, **scales, **more)
        if in_place:
            out = into
        elif out is not None and out.shape != shape:
            out.resize_(shape)
        if b.dtype == torch.float32:
            return compiled(a, b, out, into, **scales)
        return widen(a, b, a.new_empty(shape) if out is None else out, into, **scales)

    return run


def _is_torchs(a: Tensor, b: Tensor) -> bool:
    """Whether torch's own kernel is the quicker one for two matrices that fit each other."""
    if a.dim() == 3:
        return False
    if b.dtype == torch.float32:
        few = min(len(a), b.shape[1]) <= FEW_ROWS or a.numel() * b.shape[1] < MANY
        # oneDNN copies a left operand, and has only its reference's loop for such a right one.
        copied_for_little = not a.is_contiguous() and min(b.shape) < 32
        is_dense = b.is_contiguous() or b.t().is_contiguous()
        return few or copied_for_little or not is_dense
    return len(a) <= FEW_ROWS and b.stride(0) == 1


def _attention_backward(
    kernel: Callable[..., Any], dtypes: Dtypes, short: Dtypes
) -> Callable[..., tuple[Tensor, ...]]:
    """A few examples at a time, each tensor widened; of dtypes `short` those of short rows."""

    def run(
        keys: Any, grad: Tensor, *tensors: Tensor, attn_mask: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, ...]:
        *qkvo, logsumexp, dropout, is_causal = tensors
        is_short = all(t.shape[2] * t.shape[3] <= HEAD_ELEMENTS for t in qkvo)
        if not _is_one_of((*dtypes, *short) if is_short else dtypes, grad, *qkvo):
            return kernel(keys, grad, *tensors, attn_mask=attn_mask, **more)
        grads = tuple(torch.empty_like(t) for t in qkvo[:3])
        largest = max(t[:1].numel() for t in qkvo)
        n = BATCH_ELEMENTS // 4 // max(1, largest)  # eight tensors, of which each is widened
        for batch in _blocks(len(grad), max(1, n)):
            mask = attn_mask
            if mask is not None:
                mask = mask[batch] if mask.dim() == 4 and len(mask) > 1 else mask
                mask = mask.float() if mask.dtype in dtypes else mask
            wide = [t[batch].float() for t in (grad, *qkvo)]
            rest = (logsumexp[batch], dropout, is_causal)
            found = kernel(keys, *wide, *rest, attn_mask=mask, **more)
            for made, part in zip(grads, found, strict=True):
                made[batch] = part
        return grads

    return run


def _is_one_of(dtypes: Dtypes, *tensors: Tensor | None) -> bool:
    """Whether all are of one of the dtypes, and the same."""
    found = {t.dtype for t in tensors if t is not None}
    return len(found) == 1 and found <= set(dtypes)


_WIDENED, _SHORT, _COMPILED = "products", "attention's backward pass", "float32 products"
_PRODUCTS = (
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_"),
    *("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_"),
)
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu_backward"
