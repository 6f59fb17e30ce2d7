"""Which tokens of a batch take the dense path.

SparseLoRA (ICML 2025), section 3.4: tokens of the output are dense, those of the context sparse.
Here a token is one of the output if it carries a label or predicts one: the hidden state of the
prompt's last token goes into the loss as any other's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_NO_LOSS = -100
_EVERY = 16
SPLITS = ("context", "all")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a batch, R rows of T, shared out.

    Attributes:
        shape: (R, T).
        sparse: flat indices of context tokens, and of padding, which is cheapest there.
        dense: flat indices of the others.
        counted: (R, T) float32, 1 for tokens that the choice of channels is made by: those of the
            context, without padding.
    """

    shape: tuple[int, int]
    sparse: Tensor
    dense: Tensor
    counted: Tensor

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """Some of the counted tokens, flat indices (S,), and how many each stands for, (S, 1)
        float32: the first of each row, which many models make a sink of attention with activations
        unlike all others, and every 16th of the rest."""
        counted = self.counted.bool()
        is_first = counted & (counted.cumsum(1) == 1)
        first, rest = (m.flatten().nonzero().flatten() for m in (is_first, counted & ~is_first))
        rest = rest[::_EVERY]
        stands = self.counted.new_ones(len(first) + len(rest), 1)
        stands[len(first) :] = _EVERY
        return torch.cat([first, rest]), stands

    @classmethod
    def of(cls, labels: Tensor | None, mask: Tensor, split: str = "context") -> Tokens:
        """Share out the tokens of rows padded on the right.

        Args:
            labels: (R, T), -100 where there is no loss; None, or of another shape, where one
                prediction is made at the last token of a row, which then is the output.
            mask: (R, T), 0 on padding.
            split: `"context"`, or `"all"`: every token is sparse.
        """
        if split == "all":
            output = torch.zeros_like(mask, dtype=torch.bool)
        elif labels is None or labels.shape != mask.shape:
            ends = torch.nn.functional.pad(mask[:, 1:], (0, 1)) == 0
            output = ends & (mask != 0)
        else:
            labelled = labels != _NO_LOSS
            output = labelled.clone()
            output[:, :-1] |= labelled[:, 1:]
        counted = (~output & (mask != 0)).float()
        return cls(
            tuple(mask.shape),
            (~output).flatten().nonzero().flatten(),
            output.flatten().nonzero().flatten(),
            counted,
        )

    @classmethod
    def of_batch(cls, batch: Any, split: str = "context") -> Tokens | None:
        """Of a `Batch` or a mapping with `input_ids`; None where there are none."""
        get = batch.get if hasattr(batch, "get") else lambda name: getattr(batch, name, None)
        ids, mask = get("input_ids"), get("attention_mask")
        if ids is None:
            return None
        return cls.of(get("labels"), torch.ones_like(ids) if mask is None else mask, split)
