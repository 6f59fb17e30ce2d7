"""How good a model is: likelihood of texts, right choices, generated answers.

Every mean is over the whole data set (tokens, examples), never a mean of batch means, so that none
depends on the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyft.data import Batches, Encoded, Example, Examples, encode, pad_id
from tinyft.errors import InputError
from tinyft.losses import choice_scores, class_logits, macro_f1, row_losses
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
    with _evaluating(model):
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

    A row's answer is its completion, its right choice, or its last assistant turn. Prompts that
    the model's positions cannot hold lose their beginning.

    Returns:
        `exact_match` (share of rows, surrounding white space apart), `rouge1`, `rouge2`, `rougeL`
        (mean F-measure), and the first `n_samples` as `samples`.

    Raises:
        InputError: rows of text, which ask nothing.
    """
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [_prompt_and_answer(example, tokenizer, examples) for example in examples.items]
    written = generate(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in written]
    answers = [answer.strip() for _, answer in pairs]
    scorer = RougeScorer(ROUGE)
    rouge = [scorer.score(answer, text) for answer, text in zip(answers, texts, strict=True)]
    n = len(pairs)
    return {
        "exact_match": sum(map(str.__eq__, texts, answers)) / n,
        **{name: sum(score[name].fmeasure for score in rouge) / n for name in ROUGE},
        "samples": [
            {"prompt": tokenizer.decode(prompt), "generated": text, "reference": answer}
            for (prompt, _), text, answer in list(zip(pairs, texts, answers, strict=True))[
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
) -> list[list[int]]:
    """Greedy continuations of prompts of token ids, each cut before its end token.

    Rows of different lengths share a batch by padding on the left; what comes out is what each
    row would give alone.
    """
    config = copy.deepcopy(model.generation_config)
    ends = {tokenizer.eos_token_id}.union(_as_list(config.eos_token_id)) - {None}
    padding = pad_id(tokenizer)
    config.update(
        do_sample=False,
        num_beams=1,
        max_length=None,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,  # None would be the model's own
        no_repeat_ngram_size=0,
    )
    room = getattr(model.config, "max_position_embeddings", 1 << 30) - max_new_tokens
    if room < 1:
        raise InputError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the model has "
            f"{room + max_new_tokens} positions."
        )
    fitted = [_cut(list(prompt) or [min(ends, default=0)], room, tokenizer) for prompt in prompts]
    order = sorted(range(len(fitted)), key=lambda i: -len(fitted[i]))
    device = next(model.parameters()).device
    found: dict[int, list[int]] = {}
    with _evaluating(model), quiet():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(fitted[chosen[0]])
            ids = torch.full((len(chosen), width), padding)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, width - len(fitted[i]) :] = torch.tensor(fitted[i])
                mask[row, width - len(fitted[i]) :] = 1
            out = model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
            for i, new in zip(chosen, out[:, width:].tolist(), strict=True):
                stop = next((t for t, token in enumerate(new) if token in ends), len(new))
                found[i] = new[:stop]
    return [found[i] for i in range(len(prompts))]


def _scores(
    model: nn.Module, tokenizer: Any, encoded: Encoded, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores (N, C) float32 and right answers (N,) int64 of choices or classes, on the CPU."""
    score = class_logits if encoded.kind == "class" else choice_scores
    scores, answers = [], []
    with _evaluating(model):
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prompt_and_answer(
    example: Example, tokenizer: Any, examples: Examples
) -> tuple[list[int], str]:
    """Token ids of the prompt, as training sees it, and the text that should follow."""
    if example.kind == "text":
        raise InputError(
            f"{examples.source}, {examples.unit} {example.line}: a row of text asks nothing that "
            f"could be answered. Leave --generate out (perplexity fits texts), or give prompts."
        )
    if example.kind == "messages":
        last = max(i for i, m in enumerate(example.messages) if m["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(
            list(example.messages[:last]), tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # the template wrote its own
        return ids, example.messages[last]["content"]
    ids = tokenizer(example.prompt)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    is_choice = example.kind == "choices"
    return ids, example.choices[example.answer] if is_choice else example.completion


def _cut(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """The last `room` tokens, behind the BOS if there was one."""
    if len(ids) <= room:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - room + len(head) :]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
