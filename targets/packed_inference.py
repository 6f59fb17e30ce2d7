"""`tinyft export --format inference` of a model that RoSTE packed: its linear weights stay packed.

The graph computes in float32. So does, to compare, the packed model in torch; but where an
activation lies within rounding errors of the middle between two codes, they take different ones,
and a network of some hundred roundings makes much of it. Therefore torch is led: wherever it
rounds, it goes on with the number that the graph has there. Each such number must be, to the
tolerance, as near to torch's own as any of the quantiser's, and the logits torch's to the
tolerance. How far apart both are when torch goes its own way is told as well.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tinyft.checkpoint import write_directory_atomic
from tinyft.errors import InputError
from tinyft.models import load
from tinyft.rotated.quantisers import Quantiser
from tinyft.targets import device, gate, graphs, rotated_graph

_NODE = "MatMulNBits"


def export_packed(ref: str | Path, output: Path) -> dict[str, Any]:
    """Write the folder `output`.

    Args:
        ref: a packed model, or what was trained on one.

    Returns:
        `logit_error`: the largest of a logit, of the largest logit, torch being led; `flips`: the
        share of activations that torch rounds to another code; `free_error`: as `logit_error`, but
        root mean square and torch on its own; `agreement`: the share of tokens of same best guess
        then; `packed_weights` and the `bytes` of the file.

    Raises:
        InputError: `output` exists, a weight has no packed form in a graph, or the graph is not
            what torch computes; nothing is left behind.
    """
    if output.exists():
        raise InputError(f"--output {output} must be a new folder.")
    loaded = load(ref)
    model = loaded.model.float()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * 17).view(3, 17) * 7919 % vocabulary
    with write_directory_atomic(output) as work:
        path = work / "model.onnx"
        weights = _write(_twin(model), getattr(torch, loaded.dtype), ids, path)
        loaded.tokenizer.save_pretrained(work)
        gate.operators(work, rotated_graph.OPERATORS)
        found = compare(model, path, ids)
        found["packed_weights"] = still_packed(path, weights)
        found["bytes"] = sum(path.stat().st_size for path in work.glob("model.onnx*"))
    return found


def _twin(model: nn.Module) -> nn.Module:
    """Modules of its own over the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _write(model: nn.Module, dtype: torch.dtype, ids: Tensor, path: Path) -> dict[str, int]:
    """The graph, in which what is rounded is named by its place.

    Returns:
        how many weights each packed tensor holds.
    """
    heard = rotated_graph.convert(model, dtype)

    @torch.no_grad()
    def run(tensors: graphs.Tensors) -> graphs.Tensors:
        heard.clear()
        ids = tensors["input_ids"]
        # Causal: padding on the right changes nothing before it.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        out = functional_call(model, graphs.tensors_of(model, tensors), (), inputs)
        return {"logits": out.logits, **heard}

    parameters, batch = graphs.frozen_of(model, []), {"input_ids": ids}
    graph = graphs.trace(run, graphs.constants_of(model), parameters | batch)
    proto = graphs.with_inside(graph, parameters, batch)
    del proto.graph.output[1:]
    graphs.save(proto, path)
    layers = (m for m in model.modules() if isinstance(m, rotated_graph.GraphLinear))
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(m.codes)]: m.in_features * m.out_features for m in layers}


def compare(model: nn.Module, path: Path, ids: Tensor) -> dict[str, float]:
    """A graph with a packed model in float32, whose quantisers are replaced; see the module.

    Raises:
        InputError: the graph does not compute what the model does.
    """
    places = list(rotated_graph.places(model))
    got = _with_roundings(path, ids, [place for place, _, _ in places])
    (alone,) = device.session(path).run(None, {"input_ids": ids.numpy()})
    alone = torch.from_numpy(alone)
    with torch.no_grad():
        free = model(ids).logits
        guides = []
        for place, owner, attribute in places:
            guides.append(_Guide(place, getattr(owner, attribute), got[place]))
            setattr(owner, attribute, guides[-1])
        led = model(ids).logits
    # Telling what it rounds, the graph must not be another one to the runtime.
    error, apart = gate.largest_error(got["logits"], led), gate.largest_error(alone, got["logits"])
    if not max(error, apart) <= gate.TOLERANCE:
        raise InputError(
            f"The graph's logits are off by {max(error, apart):.2g}. Nothing was written."
        )
    numbers = sum(guide.wanted.numel() for guide in guides)
    return {
        "logit_error": error,
        "flips": sum(guide.flips for guide in guides) / max(numbers, 1),
        "free_error": float((alone - free).square().mean().sqrt() / free.square().mean().sqrt()),
        "agreement": float((alone.argmax(-1) == free.argmax(-1)).float().mean()),
    }


