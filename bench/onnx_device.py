"""Training steps in onnxruntime against the same runtime's inference, and against torch's LoRA.

    python bench/onnx_device.py [--model smollm2-135m] [--batch 8] [--length 96] [--threads 1]

Every contender takes the same batch of film reviews, padded to one length. Peaks: VmHWM of a
process of its own without torch (torch's own contender excepted), three steps. Times: the
contenders of a group in one process, in turn, medians. Inference is the graph of the losses with
the weights inside, read from a file beside it, once with the runtime's defaults, and once told to
keep no second form of a weight; the lesser peak and the lesser time count. Writes
bench/results/onnx_device.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "onnx_device.csv"
TWO_SIDED = ["--method=mezo", "--estimator=two-sided"]
EXPORTS = {
    "mezo": TWO_SIDED,
    "mezo-int4": [*TWO_SIDED, "--trainable=lora", "--base-bits=4", "--dtype=float16"],
    "lora": ["--method=lora"],
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/onnx-device"))
    parser.add_argument("--contenders", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contenders:
        print(json.dumps(_measured(arguments, arguments.contenders)))
        return
    _prepare(arguments)
    peaks = {
        name: _child(arguments, [name])[name]["peak_mib"]
        for name in ("inference", "inference-defaults", *EXPORTS, "torch-lora")
    }
    times: dict[str, float] = {}
    for group in (
        ["inference", "inference-defaults", "mezo", "mezo-int4"],
        ["lora", "torch-lora"],
    ):
        times |= {name: found["seconds"] for name, found in _child(arguments, group).items()}
    inference = min(peaks["inference"], peaks["inference-defaults"])
    twice = 2 * min(times["inference"], times["inference-defaults"])
    against = {name: (inference, twice) for name in EXPORTS if "mezo" in name}
    against["lora"] = (peaks["torch-lora"], times["torch-lora"])
    rows = []
    for name, peak in peaks.items():
        base = against.get(name)
        row = {"contender": name, "peak_mib": round(peak), "seconds": round(times[name], 3)}
        row["peak_ratio"] = round(peak / base[0], 3) if base else ""
        row["time_ratio"] = round(times[name] / base[1], 3) if base else ""
        row |= {"batch": arguments.batch, "length": arguments.length, "threads": arguments.threads}
        rows.append(row)
        print(row, flush=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _prepare(arguments: argparse.Namespace) -> None:
    """The exports, the graph of inference, and the batch, unless they are there."""
    from commands import tinyft

    arguments.work.mkdir(parents=True, exist_ok=True)
    for name, flags in EXPORTS.items():
        if not (arguments.work / name).exists():
            words = ["--data=film-reviews:train", f"--batch-size={arguments.batch}"]
            words += [f"--model={arguments.model}", f"--max-length={arguments.length}"]
            tinyft(
                "export",
                *flags,
                *words,
                "--target=raspberry-pi-5",
                f"--output={arguments.work / name}",
            )
    if (arguments.work / "forward.onnx").exists():
        return
    import onnx_ir

    import tinyft as engine
    from tinyft.batches import collate
    from tinyft.data import encode, pad_id
    from tinyft.inputs import read_source
    from tinyft.losses import check_head
    from tinyft.targets import graphs

    loaded = engine.load(arguments.model, dtype="float32")
    loaded.model.set_attn_implementation("eager")
    check_head(loaded.model)
    examples, _ = read_source("film-reviews:train", None, False)
    encoded = encode(
        examples, loaded.tokenizer, max_length=arguments.length, objective="lm", encoder=False
    )
    longest = sorted(encoded.items, key=lambda item: -item.length)[: arguments.batch]
    batch = graphs.batch_inputs(collate(longest, pad_id(loaded.tokenizer)))
    loss_of = graphs.Loss(loaded.model)

    def losses(tensors: graphs.Tensors) -> graphs.Tensors:
        return {"losses": loss_of.at(graphs.tensors_of(loaded.model, tensors), tensors)}

    constants = graphs.constants_of(loaded.model) | graphs.frozen_of(loaded.model, [])
    np.savez(arguments.work / "batch.npz", **{k: t.numpy() for k, t in batch.items()})
    graph = graphs.trace(losses, constants, batch)
    onnx_ir.save(graph, arguments.work / "forward.onnx", external_data="forward.onnx.data")


def _child(arguments: argparse.Namespace, names: list[str]) -> dict[str, dict[str, float]]:
    words = [sys.executable, __file__, "--contenders", *names]
    for name in ("model", "rounds", "threads", "work"):
        words.append(f"--{name}={getattr(arguments, name)}")
    print("measuring", *names, flush=True)
    done = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(arguments: argparse.Namespace, names: list[str]) -> dict[str, dict[str, float]]:
    """In a process of its own: seconds of a step of each, and the peak of them all."""
    batch = dict(np.load(arguments.work / "batch.npz"))
    steps = {name: _contender(arguments, name, batch) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(STEPS if len(names) == 1 else arguments.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    return {
        name: {"seconds": statistics.median(taken), "peak_mib": peak}
        for name, taken in seconds.items()
    }


def _contender(arguments: argparse.Namespace, name: str, batch: dict) -> Callable[[], object]:
    if name == "torch-lora":
        return _torch_lora(arguments, batch)
    path = ROOT / "targets" / "device.py"  # by itself: it imports neither tinyft nor torch
    spec = importlib.util.spec_from_file_location("device", path)
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    if name in EXPORTS:
        job = device.Job(arguments.work / name, arguments.threads)
        return lambda: job.step(batch, 1e-6)
    graph = arguments.work / "forward.onnx"
    options = device.onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    disabled = []
    if name == "inference":
        options = device.options(arguments.threads)
        options.add_session_config_entry("session.disable_prepacking", "1")
        disabled = ["ConstantFolding"]  # of weights that are only transposed
    session = device.onnxruntime.InferenceSession(graph, options, disabled_optimizers=disabled)
    return lambda: session.run(None, batch)


def _torch_lora(arguments: argparse.Namespace, batch: dict) -> Callable[[], object]:
    import torch

    import tinyft
    from tinyft.batches import Batch
    from tinyft.encoding import NO_LOSS
    from tinyft.losses import objective
    from tinyft.memory import reuse_heap

    torch.set_num_threads(arguments.threads)
    reuse_heap()
    model = tinyft.load(arguments.model, dtype="float32").model
    optimizer = tinyft.LoRA(model, lr=1e-6)
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    ids = tensors["input_ids"]
    labels = torch.full_like(ids, NO_LOSS).flatten()
    labels[tensors["position"] + 1] = tensors["target"]
    whole = Batch(ids, tensors["attention_mask"], labels.view_as(ids))
    return lambda: optimizer.step(lambda part: objective("lm")(model, part), whole)


if __name__ == "__main__":
    main()
