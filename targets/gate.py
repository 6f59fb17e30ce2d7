"""The gate that every export passes: its graphs do what torch does, or there is no export.

Checked in the runtime itself, through the code that the device will run (`device.Job`): operators
on the list below, every gradient (or every weight's bits, in zeroth order), and the losses of 20
steps against the engine's own optimizer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tinyft.batches import Batch
from tinyft.errors import InputError
from tinyft.targets import device, graphs
from tinyft.zeroth.update import update_

STEPS, TOLERANCE = 20, 1e-5
# Adam divides a gradient by its size, rounding too, and large steps make one run of another: graphs
# take the rate as an input, so none larger is needed to check them.
_MOST_LR = 1e-3
# A gradient below this share of the largest is rounding alone (a key's bias, whose gradient is 0):
# it is held to the tolerance at this size.
_SMALL = 1e-3
_MOVEMENT = 0.01
_PROJECTED = "projected_gradient_error"
# Standard operators that every build of the runtime has. No sequences, no control flow, no fusions
# of one vendor; nothing that is exported differently from what it computes.
OPERATORS = frozenset(
    """Abs Add And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip
    Concat
    Constant ConstantOfShape Cos CumSum DequantizeLinear Div Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity IsInf IsNaN
    LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max Min Mod Mul Neg Not Or Pad
    Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Round
    ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Split Sqrt Squeeze Sub
    Tanh Tile Transpose Trilu Unsqueeze Where Xor""".split()
)


def wide(batch: Batch) -> Batch:
    """A batch of at least two rows: a size of 1 would be baked into a graph."""
    if len(batch.input_ids) > 1:
        return batch
    twice = batch.repeat(2)
    return replace(twice, copies=1)


def check(job: Any, folder: Path) -> dict[str, Any]:
    """Train the export and the engine side by side; leaves the job's model trained.

    Args:
        job: an `export.Job`.
        folder: the export.

    Returns:
        the largest errors, and what was run.

    Raises:
        InputError: naming the operator or the tensor that differs.
    """
    found = {"operators": operators(folder), "steps": STEPS}
    zeroth = job.config.method == "mezo"
    graph = "forward.onnx" if zeroth else "step.onnx"
    if job.packed:
        found["packed"] = still_packed(folder / graph, job.packed)
    runner = device.Job(folder)
    lr = learning_rate(job)
    batches = [wide(job.batches[i]) for i in range(STEPS)]
    wanted, losses, last = [], [], {}
    for i, batch in enumerate(batches):
        inputs = {k: t.numpy() for k, t in graphs.batch_inputs(batch).items()}
        if not zeroth and i in (0, STEPS - 1):  # adapters start where half their gradients are 0
            gradients = _gradients(job, runner, folder, inputs)
            last[f"gradient_error_step_{i}"] = check_gradients(job, batch, runner.state, gradients)
        got = runner.step(inputs, lr)
        if zeroth:
            want, wanted_g = _zeroth_step(job, batch, lr, got)
            error = float(np.abs(got["projected_gradients"] - wanted_g).max())
            last[_PROJECTED] = max(last.get(_PROJECTED, 0.0), error)
        else:
            want = engine_loss(job, batch, lr)
        wanted.append(want)
        losses.append(float(got["loss"]))
    if zeroth:
        found |= compare_losses(wanted, losses)
        _same_bits(job, runner)
        last["weights"] = "the same bits as torch's replay"
    else:
        start: dict[str, np.ndarray] = {}
        device.read_tensors(folder / "initial.safetensors", start)
        found |= compare_losses(wanted, losses, lambda: plain_losses(job, start, batches, lr))
        last["movement_error"] = compare_movement(job, start, runner.trained())
    return {**found, "runtime": f"onnxruntime {device.onnxruntime.__version__}", **last}


def learning_rate(job: Any) -> float:
    """At which an export is checked, as float32 holds it."""
    return float(np.float32(min(job.config.lr, _MOST_LR)))


def engine_loss(job: Any, batch: Batch, lr: float) -> float:
    """The loss of the engine's own step along a gradient."""
    job.optimizer.param_groups[0]["lr"] = lr
    return float(job.optimizer.step(lambda part: job.loss(job.model, part), batch))


def _zeroth_step(job: Any, batch: Batch, lr: float, got: dict) -> tuple[float, list[float]]:
    """The engine's loss and projected gradients; then its step along the export's own numbers, so
    that the weights must stay the same bits."""
    optimizer, taken = job.optimizer, []
    optimizer._update = lambda lr, gradients: taken.extend(gradients)
    loss = engine_loss(job, batch, lr)
    probes = got["projected_gradients"].tolist()
    draws = [optimizer.directions.draw(optimizer.steps_taken, p) for p in range(len(probes))]
    update_(
        optimizer.parameters,
        [(draw, lr * g / len(probes)) for draw, g in zip(draws, probes, strict=True)],
    )
    optimizer.steps_taken += 1
    return loss, taken


