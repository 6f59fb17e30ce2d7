"""Random directions z with E[z z'] = I, drawn from a counter: the same z whenever it is asked for.

Four families over a parameter seen as a matrix `(rows, cols)` (vectors are one row):

* `gaussian`     z_ij ~ N(0, 1): the published choice. E||g_hat||^2 = (d + 2) ||g||^2.
* `rademacher`   z_ij = +-1: one random bit a weight, E||g_hat||^2 = d ||g||^2.
* `sign-rank1`   z = u v' with random signs u, v: the same second moment, since
                 E[(u' G v)^2] = ||G||_F^2 and ||z||^2 = d; a linear layer applies it as
                 x z' = (x v) u', one dot product and one outer product.
* `hadamard`     z = diag(u) H diag(v): entries +-1, full rank, applied by a fast transform.

Vectors (norm scales, biases) take random signs in the structured families. `structured` families
never form z; dense ones form it a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tinyft.kernels import philox
from tinyft.kernels.hadamard import hadamard_product, hadamard_rows
from tinyft.kernels.perturbed_linear import Direction


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter's shape as `(rows, cols)`: vectors are one row, higher ranks are flattened."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


class Directions:
    """A family of directions over a list of tensors.

    Args:
        shapes: the shapes of the perturbed tensors; their order is part of the bits.
        seed: 64-bit key of the run.
        device, dtype: where and as what z is wanted (the bits do not depend on either).
    """

    structured: ClassVar[bool]

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes = [matrix_shape(shape) for shape in shapes]
        self.seed, self.device, self.dtype = seed, device, dtype

    def draw(self, step: int, probe: int) -> Draw:
        """The direction of one probe of one step."""
        raise NotImplementedError


class Draw:
    """One direction z, over all tensors; `t` is a tensor's index."""

    def __init__(self, family: Directions, step: int, probe: int) -> None:
        self.family, self.step, self.probe = family, step, probe

    def rows(self, t: int, index: Tensor) -> Tensor:
        """`z_t[index]`, `(len(index), cols)`; index is int64, one-dimensional."""
        raise NotImplementedError

    def block(self, t: int, start: int, stop: int) -> Tensor:
        """`z_t[start:stop]`, `(stop - start, cols)`."""
        return self.rows(t, torch.arange(start, stop, device=self.family.device))

    def dense(self, t: int) -> Tensor:
        """All of z_t, `(rows, cols)`."""
        return self.block(t, 0, self.family.shapes[t][0])

    def vector(self, t: int) -> Tensor:
        """z_t of a one-row tensor, `(cols,)`."""
        return self.dense(t)[0]

    def direction(self, t: int) -> Direction | None:
        """z_t by the name that fused kernels know it by; None if they have no such kind."""
        return None

    def add_product_(
        self, t: int, x: Tensor, y: Tensor, scale: float | Tensor, transposed: bool
    ) -> None:
        """`y += scale * x z_t'` in place (`x z_t` if transposed), without forming z_t.

        `x` is `(N, in)`, `y` is `(N, out)` and contiguous, `scale` a number or `(N, 1)` in the
        dtype of `y`. Structured families only.
        """
        raise NotImplementedError

    def subtract_from_(self, t: int, w: Tensor, start: int, c: float) -> None:
        """`w -= c z_t[start : start + len(w)]` in place; `w` is a block of rows, float32."""
        w.sub_(self.block(t, start, start + w.shape[0]).float(), alpha=c)


