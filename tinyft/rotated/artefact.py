"""A quantised model on disk: packed weights, scales, zero points and rotations, and a manifest.

```
packed.json          format, recipe, and every block's rotations and clips
packed.safetensors   codes, scales and zero points of the linear layers; the rest in 16 bits
config.json          transformers' own, with the tokenizer's files beside it
```
The rotations R1 to R4 follow from their sizes and, R1, from its signs, which are a tensor. What is
read back is made of the same modules as in training and computes the same numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyft.adapters import LoRALinear, adapters
from tinyft.errors import InputError
from tinyft.kernels.int4_linear import Int4Weight
from tinyft.references import quiet
from tinyft.rotated.layers import QuantLinear
from tinyft.rotated.quantisers import PackedWeight
from tinyft.rotated.search import Choice, Recipe, Rotated

MANIFEST, WEIGHTS = "packed.json", "packed.safetensors"
_SIGNS = "rotation.r1"
_FORMAT = 1


def save(rotated: Rotated, tokenizer: Any, directory: str | Path) -> dict[str, int]:
    """Write a quantised model, packing what is not packed yet; the model stays as it is.

    Returns:
        Bytes of `packed.safetensors`: `linear` (codes, scales, zero points), `embedding`, `rest`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = rotated.model
    tensors: dict[str, Tensor] = {}
    in_linears: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and (module.is_packed or module.quantiser):
            found = _of_packed(module.packed())
            tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
            in_linears |= {f"{name}.{part}" for part in found}
    aliases: set[int] = set()
    for name, tensor in model.state_dict().items():
        if f"{name.removesuffix('weight')}scales" in in_linears or name in in_linears:
            continue
        if tensor.data_ptr() in aliases and tensor.numel():  # an embedding that is the head too
            continue
        aliases.add(tensor.data_ptr())
        # Adapters are multiplied in the base's dtype (`kernels/lora_linear.py`): no bit is lost.
        tensors[name] = tensor.to(model.dtype) if ".lora_" in name else tensor
    if rotated.r1 is not None:
        tensors[_SIGNS] = rotated.r1.signs
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    layers = adapters(model)
    manifest = {
        "format": _FORMAT,
        "dtype": str(model.dtype).removeprefix("torch."),
        **rotated.manifest(),
        "adapters": {name: [layer.rank, layer.alpha] for name, layer in layers.items()},
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # safetensors makes its files unreadable for others
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    with quiet():
        model.config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return _sizes(model, tensors, in_linears)


def _of_packed(weight: PackedWeight | Int4Weight) -> dict[str, Tensor]:
    if isinstance(weight, Int4Weight):
        return {"codes": weight.packed, "scales": weight.scales}
    return {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}


def _sizes(model: nn.Module, tensors: dict[str, Tensor], in_linears: set[str]) -> dict[str, int]:
    embedding = model.get_input_embeddings().weight.data_ptr()
    found = {"linear": 0, "embedding": 0, "rest": 0}
    for name, tensor in tensors.items():
        is_embedding = tensor.data_ptr() == embedding
        kind = "linear" if name in in_linears else "embedding" if is_embedding else "rest"
        found[kind] += tensor.numel() * tensor.element_size()
    return found


def load(directory: str | Path) -> tuple[nn.Module, str]:
    """A quantised model in evaluation mode, frozen, and the dtype of what is not packed.

    Raises:
        InputError: files that are missing, cut or do not belong together.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        with safe_open(directory / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}, and this version reads {_FORMAT}")
        recipe = Recipe(**manifest["recipe"])
        choices = [Choice(**block) for block in manifest["blocks"]]
        with quiet():
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, manifest["dtype"])
                )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"The packed model in {directory} cannot be read ({error}). It needs {MANIFEST}, "
            f"{WEIGHTS} and config.json, whole and of one export: write it again."
        ) from error
    _restore_buffers(model, config)
    rotated = Rotated(model, recipe, arithmetic=False)
    if rotated.r1 is not None and _SIGNS in tensors:
        signs = tensors.pop(_SIGNS)
        rotated.r1.signs.copy_(signs)
    for name in tensors:
        if ".lora_" in name:  # to go on training them
            wide = torch.promote_types(tensors[name].dtype, torch.float32)
            tensors[name] = tensors[name].to(wide)
    for name, (rank, alpha) in manifest["adapters"].items():
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and f"{name}.codes" in tensors:
            parts = [tensors.pop(f"{name}.{part}", None) for part in ("codes", "scales", "zeros")]
            if parts[2] is None:
                module.set_packed(Int4Weight(parts[0], parts[1], module.in_features))
            else:
                module.set_packed(PackedWeight(*parts, module.in_features))
            if f"{name}.input_scale" in tensors:
                module.input_scale = nn.Parameter(tensors[f"{name}.input_scale"])
    own = model.state_dict()
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in wrong},
        strict=False,
        assign=True,
    )
    model.tie_weights()
    rotated.apply(choices)
    lost = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if wrong or lost:
        raise InputError(
            f"The packed model in {directory} is not whole: {', '.join((wrong + lost)[:3])}. "
            f"Write it again."
        )
    model.requires_grad_(False)
    if (directory / "generation_config.json").is_file():
        with quiet():
            model.generation_config = type(model.generation_config).from_pretrained(directory)
    return model.eval(), manifest["dtype"]


def _restore_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that are computed and not stored (rotary frequencies), made off the meta device."""
    for _, module in list(model.named_modules()):
        names = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        if not names:
            continue
        fresh = type(module)(config=config)
        for name in names:
            module.register_buffer(name, getattr(fresh, name), persistent=False)