def _gradients(job: Any, runner: device.Job, folder: Path, inputs: dict) -> dict[str, np.ndarray]:
    """Every gradient of the graph that is shipped, read from inside it."""
    path = folder / "checked.onnx"  # beside the weights that it shares
    graph = onnx.load(folder / "step.onnx", load_external_data=False)
    for name in job.names:
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(name + graphs.GRADIENT))
    onnx.save(graph, path)
    try:
        session = device.session(path)
    finally:
        path.unlink()
    tensors = {**runner.state, **runner.frozen, **inputs, **runner.scalars(), "lr": np.float32(0)}
    feeds = {i.name: np.asarray(tensors[i.name]) for i in session.get_inputs()}
    names = [name + graphs.GRADIENT for name in job.names]
    return dict(zip(job.names, session.run(names, feeds), strict=True))


def check_gradients(
    job: Any, batch: Batch, weights: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Compare gradients at `weights` with torch's there.

    In torch without this project's own backward passes: plain autograd of the plain loss. An error
    above the tolerance counts against float64's gradients, where torch's own float32 is off, too:
    it may be twice that and the tolerance.

    Returns:
        the largest error, of its tensor's size, and whose; torch's own error if it was needed.

    Raises:
        InputError: naming the tensor whose error is too large.
    """
    with _moved(job, weights):
        want = _autograd(job, batch)
        errors = _errors(found, want)
        worst = max(errors, key=errors.__getitem__)
        report = {"error": errors[worst], "tensor": worst}
        allowed = dict.fromkeys(errors, TOLERANCE)
        if not errors[worst] <= TOLERANCE:
            job.model.double()
            exact = _autograd(job, batch)
            job.model.float()
            own, errors = _errors(want, exact), _errors(found, exact)
            allowed = {name: 2 * error + TOLERANCE for name, error in own.items()}
            report["error_in_float64"] = errors[worst]
            report["error_of_torch_in_float64"] = own[worst]
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise InputError(
                f"The export differs from torch: the gradient of {name} is off by {error:.2g} of "
                f"its size. Nothing was written."
            )
    return report


@contextmanager
def _moved(job: Any, weights: Mapping[str, np.ndarray]) -> Iterator[None]:
    """The model at other weights, its buffers and frozen parameters kept as they were."""
    kept = {name: tensor.clone() for name, tensor in job.parameters().items()}
    try:
        with torch.no_grad():
            for name in job.names:
                job.model.get_parameter(name).copy_(torch.from_numpy(weights[name]))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                job.model.get_parameter(name).copy_(tensor)


def _autograd(job: Any, batch: Batch) -> dict[str, torch.Tensor]:
    parameters = [job.model.get_parameter(name) for name in job.names]
    loss = graphs.losses(job.model, graphs.batch_inputs(batch)).mean()
    return dict(zip(job.names, torch.autograd.grad(loss, parameters), strict=True))


def largest_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of a number, over the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def _errors(found: Mapping[str, Any], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each tensor, of its largest entry."""
    largest = max(float(g.abs().max()) for g in wanted.values())
    return {
        name: float((torch.as_tensor(found[name]) - want).abs().max())
        / max(float(want.abs().max()), _SMALL * largest)
        for name, want in wanted.items()
    }


def compare_losses(
    wanted: Sequence[float],
    found: Sequence[float],
    plain: Callable[[], tuple[Sequence[float], Sequence[float]]] | None = None,
) -> dict[str, float]:
    """Compare the losses of an export's steps with the engine's.

    As for gradients, an error above the tolerance counts against float64's losses, where torch's
    own in float32 are off, too: it may be twice as large as torch's were by then, and the
    tolerance.

    Args:
        wanted: the engine's, step by step.
        found: the export's.
        plain: makes torch's in float32 and in float64, if they are needed; None: there are none.

    Returns:
        the largest error, of a loss's size; float64's, if they were needed.

    Raises:
        InputError: naming the step whose loss is too far off.
    """
    errors, allowed = _off(found, wanted), np.full(len(wanted), TOLERANCE)
    report = {"loss_error": float(errors.max())}
    if not report["loss_error"] <= TOLERANCE and plain:
        single, exact = plain()
        errors, own = _off(found, exact), np.maximum.accumulate(_off(single, exact))
        allowed += 2 * own
        report["loss_error_in_float64"] = float(errors.max())
        report["loss_error_of_torch_in_float64"] = float(own[-1])
    for step in np.flatnonzero(~(errors <= allowed)):
        raise InputError(
            f"The export differs from torch: the loss of step {step} is {found[step]:.8g}, torch's "
            f"{wanted[step]:.8g}. Nothing was written."
        )
    return report


def _off(found: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Errors of numbers, each of its size."""
    return np.abs(np.subtract(found, wanted)) / np.maximum(np.abs(wanted), 1e-6)


def plain_losses(
    job: Any, start: Mapping[str, np.ndarray], batches: Sequence[Batch], lr: float
) -> tuple[list[float], list[float]]:
    """The losses of steps from `start` on in float32 and in float64, by torch's own optimizer and
    plain autograd: nothing of this project's but the loss. The model stays as it is."""
    with _moved(job, start):
        single = list(_plain_training(job, batches, lr))
    with _moved(job, start):
        job.model.double()
        try:
            return single, list(_plain_training(job, batches, lr))
        finally:
            job.model.float()


def _plain_training(job: Any, batches: Sequence[Batch], lr: float) -> Iterator[float]:
    parameters = [job.model.get_parameter(name) for name in job.names]
    how = {"lr": lr, "weight_decay": job.config.weight_decay}
    optimizer: torch.optim.Optimizer
    if job.config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, **how)
    else:
        adam = graphs.ADAM
        optimizer = torch.optim.AdamW(parameters, betas=adam.betas, eps=adam.eps, **how)
    for batch in batches:
        loss = graphs.losses(job.model, graphs.batch_inputs(batch)).mean()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def compare_movement(
    job: Any, start: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> float:
    """How far all weights are from torch's, over how far torch moved them (both as one vector).

    Raises:
        InputError: it is more than rounding under Adam explains.
    """
    off, moved = 0.0, 0.0
    for name, want in job.parameters().items():
        off += float(np.square(found[name] - want.numpy(), dtype=np.float64).sum())
        moved += float(np.square(start[name] - want.numpy(), dtype=np.float64).sum())
    error = (off / max(moved, sys.float_info.min)) ** 0.5  # a rate of 0 moves nothing
    if not error <= _MOVEMENT:
        raise InputError(
            f"The export differs from torch: {STEPS} steps took the weights elsewhere, {error:.2g} "
            f"of their way. Nothing was written."
        )
    return error


def _same_bits(job: Any, runner: device.Job) -> None:
    for name, want in job.parameters().items():
        if not np.array_equal(runner.state[name].view(np.int32), want.numpy().view(np.int32)):
            raise InputError(
                f"The export differs from torch: {name} has other bits after {STEPS} steps along "
                f"the same directions. Nothing was written."
            )


def optimised(path: Path) -> onnx.GraphProto:
    """A graph as the runtime, with its defaults on a CPU, has rewritten it."""
    result = path.with_name("optimised.onnx")
    try:
        options = device.onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(result)
        device.onnxruntime.InferenceSession(path, options, providers=device.PROVIDERS)
        return onnx.load(result).graph
    finally:
        for left in path.parent.glob("optimised.onnx*"):
            left.unlink()


def still_packed(path: Path, packed: list[str]) -> int:
    """How many weights a graph has in 8 or 4 bits, once the runtime has optimised it.

    Raises:
        InputError: one has become a float weight of the graph's own.
    """
    graph = optimised(path)
    bits = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    sizes = {
        i.name: math.prod(d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in graph.input
        if i.type.tensor_type.elem_type in bits
    }
    if lost := [name for name in packed if name not in sizes]:
        raise InputError(
            f"{path.name} does not take {lost[0]} in 8 or 4 bits. Nothing was written."
        )
    for tensor in graph.initializer:  # tables are smaller
        if tensor.data_type not in bits and math.prod(tensor.dims) >= max(sizes.values()):
            raise InputError(
                f"{path.name} holds {tensor.name} {tuple(tensor.dims)} once it is optimised: a "
                f"packed weight that was folded into a float one. Nothing was written."
            )
    return len(packed)


def operators(folder: Path, also: frozenset[str] = frozenset()) -> list[str]:
    """The operators of all graphs.

    Raises:
        InputError: one is neither in `OPERATORS` nor in `also`, or a graph has functions of its
            own.
    """
    found = set()
    for path in sorted(folder.glob("*.onnx")):
        graph = onnx.load(path, load_external_data=False)
        for node in graph.graph.node:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            found.add(name)
            if name not in OPERATORS | also:
                raise InputError(
                    f"{path.name} needs the operator {name} for {', '.join(node.output)}, which is "
                    f"not among those known to run and to train as torch does. Nothing was written."
                )
    return sorted(found)
