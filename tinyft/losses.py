"""What is minimised: one loss per example from a model and a batch, with no whole logits.

`objective("lm")` and its siblings return `f(model, batch) -> (B * copies,)` float32 losses, copy by
copy; the mean over a batch is the batch's loss. F1 alone is one number a batch. The backbone runs
once; only positions that carry a label go through the head, a piece at a time:

* with gradients and a plain head, in `kernels/chunked_cross_entropy.py`;
* otherwise through the head as a module, so that whoever changed it (zeroth-order perturbations,
  adapters, packed weights) is heard. Each piece then holds the same positions of every copy,
  copies first, so that a module may still tell the copies apart by its first dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tinyft.errors import InputError
from tinyft.kernels.chunked_cross_entropy import (
    Postponed,
    TiedLookup,
    chunked_cross_entropy,
    postpone,
)
from tinyft.modules import evaluating, is_plain_linear, replaced_forwards

log = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20  # float32 logits of one piece through a head module
_NO_LOSS = -100

Objective = Callable[[nn.Module, Any], Tensor]


def objective_of(asked: str, kind: str) -> Objective:
    """The loss of a run: what is `asked` for where that has no gradient, else that of the rows.

    Args:
        asked: a run's `objective`.
        kind: of the encoded rows.
    """
    return objective(asked if asked in ("accuracy", "f1") else kind)


def objective(name: str) -> Objective:
    """The loss called `name`, as `f(model, batch) -> (B * copies,)` float32.

    Args:
        name: `"lm"`: negative log-likelihood of the labelled tokens, over `tokens_per_example`, so
            that the mean over examples is the mean over tokens. `"choice"`: cross-entropy among an
            example's choices, each scored by its log-likelihood. `"class"`: cross-entropy of a
            classifier. `"accuracy"`: 1 where the best choice or class is wrong, else 0. `"f1"`:
            1 - macro F1 of the whole batch, a scalar. The last two have no gradient.

    Example:
        >>> objective("perplexity")
        Traceback (most recent call last):
        tinyft.errors.InputError: There is no objective 'perplexity'. Choose from: lm, choice, ...
    """
    try:
        return _OBJECTIVES[name]
    except KeyError:
        raise InputError(
            f"There is no objective {name!r}. Choose from: {', '.join(_OBJECTIVES)}."
        ) from None


def lm_losses(model: nn.Module, batch: Any) -> Tensor:
    """(B * copies,): an example's token losses, summed, over the batch's `tokens_per_example`."""
    return row_losses(model, batch) / batch.tokens_per_example


def choice_losses(model: nn.Module, batch: Any) -> Tensor:
    """(B * copies,): cross-entropy of the right choice among the example's choices."""
    return nn.functional.cross_entropy(choice_scores(model, batch), batch.answers, reduction="none")


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    """(B * copies,): cross-entropy of a sequence classifier."""
    return nn.functional.cross_entropy(class_logits(model, batch), batch.answers, reduction="none")


def error_rates(model: nn.Module, batch: Any) -> Tensor:
    """(B * copies,): 0 where the best choice or class is right, else 1."""
    return (_answer_scores(model, batch).argmax(1) != batch.answers).float()


def f1_losses(model: nn.Module, batch: Any) -> Tensor:
    """(): 1 - macro F1 over all examples, for examples have none of their own."""
    scores = _answer_scores(model, batch)
    return 1 - macro_f1(scores.argmax(1), batch.answers, scores.shape[1])


def macro_f1(guesses: Tensor, answers: Tensor, n_classes: int) -> Tensor:
    """F1 of each class that occurs in `guesses` or `answers` (both (N,) int64), averaged."""
    classes = torch.arange(n_classes, device=answers.device).unsqueeze(1)
    guessed, right = guesses == classes, answers == classes  # (n_classes, N)
    counts = (guessed.sum(1) + right.sum(1)).float()
    f1 = 2 * (guessed & right).sum(1) / counts.clamp(min=1)
    return f1.sum() / (counts > 0).sum()


