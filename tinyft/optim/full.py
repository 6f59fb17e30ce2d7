"""Full fine-tuning: every parameter, along its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import Unpack

from tinyft.losses import check_head
from tinyft.optim.base import register
from tinyft.optim.gradient import GradientArguments, GradientOptimizer


@register("full")
class Full(GradientOptimizer):
    """Every parameter of a model that requires a gradient.

    Gradients are used and freed during the backward pass, so memory is weights, moments and
    activations. `optimizer="adamw8bit"` quarters the moments, `"sgd"` has none. The other
    arguments are `GradientOptimizer`'s.

    Example:
        >>> optimizer = tinyft.Full(model, lr=2e-5)
        >>> for batch in batches:
        ...     loss = optimizer.step(lambda: model(**batch).loss)
    """

    needs = "all"
    layers_alike = True

    def __init__(
        self, model: nn.Module, lr: float = 2e-5, **common: Unpack[GradientArguments]
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, named, lr, **common)

    @classmethod
    def attach(cls, model: nn.Module, config: Any) -> Full:
        model.requires_grad_(True).train()
        check_head(model)
        return cls(model, config.lr, **cls.arguments(config))

    def save_artefact(self, model: nn.Module, tokenizer: Any, directory: Path, base: str) -> str:
        from tinyft.models import save_model

        save_model(model, tokenizer, directory)
        return "model"
