"""LoRA (Hu et al. 2021, arXiv:2106.09685): low-rank adapters, along their gradient.

The adapters themselves, and PEFT's files, are in `tinyft/adapters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from tinyft.adapters import (
    LoRALinear,
    adapter_arguments,
    ensure,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
)
from tinyft.losses import check_head
from tinyft.optim.base import register
from tinyft.optim.gradient import GradientArguments, GradientOptimizer

__all__ = ["LoRA", "LoRALinear", "inject", "load_adapter", "merge", "remove", "save_adapter"]


class LoRAArguments(GradientArguments, total=False):
    """What every method on adapters can be told as well; see `LoRA`."""

    rank: int
    alpha: float
    targets: str | Sequence[str]
    dropout: float
    seed: int


@register("lora")
class LoRA(GradientOptimizer):
    """Adapters on the linear layers of a model, whose own weights stay frozen (in 16, 8 or 4 bits).

    A model that has adapters already (`tinyft.adapters.load_adapter`) keeps them and goes on from
    there; `rank`, `alpha`, `targets`, `dropout` and `seed` are for new ones. The other arguments
    are `GradientOptimizer`'s.

    Args:
        rank, alpha: the update is `alpha / rank * B A`, of this rank.
        targets: `"all-linear"`, `"attention"`, or names of layers.
        dropout: before the adapters.
        seed: of their initialisation.

    Example:
        >>> optimizer = tinyft.LoRA(model, lr=2e-4, rank=8)
        >>> for batch in batches:
        ...     loss = optimizer.step(lambda: model(**batch).loss)
        >>> tinyft.adapters.save_adapter(model, "adapter", "owner/base-model")
    """

    needs = "lora"
    layers_alike = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-4,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] = "all-linear",
        dropout: float = 0.0,
        seed: int = 0,
        **common: Unpack[GradientArguments],
    ) -> None:
        ensure(model, rank, alpha, dropout, targets, seed)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, named, lr, **common)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> LoRA:
        model.train()
        check_head(model)
        return cls(model, config.lr, **adapter_arguments(config), **cls.arguments(config))

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        save_adapter(model, directory, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        return "adapter"
