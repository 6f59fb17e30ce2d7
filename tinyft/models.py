"""Model references -> model and tokenizer, and back to a plain folder.

A reference is a built-in name (`smollm2-135m`), a hub id (`owner/name`), a folder of safetensors, a
GGUF file, a folder with an adapter in PEFT's format, or an output folder of TinyFT. Everything goes
through transformers' own classes; nothing here knows an architecture. Code from a repository is
never run and pickles are never opened.

Memory: weights in their stored dtype stay views of the memory-mapped file (no copy; pages are
copied one by one when an optimizer writes to them); a cast or a packed base drops the mapping.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyft import adapters, prefix
from tinyft.checkpoint import fsync_path, is_disk_full, write_directory_atomic
from tinyft.data import Encoded, pad_id
from tinyft.errors import InputError, TransientError
from tinyft.kernels import cpu_products
from tinyft.memory import bound_compiled_products
from tinyft.packing import pack
from tinyft.references import Source, explained, lineage, locate, quiet

SEED_LOG = "steps.seedlog"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TOKENIZER_FILES = re.compile(r"(tokenizer\.|tokenizer_config|vocab|merges|spiece|sentencepiece)")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, and how to get the same again.

    Attributes:
        kind: `"causal"`, or `"encoder"` (with a classification head of `num_labels`).
        path: the folder or GGUF file on this machine.
        base_ref: what an output made from this model records as its base: a name, a hub id, or
            an absolute path.
        dtype: of the weights that are not packed, e.g. `"float32"`.
    """

    model: nn.Module
    tokenizer: Any
    ref: str
    kind: str
    path: Path
    base_ref: str
    dtype: str
    base_bits: int
    num_labels: int | None
    seed: int

    def recipe(self) -> dict[str, Any]:
        """The fields of `tinyft.json` from which `load` makes this very model again, bit for bit
        (a new classification head included: it follows from the seed)."""
        return {
            "base": self.base_ref,
            "dtype": self.dtype,
            "base_bits": self.base_bits,
            "num_labels": self.num_labels,
            "seed": self.seed,
        }


def load(
    ref: str | Path,
    *,
    dtype: str = "auto",
    base_bits: int = 16,
    device: str = "cpu",
    num_labels: int | None = None,
    seed: int = 0,
) -> Loaded:
    """Load a model and its tokenizer.

    Adapters come back merged into the base, unless the base is packed (then they stay beside it,
    as trained); a seed log is replayed in the dtype that it was written in.

    Args:
        ref: see the module.
        dtype: a key of `DTYPES`, or `"auto"`: as stored, float32 for GGUF files, and float32 for
            float16 on a CPU, which has no fast float16.
        base_bits: 8 or 4 packs the linear layers of the blocks with bitsandbytes (int8, nf4) and
            freezes them; embeddings, norms and heads keep `dtype`.
        num_labels: classes of an encoder; None takes the checkpoint's own classification head.
            Causal models score the choices themselves and ignore it.
        seed: of a new classification head.

    Raises:
        InputError: nothing there, no model in it, only pickles, an unknown architecture, missing
            or misshapen weights, no tokenizer, no hub.
    """
    _check_options(dtype, base_bits, device)
    bound_compiled_products()
    source = locate(ref)
    if source.form in ("adapter", "seed_log"):
        return _load_trained(source, dtype, base_bits, device, num_labels, seed)
    if source.form == "packed":
        return _load_packed(source, dtype, device, seed)
    config = _read_config(source)
    kind = _kind(config, source)
    num_labels = _num_labels(config, source, num_labels) if kind == "encoder" else None
    dtype = _resolve_dtype(dtype, config, source, device)
    tokenizer = load_tokenizer(source)
    # A base to be packed is first left as stored, unread: each layer is cast and packed in turn.
    stored = dtype if base_bits == 16 or source.form == "gguf" else "auto"
    with quiet(), _seeded(seed):
        model = _from_pretrained(source, config, kind, stored, num_labels)
        if base_bits < 16:
            pack(model, base_bits, DTYPES[dtype], device)
        model.to(device)
    cpu_products.install_for(model)
    _check_vocabulary(model, tokenizer, source)
    _fault_in(model)
    return Loaded(
        model.eval(),
        tokenizer,
        source.ref,
        kind,
        source.path,
        source.own_ref,
        dtype,
        base_bits,
        num_labels,
        seed,
    )


def kind_of(ref: str | Path) -> str:
    """`"causal"` or `"encoder"`, from the configuration alone (no weights are read)."""
    *_, base = lineage(ref)
    return _kind(_read_config(base), base)


