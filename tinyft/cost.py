"""What a step costs in FLOPs: counted from the operations that ran, not from layer names.

A multiply-add is 2 FLOPs. Matrix products, convolutions and attention count; elementwise work does
not, as everywhere in the field. torch's own `FlopCounterMode` counts 0 for scaled-dot-product
attention on a CPU and for packed 8- and 4-bit products; these formulas include them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from fractions import Fraction
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
aten = torch.ops.aten


def _product(left: Tensor, right: Tensor) -> int:
    """`(..., M, K) @ (..., K, N)`, or with a vector on either side."""
    columns = right.shape[-1] if right.dim() > 1 else 1
    return 2 * left.numel() * columns


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Q K' and P V, `(B, H, T, D)`; the causal half is counted, as torch does on a GPU."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return 2 * pairs * (query.shape[3] + value.shape[3])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> int:
    """Scores again, then the gradients of V, P, Q and K: five products for the forward's two."""
    pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return 2 * pairs * (3 * query.shape[3] + 2 * value.shape[3])


def _convolution(x: Tensor, weight: Tensor, out: Tensor) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])


# Formula over (positional arguments, result), by operator packet.
_FORMULAS: dict[Any, Callable[[tuple, Any], int]] = {
    aten.mm: lambda a, _: _product(a[0], a[1]),
    aten.bmm: lambda a, _: _product(a[0], a[1]),
    aten.mv: lambda a, _: _product(a[0], a[1]),
    aten.dot: lambda a, _: 2 * a[0].numel(),
    aten.addmm: lambda a, _: _product(a[1], a[2]),
    aten.addmm_: lambda a, _: _product(a[1], a[2]),
    aten.baddbmm: lambda a, _: _product(a[1], a[2]),
    aten.addmv: lambda a, _: _product(a[1], a[2]),
    aten.addr: lambda a, _: 2 * a[0].numel(),
    aten.addr_: lambda a, _: 2 * a[0].numel(),
    aten.convolution: lambda a, out: _convolution(a[0], a[1], out),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda a, _: _attention(*a[:3]),
    aten._scaled_dot_product_flash_attention: lambda a, _: _attention(*a[:3]),
    aten._scaled_dot_product_efficient_attention: lambda a, _: _attention(*a[:3]),
    aten._scaled_dot_product_cudnn_attention: lambda a, _: _attention(*a[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda a, _: _attention_backward(*a[:4])
    ),
    aten._scaled_dot_product_flash_attention_backward: lambda a, _: _attention_backward(*a[:4]),
    aten._scaled_dot_product_efficient_attention_backward: lambda a, _: _attention_backward(*a[:4]),
    aten._scaled_dot_product_cudnn_attention_backward: lambda a, _: _attention_backward(*a[:4]),
    aten._int_mm: lambda a, _: _product(a[0], a[1]),
    # Of experts, whose rows lie one after the other: `(M, K) @ (E, K, N)`, every row by one
    # expert's weight; and for the weights' gradients `(K, M) @ (M, N)`.
    aten._grouped_mm: lambda a, _: _product(a[0], a[1]),
}
# Operators of transformers in the place of the last, by name: a program may come without them.
_EXPERTS: dict[str, Callable[[tuple], int]] = {
    "grouped_mm_fallback": lambda a: _product(a[0], a[1]),
    "grouped_mm_fallback_backward": lambda a: 2 * _product(a[0], a[1]),
}


def _packed_product(name: str, args: tuple, out: Any) -> int:
    """bitsandbytes' products whose weight is packed: `(M, K)` int8 or float by `(N, K)`."""
    if "int8_linear_matmul" in name or "int8_scaled_mm" in name or "int8_mixed_scaled_mm" in name:
        return 2 * args[0].numel() * args[1].shape[0]
    if "gemv_4bit" in name or "gemm_4bit" in name:
        result = out if isinstance(out, Tensor) else args[-1]
        return 2 * args[0].numel() * result.shape[-1]
    return 0


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operator's operands or results, which may come in lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


@cache
def formula_of(func: Any) -> Callable[[tuple, Any], int] | None:
    """FLOPs of a dispatched operator, as a function of its positional arguments and its result;
    None where there are none."""
    packet = func._overloadpacket
    if formula := _FORMULAS.get(packet):
        return formula
    if func.namespace == "transformers" and (of_experts := _EXPERTS.get(packet.__name__)):
        return lambda args, _: of_experts(args)
    if func.namespace == "bitsandbytes":
        return partial(_packed_product, packet.__name__)
    return None


def flops_of(func: Any, args: tuple, out: Any) -> int:
    """FLOPs of one dispatched operator, given its positional arguments and its result."""
    formula = formula_of(func)
    return formula(args, out) if formula else 0


class DispatchMode(TorchDispatchMode):
    """torch's, without what it puts around every operation to keep `torch.compile` out: nothing is
    compiled here, and that takes a fifth of an operation's time in a mode that does little."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class FlopCounter(DispatchMode):
    """Counts the FLOPs of everything that runs inside it, backward passes too.

    Attributes:
        flops: the sum so far.
        by_operator: `{operator name: FLOPs}`.

    Example:
        >>> import torch
        >>> with FlopCounter() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> counter.flops
        60
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.by_operator: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flops_of(func, args, out):
            name = func._overloadpacket.__name__
            self.flops += count
            self.by_operator[name] = self.by_operator.get(name, 0) + count
        return out


class FlopMeter:
    """Counts some steps of each kind and works out the others: to count slows a step by a tenth.

    Steps of a kind cost what is linear in the sizes of their batches, so what one costs follows
    from those that were counted, exactly. The first that follow are counted all the same, and now
    and then another: should one disagree, every step of its kind is counted from then on.

    Attributes:
        flops: of all steps so far.

    Example:
        >>> import torch
        >>> meter, weight = FlopMeter(), torch.ones(3, 5)
        >>> for rows in (1, 2, 7, 4):
        ...     _ = meter.step("a product", (rows,), lambda: torch.ones(rows, 3) @ weight)
        >>> meter.flops
        420
    """

    def __init__(self) -> None:
        self.flops = 0
        self._kinds: dict[Hashable, _LinearCost] = {}

    def step(self, kind: Hashable, sizes: tuple[int, ...], function: Callable[[], T]) -> T:
        """Run one step.

        Args:
            kind: of the step.
            sizes: what its cost is linear in, with equally many numbers for each step of the kind.
            function: takes the step.
        """
        cost = self._kinds.setdefault(kind, _LinearCost())
        found = cost.at(sizes)
        if found is None:
            with FlopCounter() as counter:
                result = function()
            found = counter.flops
            cost.learn(sizes, found)
        else:
            result = function()
        self.flops += found
        return result


_CHECKS, _CHECK_EVERY = 2, 64


class _LinearCost:
    """A linear function of whole numbers, known from some of its values."""

    def __init__(self) -> None:
        self._counted: dict[tuple[int, ...], int] = {}
        # Gaussian elimination: of each row, where it begins, its sizes from 1 there on, its cost.
        self._rows: list[tuple[int, list[Fraction], Fraction]] = []
        self._checks = self._asked = 0
        self._is_linear = True

    def at(self, sizes: tuple[int, ...]) -> int | None:
        """The value there; None where it has to be counted, be it as a check."""
        if sizes in self._counted:
            return self._counted[sizes]
        rest, cost = self._reduced(sizes)
        if any(rest) or not self._is_linear or self._checks < _CHECKS:
            return None
        self._asked += 1
        return None if self._asked % _CHECK_EVERY == 0 else int(cost)

    def learn(self, sizes: tuple[int, ...], flops: int) -> None:
        """Take in a counted value."""
        rest, cost = self._reduced(sizes)
        self._counted[sizes] = flops
        if any(rest):
            first = next(i for i, x in enumerate(rest) if x)
            scale = rest[first]
            self._rows.append((first, [x / scale for x in rest], (flops - cost) / scale))
            self._checks = 0  # what was checked before had fewer dimensions
        else:
            self._is_linear &= cost == flops
            self._checks += 1

    def _reduced(self, sizes: tuple[int, ...]) -> tuple[list[Fraction], Fraction]:
        """What of `sizes` the rows do not make up, and the cost of what they do."""
        rest, cost = [Fraction(x) for x in sizes], Fraction(0)
        for first, row, row_cost in self._rows:
            if times := rest[first]:
                rest = [x - times * y for x, y in zip(rest, row, strict=True)]
                cost += times * row_cost
        return rest, cost
