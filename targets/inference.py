"""`tinyft export --format inference`: a trained model, merged, as one graph for any onnxruntime.

`model.onnx` takes `input_ids` (B, T), padded on the right, and gives `logits` (B, T, V), causal;
a classifier takes `attention_mask` (B, T), too, and gives (B, classes). No cache of keys and
values. In the int8 form the linear weights of the blocks are int8 with a scale an output, behind
DequantizeLinear nodes; activations, embeddings and the head stay in float32. What RoSTE packed has
a graph of its own: see `packed_inference.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tinyft.checkpoint import write_directory_atomic
from tinyft.errors import InputError
from tinyft.models import load
from tinyft.references import lineage
from tinyft.targets import device, gate, graphs
from tinyft.targets.packed_inference import export_packed


def export_inference(ref: str | Path, output: Path, *, int8: bool) -> dict[str, Any]:
    """Write the folder `output`.

    Args:
        ref: a model, or what a run left.
        int8: quantise the linear weights of the blocks.

    Returns:
        the largest error of a logit, of the largest logit; above the tolerance the same against
        float64, where torch's own float32 is off, too; `bytes` on disk; in int8, the share of
        tokens whose best guess is the float model's.

    Raises:
        InputError: nothing there, `output` exists, or the graph's logits are not torch's; nothing
            is left behind.
    """
    if output.exists():
        raise InputError(f"--output {output} must be a new folder.")
    if _is_packed(ref):
        if int8:
            raise InputError(
                f"{ref} has packed weights, of fewer bits or as many: use --format inference."
            )
        return export_packed(ref, output)
    loaded = load(ref, dtype="float32")
    model = loaded.model
    model.set_attn_implementation("eager")
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * 17).view(3, 17) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        plain = model(**batch).logits
        weights = _quantised(model) if int8 else {}
        want = model(**batch).logits
    inputs = dict(batch)
    if loaded.kind != "encoder":
        del batch["attention_mask"]
    with write_directory_atomic(output) as work:
        _write(model, weights, batch, work / "model.onnx")
        loaded.tokenizer.save_pretrained(work)
        gate.operators(work)
        options = device.options()
        # Else some builds round activations to 8 bits, too, for a faster product.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        path, providers = work / "model.onnx", device.PROVIDERS
        session = device.onnxruntime.InferenceSession(path, options, providers=providers)
        feeds = {name: tensor.numpy() for name, tensor in batch.items()}
        got = torch.from_numpy(session.run(None, feeds)[0])
        seen = mask.bool() if got.dim() == 3 else slice(None)
        error = gate.largest_error(got[seen], want[seen])
        found = {"logit_error": error}
        if not error <= gate.TOLERANCE:  # as far as torch's own float32 is from float64?
            with torch.no_grad():
                exact = model.double()(**inputs).logits
            own = gate.largest_error(want[seen], exact[seen])
            error = gate.largest_error(got[seen], exact[seen])
            found |= {"error_in_float64": error, "error_of_torch_in_float64": own}
            if not error <= 2 * own + gate.TOLERANCE:
                raise InputError(f"The graph's logits are off by {error:.2g}. Nothing was written.")
        if int8:
            agree = (got[seen].argmax(-1) == plain[seen].argmax(-1)).float().mean()
            found |= {"int8_weights": _kept(work / "model.onnx", weights)}
            found |= {"agreement": float(agree)}
        found["bytes"] = sum(path.stat().st_size for path in work.glob("model.onnx*"))
    return found


def _is_packed(ref: str | Path) -> bool:
    """Whether a model, or what it was trained on, is one that RoSTE packed."""
    *_, base = lineage(ref)
    return base.form == "packed"


def _quantised(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, int]]:
    """int8 weights, scales and the axis of the outputs, by name; the model gets what they stand
    for, in place."""
    found = {}
    for path, module in model.base_model.named_modules():
        conv1d = type(module).__name__ == "Conv1D"
        if not (conv1d or isinstance(module, nn.Linear)) or not any(
            part.isdigit() for part in path.split(".")
        ):
            continue
        axis = 1 if conv1d else 0
        scale = module.weight.abs().amax(1 - axis, keepdim=True).clamp_min(1e-12) / 127
        q = (module.weight / scale).round().to(torch.int8)
        module.weight.copy_(q.float() * scale)
        name = next(n for n, p in model.named_parameters() if p is module.weight)
        found[name] = q, scale.flatten(), axis
    return found


def _write(model: nn.Module, weights: dict, batch: dict[str, Tensor], path: Path) -> None:
    @torch.no_grad()
    def logits(tensors: graphs.Tensors) -> graphs.Tensors:
        # Causal: padding on the right changes nothing before it.
        inputs = {"attention_mask": torch.ones_like(tensors["input_ids"])}
        inputs |= {name: tensors[name] for name in batch}
        if "attention_mask" not in batch:
            inputs["use_cache"] = False
        return {
            "logits": functional_call(model, graphs.tensors_of(model, tensors), (), inputs).logits
        }

    parameters = graphs.frozen_of(model, [])
    graph = graphs.trace(logits, graphs.constants_of(model), parameters | batch)
    inside = {name: tensor for name, tensor in parameters.items() if name not in weights}
    for name, (q, scale, _) in weights.items():
        inside |= {f"{name}/int8": q, f"{name}/scale": scale}
    proto = graphs.with_inside(graph, inside, batch)
    for name, (_, _, axis) in weights.items():
        inputs = [f"{name}/int8", f"{name}/scale"]
        node = onnx.helper.make_node("DequantizeLinear", inputs, [name], axis=axis)
        proto.graph.node.insert(0, node)
    graphs.save(proto, path)


def _kept(path: Path, weights: dict) -> int:
    """How many weights are int8 once the runtime has optimised the graph.

    Raises:
        InputError: it has made floats of some.
    """
    initializers = gate.optimised(path).initializer
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    kept = sum(math.prod(t.dims) for t in initializers if t.data_type in kinds)
    packed = sum(q.numel() for q, _, _ in weights.values())
    if kept < packed:
        raise InputError(
            f"onnxruntime {device.onnxruntime.__version__} makes floats of {packed - kept} of "
            f"{packed} int8 weights. Nothing was written."
        )
    return packed
