"""How good a model is: likelihood of texts, right choices, generated answers.

Every mean is over the whole data set (tokens, examples), never a mean of batch means, so that none
depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyft import prefix
from tinyft.data import Batches, Encoded, Examples, encode, pad_id, questions
from tinyft.errors import InputError
from tinyft.losses import choice_scores, class_logits, macro_f1, row_losses
from tinyft.modules import evaluating
from tinyft.references import quiet

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Prediction:
    """What a model makes of one row of choices; `probabilities` sum to 1 over the choices."""

    prompt: str
    choices: tuple[str, ...]
    probabilities: tuple[float, ...]
    predicted: int
    answer: int


def evaluate(
    model: nn.Module, tokenizer: Any, encoded: Encoded, *, batch_size: int
) -> dict[str, float | int]:
    """Score a model on encoded examples; its training or evaluation mode is left as it was.

    Returns:
        For kind "lm": `loss` (nats a labelled token), `perplexity`, `tokens`. For "choice" and
        "class": `loss` (nats an example, among its choices), `accuracy`, `f1` (macro), `n`.
    """
    # By length, longest first: little padding, and what does not fit fails at once.
    items = sorted(encoded.items, key=lambda item: -item.length)
    encoded = replace(encoded, items=items)
    if encoded.kind != "lm":
        return _classification(*_scores(model, tokenizer, encoded, batch_size))
    total, tokens = 0.0, 0
    with evaluating(model), torch.no_grad():
        for batch in _batches(model, tokenizer, encoded, batch_size):
            total += row_losses(model, batch).double().sum().item()
            tokens += int((batch.labels[:, 1:] != -100).sum())
    loss = total / tokens
    return {"loss": loss, "perplexity": float(torch.tensor(loss).double().exp()), "tokens": tokens}


def predictions(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> list[Prediction]:
    """What the model makes of rows of choices, in their order."""
    encoder = model.get_output_embeddings() is None
    objective = "class" if encoder else "choice"
    encoded = encode(
        examples, tokenizer, max_length=max_length, objective=objective, encoder=encoder
    )
    scores, answers = _scores(model, tokenizer, encoded, batch_size)
    by_line = {example.line: example for example in examples.items}
    found = []
    for item, row, answer in zip(encoded.items, scores.softmax(1), answers.tolist(), strict=True):
        example = by_line[item.line]
        probabilities = tuple(row[: len(example.choices)].tolist())
        best = int(row.argmax())
        found.append(Prediction(example.prompt, example.choices, probabilities, best, answer))
    return found


def generate_and_score(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    n_samples: int = 5,
) -> dict[str, Any]:
    """Let a causal model answer the prompts, greedily, and compare with the given answers.

    A row's answer is its completion, its right choice, or its last assistant turn; what stands
    before it and where it ends is as training sees it (`questions`). Prompts that the model's
    positions cannot hold lose their beginning.

    Returns:
        `exact_match` (share of rows, surrounding white space apart), `rouge1`, `rouge2`, `rougeL`
        (mean F-measure), and the first `n_samples` as `samples`.

    Raises:
        InputError: rows that ask nothing or that the chat template refuses: all named, unless
            `examples.skip_bad_rows`, which leaves them out.
    """
    from rouge_score.rouge_scorer import RougeScorer

    asked, ends = questions(examples, tokenizer)
    written = generate(
        model,
        tokenizer,
        [prompt for prompt, _ in asked],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        ends=ends,
    )
    right = [_before_end(answer, ends) for _, answer in asked]
    texts, answers = (
        [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]
        for rows in (written, right)
    )
    scorer = RougeScorer(ROUGE)
    rouge = [scorer.score(answer, text) for answer, text in zip(answers, texts, strict=True)]
    n = len(asked)
    return {
        "exact_match": sum(map(str.__eq__, texts, answers)) / n,
        **{name: sum(score[name].fmeasure for score in rouge) / n for name in ROUGE},
        "samples": [
            {"prompt": tokenizer.decode(prompt), "generated": text, "reference": answer}
            for (prompt, _), text, answer in list(zip(asked, texts, answers, strict=True))[
                :n_samples
            ]
        ],
    }


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Greedy continuations of prompts of token ids, each cut before its end token.

    The tokenizer's and the model's own EOS end a continuation, and the tokens `ends`. Rows of
    different lengths share a batch by padding on the left; what comes out is what each row would
    give alone.
    """
    own = {tokenizer.eos_token_id}.union(_as_list(model.generation_config.eos_token_id)) - {None}
    ends = own.union(ends)
    padding = pad_id(tokenizer)
    config = type(model.generation_config)(
        max_new_tokens=max_new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=padding
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30)
    positions -= prefix.positions_taken(model)
    room = positions - max_new_tokens
    if room < 1:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has "
            f"{positions} positions."
        )
    fitted = [_cut(list(prompt) or [min(own, default=0)], room, tokenizer) for prompt in prompts]
    order = sorted(range(len(fitted)), key=lambda i: -len(fitted[i]))
    device = next(model.parameters()).device
    found: dict[int, list[int]] = {}
    # Whatever settings leave open transformers takes from the model's: penalties, tokens to forbid.
    settings = patch.object(model, "generation_config", config)
    with evaluating(model), torch.no_grad(), quiet(), settings:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(fitted[chosen[0]])
            ids = torch.full((len(chosen), width), padding)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(fitted[i]) :] = torch.tensor(fitted[i])
                mask[row, width - len(fitted[i]) :] = 1
            out = model.generate(ids.to(device), attention_mask=mask.to(device))
            for i, new in zip(chosen, out[:, width:].tolist(), strict=True):
                found[i] = _before_end(new, ends)
    return [found[i] for i in range(len(prompts))]


def _scores(
    model: nn.Module, tokenizer: Any, encoded: Encoded, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores (N, C) float32 and right answers (N,) int64 of choices or classes, on the CPU."""
    score = class_logits if encoded.kind == "class" else choice_scores
    scores, answers = [], []
    with evaluating(model), torch.no_grad():
        for batch in _batches(model, tokenizer, encoded, batch_size):
            scores.append(score(model, batch).cpu())
            answers.append(batch.answers.cpu())
    most = max(part.shape[1] for part in scores)
    padded = [F.pad(part, (0, most - part.shape[1]), value=float("-inf")) for part in scores]
    return torch.cat(padded), torch.cat(answers)


def _classification(scores: Tensor, answers: Tensor) -> dict[str, float | int]:
    guesses = scores.argmax(1)
    return {
        "loss": F.cross_entropy(scores.double(), answers).item(),
        "accuracy": (guesses == answers).double().mean().item(),
        "f1": macro_f1(guesses, answers, scores.shape[1]).item(),
        "n": len(answers),
    }


def _batches(model: nn.Module, tokenizer: Any, encoded: Encoded, batch_size: int) -> Iterator[Any]:
    device = next(model.parameters()).device
    padding = pad_id(tokenizer)
    for batch in Batches(encoded, batch_size, seed=0, pad_id=padding, shuffle=False):
        yield batch.to(device)


def _before_end(ids: list[int], ends: Collection[int]) -> list[int]:
    stop = next((t for t, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _cut(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` tokens, behind the BOS if there was one."""
    if len(ids) <= room:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - room + len(head) :]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
