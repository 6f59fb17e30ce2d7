"""Torch functions to ONNX graphs in standard operators, and the graph of one gradient step.

A function of named tensors is traced with its backward pass (`make_fx`, so that what differentiates
is torch's own autograd), then written by torch's exporter. Nothing here knows an architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir
import onnx_ir.passes.common
import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.functional import cross_entropy

from tinyft.activations import blocks_of
from tinyft.batches import Batch
from tinyft.encoding import NO_LOSS
from tinyft.losses import class_logits, logits_at

OPSET = 18
aten = torch.ops.aten
NEXT, GRADIENT = "/next", "/gradient"  # what follows a parameter's name
Tensors = dict[str, Tensor]

# Dimensions of the inputs that a device chooses anew each step: examples, tokens of a row, tokens
# that carry loss.
_DYNAMIC = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "sequence"),
    "position": ("labelled",),
    "target": ("labelled",),
    "answers": ("batch",),
}


def batch_inputs(batch: Batch) -> Tensors:
    """A batch as a graph takes it: without padding of labels, whose number is data.

    `position` (N,) are the flat places of what predicts the labels `target` (N,).
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.labels is None:
        return inputs | {"answers": batch.answers}
    row, column = (batch.labels[:, 1:] != NO_LOSS).nonzero(as_tuple=True)
    width = batch.labels.shape[1]
    return inputs | {"position": row * width + column, "target": batch.labels[row, column + 1]}


def losses(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """`(N,)` float32: the loss of every labelled token, or of every example of a class."""
    return cross_entropy(*_logits(model, inputs), reduction="none")


def _logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`(N, V)` float32, and the labels `(N,)`."""
    batch = Batch(inputs["input_ids"], inputs["attention_mask"])
    if "answers" in inputs:
        logits, labels = class_logits(model, batch), inputs["answers"]
    else:
        logits, labels = logits_at(model, batch, inputs["position"]), inputs["target"]
    return logits.flatten(0, -2), labels


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits (N, V) and labels (N,), whose gradient keeps its digits.

    softmax(z) - onehot(y) pulls at each row of a head, and the pulls add up to nothing: an error in
    the sum of exponentials that they share must change them all by the same factor. So p_y - 1 is
    -sum_{j != y} p_j here, as in `kernels/chunked_cross_entropy.py`, for which there is no
    operator. torch's own gradients are 1.4e-5 off in float32 over 49,152 logits, these 2e-6.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        y = labels.unsqueeze(1)
        top = logits.amax(1, keepdim=True)
        terms = (logits - top).exp().scatter(1, y, 0.0)
        others = terms.unflatten(1, (-1, _near_root(terms.shape[1]))).sum(2).sum(1, keepdim=True)
        of_label = (logits.gather(1, y) - top).double()  # log(1 + others) keeps those of others
        total = others + of_label.exp()
        ctx.save_for_backward(terms, others, total, y)
        return (total.log() - of_label).to(logits.dtype).squeeze(1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        terms, others, total, y = ctx.saved_tensors
        scale = g.unsqueeze(1) / total.to(g.dtype)
        return (scale * terms).scatter(1, y, -scale * others), None


def _near_root(n: int) -> int:
    """The largest divisor up to the root: a runtime adds one number after the other, and two short
    sums of 49,152 numbers are off by less than a long one."""
    return next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)


class Loss(nn.Module):
    """The loss as a module's forward, so that parameters can be given to it from outside.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Mapping[str, Tensor], by: Sequence[Tensor] = ()) -> Any:
        """See `losses`; with `by`, their mean and its gradients by those tensors."""
        if not by:
            return losses(self.model, inputs)
        loss = _CrossEntropy.apply(*_logits(self.model, inputs)).mean()
        return loss.detach(), torch.autograd.grad(loss, by)

    def at(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        by: Sequence[Tensor] = (),
    ) -> Any:
        """What `forward` gives with the model's parameters and buffers replaced by `tensors`."""
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self, named, (inputs, by))


