"""Update rules for one parameter at a time, as a gradient that is freed at once needs them.

A rule makes a parameter's state and takes a step: the arithmetic is torch's and bitsandbytes' own.
State is a flat dict of tensors, so it goes into safetensors as it is.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinyft.errors import InputError

State = dict[str, Tensor]


class UpdateRule(Protocol):
    """Both in place; `group` is the parameter's group: `lr`, `weight_decay`, `betas`, `eps`."""

    def start(self, parameter: Tensor) -> State: ...

    def step(
        self, parameter: Tensor, grad: Tensor, state: State, group: dict[str, Any]
    ) -> None: ...


class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019), by torch's fused kernel."""

    def start(self, parameter: Tensor) -> State:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    def step(self, parameter: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [parameter],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


class SGD:
    """`w -= lr (g + weight_decay w)`; no momentum, hence no state."""

    def start(self, parameter: Tensor) -> State:
        return {}

    def step(self, parameter: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(grad, alpha=-group["lr"])


class AdamW8bit:
    """AdamW with moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861).

    Small parameters keep whole moments, as in `bitsandbytes.optim.AdamW8bit`.
    """

    small = 4096  # elements
    block = 256
    piece = 1 << 18  # elements updated at a time: on a CPU each takes 24 bytes meanwhile

    def __init__(self) -> None:
        _codes(torch.device("cpu"))  # no part of the first step, which is priced

    def start(self, parameter: Tensor) -> State:
        if parameter.numel() < self.small:
            return AdamW().start(parameter)
        blocks = -(-parameter.numel() // self.block)
        absmax = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        return {
            "step": torch.zeros((), dtype=torch.float32),
            "state1": torch.zeros_like(parameter, dtype=torch.uint8),
            "state2": torch.zeros_like(parameter, dtype=torch.uint8),
            "absmax1": absmax,
            "absmax2": absmax.clone(),
        }

    def step(self, parameter: Tensor, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        if "state1" not in state:
            return AdamW().step(parameter, grad, state, group)
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state["step"] += 1
        beta1, beta2 = group["betas"]
        signed, unsigned = _codes(parameter.device)
        tensors = (grad.contiguous(), parameter, state["state1"], state["state2"])
        flat = [tensor.view(-1) for tensor in tensors]
        pieces = [t.split(self.piece) for t in flat]
        scales = [state[name].split(self.piece // self.block) for name in ("absmax1", "absmax2")]
        for g, p, state1, state2, absmax1, absmax2 in zip(*pieces, *scales, strict=True):
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