def _with_roundings(path: Path, ids: Tensor, places: list[str]) -> dict[str, Tensor]:
    """The logits of a graph, and what it has rounded, read from inside it."""
    checked = path.with_name("checked.onnx")  # beside the weights that it shares
    proto = onnx.load(path, load_external_data=False)
    for place in places:
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(place))
    onnx.save(proto, checked)
    try:
        session = device.session(checked)
    finally:
        checked.unlink()
    names = ["logits", *places]
    results = session.run(names, {"input_ids": ids.numpy()})
    return {name: torch.from_numpy(result) for name, result in zip(names, results, strict=True)}


class _Guide:
    """Stands for a quantiser: rounds to what the graph has, after a look whether that is right."""

    symmetric, clipped, group = False, True, 0  # nothing that a fused kernel does

    def __init__(self, place: str, quantiser: Quantiser, wanted: Tensor) -> None:
        self.place, self.quantiser, self.wanted, self.flips = place, quantiser, wanted, 0

    def __call__(self, x: Tensor) -> Tensor:
        """Of `(..., n)`."""
        rows, wanted = x.reshape(-1, x.shape[-1]), self.wanted.reshape(-1, x.shape[-1])
        own = self.quantiser.round(rows)
        s, _ = self.quantiser.grid(rows.clone())
        # Off by the tolerance, of its range, a number is nearest to a code that is twice that
        # farther from it than its own.
        slack = 2 * gate.TOLERANCE * self.quantiser.top
        farther = ((wanted - rows).abs() - (own - rows).abs()) / s
        allowed = slack + self._undecided(rows, s, slack)
        self.flips += int(((wanted - own).abs() > 0.5 * s).sum())
        if not bool((farther <= allowed).all()):
            raise InputError(
                f"The graph rounds {self.place} as torch does not: by {float(farther.max()):.2g} "
                f"steps. Nothing was written."
            )
        return self.wanted.view_as(x)

    def _undecided(self, rows: Tensor, s: Tensor, slack: float) -> Tensor:
        """1 for rows whose zero point lies in the middle between two: what they clip may be a step
        farther. Else 0."""
        if self.quantiser.symmetric:
            return torch.zeros_like(s)
        z = -self.quantiser.clip * rows.amin(1, keepdim=True).clamp(max=0) / s
        return ((z - z.floor() - 0.5).abs() < slack).float()


def still_packed(path: Path, weights: dict[str, int]) -> int:
    """How many weights are packed once the runtime has optimised the graph.

    Raises:
        InputError: it has made floats of some, or of a table in 16 bits.
    """
    written = onnx.load(path, load_external_data=False).graph
    optimised = gate.optimised(path)
    sizes = {tensor.name: _bytes(tensor) for tensor in optimised.initializer}
    packed = {node.input[1] for node in optimised.node if node.op_type == _NODE}
    exact = all(
        attribute.i == 1
        for node in optimised.node
        if node.op_type == _NODE
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    )
    before, after = sum(map(_bytes, written.initializer)), sum(sizes.values())
    if not exact or not weights.keys() <= packed or after > 1.01 * before:
        raise InputError(
            f"onnxruntime {device.onnxruntime.__version__} makes {after:,} bytes of {before:,} of "
            f"weights, {len(packed)} of {len(weights)} packed. Nothing was written."
        )
    return sum(weights.values())


def _bytes(tensor: onnx.TensorProto) -> int:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
