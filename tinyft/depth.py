"""A model of fewer layers, from whose costs those of the whole follow.

A layer costs what the one before it cost. So a model of few layers and one of a few more tell, by
their difference, what any number takes, and a model of thirty layers is priced in a quarter of
the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

_FEW = 3  # layers: a first, a last, and one between


def with_layers(config: Any, n: int) -> Any:
    """A copy of a transformers configuration for the first `n` layers of its language model: every
    list that has an entry a layer is as much shorter."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == before:
            setattr(text, name, value[:n])
    text.num_hidden_layers = n
    return config


def few_layers(config: Any, n_parameters: Callable[[Any], int]) -> tuple[int, int] | None:
    """Two small numbers of layers that tell what the model takes.

    Their difference is one round of the pattern in which layers repeat (`layer_types`: one in six
    may see all tokens), and from the larger to the model's own it is whole rounds, too.

    Args:
        config: of the model.
        n_parameters: of a model of a configuration; where they do not grow by the same for every
            round, layers differ in a way that no pattern tells.

    Returns:
        None where layers differ so, or where there are few of them anyway.
    """
    text = config.get_text_config()
    n = getattr(text, "num_hidden_layers", None) or 0
    if n <= _FEW:
        return None
    kinds = getattr(text, "layer_types", None) or [""] * n
    period = next((p for p in range(1, n) if kinds[p:] == kinds[: n - p]), n)
    few = _FEW + (n - _FEW) % period
    if few + 2 * period > n:
        return None
    small, larger, whole = (
        n_parameters(with_layers(config, layers)) for layers in (few, few + period, n)
    )
    if (whole - small) * period != (larger - small) * (n - few):
        return None
    return few, few + period
