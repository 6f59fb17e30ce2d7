"""The same job with other people's tools: `python -m tinyft.benchmark.peers LABEL FLAGS`.

`peft` is PEFT's LoRA in the stock Hugging Face Trainer, `torch-full` a plain torch loop over AdamW.
FLAGS are those of our run that is repeated, each as `--NAME=VALUE`: the model and its seed, the
batches and their order, steps, learning rate and schedule are the same (adapters begin from PEFT's
own random numbers); losses are written as one writes them without us, from whole logits.
In `--output` report.json is left, of our shape. Held-out rows are scored by our code, and FLOPs are
counted after the run, so that neither its time nor its peak has a part of that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from tinyft.checkpoint import write_atomic
from tinyft.config import TrainConfig, as_flag, from_flags
from tinyft.errors import InputError, TinyFTError

_NEEDS = {"peft": ("peft", "transformers", "accelerate"), "torch-full": ()}


def missing(label: str) -> str | None:
    """What a peer lacks here, and how to get it."""
    absent = [name for name in _NEEDS[label] if find_spec(name) is None]
    return f"not installed: pip install {' '.join(absent)}" if absent else None


def repeat(label: str, config: TrainConfig) -> dict[str, Any]:
    """Train and score; returns the report."""
    from tinyft.cost import FlopCounter
    from tinyft.data import Batches, encode, encode_held_out, pad_id
    from tinyft.evaluate import evaluate
    from tinyft.guard import EnergyMeter
    from tinyft.inputs import pick_device, read_source
    from tinyft.kernels import cpu_products
    from tinyft.memory import PeakMeter, trim
    from tinyft.models import kind_of, load
    from tinyft.report import hardware, versions

    began, energy = perf_counter(), EnergyMeter.where_readable()
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    encoder = kind_of(config.model) == "encoder"
    (train, digest), (test, _) = (
        read_source(source, None, config.skip_bad_rows)
        for source in (config.data, config.eval_data)
    )
    loaded = load(
        config.model,
        dtype=config.dtype,
        device=pick_device(config.device),
        num_labels=len(train.items[0].choices) or None if encoder else None,
        seed=config.seed,
    )
    cpu_products.remove()  # a peer has torch as it comes
    model, tokenizer = loaded.model, loaded.tokenizer
    shape = {"max_length": config.max_length, "encoder": encoder}
    encoded = encode(train, tokenizer, objective=config.objective, **shape)
    held_out = encode_held_out(test, tokenizer, encoded, objective=config.objective, **shape)
    per_step = config.batch_size * config.grad_accumulation
    batches = Batches(encoded, per_step, seed=config.seed, pad_id=pad_id(tokenizer))
    device = next(model.parameters()).device
    meter = PeakMeter(str(device))
    trim()
    loaded_bytes = meter.now_bytes()

    def score() -> dict[str, Any]:
        with meter.phase("eval"):
            return evaluate(model, tokenizer, held_out, batch_size=config.batch_size)

    def loss_of(model: Any, batch: dict[str, Any]) -> Any:
        return _LOSSES[encoded.kind](model, **batch)

    began_steps: float | None = None

    def stream() -> Iterator[dict[str, Any]]:
        nonlocal began_steps
        began_steps = began_steps or perf_counter()  # what a library does before is no step
        for step in range(config.steps):
            if energy:
                energy.joules()  # counters wrap around
            yield as_dict(batches[step].to(device))

    before = score()
    with meter.phase("train"):
        trained = _TRAIN[label](model, config, stream, loss_of)
    assert began_steps is not None
    seconds = perf_counter() - began_steps
    after = score()
    used = {"elapsed_s": perf_counter() - began}
    if energy:
        used["energy_j"] = energy.joules()

    costs: dict[Any, int] = {}
    shapes: Counter[Any] = Counter()
    model.train()
    for step in range(config.steps):
        batch = batches[step]
        shapes[batch.sizes] += 1
        if batch.sizes not in costs:
            with FlopCounter() as counter:
                loss_of(trained, as_dict(batch.to(device))).backward()
            trained.zero_grad()
            costs[batch.sizes] = counter.flops
    packages = {name: metadata.version(name) for name in _NEEDS[label]}
    return {
        "method": label,
        "model": config.model,
        "config": config.flat(),
        "stopped_by": None,
        "measured": {
            "peak_memory_bytes": meter.peaks["train"],
            "loaded_memory_bytes": loaded_bytes,
            "eval_peak_memory_bytes": meter.peaks["eval"],
            "memory_source": meter.source,
            "flops": sum(n * costs[shape] for shape, n in shapes.items()),
            "wall_s": round(seconds, 3),
            "steps": config.steps,
            **used,
        },
        "eval": {"before": before, "after": after},
        "data": {"sha256": digest, "examples": len(encoded.items)},
        "parameters": {"dtype": loaded.dtype, "base_bits": 16},
        "versions": versions() | packages,
        "hardware": hardware(str(device)),
    }


def as_dict(batch: Any) -> dict[str, Any]:
    """A batch's tensors."""
    names = ("input_ids", "attention_mask", "labels", "answers", "choice_ids", "choice_mask")
    return {n: getattr(batch, n) for n in names if getattr(batch, n) is not None}