_OBJECTIVES: dict[str, Objective] = {
    "lm": lm_losses,
    "choice": choice_losses,
    "class": class_losses,
    "accuracy": error_rates,
    "f1": f1_losses,
}


def row_losses(model: nn.Module, batch: Any) -> Tensor:
    """Negative log-likelihood of each row's labelled tokens, summed: (R,) float32."""
    n_rows, width = batch.labels.shape
    per_copy = n_rows // batch.copies
    # The token at t is predicted at t - 1. Labels are the same in every copy.
    row, column = (batch.labels[:per_copy, 1:] != _NO_LOSS).nonzero(as_tuple=True)
    position = row * width + column
    labels = batch.labels.reshape(batch.copies, -1)[:, position + 1]  # (copies, N)
    losses = _head_losses(model, batch, position, labels)
    by_row = losses.new_zeros(batch.copies, per_copy * width).index_copy(1, position, losses)
    return by_row.view(n_rows, width).sum(1)


def choice_scores(model: nn.Module, batch: Any) -> Tensor:
    """Scores (B * copies, C) float32 whose softmax is the probability among an example's choices.

    Choices of one token: their logits. Longer ones: the summed log-likelihood of their tokens
    (and of EOS behind them, where one begins another). Missing choices score -inf.
    """
    if batch.choice_ids is None:
        scores = -row_losses(model, batch).view(len(batch.answers), -1)
    else:
        per_copy, width = len(batch.input_ids) // batch.copies, batch.input_ids.shape[1]
        last = batch.attention_mask[:per_copy].sum(1) - 1
        position = torch.arange(per_copy, device=last.device) * width + last
        scores = _head_scores(model, batch, position, batch.choice_ids)
    if batch.choice_mask is not None:
        scores = scores.masked_fill(~batch.choice_mask, float("-inf"))
    return scores


def logits_at(model: nn.Module, batch: Any, position: Tensor) -> Tensor:
    """Whole logits (copies, N, V) float32 of what predicts at flat positions (N,) of each copy.

    For a graph that is exported, where memory is another's business. Call `check_head` before.
    """
    plan = check_head(model, batch.copies)
    states = _selected(model, batch, position, plan)
    return _wide(states) if plan.whole else _logits(_head(model), states, plan)


