"""`tinyft export`: a fine-tuning job as a folder that a device without torch can run.

The folder holds `step.onnx` (for zeroth order `forward.onnx` and `update.onnx`), the trainable
tensors as they start and the frozen ones, or the artefacts of onnxruntime-training
(`ort_training.py`); then the tokenizer, `job.json`, and `train.py`. It exists only if it passed the
gate (`gate.py`). `collect` makes a model of what a device trained.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyft import adapters
from tinyft.checkpoint import new_folder, write_directory_atomic
from tinyft.config import LIMITS, TrainConfig, as_flag
from tinyft.data import Batches, encode, pad_id
from tinyft.errors import InputError
from tinyft.examples import alpaca_prompt
from tinyft.inputs import read_source
from tinyft.losses import check_head, objective
from tinyft.models import Loaded, check_rows, kind_of, load, save_model
from tinyft.optim import METHODS
from tinyft.targets import device, gate, graphs, ort_training, packed_base
from tinyft.targets.profiles import profile
from tinyft.targets.zeroth_graph import FAMILIES, Plan, zeroth_forward, zeroth_update
from tinyft.zeroth.seed_log import fingerprint

METHODS_WITH_GRAPHS = ("mezo", "lora", "full", "green_trainer")


@dataclass(frozen=True)
class Job:
    """What an export and its gate share.

    Attributes:
        names: of the trainable parameters, in the optimizer's order.
        packed: names of the frozen tensors in 8 or 4 bits.
        base: the bits of the model as it was loaded.
        classes: an encoder's, in the order of its outputs.
        loss: the objective, `(model, batch) -> losses`.
    """

    config: TrainConfig
    loaded: Loaded
    optimizer: Any
    names: list[str]
    packed: list[str]
    base: str
    classes: tuple[str, ...]
    batches: Batches
    loss: Any

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.loaded.model

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name, detached."""
        return {name: self.model.get_parameter(name).detach() for name in self.names}


def export(config: TrainConfig, target: str, training_python: Path | None = None) -> dict[str, Any]:
    """Write the folder `config.output`.

    Args:
        config: the run, as for `tinyft train`; `data` is a sample, on which the gate trains.
        target: name of a device profile.
        training_python: an interpreter with onnxruntime-training and onnx: make that runtime's own
            artefacts, which differentiate on the device. None: graphs for any onnxruntime.

    Returns:
        what the gate measured, as in `parity.json`.

    Raises:
        InputError: a setting that no graph knows, a target without onnxruntime, or a graph that
            does not do what torch does; nothing is left behind.
    """
    output = config.output
    _check(config, target, training_python)
    job = _prepared(config)
    with write_directory_atomic(output) as work:
        if training_python:
            moments, runtime = [], "onnxruntime-training"
        else:
            moments, runtime = _write_graphs(job, work), "onnxruntime"
        settings = _settings(job, moments) | {"target": target, "runtime": runtime}
        (work / "job.json").write_text(json.dumps(settings, indent=2) + "\n")
        job.loaded.tokenizer.backend_tokenizer.save(str(work / "tokenizer.json"))
        shutil.copyfile(device.__file__, work / "train.py")
        if training_python:
            parity = ort_training.write(job, work, training_python)
        else:
            parity = gate.check(job, work)
        parity["objective"] = settings["kind"]
        if dropout := _dropout(job):
            parity["dropout_left_out"] = dropout
        (work / "parity.json").write_text(json.dumps(parity, indent=2) + "\n")
    return parity


def collect(folder: Path, output: Path) -> None:
    """Make a model folder (LoRA: an adapter) of what a device trained in an export's folder.

    Raises:
        InputError: nothing was trained there, or other tensors than were exported, or on another
            base than is there now; or `output` is not empty.
    """
    output, trained = new_folder(output), folder / "trained.safetensors"
    if not trained.is_file() or not (folder / "job.json").is_file():
        raise InputError(f"{folder} holds no trained.safetensors: run its train.py first.")
    try:
        tensors = load_file(trained)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{trained} cannot be read: {error}. Copy it again.") from error
    made = json.loads((folder / "job.json").read_text())
    if "base" not in made:
        raise InputError(f"{folder} was made by an earlier version of TinyFT, which can import it.")
    for name in sorted({*tensors, *made["trainable"]}):
        found = list(tensors[name].shape) if name in tensors else "missing"
        if found != (wanted := made["trainable"].get(name, "nothing")):
            raise InputError(
                f"{trained} is not of this export: {name} is {found}, and {wanted} was exported."
            )
    recipe = dict(made["recipe"])
    loaded = load(recipe.pop("base"), **recipe)
    if _bits(loaded.model) != made["base"]:
        raise InputError(
            f"{loaded.ref} is no longer the model that was exported to {folder}: its weights are "
            f"others. Put that one back, or export and train again."
        )
    config = TrainConfig.build(made["config"])
    if made["classes"]:
        loaded.model.config.id2label = dict(enumerate(made["classes"]))
        loaded.model.config.label2id = {name: i for i, name in enumerate(made["classes"])}
    if config.trainable == "lora":
        _inject(loaded.model, config)
    with torch.no_grad():
        for name, tensor in tensors.items():
            loaded.model.get_parameter(name).copy_(tensor)
    if config.trainable == "lora":
        adapters.save_adapter(loaded.model, output, loaded.base_ref)
        loaded.tokenizer.save_pretrained(output)
    else:
        save_model(loaded.model, loaded.tokenizer, output)


