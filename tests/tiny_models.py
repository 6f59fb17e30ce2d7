"""Random models of every supported family, small enough to make in a test: two layers, 400 tokens.

Made from transformers' configurations with a fixed seed and saved as plain folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_COMMON = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GQA),
    "gemma": ("GemmaConfig", _GQA),
    "gemma2": ("Gemma2Config", _GQA),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 64}),
    "bert": ("BertConfig", {**_COMMON, "intermediate_size": 64, "max_position_embeddings": 128}),
}
CAUSAL = tuple(name for name in CONFIGS if name != "bert")
SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}


def config_of(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model of a family, with `changes`."""
    name, fields = CONFIGS[family]
    return getattr(transformers, name)(**{**fields, **SPECIAL, **changes})


def save_tiny_model(
    directory: Path, family: str, tokenizer: Any, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random model of a family and `tokenizer` into `directory`, and return it.

    BERT comes as a masked language model: an encoder without a classification head.
    """
    auto = transformers.AutoModelForMaskedLM if family == "bert" else None
    auto = auto or transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config_of(family, **changes)).to(dtype)
        # Configurations start biases at 0 and norms at 1: move them, so that they count.
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
