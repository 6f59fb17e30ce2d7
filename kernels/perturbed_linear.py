"""A linear layer at W + s Z for the two signs of a probe, and the update W -= c Z, Z never stored.

Z is one matrix of a random direction (Malladi et al. 2023, arXiv:2305.17333), drawn from the
counter-based generator of `philox` wherever it is needed:

* `rademacher`, `gaussian`: entries of their own; W + s Z is formed and rounded to the type of x, as
  if the weights had been perturbed in place.
* `sign-rank1`: Z = u v' with random signs; y = x W' + s (x v) u'.
* `hadamard`: Z = diag(u) H diag(v), H Sylvester's Hadamard matrix; y = x W' + s (x Z'), where x Z'
  is a fast transform in torch and a product with a matrix of signs in Triton.

W may be packed to 8 or 4 bits: it is dequantised where it is read. The Triton kernels read W once
for both signs and draw Z in registers. Forward only: zeroth order wants no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tinyft.kernels import philox
from tinyft.kernels.dispatch import choose
from tinyft.kernels.hadamard import hadamard_product, hadamard_rows
from tinyft.kernels.int4_linear import product_into
from tinyft.kernels.packed import Weight, rows_of, tensors_of

STRUCTURED = ("sign-rank1", "hadamard")  # signs u, v for each side
KINDS = ("rademacher", "gaussian", *STRUCTURED)
# Dense directions form W + s Z this many elements at a time in the reference.
SCRATCH_ELEMENTS = 1 << 20
DITHER_SIZE = 1 << 16


@dataclass(frozen=True)
class Direction:
    """Names one random matrix: the tensor's index, the step and the probe of a seeded run."""

    kind: str
    seed: int
    tensor: int
    step: int
    probe: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"A direction's kind is one of {', '.join(KINDS)}; found {self.kind}.")

    def stream(self, role: int) -> int:
        return self.probe << 3 | role

    def rows(self, start: int, stop: int, cols: int, device: torch.device | str = "cpu") -> Tensor:
        """`Z[start:stop]`, `(stop - start, cols)` float32, in torch."""
        if self.kind in STRUCTURED:
            left, right = self.signs(stop, cols, device)
            z = torch.outer(left[start:], right)
            if self.kind == "hadamard":
                z *= hadamard_rows(torch.arange(start, stop, device=device), cols)
            return z
        kind = "gaussians" if self.kind == "gaussian" else "signs"
        index = torch.arange(start, stop, device=device)
        return philox.matrix_ref(kind, index, cols, **self._counter(philox.DENSE))

    def signs(
        self, rows: int, cols: int, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """u `(rows,)` and v `(cols,)` of the structured kinds, float32, in torch."""
        row = torch.zeros(1, dtype=torch.int64, device=device)
        counters = [
            philox.matrix_counters(
                row, -(-n // philox.SIGNS_PER_BLOCK), self.tensor, self.step, self.stream(role)
            )
            for n, role in ((rows, philox.LEFT), (cols, philox.RIGHT))
        ]  # drawn together: a call of the generator costs more than so few signs
        signs = philox.signs(philox.philox_ref(torch.cat(counters, 1), self.seed)).flatten()
        right = counters[0].shape[1] * philox.SIGNS_PER_BLOCK
        return signs[:rows], signs[right : right + cols]

    def _counter(self, role: int) -> dict[str, int]:
        return {
            "seed": self.seed,
            "tensor": self.tensor,
            "step": self.step,
            "stream": self.stream(role),
        }


Terms = Sequence[tuple[Direction, float]]


def perturbed_linear_ref(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], *, bias: Tensor | None = None
) -> Tensor:
    """`perturbed_linear` in plain torch."""
    rows = x.reshape(-1, x.shape[-1])
    run = _structured if z.kind in STRUCTURED else _formed
    return run(rows, weight, z, scales, bias).view(*x.shape[:-1], weight.shape[0])


def _blocks(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight, and their numbers, a block at a time."""
    out, cols = weight.shape
    step = max(1, SCRATCH_ELEMENTS // cols)
    for start in range(0, out, step):
        block = slice(start, min(start + step, out))
        yield block, rows_of(weight, block, dtype)


def _formed(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], bias: Tensor | None
) -> Tensor:
    """`x (W + s Z)' + b` for x `(N, in)`, W + s Z formed a block at a time."""
    cols, y = weight.shape[1], x.new_empty(x.shape[0], weight.shape[0])
    parts = list(zip(x.chunk(len(scales)), y.chunk(len(scales)), scales, strict=True))
    for block, w in _blocks(weight, x.dtype):
        z_block = z.rows(block.start, block.stop, cols, x.device).to(w.dtype)
        moved = torch.empty_like(w)
        for part, y_part, s in parts:
            torch.add(w, z_block, alpha=s, out=moved)
            product_into(y_part[:, block], part, moved, None if bias is None else bias[block])
    return y


def _structured(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], bias: Tensor | None
) -> Tensor:
    """`x W' + s x Z' + b` for x `(N, in)`, Z from u and v."""
    (out, cols), copies = weight.shape, len(scales)
    u, v = (signs.to(x.dtype) for signs in z.signs(out, cols, x.device))
    inner = None
    if z.kind == "sign-rank1":
        inner = x @ v.unsqueeze(1)
        for part, s in zip(inner.chunk(copies), scales, strict=True):
            part.mul_(s)
    if inner is not None and x.dtype.itemsize == 2:
        # One column more: y is rounded once, and a pass over it costs more than a copy of W.
        y, wider = x.new_empty(x.shape[0], out), torch.cat((x, inner), 1)
        for block, w in _blocks(weight, x.dtype):
            w = torch.cat((w, u[block].unsqueeze(1)), 1)
            product_into(y[:, block], wider, w, None if bias is None else bias[block])
        return y
    if isinstance(weight, Tensor):
        y = linear(x, weight, bias)
    else:
        y = x.new_empty(x.shape[0], out)
        for block, w in _blocks(weight, x.dtype):
            product_into(y[:, block], x, w, None if bias is None else bias[block])
    if inner is not None:
        return y.addr_(inner.squeeze(1), u)
    change = hadamard_product(x * v, out)
    for part, y_part, s in zip(change.chunk(copies), y.chunk(copies), scales, strict=True):
        y_part.addcmul_(part, u, value=s)
    return y


def perturbed_linear_triton(
    x: Tensor, weight: Weight, z: Direction, scales: Sequence[float], *, bias: Tensor | None = None
) -> Tensor:
    """`perturbed_linear` as one Triton kernel."""
    from tinyft.kernels.gpu import perturbed_linear as gpu

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    run = gpu.structured if z.kind in STRUCTURED else gpu.dense
    return run(rows, weight, z, scales, bias).view(*x.shape[:-1], weight.shape[0])


def perturbed_linear(
    x: Tensor,
    weight: Weight,
    z: Direction,
    scales: Sequence[float],
    *,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`x (W + s Z)' + b`, each part of the batch with its own s.

    Args:
        x: `(copies * B, ..., in)`, copies-major; part g sees `W + scales[g] Z`.
        weight: `(out, in)`, dtype of x, or packed (`pack_int8`, `pack_int4`).
        z: the direction of this weight.
        scales: one or two numbers, `(eps, -eps)` for a two-sided probe.
        bias: `(out,)` or None.
        impl: see `dispatch`.

    Returns:
        `(copies * B, ..., out)`, dtype of x.
    """
    if len(scales) not in (1, 2) or x.shape[0] % len(scales):
        raise ValueError(
            f"perturbed_linear takes one or two scales that divide the batch; "
            f"found {len(scales)} scales and x of shape {tuple(x.shape)}."
        )
    chosen = choose("perturbed_linear", impl, x, *tensors_of(weight), bias, forward_only=True)
    run = perturbed_linear_triton if chosen == "triton" else perturbed_linear_ref
    return run(x, weight, z, scales, bias=bias)


def subtract_directions_ref_(
    w: Tensor,
    terms: Terms,
    *,
    decay: float = 0.0,
    start: int = 0,
    dither: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """`subtract_directions_` in plain torch."""
    wide = w.float() if w.dtype.itemsize == 2 else w
    if decay:
        wide.mul_(1.0 - decay)
    for z, c in terms:
        wide.sub_(z.rows(start, start + w.shape[0], w.shape[1], w.device), alpha=c)
    if wide is w:
        return w
    if dither is None:
        return w.copy_(wide)
    index = (torch.arange(w.numel(), device=w.device) + offset) % DITHER_SIZE
    lost = 0xFFFF if w.dtype == torch.bfloat16 else 0x1FFF
    bits = wide.view(torch.int32)
    bits.add_((dither[index] & lost).view(w.shape)).bitwise_and_(~lost)
    return w.copy_(wide)


def subtract_directions_triton_(
    w: Tensor,
    terms: Terms,
    *,
    decay: float = 0.0,
    start: int = 0,
    dither: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """`subtract_directions_` as one Triton kernel."""
    from tinyft.kernels.gpu import perturbed_linear as gpu

    return gpu.subtract_(w, terms, 1.0 - decay, start, dither, offset)


def subtract_directions_(
    w: Tensor,
    terms: Terms,
    *,
    decay: float = 0.0,
    start: int = 0,
    dither: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """`w = (1 - decay) w - sum_k c_k Z_k[start : start + len(w)]` in place.

    float32 weights round each term once, in their order, so that with random signs every
    implementation gives the same bits. 16-bit weights are updated in float32 and then rounded: to
    nearest, or stochastically by adding random bits below the last kept one (a float's bits order
    as integers) and truncating. float16 numbers below 2^-14 round to nearest.

    Args:
        w: `(n, cols)`, contiguous: a block of rows of the weight.
        terms: (Z, c): directions of this weight, of one kind and seed, and learning rate times
            projected gradient.
        decay: decoupled weight decay, lr * wd.
        start: the block's first row in the weight.
        dither: `(>= 65536,)` int32, uniform 16-bit numbers, taken in turn by the elements of the
            block; None rounds to nearest. Ignored for float32.
        offset: where in `dither` the block's first element starts.
        impl: see `dispatch`.

    Returns:
        `w`.
    """
    assert w.dim() == 2 and w.is_contiguous()
    with torch.no_grad():
        chosen = choose("subtract_directions_", impl, w, dither)
        run = subtract_directions_triton_ if chosen == "triton" else subtract_directions_ref_
        return run(w, terms, decay=decay, start=start, dither=dither, offset=offset)
