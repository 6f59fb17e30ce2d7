"""What a model reference is: a name, a hub id, a folder, a GGUF file, or something trained on one.

`locate` only looks: it downloads what a name or a hub id means (without weights, where nobody asks
for them), but reads no weights, and never opens a pickle.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyft import assets
from tinyft.errors import InputError, TransientError

MANIFEST = "tinyft.json"
_KINDS = ("model", "adapter", "packed", "seed_log")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = (".safetensors", ".gguf", *_PICKLES)
_NO_PICKLE = (
    "pickled weights can run code when they are opened, so they never are: convert them with "
    "`model.save_pretrained(folder)` of transformers, which writes safetensors"
)


@dataclass(frozen=True)
class Source:
    """Where a reference leads: `form` is `"folder"`, `"gguf"`, `"packed"`, `"adapter"` or
    `"seed_log"`.

    `path` is a folder or the GGUF file itself; `manifest` is what the trained forms say they are.
    """

    ref: str
    path: Path
    form: str
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The reference of the model that this was trained on."""
        if base := self.manifest.get("base"):
            return base
        raise InputError(
            f'{self.ref} does not say which model it was trained on. Write it as "base" into its '
            f'{MANIFEST}, or as "base_model_name_or_path" into its adapter_config.json.'
        )

    @property
    def own_ref(self) -> str:
        """The reference by which an output finds this model again, from any working directory."""
        is_name = self.ref in assets.MODELS or is_hub_id(self.ref)
        return self.ref if is_name else str(self.path)


def locate(ref: str | Path, *, weights: bool = True) -> Source:
    """Follow a reference to files on this machine.

    Args:
        ref: see the module.
        weights: a folder without any will not do; else a model's are not downloaded.

    Raises:
        InputError: nothing there; a folder without a model; only pickles.
        TransientError: no hub reached.
    """
    ref = str(ref)
    if ref in assets.MODELS:
        return _inspect(ref, assets.fetch(ref))
    path = Path(ref).expanduser()
    if path.exists():
        return _inspect(ref, path.resolve(), weights)
    if is_hub_id(ref):
        return _inspect(ref, _from_hub(ref, weights), weights)
    raise InputError(
        f"There is no model at {ref}. Give a folder of safetensors, a GGUF file, a hub id "
        f"(owner/name), or a built-in name: {', '.join(assets.MODELS)}."
    )


def lineage(ref: str | Path) -> Iterator[Source]:
    """Where a reference leads, then what that was trained on, and so on to a whole model."""
    source = locate(ref)
    yield source
    if source.form in ("adapter", "seed_log"):
        yield from lineage(source.base)


def is_hub_id(ref: str) -> bool:
    """Whether a reference has the form `name` or `owner/name` and is nothing on this machine."""
    shape = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", ref)
    return bool(shape) and Path(ref).suffix not in _WEIGHTS and not Path(ref).exists()


def _from_hub(ref: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    large = "*.safetensors" if weights else "adapter_model.safetensors"
    wanted = ["*.json", large, "*.model", "*.txt", "*.jinja"]
    unwanted = ["*/*", "consolidated*.safetensors"]  # the same weights in other formats
    try:
        return Path(snapshot_download(ref, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        unknown = isinstance(error, (RepositoryNotFoundError, HFValidationError))
        raise (InputError if unknown else TransientError)(
            f"{ref!r} is no file or folder here, and no hub gave it ({type(error).__name__}: "
            f"{reason}). Without a hub, give a folder of safetensors, a GGUF file, or a built-in "
            f"name: {', '.join(assets.MODELS)}."
        ) from error


def _inspect(ref: str, path: Path, weights: bool = True) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(ref, path, "gguf")
        hint = f"give its folder {path.parent}" if path.suffix == ".safetensors" else _NO_PICKLE
        raise InputError(f"{ref} is a file but no GGUF model; {hint}.")
    names = sorted(entry.name for entry in path.iterdir())
    if MANIFEST in names:
        manifest = _read_json(path / MANIFEST)
        kind = manifest.get("kind")
        if manifest.get("format") != 1 or kind not in _KINDS:
            raise InputError(
                f"{path / MANIFEST} has format {manifest.get('format')!r} and kind {kind!r}; this "
                f"version of TinyFT reads format 1. Update TinyFT."
            )
        if kind != "model":
            return Source(ref, path, kind, manifest)
    elif "run.json" in names:  # even if its files look whole: the manifest comes last
        raise InputError(f"{ref} is a training run that has not finished. Finish it with --resume.")
    elif "packed.json" in names:
        return Source(ref, path, "packed")
    elif "adapter_config.json" in names:
        if "adapter_model.safetensors" not in names:
            raise InputError(f"{ref} has no adapter_model.safetensors; {_NO_PICKLE}.")
        base = _read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return Source(ref, path, "adapter", {"base": base})
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return Source(ref, path, "folder")
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return Source(ref, path / ggufs[0], "gguf")
    if "config.json" in names and not weights:
        return Source(ref, path, "folder")
    raise InputError(f"{ref} holds no model to load: {_what_is_wrong(path, names, ggufs)}")


def _what_is_wrong(path: Path, names: list[str], ggufs: list[str]) -> str:
    if ggufs:
        return f"it has several GGUF files; name one of them: {', '.join(ggufs)}."
    if any(name.endswith(_PICKLES) for name in names) and "config.json" in names:
        return f"its weights are pickles; {_NO_PICKLE}."
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "nothing"
    return (
        f"a folder needs config.json and *.safetensors, or one *.gguf; {path} has {listed}. "
        f"Built-in names: {', '.join(assets.MODELS)}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}. Write it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


# What every call into the libraries below is wrapped in.


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars, log lines and warnings of the libraries: errors still arrive as
    exceptions, and what a person should know we say ourselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def explained(source: Source, what: str) -> Iterator[None]:
    """Whatever a library raises while it reads a model, as an error about the model."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason"]
        raise InputError(
            f"Cannot read {what} from {source.path}: {lines[0]} ({type(error).__name__}). "
            f"transformers must know the architecture, and the files must be complete."
        ) from error
