"""TinyFT as functions: what the commands do, for a program to call."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyft.checkpoint import new_folder, write_directory_atomic
from tinyft.config import TrainConfig
from tinyft.errors import InputError
from tinyft.inputs import pick_device, read_source
from tinyft.progress import Reporter, make_reporter
from tinyft.train import Result, run

if TYPE_CHECKING:
    from tinyft.budget import Budget
    from tinyft.planning import Planned


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
    named, rows = _sources(data, eval_data)
    ref = str(model) if loaded is None else loaded.ref
    config = TrainConfig.build({"model": ref, "method": method, **named, **fields})
    return run(config, Reporter() if quiet else make_reporter(), loaded=loaded, rows=rows)


def plan(
    model: str | Path,
    data: Any,
    budget: Budget | None = None,
    *,
    eval_data: Any = None,
    target: str | None = None,
    **fields: Any,
) -> Planned:
    """Which method fits a budget, and what it will take: `tinyft plan` as a function.

    Args:
        model: a hub id, folder, GGUF file or built-in name; a folder with a configuration and a
            tokenizer is enough.
        data, eval_data: as for `fit`.
        budget: the limits (or `memory`, `flops`, `time` and `energy` among `fields`); memory
            without one is what the machine has free.
        target: a device of `tinyft targets`; this machine if None.
        fields: any field of `TrainConfig` or option of a method, kept as given.

    Returns:
        The plan; its `config` holds what `fit` takes, the limits too. Rows are no part of it:
        `fit(data=rows, **found.config)`.

    Raises:
        InputError: naming all that is wrong with the arguments.

    Example:
        >>> found = tinyft.plan(  # doctest: +SKIP
        ...     "smollm2-135m", "train.jsonl", tinyft.Budget.parse(memory="1.5GiB")
        ... )
        >>> tinyft.fit(**found.config)  # doctest: +SKIP
    """
    from tinyft.planning import make_plan

    named, rows = _sources(data, eval_data)
    values = {"model": str(model), **named, **fields}
    return make_plan(values, budget, target=target, rows=rows)


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

    Raises:
        InputError: naming what is wrong with model, rows or options; an encoder's classes that are
            not the rows'.
    """
    import torch

    from tinyft.data import encode
    from tinyft.evaluate import evaluate, generate_and_score
    from tinyft.models import check_rows, load

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
    check_rows(loaded.model, encoded)
    if encoder:
        _check_classes(loaded, encoded.labels)
    found = dict(evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=batch_size))
    if generate:
        left_out = {row.line for row in encoded.bad}
        same = [example for example in examples.items if example.line not in left_out]
        found |= generate_and_score(
            loaded.model,
            loaded.tokenizer,
            replace(examples, items=same),
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return found


def _check_classes(loaded: Any, asked: Sequence[str]) -> None:
    """Refuse rows of more or fewer classes than an encoder has, or of the same in another order.

    Other names than the model's may stand for its classes: many checkpoints call them LABEL_0, ...
    """
    named = loaded.model.config.id2label
    own = [named[i] for i in sorted(named)]
    here, there = ([name.strip().casefold() for name in names] for names in (asked, own))
    if len(here) != len(there) or (here != there and sorted(here) == sorted(there)):
        raise InputError(
            f"The rows offer the choices {list(asked)}, and the classes of {loaded.ref} are {own}, "
            f"in this order: write choices and answers of the rows accordingly."
        )


def merge(source: str | Path, output: str | Path, *, dtype: str = "auto") -> None:
    """Write what a run left (an adapter, a seed log), with its base, as a plain model folder.

    Raises:
        InputError: nothing there, or `output` already holds something.
    """
    from tinyft.models import load, save_model

    output = new_folder(output)
    loaded = load(source, dtype=dtype)
    save_model(loaded.model, loaded.tokenizer, output)


def is_packed(ref: str | Path) -> bool:
    """Whether a reference is a folder with a packed model."""
    return (Path(ref) / "packed.json").is_file()


def copy_packed(source: str | Path, output: str | Path) -> None:
    """The packed model in a run's folder, without the rest of the run.

    Raises:
        InputError: the run has not finished, or `output` already holds something.
    """
    from tinyft.references import locate

    output, source = new_folder(output), locate(source).path
    wanted = ("packed.*", "*config.json", "tokenizer*", "*.jinja", "special_tokens_map.json")
    files = {path for pattern in wanted for path in source.glob(pattern)}
    with write_directory_atomic(output) as work:
        for path in files:
            shutil.copy(path, work / path.name)


def pack(config: TrainConfig) -> dict[str, int]:
    """Rotate and quantise a model without training it: `tinyft export --format packed`.

    Args:
        config: of a run of `roste`, whose data calibrate; what is about training is not used.

    Returns:
        Bytes of the weights: `linear`, `embedding`, `rest`.

    Raises:
        InputError: another method, bad input, or an output folder that holds something.
    """
    from tinyft.data import Batches, encode, pad_id
    from tinyft.losses import objective
    from tinyft.models import check_rows, load
    from tinyft.optim.roste import RoSTE
    from tinyft.rotated import artefact

    if config.method != RoSTE.name:
        raise InputError(f"--format packed is for roste, not for {config.method}.")
    output = new_folder(config.output)
    examples, _ = read_source(config.data, None, config.skip_bad_rows)
    loaded = load(config.model, dtype=config.dtype, device=pick_device(config.device))
    encoded = encode(
        examples,
        loaded.tokenizer,
        objective=config.objective,
        max_length=config.max_length,
        encoder=loaded.kind == "encoder",
    )
    check_rows(loaded.model, encoded)
    batches = Batches(encoded, config.batch_size, seed=config.seed, pad_id=pad_id(loaded.tokenizer))
    optimizer = RoSTE.attach(loaded.model, config)
    loss = objective(encoded.kind)
    optimizer.prepare(lambda batch: loss(loaded.model, batch), batches)
    with write_directory_atomic(output) as work:
        sizes = artefact.save(optimizer.rotated, loaded.tokenizer, work)
        for name, draw in optimizer.plots().items():
            draw(work / name)
    return sizes


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


def _sources(data: Any, eval_data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both as fields of `TrainConfig`, and those that are rows themselves."""
    given = {"data": data, "eval_data": eval_data}
    rows = {name: value for name, value in given.items() if _is_rows(value)}
    named = {k: "rows" if k in rows else v and str(v) for k, v in given.items()}
    return named, rows


def _is_rows(value: Any) -> bool:
    return value is not None and not isinstance(value, (str, Path))
