"""A frozen base packed to 8 or 4 bits, by bitsandbytes, on CPU and GPU alike."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from tinyft.memory import trim


def pack(model: nn.Module, bits: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Pack the linear layers of the blocks to 8 bits (int8 by rows) or 4 (nf4, double quant).

    In place, one layer at a time: each weight is freed before the next is read. The rest of the
    model is cast to `dtype` (copied, so that no mapped file stays resident).
    """
    from transformers.pytorch_utils import Conv1D

    # It would say at every call that float32 activations are rounded to float16 on the way to int8.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    backbone = model.base_model
    for name, old in list(backbone.named_modules()):
        in_blocks = any(part.isdigit() for part in name.split("."))
        if not in_blocks or type(old) not in (nn.Linear, Conv1D):
            continue
        weight = old.weight.detach().to(device, dtype)
        if isinstance(old, Conv1D):  # GPT-2's linear layers, stored transposed
            weight = weight.T.contiguous()
        backbone.set_submodule(name, _packed(weight, old.bias, bits, dtype))
        del old, weight
        trim()  # or the temporaries stay: 0.3 GB for 135M weights
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, dtype, copy=True)


def _packed(weight: Tensor, bias: nn.Parameter | None, bits: int, dtype: torch.dtype) -> nn.Linear:
    """A bitsandbytes layer with `weight` (out, in) packed on the device that it is on."""
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    shape = (in_features, out_features, bias is not None)
    with torch.device("meta"):  # or the layer would fill a float weight of its own first
        if bits == 8:
            # threshold 0: each row by itself, so that no result depends on its neighbours.
            layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=0.0)
            kind, options = bnb.nn.Int8Params, {"has_fp16_weights": False}
        else:
            layer = bnb.nn.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
            # Else, on some CPUs, evaluation would rewrite the weights in another layout, refuse
            # widths that are no multiple of 32, and differ from training.
            layer.support_avx512bf16_for_cpu = False
            kind, options = bnb.nn.Params4bit, {"quant_type": "nf4", "module": layer}
    # Moving the parameter, even to where it is, packs it.
    layer.weight = kind(weight, requires_grad=False, **options).to(weight.device)
    layer.bias = bias
    return layer
