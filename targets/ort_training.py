"""onnxruntime-training's own artefacts: a forward graph that the runtime differentiates itself.

Its Python package stands in for the stock one under the same name, so what makes and runs the
artefacts (`artefacts.py`) is another interpreter, without torch; the gate compares what it found.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tinyft.errors import InputError
from tinyft.targets import gate, graphs

SCRIPT = Path(__file__).with_name("artefacts.py")


def write(job: Any, work: Path, python: Path) -> dict[str, Any]:
    """Make the artefacts in `work` and check them; leaves the job's model trained.

    Args:
        job: an `export.Job`.
        python: an interpreter with onnxruntime-training and onnx.

    Returns:
        the largest errors, and what was run.

    Raises:
        InputError: the interpreter cannot make them, or they do not train as torch does.
    """
    _write_forward(job, work)
    operators = gate.operators(work)
    check = work / "check"
    check.mkdir()
    config, last = job.config, gate.STEPS - 1
    plan = {
        "trainable": job.names,
        "frozen": list(graphs.frozen_of(job.model, job.names)),
        "adam": [*graphs.ADAM.betas, graphs.ADAM.eps] if config.optimizer == "adamw" else None,
        "weight_decay": config.weight_decay,
        "lr": gate.learning_rate(job),
        "steps": gate.STEPS,
        "gradients_at": [0, last],
    }
    (check / "plan.json").write_text(json.dumps(plan))
    start = {name: tensor.clone().numpy() for name, tensor in job.parameters().items()}
    wanted, batches = [], []
    for i in range(gate.STEPS):
        batch = gate.wide(job.batches[i])
        inputs = {name: tensor.numpy() for name, tensor in graphs.batch_inputs(batch).items()}
        np.savez(check / f"batch{i}.npz", **inputs)
        batches.append(batch)
        wanted.append(gate.engine_loss(job, batch, plan["lr"]))
    _run(python, work)
    with np.load(check / "found.npz") as data:
        found = dict(data)
    shutil.rmtree(check)
    (work / "forward.onnx").unlink()
    losses = [float(found[f"{i}/loss"]) for i in range(gate.STEPS)]
    return {
        "operators": operators,
        "steps": gate.STEPS,
        "runtime": f"onnxruntime-training {found['version']}",
        **gate.compare_losses(
            wanted, losses, lambda: gate.plain_losses(job, start, batches, plan["lr"])
        ),
        "movement_error": gate.compare_movement(job, start, _part(found, "trained/")),
        **{
            f"gradient_error_step_{i}": gate.check_gradients(
                job, batches[i], _part(found, f"{i}/weight/"), _part(found, f"{i}/gradient/")
            )
            for i in plan["gradients_at"]
        },
    }


def _part(found: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}


def _write_forward(job: Any, work: Path) -> None:
    """The graph of the loss with all parameters inside, by their names."""
    loss_of = graphs.Loss(job.model)

    @torch.no_grad()
    def loss(tensors: graphs.Tensors) -> graphs.Tensors:
        return {"loss": loss_of.at(graphs.tensors_of(job.model, tensors), tensors).mean()}

    parameters = job.parameters() | graphs.frozen_of(job.model, job.names)
    batch = graphs.batch_inputs(gate.wide(job.batches[0]))
    graph = graphs.trace(loss, graphs.constants_of(job.model), parameters | batch)
    proto = graphs.with_inside(graph, parameters, batch)
    for node in proto.graph.node:
        if node.op_type == "LayerNormalization":  # its gradient wants the optional outputs
            node.output.extend(f"{node.output[0]}/{x}" for x in ("mean", "inverse_deviation"))
    proto.ir_version = 10  # the newest that the runtime's last release reads
    onnx.save(proto, work / "forward.onnx")


def _run(python: Path, work: Path) -> None:
    command = [str(python), str(SCRIPT), str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"--training-python {python} does not run: {error}.") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise InputError(
            f"--training-python {python} could not make the training artefacts: {said[-1]}. It "
            f"needs onnxruntime-training or onnxruntime-training-cpu 1.19.2, onnx and tokenizers."
        )