@contextmanager
def blocks_twice(model: nn.Module) -> Iterator[None]:
    """Within it, a block keeps its input alone, and its backward pass runs it a second time."""
    blocks = blocks_of(model)
    try:
        for block in blocks:
            block.forward = partial(_twice, block, block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _twice(block: nn.Module, forward: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    bare = []

    def run(x: Tensor) -> Tensor:
        y = forward(x, *args, **kwargs)
        bare.append(isinstance(y, Tensor))
        return y if bare[-1] else y[0]

    y = _Twice.apply(run, x, *(p for p in block.parameters() if p.requires_grad))
    return y if bare[0] else (y,)


class _Twice(torch.autograd.Function):
    """A block's second run waits for its output's gradient: else a runtime would see the same thing
    computed twice and keep the first, or run both at once."""

    @staticmethod
    def forward(ctx, run: Callable, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        again = (x + 0 * g.flatten()[0]).detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(again)
        return None, *torch.autograd.grad(y, [again, *parameters], g)


@dataclass(frozen=True)
class Adam:
    """AdamW's constants."""

    betas: tuple[float, float]
    eps: float


ADAM = Adam((0.9, 0.999), 1e-8)  # as torch has them, and the engine


def gradient_step(
    model: nn.Module, trainable: Sequence[str], adam: Adam | None, weight_decay: float
) -> Callable[[Tensors], Tensors]:
    """Forward, backward and update as a function `tensors -> outputs` for `trace`.

    Outputs are `loss`, then for every trainable tensor its next value (with AdamW its next moments,
    too), `<name>/next`, and its gradient, `<name>/gradient`.

    Args:
        adam: None for SGD.
    """
    loss_of = Loss(model)

    def step(tensors: Tensors) -> Tensors:
        w = {name: tensors[name].detach().requires_grad_() for name in trainable}
        with torch.enable_grad():
            replaced = {**tensors_of(model, tensors), **w}
            loss, found = loss_of.at(replaced, tensors, by=list(w.values()))
        gradients = dict(zip(trainable, found, strict=True))
        outputs = {"loss": loss}
        # A device writes next values over the old ones, so no weight's may be ready before its last
        # use. Every use ends in some gradient: the learning rate waits for them all.
        all_there = 0 * torch.stack([g.flatten()[0] for g in found]).sum()
        lr = tensors["lr"] + all_there
        if adam is not None:
            # 1 - beta^t by the logarithm: of a Python number the exporter keeps a float32's bits,
            # enough for the logarithm of 0.999, but 1 - 0.999 would be off by 1e-5.
            t = tensors["step"].double() + 1
            correction1, correction2 = (1 - torch.exp(t * math.log(beta)) for beta in adam.betas)
            step_size = (lr.double() / correction1).float()
            scale = correction2.sqrt().float()
        for name in trainable:
            g, p = gradients[name], tensors[name] * (1 - lr * weight_decay)
            if adam is None:
                outputs[name + NEXT] = p - lr * g
                continue
            # torch.optim.AdamW, in its order of operations.
            (beta1, beta2), m, v = adam.betas, f"{name}/exp_avg", f"{name}/exp_avg_sq"
            outputs[m + NEXT] = tensors[m] + (1 - beta1) * (g - tensors[m])
            outputs[v + NEXT] = beta2 * tensors[v] + (1 - beta2) * (g * g)
            denominator = outputs[v + NEXT].sqrt() / scale + adam.eps
            outputs[name + NEXT] = p - step_size * (outputs[m + NEXT] / denominator)
        return outputs | {name + GRADIENT: g for name, g in gradients.items()}

    return step


def moments(parameters: Mapping[str, Tensor]) -> Tensors:
    """AdamW's state at the start."""
    kinds = ("exp_avg", "exp_avg_sq")
    return {f"{n}/{kind}": torch.zeros_like(p) for n, p in parameters.items() for kind in kinds}


def tensors_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """Those of `tensors` that are parameters or buffers of the model."""
    names = dict([*model.named_parameters(), *model.named_buffers()])
    return {name: tensors[name] for name in names if name in tensors}


def frozen_of(model: nn.Module, trainable: Sequence[str]) -> Tensors:
    """The model's other parameters. A graph takes them as inputs: what it held itself, the runtime
    would fold and pack at will, into second copies and quantised weights into float ones."""
    names = set(trainable)
    return {n: p.detach() for n, p in model.named_parameters() if n not in names}


def constants_of(model: nn.Module) -> Tensors:
    """What a graph holds itself: buffers, which are small."""
    return dict(model.named_buffers())


def with_inside(graph: Any, tensors: Tensors, inputs: Collection[str]) -> onnx.ModelProto:
    """A traced graph of the `inputs` alone, with `tensors` inside by their names."""
    proto = onnx_ir.to_proto(graph)
    kept = [value for value in proto.graph.input if value.name in inputs]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for name, tensor in tensors.items():
        proto.graph.initializer.append(_initializer(name, tensor))
    return proto


def _initializer(name: str, tensor: Tensor) -> onnx.TensorProto:
    if tensor.dtype != torch.bfloat16:
        return onnx.numpy_helper.from_array(tensor.numpy(), name)
    data = tensor.contiguous().view(torch.int16).numpy().tobytes()  # numpy has no such type
    return onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, tensor.shape, data, raw=True)


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph, and its weights beside it."""
    data = path.with_name(f"{path.name}.data")
    onnx.save(proto, path, save_as_external_data=True, location=data.name)
    data.chmod(path.stat().st_mode)  # onnx makes it unreadable for others


def trace(function: Callable[[Tensors], Tensors], constants: Tensors, arguments: Tensors) -> Any:
    """An `onnx_ir.Model` of `function`, with inputs and outputs named as its tensors.

    Args:
        function: of all tensors by name; pure.
        constants: become initialisers.
        arguments: examples of the inputs; sizes of a batch must be larger than 1.
    """
    names = [*constants, *arguments]
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        found = function(dict(zip(names, tensors, strict=True)))
        outputs[:] = found
        return list(found.values())

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    fakes = [_fake(mode, name, t.detach()) for name, t in (constants | arguments).items()]
    rules = {aten.split_with_sizes.default: _slices, aten.split.Tensor: _equal_slices}
    rules[aten.squeeze.dims] = _squeezed
    rules = {**core_aten_decompositions(), **rules}
    graph = make_fx(flat, tracing_mode="fake", decomposition_table=rules)(*fakes)
    dims = {d: torch.export.Dim(d, min=2) for d in ("batch", "sequence", "labelled")}
    shapes = tuple(
        {i: dims[d] for i, d in enumerate(_DYNAMIC[name])} if name in _DYNAMIC else None
        for name in arguments
    )
    # The exporter would decompose it again, half of its time, which only writing in place needs.
    again = patch.object(torch.export.ExportedProgram, "run_decompositions", _as_it_is)
    with again if _make_pure(graph) else nullcontext():
        program = torch.onnx.export(
            _Holding(graph, list(constants.values())),
            tuple(arguments.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(arguments),
            output_names=outputs,
            dynamic_shapes=(shapes,),
            # The exporter's optimiser takes 1e-8 for 0 and drops AdamW's eps (onnxscript 0.7).
            optimize=False,
            verbose=False,
        )
    passes = onnx_ir.passes.common
    for tidy in (
        passes.InlinePass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # or a third of a graph's file is its traces
    ):
        tidy(program.model)
    return program.model


def _make_pure(graph: torch.fx.GraphModule) -> bool:
    """Operators that write into a tensor become those that make the result, where nothing else sees
    the tensor (what reads it later reads, in a traced graph, what the writing returned); returns
    whether all did."""

    def schema(node: torch.fx.Node) -> Any:
        return getattr(node.target, "_schema", None)

    def is_view(node: torch.fx.Node) -> bool:
        return bool(schema(node)) and any(r.alias_info for r in schema(node).returns)

    at = {node: i for i, node in enumerate(graph.graph.nodes)}

    def is_alone(written: Any, by: torch.fx.Node) -> bool:
        """Whether nothing but what reads `by` sees the tensor after it."""
        if not isinstance(written, torch.fx.Node) or written.op != "call_function":
            return False
        others = [user for user in written.users if user is not by]
        return not is_view(written) and not any(is_view(o) or at[o] > at[by] for o in others)

    pure = True
    for node in at:
        if not schema(node) or not schema(node).is_mutable:
            continue
        name = node.target.overloadpacket.__name__
        packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
        made = getattr(packet, node.target._overloadname, None)
        if made and node.target.namespace == "aten" and is_alone(node.args[0], node):
            node.target = made
        else:
            pure = False
    graph.recompile()
    return pure


def _as_it_is(program: torch.export.ExportedProgram, table: Any) -> torch.export.ExportedProgram:
    return program


def _slices(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """What `split` and `chunk` are; the exporter would make a sequence of them."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]


def _equal_slices(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole, rest = divmod(x.shape[dim], size)
    return _slices(x, [size] * whole + ([rest] if rest else []), dim)


def _squeezed(x: Tensor, dims: Sequence[int]) -> Tensor:
    """What a core decomposition leaves, and the exporter does not know."""
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.select(dim, 0) if x.shape[dim] == 1 else x
    return x


class _Holding(nn.Module):
    """A traced graph with its first inputs held as buffers."""

    def __init__(self, graph: nn.Module, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.held = graph, len(held)
        for i, tensor in enumerate(held):
            self.register_buffer(f"held{i}", tensor)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """The graph's outputs."""
        return self.graph(*(getattr(self, f"held{i}") for i in range(self.held)), *tensors)


def _fake(mode: FakeTensorMode, name: str, tensor: Tensor) -> Tensor:
    if name not in _DYNAMIC:
        return mode.from_tensor(tensor, static_shapes=True)
    sizes = [DimDynamic.DYNAMIC] * tensor.dim()
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(sizes))