# Losses, as one writes them with transformers alone.


def lm_loss(model: Any, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss


def class_loss(model: Any, input_ids: Any, attention_mask: Any, answers: Any) -> Any:
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=answers).loss


def choice_loss(
    model: Any,
    input_ids: Any,
    attention_mask: Any,
    answers: Any,
    choice_mask: Any,
    labels: Any = None,
    choice_ids: Any = None,
) -> Any:
    """Cross-entropy of the right choice, by the likelihood of each."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    if choice_ids is not None:
        rows = torch.arange(len(logits), device=logits.device)
        scores = logits[rows, attention_mask.sum(1) - 1].gather(1, choice_ids)
    else:
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        scores = -losses.sum(1).view(len(answers), -1)
    return cross_entropy(scores.masked_fill(~choice_mask, float("-inf")), answers)


_LOSSES: dict[str, Callable[..., Any]] = {
    "lm": lm_loss,
    "class": class_loss,
    "choice": choice_loss,
}


def train_torch(model: Any, config: Any, stream: Any, loss_of: Any) -> Any:
    """The loop of every tutorial."""
    import torch

    from tinyft.schedule import learning_rate

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    model.train()
    for step, batch in enumerate(stream()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config)
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_peft(model: Any, config: Any, stream: Any, loss_of: Any) -> Any:
    """PEFT's LoRA on the same layers, and the stock Trainer over ready batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return stream()

    class OwnLoss(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            return loss_of(model, dict(inputs))

    targets = config.lora_targets
    encoder = model.get_output_embeddings() is None
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="SEQ_CLS" if encoder else "CAUSAL_LM",
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=1,  # of ready batches
            learning_rate=config.lr,
            lr_scheduler_type=config.schedule,
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip or 0.0,
            optim="adamw_torch",
            seed=config.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        OwnLoss(
            wrapped, arguments, train_dataset=Stream(), data_collator=lambda items: items[0]
        ).train()
    return wrapped


_TRAIN = {"peft": train_peft, "torch-full": train_torch}


def main(words: list[str]) -> int:
    try:
        label, *flags = words or [""]
        if label not in _TRAIN:
            raise InputError(f"{label!r} is no peer; there are {', '.join(_TRAIN)}.")
        if reason := missing(label):
            raise InputError(f"{label} is {reason}.")
        config = TrainConfig.build(from_flags(flags), require=("output",), spell=as_flag)
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        report = repeat(label, config)
    except TinyFTError as error:
        print(f"tinyft: {error}", file=sys.stderr)
        return error.exit_code
    write_atomic(folder / "report.json", json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