@dataclass(frozen=True)
class Outline:
    """What is known of a model before its weights are read.

    Attributes:
        config: as transformers reads it.
        kind: `"causal"` or `"encoder"`.
        tokenizer: its own.
        dtype: what `"auto"` means for it, a key of `DTYPES`.
    """

    config: Any
    kind: str
    tokenizer: Any
    dtype: str

    def build(self, dtype: str, num_labels: int | None = None, config: Any = None) -> nn.Module:
        """A model of this configuration, in evaluation mode, its weights not those of any file.

        Args:
            dtype: a key of `DTYPES`.
            num_labels: classes of an encoder.
            config: another one for the same kind of model.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        config = config or self.config
        encoder = self.kind == "encoder"
        if encoder and num_labels:
            config.num_labels = num_labels
        auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
        with quiet():
            return auto.from_config(config, dtype=DTYPES[dtype]).eval()


def outline(ref: str | Path, device: str = "cpu") -> Outline:
    """Read all of a model but its weights, which need not be there.

    Args:
        ref: see the module; of something trained, its base.
        device: where it would run, which decides what dtype is meant by `"auto"`.

    Raises:
        InputError: as `load`.
    """
    source = locate(ref, weights=False)
    if source.form == "packed":
        raise InputError(
            f"{ref} is packed already, and what trains on it is not priced. Plan on the model that "
            f"it was made from, with --method roste."
        )
    if source.form in ("adapter", "seed_log"):
        return outline(source.base, device)
    config = _read_config(source)
    tokenizer = load_tokenizer(source)
    dtype = _resolve_dtype("auto", config, source, device)
    return Outline(config, _kind(config, source), tokenizer, dtype)


def base_model(model: nn.Module) -> nn.Module:
    """The backbone: everything from token ids to the last hidden states `(B, T, D)`."""
    return model.base_model


def n_positions(model: nn.Module) -> int | None:
    """The most tokens of a row, where a model looks its positions up in a table that was learnt;
    None where it computes them."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and re.search(r"(^|\.)(wpe|embed_positions|positions?_\w+)$", name)
    ]
    # OPT's and BioGPT's tables begin with rows for nobody, RoBERTa's with those up to padding's.
    return min(
        (
            table.num_embeddings
            - (getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1)
            - prefix.positions_taken(model)
            for table in tables
        ),
        default=None,
    )


def check_rows(model: nn.Module, encoded: Encoded, *, for_prefix: bool = False) -> None:
    """Refuse rows that a model cannot read.

    Args:
        for_prefix: a prefix will be put on the model, and takes positions.

    Raises:
        InputError: a row has a token that the model has no embedding for, or is longer than its
            table of positions.
    """
    known = model.get_input_embeddings().num_embeddings
    for item in encoded.items:
        if (highest := item.highest_id) >= known:
            raise InputError(
                f"{encoded.source} {item.line}: the tokenizer gives it the id {highest}, and the "
                f"model has {known} embeddings. Leave that token out, or put the model's own "
                f"tokenizer into its folder."
            )
    positions = n_positions(model)
    if positions is None:
        return
    positions -= prefix.TOKENS if for_prefix else 0
    longest = max(encoded.items, key=lambda item: item.length)
    if longest.length > positions:
        beside = " beside its prefix" if for_prefix or prefix.is_attached(model) else ""
        raise InputError(
            f"{encoded.source} {longest.line}: {longest.length} tokens, and the model has "
            f"{positions} positions{beside}. Give --max-length {positions}."
        )


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Write the names of an encoder's classes into its configuration; without names, nothing."""
    if labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {name: i for i, name in enumerate(labels)}


def head(model: nn.Module) -> nn.Module:
    """What turns hidden states into logits: a language-model head or a classifier."""
    if (output := model.get_output_embeddings()) is not None:
        return output
    return [child for child in model.children() if child is not model.base_model][-1]


# Reading it.


def _load_packed(source: Source, dtype: str, device: str, seed: int) -> Loaded:
    """A rotated, quantised model, which computes in the dtype that it was made in."""
    from tinyft.rotated import artefact

    model, stored = artefact.load(source.path)
    if dtype not in ("auto", stored):
        raise InputError(
            f"{source.ref} computes in {stored}, as it was packed, and not in {dtype}: leave "
            f"--dtype out."
        )
    tokenizer = load_tokenizer(source)
    model.to(device)
    cpu_products.install_for(model)
    return Loaded(
        model, tokenizer, source.ref, "causal", source.path, source.own_ref, stored, 4, None, seed
    )


