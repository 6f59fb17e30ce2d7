"""Prefix tuning: P trainable key-value pairs before every sequence, in every attention layer.

Li & Liang, "Prefix-Tuning" (ACL 2021), without their reparametrisation, and started, as MeZO needs
it, from the activations of real tokens. Works on every decoder that takes a cache; the files are
PEFT's (`PREFIX_TUNING`).
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinyft.adapters import CONFIG, WEIGHTS
from tinyft.errors import InputError

TOKENS = 5  # MeZO's setting


class Prefix(nn.Module):
    """The key-value pairs of all layers: `(P, layers * 2 * heads * head_dim)`, PEFT's layout."""

    def __init__(self, weight: Tensor, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.n_layers, self.n_heads = n_layers, n_heads

    def forward(self, ids: Tensor) -> Tensor:
        """One copy a row of `ids` (R, T): `(R, layers * 2, heads, P, head_dim)`.

        By row, so that rows may see different prefixes (zeroth-order copies do).
        """
        n_tokens = self.weight.shape[0]
        pairs = self.weight.view(n_tokens, 2 * self.n_layers, self.n_heads, -1)
        return pairs.permute(1, 2, 0, 3).expand(len(ids), -1, -1, -1, -1)


def inject(model: nn.Module, tokens: int = TOKENS, seed: int = 0) -> None:
    """Put a trainable prefix on a decoder and freeze everything else.

    It starts as the keys and values of `tokens` random tokens, which matters: from noise, zeroth
    order does not get away.

    Raises:
        InputError: the model fills no key-value cache, or has a prefix already.
    """
    if is_attached(model):
        raise InputError("This model has a prefix already. Train that one on.")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    device = next(model.parameters()).device
    with torch.no_grad():
        out = model.base_model(input_ids=ids.to(device))
    cache = getattr(out, "cache", None) or getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or getattr(layers[0], "keys", None) is None:
        raise InputError(
            f"{type(model).__name__} keeps no key-value cache, so it can have no prefix. Use "
            f"--trainable lora or all."
        )
    # (layers * 2, heads, P, head_dim) -> (P, layers * 2 * heads * head_dim)
    pairs = torch.cat([torch.cat((layer.keys, layer.values)) for layer in layers])
    n_layers, n_heads = len(layers), pairs.shape[1]
    _attach(model, Prefix(pairs.permute(2, 0, 1, 3).flatten(1).contiguous(), n_layers, n_heads))


def is_attached(model: nn.Module) -> bool:
    """Whether `inject` or `load` put a prefix on the model."""
    return isinstance(getattr(model, "prefix", None), Prefix)


def positions_taken(model: nn.Module) -> int:
    """By the model's prefix; 0 without one."""
    return len(model.prefix.weight) if is_attached(model) else 0


def _attach(model: nn.Module, prefix: Prefix) -> None:
    if is_attached(model):  # as the base of one that was trained on
        model.prefix.hook.remove()
    model.requires_grad_(False)
    model.prefix = prefix
    # The module that holds the blocks is the one that every caller goes through (OPT's causal model
    # passes its backbone by).
    stack = max(
        (m for m in model.modules() if any(isinstance(c, nn.ModuleList) for c in m.children())),
        key=lambda m: max(len(c) for c in m.children() if isinstance(c, nn.ModuleList)),
    )
    prefix.hook = stack.register_forward_pre_hook(_prepend(prefix, stack), with_kwargs=True)


def _prepend(prefix: Prefix, stack: nn.Module) -> Any:
    from transformers import DynamicCache

    # transformers renames `past_key_values` to `cache`, model by model.
    accepted = inspect.signature(stack.forward).parameters
    known = [name for name in ("cache", "past_key_values") if name in accepted]

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None else ids
        n_tokens = prefix.weight.shape[0]
        given = next((name for name in known if kwargs.get(name) is not None), None)
        cache = kwargs[given] if given else DynamicCache()
        if cache.get_seq_length() == 0:  # a later step of generation has it already
            pairs = prefix(ids).to(next(module.parameters()).dtype)
            for layer in range(prefix.n_layers):
                cache.update(pairs[:, 2 * layer], pairs[:, 2 * layer + 1], layer)
        for name in known:
            kwargs.pop(name, None)
        kwargs[known[0]] = cache
        if (mask := kwargs.get("attention_mask")) is not None and mask.dim() == 2:
            kwargs["attention_mask"] = torch.cat((mask.new_ones(len(mask), n_tokens), mask), 1)
        if kwargs.get("position_ids") is not None:  # generation counts its own tokens alone
            kwargs["position_ids"] = kwargs["position_ids"] + n_tokens
        return args, kwargs

    return hook


def save(model: nn.Module, directory: Path, base_ref: str) -> None:
    """Write the prefix as PEFT does: a config and safetensors."""
    prefix, config = model.prefix, model.config.get_text_config()
    n_tokens, width = prefix.weight.shape
    described = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_ref,
        "inference_mode": True,
        "num_virtual_tokens": n_tokens,
        "num_layers": prefix.n_layers,
        "num_attention_heads": prefix.n_heads,
        "token_dim": width // (2 * prefix.n_layers),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.hidden_size,
        "prefix_projection": False,
    }
    weight = prefix.weight.detach().contiguous().clone()
    save_file({"prompt_embeddings": weight}, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def is_saved(directory: Path) -> bool:
    """Whether the folder's adapter is a prefix."""
    try:
        return json.loads((directory / CONFIG).read_text())["peft_type"] == "PREFIX_TUNING"
    except (OSError, ValueError, KeyError):
        return False


def load(model: nn.Module, directory: Path) -> None:
    """Put a saved prefix, PEFT's or ours, on its base, in place of one that is there."""
    config = json.loads((directory / CONFIG).read_text())
    weight = load_file(directory / WEIGHTS)["prompt_embeddings"]
    n_layers, n_heads = config["num_layers"], config["num_attention_heads"]
    text = model.config.get_text_config()
    if config.get("prefix_projection") or n_layers != text.num_hidden_layers:
        raise InputError(
            f"The prefix in {directory} ({n_layers} layers, projection "
            f"{config.get('prefix_projection')}) does not fit this {type(model).__name__} of "
            f"{text.num_hidden_layers} layers. Load it on the model that it was trained on "
            f"({config.get('base_model_name_or_path')})."
        )
    device = next(model.parameters()).device
    _attach(model, Prefix(weight.to(device), n_layers, n_heads))