def _check(config: TrainConfig, target: str, training_python: Path | None) -> None:
    """Refuse what the graphs would silently leave out."""
    problems = []
    runtime = "onnxruntime-training" if training_python else "onnxruntime"
    if runtime not in profile(target).runtimes:
        problems.append(f"--target {target} has no published {runtime}")
    if training_python and config.method == "mezo":
        problems.append("--training-python is for methods with a gradient, and mezo has none")
    if training_python and config.checkpointing == "full":
        problems.append("--training-python's graphs recompute nothing: leave --checkpointing out")
    if training_python and config.base_bits < 16:
        problems.append("--training-python has no gradient through --base-bits 8 or 4")
    if training_python and config.optimizer == "sgd" and config.weight_decay:
        problems.append("onnxruntime-training's SGD has no --weight-decay")
    if config.output is None or config.output.exists():
        problems.append(f"--output {config.output} must be a new folder")
    if config.method not in METHODS_WITH_GRAPHS:
        known = ", ".join(METHODS_WITH_GRAPHS)
        problems.append(f"--method {config.method} cannot be exported: use one of {known}")
    elif config.method == "mezo":
        options = config.options
        if options.directions not in FAMILIES:
            problems.append(f"--directions must be one of {', '.join(FAMILIES)}")
        if options.exact or options.momentum or config.weight_decay:
            problems.append("none of --exact, --momentum and --weight-decay with mezo")
    elif config.optimizer not in ("adamw", "sgd"):
        problems.append(f"--optimizer {config.optimizer} has no graph: use adamw or sgd")
    narrow = config.method == "mezo" and config.base_bits < 16 and config.dtype == "float16"
    left_out = {
        "--trainable prefix": config.trainable == "prefix",
        "--dropout": config.dropout,
        "--grad-clip": config.grad_clip,
        "--grad-accumulation": config.grad_accumulation > 1,
        f"--dtype {config.dtype}": not narrow and config.dtype not in ("auto", "float32"),
        f"--objective {config.objective}": config.objective not in ("auto", "lm", "class"),
        **{as_flag(name): getattr(config, name) for name in LIMITS},
    }
    problems += [f"{flag} is not in the graphs" for flag, given in left_out.items() if given]
    if problems:
        raise InputError("Cannot export: " + "; ".join(problems) + ".")


def _prepared(config: TrainConfig) -> Job:
    examples, _ = read_source(config.data, None, config.skip_bad_rows)
    for example in examples.items:
        if example.kind == "messages":
            raise InputError(
                f"{examples.source}: {examples.unit} {example.line} is a conversation, and devices "
                f"have no chat templates: give prompt and completion."
            )
    encoder = kind_of(config.model) == "encoder"
    if encoder and config.dtype == "float16":
        raise InputError(
            f"--dtype float16 is that of a causal model's embeddings and head, and {config.model} "
            f"is an encoder: leave it out."
        )
    classes = len(examples.items[0].choices) or None if encoder else None
    # Devices compute in float32 on the CPU, whatever the weights were stored in.
    loaded = load(
        config.model,
        dtype="float32",
        base_bits=config.base_bits,
        num_labels=classes,
        seed=config.seed,
    )
    base = _bits(loaded.model)
    if adapters.adapters(loaded.model):
        raise InputError(
            f"{config.model} has adapters on a packed base, and an export makes its own: leave "
            f"--base-bits at 16, or begin from the model that they were made for."
        )
    if not hasattr(loaded.tokenizer, "backend_tokenizer"):
        raise InputError(f"{config.model} has no tokenizer.json, which a device needs.")
    config = config.with_lr(loaded.model.config)
    kind = "class" if encoder else "lm"  # which learns the right one of choices, as a completion
    encoded = encode(
        examples,
        loaded.tokenizer,
        max_length=config.max_length,
        objective="auto" if encoder else "lm",
        encoder=encoder,
    )
    check_rows(loaded.model, encoded)
    loaded.model.set_attn_implementation("eager")  # whose backward is in plain operators
    batches = Batches(encoded, config.batch_size, seed=config.seed, pad_id=pad_id(loaded.tokenizer))
    packed = []
    if config.method != "mezo":  # which makes its own adapters, on bitsandbytes' layers
        if config.trainable == "lora":
            _inject(loaded.model, config)  # the optimizer finds them there
        packed = packed_base.convert(loaded.model)
    optimizer = METHODS[config.method].attach(loaded.model, config)
    packed = packed or packed_base.convert(loaded.model)
    if config.dtype == "float16":
        packed_base.narrow_ends(loaded.model, torch.float16)
    loaded.model.eval()  # graphs know no dropout
    if not encoder:
        check_head(loaded.model)
    names = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    loss = objective(kind)
    if config.method == "green_trainer":
        mask = optimizer.select(lambda part: loss(loaded.model, part), gate.wide(batches[0]))
        names = [name for name, chosen in zip(optimizer.names, mask, strict=True) if chosen]
    return Job(config, loaded, optimizer, names, packed, base, encoded.labels, batches, loss)


