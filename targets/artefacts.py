"""onnxruntime-training's artefacts of a graph: made, and run over a few batches.

    PYTHON artefacts.py FOLDER

PYTHON has onnxruntime-training (or onnxruntime-training-cpu) and onnx, and needs no torch; that
package takes the name of the stock runtime, so it is often an environment of its own. FOLDER holds
`forward.onnx`, whose output is the loss, and `check/plan.json` with batches beside it. What the
runtime found in them goes to `check/found.npz`, for `gate.py` to compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from device import Artefacts, training_package

artifacts, onnxblock = training_package("artifacts"), training_package("onnxblock")


def make(folder: Path, plan: dict[str, Any]) -> None:
    """Training, evaluation and optimizer graphs, and the checkpoint.

    Args:
        plan: `trainable` and `frozen`, names; `adam`, (beta1, beta2, eps) or None for SGD;
            `weight_decay`.
    """
    optimizer = artifacts.OptimType.SGD
    if plan["adam"]:
        beta1, beta2, eps = plan["adam"]
        optimizer = onnxblock.optim.AdamW(
            betas=(beta1, beta2), eps=eps, weight_decay=plan["weight_decay"]
        )
    artifacts.generate_artifacts(
        onnx.load(folder / "forward.onnx"),
        requires_grad=plan["trainable"],
        frozen_params=plan["frozen"],
        optimizer=optimizer,
        artifact_directory=folder,
    )
    path = folder / "optimizer_model.onnx"
    graph = onnx.load(path)
    graph.ir_version = 10  # the newest that the last release, 1.19.2, reads
    for function in (graph.graph, *graph.functions):
        for node in function.node:
            for attribute in node.attribute:
                if attribute.name == "adam_mode":  # 0 is torch's order of operations, 1 another's
                    attribute.i = 0
    onnx.save(graph, path)


def run(folder: Path, plan: dict[str, Any]) -> None:
    """Losses of the batches' steps; weights and gradients before those of `gradients_at`."""
    job, found = Artefacts(folder), {}
    for i in range(plan["steps"]):
        batch = dict(np.load(folder / "check" / f"batch{i}.npz"))
        if i in plan["gradients_at"]:
            job.gradients(batch)
            for name, parameter in job.state.parameters:
                if parameter.requires_grad:
                    found[f"{i}/weight/{name}"] = parameter.data.copy()
                    found[f"{i}/gradient/{name}"] = parameter.grad.copy()  # a view: the next step's
            job.model.lazy_reset_grad()
        found[f"{i}/loss"] = job.step(batch, plan["lr"])["loss"]
    found |= {f"trained/{name}": tensor for name, tensor in job.trained().items()}
    np.savez(folder / "check" / "found.npz", version=onnxruntime.__version__, **found)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "check" / "plan.json").read_text())
    make(folder, plan)
    run(folder, plan)
