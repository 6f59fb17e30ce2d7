"""Update rules for one parameter at a time, as a gradient that is freed at once needs them.

A rule makes a parameter's state and takes a step: the arithmetic is torch's and bitsandbytes' own,
of 16-bit weights in float32, a piece at a time, and rounded by chance (`rounding.py`): torch's own
step rounds to the nearest, and most of it is lost. State is a flat dict of tensors, so it goes into
safetensors as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinyft.dry_run import alike
from tinyft.errors import InputError
from tinyft.rounding import NOISE_SIZE, offset_of, rounding_noise, store

_PIECE = 1 << 18  # numbers widened at a time, 1 MB of float32: what a cache holds

State = dict[str, Tensor]
Group = dict[str, Any]
At = tuple[int, int, int]
_START: At = (0, 0, 0)


class UpdateRule(Protocol):
    """In place.

    Attributes:
        by_rows: whether rows of a matrix may take their step one after the other: no number of its
            state belongs to several rows.

    Args:
        group: the parameter's: `lr`, `weight_decay`, `betas`, `eps`.
        at: the optimizer's step, which of its parameters this is, and the number of its first
            element if these are rows of it: each rounds by other bits.
    """

    by_rows: bool

    def start(self, parameter: Tensor) -> State: ...

    def step(
        self, parameter: Tensor, grad: Tensor, state: State, group: Group, at: At = _START
    ) -> None: ...


class _Widened:
    """Pieces of 16-bit tensors in float32; what was made of them is rounded by chance."""

    def __init__(self) -> None:
        self._noise: tuple[Any, Tensor] | None = None

    def pieces(
        self, tensors: tuple[Tensor, ...], read: int, at: At
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Pieces by number, one of each tensor, widened if the first is of 16 bits. They are stored
        when the next are asked for, but for the last `read` tensors'."""
        step, place, first = at
        noise = self._of(step, tensors[0].device) if _is_widened(tensors[0]) else None
        written = len(tensors) - read
        flat = [t.view(-1) for t in tensors[:written]] + [t.reshape(-1) for t in tensors[written:]]
        parts = enumerate(zip(*(t.split(_PIECE) for t in flat), strict=True))
        for i, part in alike(parts, max(1, len(flat[0]) / _PIECE)):
            if noise is None:
                yield i, list(part)
                continue
            wide = [t.float() for t in part]
            yield i, wide
            for k in range(written):
                offset = (offset_of(place, first // _PIECE + i) + k * 25013) % NOISE_SIZE
                store(wide[k], part[k], noise, offset)
            wide.clear()  # whoever was given it still holds it while the next are made

    def _of(self, step: int, device: torch.device) -> Tensor:
        """A step's noise, as much as a piece needs at any offset."""
        if self._noise is None or self._noise[0] != (step, device):
            self._noise = (step, device), rounding_noise(0, step, device).repeat(3)
        return self._noise[1]


def _is_widened(parameter: Tensor) -> bool:
    return parameter.dtype.itemsize == 2 and parameter.is_contiguous()


class AdamW(_Widened):
    """Decoupled weight decay (Loshchilov & Hutter 2019), by torch's fused kernel."""

    by_rows = True

    def start(self, parameter: Tensor) -> State:
        dtype = parameter.dtype
        if dtype == torch.float16 and _is_widened(parameter):
            # In as many bits, but with float32's range: the square of a gradient below 0.005,
            # times 1 - beta2, is 0 in float16, and the step up to 30 times as long.
            dtype = torch.bfloat16
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
        }

    def step(
        self, parameter: Tensor, grad: Tensor, state: State, group: Group, at: At = _START
    ) -> None:
        tensors = (parameter, state["exp_avg"], state["exp_avg_sq"], grad)
        if not _is_widened(parameter):
            self._update(*tensors, state["step"], group)
            return
        before = state["step"].clone()
        for _, wide in self.pieces(tensors, 1, at):
            self._update(*wide, state["step"].copy_(before), group)

    @staticmethod
    def _update(
        parameter: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        step: Tensor,
        group: Group,
    ) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [parameter],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


class SGD(_Widened):
    """`w -= lr (g + weight_decay w)`; no momentum, hence no state."""

    by_rows = True

    def start(self, parameter: Tensor) -> State:
        return {}

    def step(
        self, parameter: Tensor, grad: Tensor, state: State, group: Group, at: At = _START
    ) -> None:
        is_widened = _is_widened(parameter)
        pieces = self.pieces((parameter, grad), 1, at) if is_widened else [(0, (parameter, grad))]
        for _, (p, g) in pieces:
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(g, alpha=-group["lr"])


class AdamW8bit(AdamW):
    """AdamW with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Small parameters keep whole moments, as in `bitsandbytes.optim.AdamW8bit`.
    """

    by_rows = False  # a block of 256 may
    small = 4096  # elements
    block = 256
    # What is updated at a time is a piece: on a CPU each of its elements takes 24 bytes meanwhile.

    def __init__(self) -> None:
        super().__init__()
        _codes(torch.device("cpu"))  # no part of the first step, which is priced

    def start(self, parameter: Tensor) -> State:
        if parameter.numel() < self.small:
            return super().start(parameter)
        blocks = -(-parameter.numel() // self.block)
        absmax = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "state2": torch.zeros_like(parameter, dtype=torch.uint8),
            "absmax1": absmax,
            "absmax2": absmax.clone(),
        }

    def step(
        self, parameter: Tensor, grad: Tensor, state: State, group: Group, at: At = _START
    ) -> None:
        if "state1" not in state:
            return super().step(parameter, grad, state, group, at)
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state["step"] += 1
        beta1, beta2 = group["betas"]
        signed, unsigned = _codes(parameter.device)
        moments = [state[name].view(-1).split(_PIECE) for name in ("state1", "state2")]
        scales = [state[name].split(_PIECE // self.block) for name in ("absmax1", "absmax2")]
        for i, (p, g) in self.pieces((parameter, grad), 1, at):
            state1, state2, absmax1, absmax2 = (parts[i] for parts in (*moments, *scales))
            optimizer_update_8bit_blockwise(
                "adam",
                g,
                p,
                state1,
                state2,
                beta1,
                beta2,
                0.0,  # beta3 and alpha belong to AdEMAMix
                0.0,
                group["eps"],
                int(state["step"]),
                group["lr"],
                signed,
                unsigned,
                absmax1,
                absmax2,
                group["weight_decay"],
            )


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """What the 256 codes of the first and of the second moment mean."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)


_RULES: dict[str, type[UpdateRule]] = {"adamw": AdamW, "sgd": SGD, "adamw8bit": AdamW8bit}


def update_rule(name: str) -> UpdateRule:
    """`"adamw"`, `"sgd"` or `"adamw8bit"`."""
    if name not in _RULES:
        raise InputError(f"There is no optimizer {name!r}. Choose from: {', '.join(_RULES)}.")
    return _RULES[name]()