def _load_trained(
    source: Source,
    dtype: str,
    base_bits: int,
    device: str,
    num_labels: int | None,
    seed: int,
) -> Loaded:
    """What was trained, on its base: an adapter or a seed log."""
    made = source.manifest
    wanted = dtype
    num_labels = made.get("num_labels", num_labels)
    if num_labels is None and source.form == "adapter":  # PEFT's, which says so by its head alone
        num_labels = adapters.saved_classes(source.path)
    seed = made.get("seed", seed)
    if source.form == "seed_log":  # bits follow from the arithmetic that wrote the log
        dtype = made.get("dtype", dtype)
        base_bits = made.get("base_bits", base_bits)
    try:
        base = load(
            source.base,
            dtype=dtype,
            base_bits=base_bits,
            device=device,
            num_labels=num_labels,
            seed=seed,
        )
    except InputError as error:
        raise InputError(
            f"{source.ref} was trained on {source.base}, which cannot be loaded: {error} Put the "
            f"base back, or correct its path in {source.path}."
        ) from error
    model = base.model
    if source.form == "adapter" and prefix.is_saved(source.path):
        prefix.load(model, source.path)
    elif source.form == "adapter":
        adapters.remove(model)  # a packed base's own, which were trained on
        adapters.load_adapter(model, source.path)
    else:
        from tinyft.optim.mezo import replay

        replay(model, source.path / SEED_LOG)
    name_classes(model, made.get("labels", ()))
    if base.base_bits == 16:
        adapters.merge(model)
    if wanted not in ("auto", base.dtype):
        for parameter in model.parameters():  # not the buffers: rotary tables stay float32
            parameter.data = parameter.data.to(DTYPES[wanted])
    has_tokenizer = any(_TOKENIZER_FILES.match(entry.name) for entry in source.path.iterdir())
    return replace(
        base,
        model=model.eval(),
        tokenizer=load_tokenizer(source) if has_tokenizer else base.tokenizer,
        ref=source.ref,
        path=source.path,
        base_ref=source.own_ref,
        dtype=base.dtype if wanted == "auto" else wanted,
    )


def _check_options(dtype: str, base_bits: int, device: str) -> None:
    wrong = []
    if dtype != "auto" and dtype not in DTYPES:
        wrong.append(f"--dtype {dtype} is unknown: auto, {', '.join(DTYPES)}.")
    if base_bits not in (16, 8, 4):
        wrong.append(f"--base-bits {base_bits} is not possible: 16 (as --dtype says), 8 or 4.")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        wrong.append(f"--device {device} is unknown: auto, cpu, cuda or cuda:N.")
    else:
        if kind == "cuda" and not torch.cuda.is_available():
            wrong.append(
                f"--device {device} needs a GPU that torch can use; there is none: use cpu."
            )
    if wrong:
        raise InputError(" ".join(wrong))