def _bits(model: nn.Module) -> str:
    return fingerprint(*zip(*model.named_parameters(), strict=True))


def _dropout(job: Job) -> dict[str, float]:
    """The dropout of the model's own configuration, which the engine trains with."""
    if job.config.method == "mezo":  # whose evaluations know none
        return {}
    found = job.model.config.to_dict().items()
    return {n: v for n, v in found if "drop" in n and isinstance(v, (int, float)) and v}


def _inject(model: nn.Module, config: TrainConfig) -> None:
    adapters.inject(model, config.rank, config.alpha, targets=config.lora_targets, seed=config.seed)


def _write_graphs(job: Job, work: Path) -> list[str]:
    """One graph a step, and its tensors; returns the names of the optimizer's moments."""
    config, zeroth = job.config, job.config.method == "mezo"
    start = {name: tensor.clone() for name, tensor in job.parameters().items()}
    frozen = {n: t.clone() for n, t in graphs.frozen_of(job.model, job.names).items()}
    constants = graphs.constants_of(job.model)
    step = {"step": torch.tensor(0)}
    batch = graphs.batch_inputs(gate.wide(job.batches[0]))
    moments: dict[str, Tensor] = {}
    if zeroth:
        plan = Plan(config.options.directions, [t.shape for t in start.values()])
        counters, number = {"counters": plan.counters}, torch.tensor(0.0)
        drawn = step | {"probe": torch.tensor(0), "seed": torch.tensor(config.seed)}
        forward = zeroth_forward(job.model, job.names, plan)
        arguments = start | frozen | batch | {"scale": number} | drawn
        _save(graphs.trace(forward, constants | counters, arguments), work, "forward")
        update = zeroth_update(job.names, plan)
        _save(graphs.trace(update, counters, start | {"c": number} | drawn), work, "update")
    else:
        adam = graphs.ADAM if config.optimizer == "adamw" else None
        moments = graphs.moments(start) if adam else {}
        function = graphs.gradient_step(job.model, job.names, adam, config.weight_decay)
        arguments = start | frozen | moments | batch | {"lr": torch.tensor(0.0)} | step
        twice = config.checkpointing == "full"
        with packed_base.recomputing(), graphs.blocks_twice(job.model) if twice else nullcontext():
            graph = graphs.trace(function, constants, arguments)
        # The gradients stay inside, under their names, where the gate can ask for them.
        kept = [v for v in graph.graph.outputs if not v.name.endswith(graphs.GRADIENT)]
        graph.graph.outputs[:] = kept
        _save(graph, work, "step")
    for name, tensors in (("initial", start), ("frozen", frozen)):
        if tensors:
            save_file({n: t.contiguous() for n, t in tensors.items()}, work / f"{name}.safetensors")
    return list(moments)


def _settings(job: Job, moments: list[str]) -> dict[str, Any]:
    """What `device.py` reads, and what `collect` makes the model again from."""
    config, tokenizer = job.config, job.loaded.tokenizer
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = list(tokenizer("a")["input_ids"])
    at = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
    wanted = ("lr", "schedule", "warmup", "batch_size", "max_length", "seed", "method")
    flat = {k: v for k, v in config.flat().items() if v is not None and k != "output"}
    return {
        **{name: getattr(config, name) for name in wanted},
        "kind": "class" if job.loaded.kind == "encoder" else "lm",
        "classes": job.classes,
        "alpaca": [alpaca_prompt("{instruction}", given) for given in ("", "{input}")],
        "head": whole[:at],
        "tail": whole[at + len(body) :],
        "eos": [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        "pad_id": pad_id(tokenizer),
        "moments": moments,
        "base": job.base,
        "trainable": {name: list(tensor.shape) for name, tensor in job.parameters().items()},
        "recipe": job.loaded.recipe(),
        "config": flat,
    }


def _save(graph: Any, work: Path, name: str) -> None:
    """A graph and, in a file beside it, its weights (one protobuf holds at most 2 GB)."""
    onnx_ir.save(graph, work / f"{name}.onnx", external_data=f"{name}.onnx.data")
