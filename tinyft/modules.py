"""What a module is, before its arithmetic is done elsewhere, and how it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(
    replacements: Sequence[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    """Meanwhile each of these modules runs its replacement; afterwards what it ran before, whether
    that was its class's or its own."""
    before = [vars(module).get("forward") for module, _ in replacements]
    try:
        for module, forward in replacements:
            module.forward = forward
        yield
    finally:
        for (module, _), forward in zip(replacements, before, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode; afterwards each module in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module(x)` is `x @ weight.T + bias`, unpatched and without hooks."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
