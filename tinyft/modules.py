"""What a module is, before its arithmetic is done elsewhere."""

from __future__ import annotations

from torch import nn


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module(x)` is `x @ weight.T + bias`, unpatched and without hooks."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
