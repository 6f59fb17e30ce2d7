"""Which models can be rotated, and where the parts are that rotations go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tinyft.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where things are in a kind of model: names in its backbone, then in one of its blocks."""

    embeddings: tuple[str, ...]
    layers: str
    final_norm: str
    attention: str
    attention_norm: str
    readers: tuple[str, ...]  # q, k, v; the last one makes the values
    output: str
    mlp_norm: str
    inner: tuple[str, ...]
    down: str

    def linears(self) -> tuple[str, ...]:
        return (*self.readers, self.output, *self.inner, self.down)


_LLAMA = Family(
    embeddings=("embed_tokens",),
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    attention_norm="input_layernorm",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    inner=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
_NEOX = Family(
    embeddings=("embed_in",),
    layers="layers",
    final_norm="final_layer_norm",
    attention="attention",
    attention_norm="input_layernorm",
    readers=("attention.query_key_value",),
    output="attention.dense",
    mlp_norm="post_attention_layernorm",
    inner=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
_OPT = Family(
    embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    layers="decoder.layers",
    final_norm="decoder.final_layer_norm",
    attention="self_attn",
    attention_norm="self_attn_layer_norm",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    inner=("fc1",),
    down="fc2",
)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "gpt_neox": _NEOX,
    "opt": _OPT,
}


def obstacle(config: Any) -> str:
    """Why a model of this configuration cannot be rotated; empty if it can."""
    kind = getattr(config, "model_type", "unknown")
    supported = f"RoSTE rotates and quantises {', '.join(FAMILIES)}. For others train with lora."
    if kind not in FAMILIES:
        return f"This is a {kind} model. {supported}"
    odd = {
        "norms after its blocks": not getattr(config, "do_layer_norm_before", True),
        "projected embeddings": getattr(config, "word_embed_proj_dim", config.hidden_size)
        != config.hidden_size,
        "no norm at the end": getattr(config, "_remove_final_layer_norm", False),
    }
    if found := [what for what, is_so in odd.items() if is_so]:
        return f"This {kind} model has {' and '.join(found)}, which no rotation passes. {supported}"
    return ""


def family_of(model: nn.Module) -> Family:
    """Where things are in `model`.

    Raises:
        InputError: it is of a kind whose rotations are not known here.
    """
    config = getattr(model, "config", None)
    if reason := obstacle(config):
        raise InputError(reason)
    if model.get_output_embeddings() is None:
        raise InputError(
            f"A {type(model).__name__} has no head over words: RoSTE trains causal language models."
        )
    return FAMILIES[config.model_type]


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks in the model."""
    layers = model.base_model.get_submodule(family_of(model).layers)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return [f"{prefix}.{i}" for i in range(len(layers))]
