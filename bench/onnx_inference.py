"""Inference graphs in onnxruntime: a model in float32, with int8 weights, and packed by RoSTE.

    python bench/onnx_inference.py [--model smollm2-135m] [--rows 50] [--threads 1]

Files: bytes of graph and weights. Peaks: VmHWM of a process of its own without torch, three runs
of a batch, with the runtime's defaults (`peak`), and without its arena, as `targets/device.py` runs
graphs (`lean`). Times: all graphs in one process, in turn, medians, as ratios of float32's. Then
film reviews, one at a time: how the packed graph compares with the packed model in torch, in
float32 and as it was packed, and whether each gives the right answer the larger logit. Writes
bench/results/onnx_inference.csv and bench/results/onnx_inference_quality.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GRAPHS = {"float32": "inference", "int8": "inference-int8", "packed": "inference"}
SHAPES = ((1, 128), (8, 128))
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/onnx-inference"))
    parser.add_argument("--only", choices=("memory", "quality"))
    parser.add_argument("--child", nargs=4, metavar="X", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, rows, length, options = arguments.child
        print(json.dumps(_peak(arguments, name, (int(rows), int(length)), options)))
        return
    from commands import keep

    _prepare(arguments)
    if arguments.only != "quality":
        lines = _memory_and_time(arguments)
        keep(lines, RESULTS / "onnx_inference.csv")
    if arguments.only != "memory":
        keep(_quality(arguments), RESULTS / "onnx_inference_quality.csv")


def _prepare(arguments: argparse.Namespace) -> None:
    """The packed model and the graphs, unless they are there."""
    from commands import tinyft

    packed = arguments.work / "model-packed"
    if not packed.exists():
        words = ["--data=film-reviews:train", f"--max-length={LENGTH}", "--dtype=bfloat16"]
        words += [f"--model={arguments.model}", f"--output={packed}"]
        tinyft("export", "--format=packed", *words)
    for name, form in GRAPHS.items():
        if not (arguments.work / name).exists():
            model = packed if name == "packed" else arguments.model
            words = [f"--model={model}", f"--format={form}", f"--output={arguments.work / name}"]
            tinyft("export", *words)


def _graph(arguments: argparse.Namespace, name: str) -> Path:
    return arguments.work / name / "model.onnx"


def _session(arguments: argparse.Namespace, name: str, options: str = "peak") -> Any:
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = arguments.threads
    # int8's activations are not to be rounded. The packed graph says so itself.
    chosen.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if options == "lean":
        chosen.enable_cpu_mem_arena = chosen.enable_mem_pattern = False
    return onnxruntime.InferenceSession(_graph(arguments, name), chosen)


def _ids(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    rows, length = shape
    return {"input_ids": np.arange(rows * length).reshape(shape) * 7919 % 16384}


# Memory and time.


def _memory_and_time(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    for shape in SHAPES:
        sessions = {name: _session(arguments, name) for name in GRAPHS}
        taken: dict[str, list[float]] = {name: [] for name in GRAPHS}
        for _ in range(arguments.rounds if shape[0] == 1 else max(3, arguments.rounds // 2)):
            for name, session in sessions.items():
                begin = time.perf_counter()
                session.run(None, _ids(shape))
                taken[name].append(time.perf_counter() - begin)
        del sessions
        for name in GRAPHS:
            files = _graph(arguments, name).parent.glob("model.onnx*")
            size = sum(path.stat().st_size for path in files)
            line: dict[str, Any] = {"graph": name, "shape": f"{shape[0]} x {shape[1]}"}
            line["file_mib"] = round(size / 2**20, 1)
            for options in ("peak", "lean"):
                line[f"{options}_mib"] = round(_child(arguments, name, shape, options))
            seconds = statistics.median(taken[name])
            line["seconds"] = round(seconds, 3)
            line["time_ratio"] = round(seconds / statistics.median(taken["float32"]), 2)
            line["threads"] = arguments.threads
            lines.append(line)
            print(line, flush=True)
    return lines


def _child(arguments: argparse.Namespace, name: str, shape: tuple[int, int], options: str) -> float:
    words = [sys.executable, __file__, f"--work={arguments.work}", f"--threads={arguments.threads}"]
    words += ["--child", name, *map(str, shape), options]
    done = subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def _peak(arguments: argparse.Namespace, name: str, shape: tuple[int, int], options: str) -> float:
    """MiB of this process, which has no torch."""
    session = _session(arguments, name, options)
    for _ in range(3):
        session.run(None, _ids(shape))
    assert "torch" not in sys.modules
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


# Quality.


def _quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A line a contender, against the packed model in torch in float32."""
    import torch

    import tinyft
    from tinyft.inputs import read_source

    torch.set_num_threads(arguments.threads)
    packed = arguments.work / "model-packed"
    loaded = tinyft.load(packed)
    examples, _ = read_source("film-reviews:dev", None, False)
    rows = [_encoded(example, loaded.tokenizer) for example in examples.items[: arguments.rows]]

    def in_torch(model: torch.nn.Module) -> list[np.ndarray]:
        with torch.inference_mode():
            return [model(torch.from_numpy(ids)).logits[0].float().numpy() for ids, *_ in rows]

    def in_onnx(name: str) -> list[np.ndarray]:
        session = _session(arguments, name, "lean")
        return [session.run(None, {"input_ids": ids})[0][0] for ids, *_ in rows]

    lines: list[dict[str, Any]] = []

    def tell(name: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
        error = sum(float(np.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
        size = sum(float(np.square(b).sum()) for b in wanted)
        same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(found, wanted, strict=True)]
        right = [
            a[-1, list(choices)].argmax() == answer
            for a, (_, choices, answer) in zip(found, rows, strict=True)
        ]
        line = {"contender": name, "rows": len(rows), "tokens": sum(map(len, same))}
        line["rms_error"] = float(f"{(error / size) ** 0.5:.3g}")
        line["agreement"] = round(float(np.concatenate(same).mean()), 4)
        line["accuracy"] = round(float(np.mean(right)), 3)
        lines.append(line)
        print(line, flush=True)

    stored = in_torch(loaded.model)
    wanted = in_torch(loaded.model.float())
    tell("packed, torch, float32", wanted, wanted)
    tell("packed, torch, as packed", stored, wanted)
    # How sure torch itself is: its embeddings off by a rounding error.
    embeddings = loaded.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: out * (1 + 2**-23), prepend=True)
    tell("packed, torch, float32, embeddings x (1 + 2^-23)", in_torch(loaded.model), wanted)
    for name in reversed(GRAPHS):
        tell(f"{name}, onnxruntime", in_onnx(name), wanted)
    return lines


def _encoded(example: Any, tokenizer: Any) -> tuple[np.ndarray, list[int], int]:
    """A prompt's tokens `(1, T)`, the first of each choice, and the right one."""
    ids = tokenizer(example.prompt, add_special_tokens=False)["input_ids"][-LENGTH:]
    firsts = [tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in example.choices]
    return np.array([ids]), firsts, example.answer


if __name__ == "__main__":
    main()