def class_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits (R, classes) float32 of a sequence classifier."""
    return _wide(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits)


def _answer_scores(model: nn.Module, batch: Any) -> Tensor:
    is_choice = batch.choice_ids is not None or batch.choice_mask is not None
    return (choice_scores if is_choice else class_logits)(model, batch)


# From hidden states to losses.


@dataclass(frozen=True)
class HeadPlan:
    """How a model's logits follow from its backbone, found out by `check_head`.

    Attributes:
        whole: the logits could not be rebuilt from backbone and head; the model makes them whole.
        unmasked: padding on the right changes no token before it, so it needs no mask (and
            attention takes its faster, leaner path).
    """

    whole: bool = False
    unmasked: bool = False
    scale: float = 1.0
    softcap: float | None = None


_PLANS: WeakKeyDictionary[nn.Module, HeadPlan] = WeakKeyDictionary()


def check_head(model: nn.Module, copies: int = 1) -> HeadPlan:
    """Find out, once per model, how to get logits from backbone and head.

    Runs the model on `copies` rows of 4 tokens and compares. Losses do it on first use; call it
    before where an extra forward pass would disturb (counting FLOPs).
    """
    if model in _PLANS:
        return _PLANS[model]
    expected = _expected_plan(model)
    device = next(model.parameters()).device
    n_words = int(getattr(_text_config(model), "vocab_size", None) or 8)
    ids = (torch.arange(1, 7, device=device) % n_words).repeat(copies, 1)
    with evaluating(model), torch.no_grad():
        want = model(input_ids=ids[:, :4], attention_mask=torch.ones_like(ids[:, :4])).logits
        for unmasked in (True, False):
            plan = replace(expected, unmasked=unmasked)
            mask = (torch.arange(6, device=device) < 4).long().expand_as(ids)
            hidden = _backbone(model, ids, mask, plan)
            if hidden is None:
                continue
            got = _logits(_head(model), hidden[:, :4], plan)
            if got.shape == want.shape and close(got, want):
                break
        else:
            plan = HeadPlan(whole=True)
            if _head(model) is not None:  # a classifier's few logits are no matter
                log.warning(
                    "%s: logits cannot be rebuilt from backbone and head; they are made "
                    "whole, which takes more memory.",
                    type(model).__name__,
                )
    _PLANS[model] = plan
    return plan


def assume_head(model: nn.Module) -> None:
    """For a model without values: take what `check_head` finds for all but unusual models."""
    _PLANS[model] = _expected_plan(model)


def _expected_plan(model: nn.Module) -> HeadPlan:
    config = _text_config(model)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return HeadPlan(unmasked=True, scale=scale, softcap=softcap)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def close(got: Tensor, want: Tensor) -> bool:
    """Whether two ways to compute the same gave the same, up to rounding."""
    tolerance = 3e-2 if want.dtype.itemsize == 2 else 1e-4
    return float((got - want).abs().max()) <= tolerance * float(want.abs().max() + 1e-6)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, whose `base_model` is something else."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: nn.Module) -> nn.Module | None:
    find = getattr(_unwrapped(model), "get_output_embeddings", None)
    return find() if find else None


def _backbone(model: nn.Module, ids: Tensor, mask: Tensor, plan: HeadPlan) -> Tensor | None:
    """Hidden states (R, T, D); None if the model does not consist of backbone and head."""
    backbone = getattr(_unwrapped(model), "base_model", None)
    if backbone is None or backbone is model or _head(model) is None:
        return None
    # All ones and not None, which transformers would take for an oversight and warn about.
    mask = torch.ones_like(mask) if plan.unmasked else mask
    out = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    return getattr(out, "last_hidden_state", None)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that: a model in float64 checks others."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(head: nn.Module, hidden: Tensor, plan: HeadPlan) -> Tensor:
    """Float32 logits of `hidden` (..., D) through the head as a module."""
    logits = _wide(head(hidden))
    if plan.scale != 1.0:
        logits = logits * plan.scale
    if plan.softcap is not None:
        logits = plan.softcap * torch.tanh(logits / plan.softcap)
    return logits


def _selected(model: nn.Module, batch: Any, position: Tensor, plan: HeadPlan) -> Tensor:
    """What predicts at flat positions (N,) of each copy: (copies, N, D or, if whole, V)."""
    ids, mask = batch.input_ids, batch.attention_mask
    if plan.whole:
        states = model(input_ids=ids, attention_mask=mask).logits
    else:
        states = _backbone(model, ids, mask, plan)
    states = states.reshape(batch.copies, -1, states.shape[-1])
    return states.index_select(1, position)


def _head_losses(model: nn.Module, batch: Any, position: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at flat positions (N,) against labels (copies, N): (copies, N) float32."""
    plan, head = check_head(model, batch.copies), _head(model)
    chunked = torch.is_grad_enabled() and not plan.whole and is_plain_linear(head)
    if chunked:  # before the backbone runs, for its gradient to be made after the backbone's
        weight, bias, later = postpone(head.weight, head.bias)
    apart = chunked and head.weight.requires_grad
    with _lookups_into(later, model, head) if apart else nullcontext():
        states = _selected(model, batch, position, plan)
    if plan.whole:
        return nn.functional.cross_entropy(_wide(states).transpose(1, 2), labels, reduction="none")
    if chunked:
        losses = chunked_cross_entropy(
            (states * plan.scale if plan.scale != 1.0 else states).flatten(0, 1),
            weight,
            labels.flatten(),
            bias=bias,
            softcap=plan.softcap,
            later=later,
        )
        return losses.view_as(labels)

    def losses_of(states: Tensor, labels: Tensor) -> Tensor:
        logits = _logits(head, states.flatten(0, 1), plan)
        if torch.is_grad_enabled():
            losses = nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        else:
            losses = _cross_entropy_(logits, labels.flatten())
        return losses.view_as(labels)

    pieces = [
        # A head with gradients that is not plain (adapters, packed weights): its logits are made
        # again in the backward pass rather than kept.
        checkpoint(losses_of, s, y, use_reentrant=False)
        if torch.is_grad_enabled()
        else losses_of(s, y)
        for s, y in _pieces(model, states, labels)
    ]
    return torch.cat(pieces, 1)


