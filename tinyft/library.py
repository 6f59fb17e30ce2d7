"""TinyFT as functions: what the commands do, for a program to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyft.config import TrainConfig
from tinyft.errors import InputError
from tinyft.inputs import pick_device, read_source
from tinyft.progress import Reporter, make_reporter
from tinyft.train import Result, run


def fit(
    model: Any,
    data: Any,
    *,
    method: str = "lora",
    eval_data: Any = None,
    quiet: bool = False,
    **fields: Any,
) -> Result:
    """Fine-tune a model: `tinyft train` as a function.

    Args:
        model: a reference (hub id, folder, GGUF file, built-in name), a `tinyft.models.Loaded`, or
            `(model, tokenizer)`; a model that is given is trained in place.
        data: a file, a hub id, or a list of rows as dicts, in the formats of the files.
        method: `"mezo"`, `"lora"`, `"full"`, or another registered one.
        eval_data: held-out examples like `data`, scored before and after.
        quiet: print nothing.
        fields: any field of `TrainConfig`, or option of the method. Without `output` nothing is
            written.

    Returns:
        The report, and the trained model with its tokenizer.

    Raises:
        InputError: naming all that is wrong with the arguments.

    Example:
        >>> tinyft.fit("smollm2-135m", "train.jsonl", method="lora", steps=50)  # doctest: +SKIP
    """
    loaded = None if isinstance(model, (str, Path)) else as_loaded(model)
    given = {"data": data, "eval_data": eval_data}
    rows = {name: value for name, value in given.items() if _is_rows(value)}
    named = {
        name: "rows" if name in rows else value and str(value) for name, value in given.items()
    }
    ref = str(model) if loaded is None else loaded.ref
    config = TrainConfig.build({"model": ref, "method": method, **named, **fields})
    return run(config, Reporter() if quiet else make_reporter(), loaded=loaded, rows=rows)


def score(
    model: Any,
    data: Any,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    generate: bool = False,
    max_new_tokens: int = 64,
    skip_bad_rows: bool = False,
    dtype: str = "auto",
    base_bits: int = 16,
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Score a model on held-out examples: `tinyft eval` as a function.

    Args:
        model, data: as for `fit`.
        generate: also let the model write answers, and compare them (exact match, ROUGE).

    Returns:
        Loss and perplexity, or accuracy and F1 by the likelihood of the choices; with `generate`,
        `exact_match`, `rouge1`, `rouge2`, `rougeL` and `samples` as well.
    """
    import torch

    from tinyft.data import encode
    from tinyft.evaluate import evaluate, generate_and_score
    from tinyft.models import load

    if threads:
        torch.set_num_threads(threads)
    rows = data if _is_rows(data) else None
    examples, _ = read_source("rows" if rows is not None else str(data), rows, skip_bad_rows)
    if isinstance(model, (str, Path)):
        device = pick_device(device)
        loaded = load(str(model), dtype=dtype, base_bits=base_bits, device=device)
    else:
        loaded = as_loaded(model)
    encoder = loaded.kind == "encoder"
    if generate and encoder:
        raise InputError(f"{loaded.ref} is an encoder, which classifies: leave --generate out.")
    encoded = encode(examples, loaded.tokenizer, max_length=max_length, encoder=encoder)
    found = dict(evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=batch_size))
    if generate:
        found |= generate_and_score(
            loaded.model,
            loaded.tokenizer,
            examples,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return found


def merge(source: str | Path, output: str | Path, *, dtype: str = "auto") -> None:
    """Write what a run left (an adapter, a seed log), with its base, as a plain model folder.

    Raises:
        InputError: nothing there, or `output` already holds something.
    """
    from tinyft.models import load, save_model

    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} is not empty: name a new folder.")
    loaded = load(source, dtype=dtype)
    save_model(loaded.model, loaded.tokenizer, output)


def as_loaded(model: Any) -> Any:
    """A model that somebody else loaded, with its tokenizer, as `tinyft.models.load` returns it."""
    from tinyft.models import Loaded

    if isinstance(model, Loaded):
        return model
    try:
        model, tokenizer = model
    except TypeError as error:
        raise InputError(
            f"A {type(model).__name__} comes without its tokenizer: give (model, tokenizer), or "
            f"the model's folder or name."
        ) from error
    ref = getattr(model.config, "_name_or_path", "") or type(model).__name__
    encoder = model.get_output_embeddings() is None
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        ref=ref,
        kind="encoder" if encoder else "causal",
        path=Path(ref),
        base_ref=str(Path(ref).resolve()) if Path(ref).exists() else ref,
        dtype=str(model.dtype).removeprefix("torch."),
        base_bits=16,
        num_labels=model.config.num_labels if encoder else None,
        seed=0,
    )


def _is_rows(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, Path))
