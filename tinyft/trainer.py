"""Methods without gradients inside the Hugging Face Trainer.

`LoRA` and `Full` work in the stock Trainer, which calls `backward()` and then `step()`. A zeroth-
order method evaluates the loss itself; so here the Trainer's `training_step` is the whole step, and
what its loop steps afterwards does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinyft.errors import InputError
from tinyft.optim.base import Optimizer


def make_trainer(
    model: nn.Module,
    args: Any,
    optimizer: Optimizer,
    *,
    objective: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    **trainer_arguments: Any,
) -> Any:
    """A `transformers.Trainer` that trains with a method that owns its step.

    Args:
        model: the model that `optimizer` was made for.
        args: `transformers.TrainingArguments`; learning rate and schedule hold as usual.
        optimizer: e.g. `tinyft.MeZO(model, lr=1e-4)`.
        objective: one loss an example, `(model, inputs) -> (B,)`, with which all probes ride in one
            batch; by default the Trainer's own scalar loss, at one forward pass for each.
        trainer_arguments: of `transformers.Trainer`: datasets, collator, callbacks, ...

    Raises:
        InputError: gradient accumulation, which has no meaning without gradients.

    Example:
        >>> optimizer = tinyft.MeZO(model, lr=1e-4)  # doctest: +SKIP
        >>> make_trainer(model, args, optimizer, train_dataset=rows).train()  # doctest: +SKIP
    """
    from transformers import Trainer

    if args.gradient_accumulation_steps != 1:
        raise InputError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}, and "
            f"{type(optimizer).__name__} accumulates no gradients: set it to 1, and a larger "
            f"per_device_train_batch_size instead."
        )

    class OwnStepTrainer(Trainer):
        def training_step(
            self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
        ) -> Tensor:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                if objective is None:
                    loss = optimizer.step(lambda: self.compute_loss(model, inputs))
                else:
                    loss = optimizer.step(lambda batch: objective(model, batch), inputs)
            return loss.to(self.args.device)

    return OwnStepTrainer(
        model=model, args=args, optimizers=(_Stepped(optimizer), None), **trainer_arguments
    )


class _Stepped(torch.optim.Optimizer):
    """Stands for an optimizer that has already stepped. It shares that one's parameter groups, so
    that learning-rate schedules reach it."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing is left to do."""

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        for mine, its in zip(self.param_groups, self.inner.param_groups, strict=True):
            mine.update(its)
        self.inner.param_groups = self.param_groups