def _where(source: Source) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: the path, and that no code of a repository is run."""
    if source.form == "gguf":
        place = {
            "pretrained_model_name_or_path": source.path.parent,
            "gguf_file": source.path.name,
        }
    else:
        place = {"pretrained_model_name_or_path": source.path}
    return {**place, "trust_remote_code": False, "local_files_only": True}


def _read_config(source: Source) -> Any:
    from transformers import AutoConfig

    with quiet(), explained(source, "its configuration"):
        config = AutoConfig.from_pretrained(**_where(source))
    if source.form == "folder" and getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "in some way")
        raise InputError(
            f"{source.ref} is already quantised ({method}). Give the original weights, and "
            f"--base-bits 8 or 4 to pack them here."
        )
    return config


def _kind(config: Any, source: Source) -> str:
    from transformers.models.auto import modeling_auto as auto

    model_type = config.model_type
    masked = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not getattr(config, "is_encoder_decoder", False):
        # BERT and its kin are in both tables: they decode only when their configuration says so.
        if causal and (not masked or getattr(config, "is_decoder", False)):
            return "causal"
        if masked and model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            return "encoder"
    raise InputError(
        f"{source.ref} is a {model_type} model. TinyFT trains causal language models (Llama, Qwen, "
        f"Gemma, GPT-2, OPT, GPT-NeoX, ...) and encoders of BERT's kind."
    )


def _num_labels(config: Any, source: Source, num_labels: int | None) -> int:
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    if num_labels is None and not trained:
        raise InputError(
            f"{source.ref} is an encoder without a classification head. Train it on rows with "
            f"choices, which say how many classes there are."
        )
    return config.num_labels if num_labels is None else num_labels


def _resolve_dtype(dtype: str, config: Any, source: Source, device: str) -> str:
    if dtype != "auto":
        return dtype
    if source.form == "gguf":
        return "float32"
    stored = str(config.dtype or "").removeprefix("torch.") or _first_dtype(source)
    on_cpu = torch.device(device).type == "cpu"
    return "float32" if stored not in DTYPES or (stored == "float16" and on_cpu) else stored


def _first_dtype(source: Source) -> str:
    from safetensors import safe_open

    files = sorted(source.path.glob("*.safetensors"))
    if not files:
        return "float32"
    with explained(source, "its weights"):
        with safe_open(files[0], "pt") as file:
            return _STORED.get(file.get_slice(next(iter(file.keys()))).get_dtype(), "float32")


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a source, with a padding token (the end of text where it has none)."""
    from transformers import AutoTokenizer

    folder = source.path
    if source.form != "gguf" and not any(_TOKENIZER_FILES.match(e.name) for e in folder.iterdir()):
        raise InputError(
            f"{source.ref} has no tokenizer. Put the files of its tokenizer (tokenizer.json, "
            f"tokenizer_config.json) into {folder}."
        )
    with quiet(), explained(source, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**_where(source))
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _from_pretrained(
    source: Source, config: Any, kind: str, dtype: str, num_labels: int | None
) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "encoder":
        config.num_labels = num_labels
    auto = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    with explained(source, "its weights"):
        model, info = auto.from_pretrained(
            **_where(source),
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            # Another number of classes gets a new head; what else is misshapen is refused below.
            ignore_mismatched_sizes=kind == "encoder",
            output_loading_info=True,
        )
    new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    if kind == "encoder":  # a new head (and pooler) is what fine-tuning is for
        new = {name for name in new if re.search(r"\.\d+\.|embed", name)}
    if new:
        listed = ", ".join(sorted(new)[:5]) + (", ..." if len(new) > 5 else "")
        raise InputError(
            f"{source.ref} lacks {len(new)} tensors of a {type(model).__name__}: {listed}. They "
            f"would be random. Give the complete checkpoint."
        )
    # Dequantised from GGUF: no longer quantised, or it could be neither moved nor saved.
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def _check_vocabulary(model: nn.Module, tokenizer: Any, source: Source) -> None:
    """Tokens that were added may lie beyond the embeddings (Gemma 3's for images does): only rows
    that have one cannot be read (`check_rows`). Padding is in nearly all batches."""
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.vocab_size - 1, pad_id(tokenizer))
    if highest >= rows:
        raise InputError(
            f"The tokenizer of {source.ref} has ids up to {highest}, its model {rows} embeddings: "
            f"they do not belong together. Put the model's own tokenizer into the folder."
        )


def _fault_in(model: nn.Module) -> None:
    """Read a word of every page, so that what is measured from here on counts the weights as
    loaded and no step pays for reading the file."""
    for tensor in model.parameters():
        if tensor.device.type == "cpu":
            tensor.detach().flatten()[:: 4096 // tensor.element_size()].sum()


# Writing it.


def save_model(model: nn.Module, tokenizer: Any, directory: str | Path) -> None:
    """Write a plain model folder, whole or not at all.

    Into a folder that exists the finished and synced files are moved one by one: `config.json`,
    without which it is no model, goes first and comes last.

    Raises:
        InputError: the weights are packed, or not all of the model; the disk is full or cannot be
            written.
    """
    if any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        raise InputError(
            "A model packed to 8 or 4 bits cannot be written as a plain folder. Load it with "
            "--base-bits 16, or keep the adapter."
        )
    if any(type(module).__module__.startswith("tinyft.rotated") for module in model.modules()):
        raise InputError(
            "A rotated and quantised model cannot be written as a plain folder. Keep its own, "
            "which TinyFT loads, or use `tinyft export --format packed` or `inference`."
        )
    if prefix.is_attached(model):
        raise InputError(
            "A prefix is no part of the weights, so it cannot be merged into a plain model. Keep "
            "the adapter folder: TinyFT and PEFT load it on its base."
        )
    directory = Path(directory)
    fresh = directory / ".model" if directory.exists() else directory
    try:
        with write_directory_atomic(fresh) as work:
            with quiet():
                model.save_pretrained(work)
                tokenizer.save_pretrained(work)
            for file in work.iterdir():  # safetensors makes its files unreadable for others
                shutil.copymode(work / "config.json", file)
        if fresh != directory:
            (directory / "config.json").unlink(missing_ok=True)
            for old in directory.glob("model*.safetensors*"):  # perhaps other shards than ours
                old.unlink()
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(directory / file.name)
            fresh.rmdir()
            fsync_path(directory)
    except Exception as error:
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        raise (TransientError if is_disk_full(error) else InputError)(
            f"Cannot write the model to {directory}: {error}. Free some space or choose another "
            f"--output; what was saved before is still there."
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