class Dense(Directions):
    """`rademacher` and `gaussian`: every entry has its own bits; rows start new counter blocks."""

    structured = False

    def __init__(self, *args, gaussian: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gaussian = gaussian

    def draw(self, step: int, probe: int) -> Draw:
        return DenseDraw(self, step, probe)


class DenseDraw(Draw):
    family: Dense

    def rows(self, t: int, index: Tensor) -> Tensor:
        family = self.family
        z = philox.matrix(
            "gaussians" if family.gaussian else "signs",
            index,
            family.shapes[t][1],
            seed=family.seed,
            tensor=t,
            step=self.step,
            stream=self.probe << 3 | philox.DENSE,
        )
        return z.to(family.dtype)

    def direction(self, t: int) -> Direction:
        kind = "gaussian" if self.family.gaussian else "rademacher"
        return Direction(kind, self.family.seed, t, self.step, self.probe)


class Structured(Directions):
    """Families built from one sign vector a side: u `(rows,)` and v `(cols,)` of every tensor.

    All vectors of a draw come from one call of the generator: some 300,000 signs for a model of
    135 M parameters, a millisecond, where one call a tensor would cost a tenth of a second.
    """

    structured = True

    def __init__(self, *args, hadamard: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.hadamard = hadamard
        counters, self.left, self.right, end = [], [], [], 0
        for t, (rows, cols) in enumerate(self.shapes):
            for role, length, slices in (
                (philox.LEFT, rows, self.left),
                (philox.RIGHT, cols, self.right),
            ):
                blocks = -(-length // philox.SIGNS_PER_BLOCK)
                row = torch.zeros(1, dtype=torch.int64, device=self.device)
                counters.append(philox.matrix_counters(row, blocks, t, 0, role))
                start = end * philox.SIGNS_PER_BLOCK
                slices.append(slice(start, start + length))
                end += blocks
        self.counters = torch.cat(counters, dim=1)

    def draw(self, step: int, probe: int) -> Draw:
        return StructuredDraw(self, step, probe)

    def batches(self, x: Tensor) -> bool:
        """Whether products with several draws are faster in one go: not in float32 on a CPU."""
        return not self.hadamard and (x.is_cuda or x.dtype.itemsize < 4)

    def add_products_(
        self, draws: Sequence[Draw], t: int, x: Tensor, y: Tensor, scale: Tensor, transposed: bool
    ) -> None:
        """`StructuredDraw.add_product_` with each draw on its own copy, one after the other, of
        the rows of `x` and `y`."""
        u, v = (
            torch.stack([(d.left if left != transposed else d.right)(t, dtype) for d in draws])
            for left, dtype in ((True, y.dtype), (False, x.dtype))
        )
        copies = len(draws)
        product = torch.bmm(x.view(copies, -1, x.shape[1]), v.unsqueeze(2)).to(y.dtype)
        product *= scale.view(copies, -1, 1)
        y.view(copies, -1, y.shape[1]).addcmul_(product, u.unsqueeze(1))


class StructuredDraw(Draw):
    family: Structured

    def __init__(self, family: Structured, step: int, probe: int) -> None:
        super().__init__(family, step, probe)
        counters = family.counters.clone()
        counters[2] = step
        counters[3] += probe << 3
        signs = philox.signs(philox.philox(counters, family.seed)).flatten().to(family.dtype)
        self._signs = {family.dtype: signs}

    def left(self, t: int, dtype: torch.dtype | None = None) -> Tensor:
        """u of tensor t, `(rows,)`; in the family's dtype unless told."""
        return self._signs_as(dtype)[self.family.left[t]]

    def right(self, t: int, dtype: torch.dtype | None = None) -> Tensor:
        """v of tensor t, `(cols,)`."""
        return self._signs_as(dtype)[self.family.right[t]]

    def _signs_as(self, dtype: torch.dtype | None) -> Tensor:
        """All signs, converted once: hundreds of layers ask for theirs."""
        family = self.family
        if dtype is None:
            return self._signs[family.dtype]
        if dtype not in self._signs:
            self._signs[dtype] = self._signs[family.dtype].to(dtype)
        return self._signs[dtype]

    def dense(self, t: int) -> Tensor:
        if self.family.shapes[t][0] == 1:
            return self.right(t).unsqueeze(0)
        return super().dense(t)

    def direction(self, t: int) -> Direction | None:
        if self.family.shapes[t][0] == 1:
            return None
        kind = "hadamard" if self.family.hadamard else "sign-rank1"
        return Direction(kind, self.family.seed, t, self.step, self.probe)

    def rows(self, t: int, index: Tensor) -> Tensor:
        rows, cols = self.family.shapes[t]
        if rows == 1:
            return self.right(t).expand(len(index), cols)
        z = self.left(t)[index].unsqueeze(1) * self.right(t)
        if self.family.hadamard:
            z *= hadamard_rows(index, cols, z.dtype)
        return z

    def add_product_(
        self, t: int, x: Tensor, y: Tensor, scale: float | Tensor, transposed: bool
    ) -> None:
        left, right = (self.right, self.left) if transposed else (self.left, self.right)
        u, v = left(t, y.dtype), right(t, x.dtype)  # the tensors of a model may differ in dtype
        if self.family.hadamard:
            product = hadamard_product(x * v, y.shape[1]).to(y.dtype)
        else:
            product = torch.mv(x, v).to(y.dtype).unsqueeze(1)
        y.addcmul_(product.mul_(scale), u)

    def subtract_from_(self, t: int, w: Tensor, start: int, c: float) -> None:
        if self.family.hadamard or self.family.shapes[t][0] == 1:
            return super().subtract_from_(t, w, start, c)
        # The product is +-c exactly, so w -+ c is rounded once: the same bits on every device.
        u, v = self.left(t, torch.float32), self.right(t, torch.float32)
        w.addr_(u[start : start + w.shape[0]], v, alpha=-c)


FAMILIES: dict[str, tuple[type[Directions], dict]] = {
    "sign-rank1": (Structured, {}),
    "hadamard": (Structured, {"hadamard": True}),
    "rademacher": (Dense, {}),
    "gaussian": (Dense, {"gaussian": True}),
}


def make_directions(
    name: str,
    shapes: Sequence[Sequence[int]],
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Directions:
    """The family of that name; see `FAMILIES`."""
    family, options = FAMILIES[name]
    return family(shapes, seed, device, dtype, **options)