def _lookups_into(
    later: Postponed, model: nn.Module, head: nn.Module
) -> AbstractContextManager[None]:
    """Meanwhile an embedding that is tied to the head leaves its gradient to the head's."""
    tied = [
        (module, partial(_look_up, module.forward, head.weight, later))
        for module in model.modules()
        if module is not head and any(p is head.weight for p in module._parameters.values())
    ]
    return replaced_forwards(tied)


def _look_up(
    forward: Callable[..., Tensor], weight: Tensor, later: Postponed, *args: Any, **kwargs: Any
) -> Tensor:
    with _TiedLookups(weight, later) as lookups:
        out = forward(*args, **kwargs)
    later.alone &= lookups.found
    return out


class _TiedLookups(TorchFunctionMode):
    """Meanwhile `embedding` of a head's weight, however it is wrapped, is a `TiedLookup`.

    Attributes:
        found: there was one.
    """

    def __init__(self, weight: Tensor, later: Postponed) -> None:
        super().__init__()
        self.weight, self.later, self.found = weight, later, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(arg is self.weight for arg in (*args, *kwargs.values())):
            if func is nn.functional.embedding:
                call = _EMBEDDING.bind(*args, **kwargs).arguments
                if not any(call.get(k) for k in ("max_norm", "scale_grad_by_freq", "sparse")):
                    self.found = True
                    tokens, padding_idx = call["input"], call.get("padding_idx")
                    return TiedLookup.apply(tokens, self.weight, padding_idx, self.later)
            out = func(*args, **kwargs)
            self.later.alone &= not getattr(out, "requires_grad", False)
            return out
        return func(*args, **kwargs)


_EMBEDDING = signature(nn.functional.embedding)


def _cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) of logits (N, V), which are overwritten: no second tensor as large."""
    of_label = logits.gather(1, labels.unsqueeze(1))
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    return (total.log_() + top - of_label).squeeze(1)


def _head_scores(model: nn.Module, batch: Any, position: Tensor, ids: Tensor) -> Tensor:
    """Logits at flat positions (B,) of each copy for the tokens `ids` (B * copies, C) alone."""
    plan = check_head(model, batch.copies)
    states = _selected(model, batch, position, plan)
    if plan.whole:
        return _wide(states).flatten(0, 1).gather(1, ids)
    head = _head(model)
    if is_plain_linear(head):
        # Rows of the head for the choices alone, never the vocabulary.
        rows = nn.functional.embedding(ids, head.weight)  # (B * copies, C, D)
        logits = _wide((rows @ states.reshape(-1, states.shape[-1], 1)).squeeze(2))
        if head.bias is not None:
            logits = logits + head.bias[ids]
        return _logits(nn.Identity(), logits, plan)

    def scores_of(states: Tensor, ids: Tensor) -> Tensor:
        logits = _logits(head, states.flatten(0, 1), plan)
        return logits.gather(1, ids.flatten(0, 1)).view_as(ids)

    by_copy = ids.view(batch.copies, -1, ids.shape[1])
    pieces = [scores_of(s, i) for s, i in _pieces(model, states, by_copy)]
    return torch.cat(pieces, 1).flatten(0, 1)


def _pieces(model: nn.Module, states: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`states` and `labels`, both (copies, N, ...), cut along N to `PIECE_BYTES` of logits."""
    n_words = getattr(_head(model), "out_features", None) or len(_head(model).weight)
    size = max(1, PIECE_BYTES // (4 * n_words * len(states)))
    return list(zip(states.split(size, 1), labels.split(size, 1), strict=True))
