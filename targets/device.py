"""Fine-tune on this device: `python train.py --data train.jsonl --steps 100`.

Stands beside the graphs that `tinyft export` wrote, and needs onnxruntime, numpy and tokenizers,
nothing else. Reads rows of {"prompt", "choices", "answer"}, {"prompt", "completion"}, {"text"}, or
{"instruction", "input"?, "output"}; answers count from 0, and what is null counts as absent.
Run it again after it was stopped, in whatever way: it goes on where it was. The result is
`trained.safetensors`; `tinyft import` makes a model of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import struct
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NEXT = "/next"
# What exports were checked on. Others, where an installation has them, round more: CUDA's TF32,
# CoreML's float16.
PROVIDERS = ["CPUExecutionProvider"]
GROUP = 50  # batches that are cut from one group of examples, sorted by length
_TYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "I8": np.int8}


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a JSONL file, each with its line, from 1."""
    # Split as bytes: str.splitlines would also split at U+2028, which JSON allows inside strings.
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SystemExit(f"{path}, line {line} is not JSON in UTF-8: {error}.") from None


class Rows:
    """Examples in tokens, and batches of them in an order that depends on seed and step alone.

    Args:
        rows: lines and what they hold, as `read_rows` gives them; none is kept.
        tokenizer: from `tokenizer.json`.
        job: what the export wrote to `job.json`.
    """

    def __init__(self, rows: Iterable[tuple[int, dict]], tokenizer: Tokenizer, job: dict) -> None:
        self.job, self.tokenizer = job, tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A list of Python's integers is nine times the array.
        self.items = [
            (np.array(ids, np.int32), label)
            for line, row in rows
            for ids, label in self._encoded(row, line)
        ]
        if not self.items:
            raise SystemExit("There is no example in the data.")
        self.epoch, self.plan = 0, self._planned(0)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The graph's inputs of step `step`, from 0: the batch that `tinyft train` takes."""
        epoch, index = divmod(step, -(-len(self.items) // self.job["batch_size"]))
        if epoch != self.epoch:
            self.epoch, self.plan = epoch, self._planned(epoch)
        return self.collated([self.items[i] for i in self.plan[index]])

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """Indices of the examples of each batch: shuffled, of like length (`tinyft.batches`)."""
        n, size = len(self.items), self.job["batch_size"]
        lengths = np.array([len(ids) for ids, _ in self.items], np.int64)
        bits = np.random.MT19937(np.random.SeedSequence([self.job["seed"], epoch]))
        random = np.random.RandomState(bits)
        order = random.permutation(n)
        grouped = GROUP * size
        group = np.minimum(np.arange(n) // grouped, max(n // grouped - 1, 0))
        order = order[np.lexsort((-lengths[order], group))]
        batches = np.split(order, range(size, n, size))
        batches = [batches[i] for i in random.permutation(len(batches))]
        if epoch == 0:  # what needs most memory comes first
            sizes = [len(batch) * lengths[batch].max() for batch in batches]
            largest = sizes.index(max(sizes))
            batches[0], batches[largest] = batches[largest], batches[0]
        return batches

    def collated(self, items: list) -> dict[str, np.ndarray]:
        """Padded on the right. Rows are doubled where there is one: the graph wants two, and the
        mean stays the same."""
        items = items * 2 if len(items) == 1 else items
        width = max(2, *(len(ids) for ids, _ in items))
        ids = np.full((len(items), width), self.job["pad_id"], dtype=np.int64)
        mask = np.zeros_like(ids)
        position, target = [], []
        for r, (row, begin) in enumerate(items):
            ids[r, : len(row)], mask[r, : len(row)] = row, 1
            if self.job["kind"] == "lm":
                position += range(r * width + begin - 1, r * width + len(row) - 1)
                target += row[begin:].tolist()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.job["kind"] == "class":
            answers = np.array([answer for _, answer in items], np.int64)
            return {**inputs, "answers": answers}
        lists = {"position": position, "target": target}
        return {**inputs, **{name: np.array(found, np.int64) for name, found in lists.items()}}

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encoded(self, row: dict, line: int) -> list[tuple[list[int], int]]:
        """`(ids, first labelled)`, or `(ids, class)`."""
        try:
            return self._read(row)
        except ValueError as error:
            raise SystemExit(f"Line {line}: {error}.") from None

    def _read(self, row: dict) -> list[tuple[list[int], int]]:
        head, tail, most = self.job["head"], self.job["tail"], self.job["max_length"]
        kind, prompt, continuation, answer = fields(row, self.job)
        if self.job["kind"] == "class":
            room = most - len(head) - len(tail)
            return [(head + self._ids(prompt)[:room] + tail, answer)]
        if kind == "text":
            ids = self._ended(head + self._ids(continuation))
            if len(ids) < 2:
                raise ValueError("the text is a single token: nothing can be predicted")
            starts = range(0, len(ids) - 1, most - 1)
            return [(ids[start : start + most], 1) for start in starts]
        alone, ids = self._ids(prompt), self._ids(prompt + continuation)
        pairs = enumerate(zip(alone, ids))
        begin = next((i for i, (a, b) in pairs if a != b), min(len(alone), len(ids)))
        begin, ids = begin + len(head), self._ended(head + ids)
        excess = max(len(ids) - most, 0)  # the prompt loses its start
        if excess and excess > begin - max(len(head), 1):
            raise ValueError(f"its completion does not fit into {most} tokens")
        ids, begin = ids[: len(head)] + ids[len(head) + excess :], max(begin - excess, 1)
        if begin >= len(ids):
            raise ValueError("its completion gives no token that can be predicted")
        return [(ids, begin)]

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.job["eos"]
        return ids if ids[-1:] == eos else ids + eos


def fields(row: dict, job: dict) -> tuple[str, str, str, int]:
    """Kind ("choices", "completion" or "text"), prompt, what follows it, and answer (else -1).

    Formats are told apart as by `tinyft train`: datasets often carry a text beside their fields.

    Raises:
        ValueError: a row that cannot be used.
    """
    row = {} if not isinstance(row, dict) else {k: v for k, v in row.items() if v is not None}
    if "messages" in row or "conversations" in row:
        raise ValueError("conversations are not read on a device: give prompt and completion")
    if {"prompt", "choices", "answer"} <= row.keys():
        answer, choices = _answer(row, job["classes"])
        return "choices", _text(row, "prompt"), choices[answer], answer
    if job["kind"] == "class":
        raise ValueError(f"found fields {', '.join(row)}, and classes need prompt, choices, answer")
    if {"prompt", "completion"} <= row.keys():
        prompt = _text(row, "prompt", may_be_empty=True)
        return "completion", prompt, _text(row, "completion"), -1
    if {"instruction", "output"} <= row.keys():
        given = _text(row, "input", may_be_empty=True) if "input" in row else ""
        template = job["alpaca"][bool(given)]
        prompt = template.format(instruction=_text(row, "instruction"), input=given)
        return "completion", prompt, _text(row, "output"), -1
    if "text" in row:
        return "text", "", _text(row, "text"), -1
    raise ValueError(
        f"found fields {', '.join(row)}; give prompt, choices and answer, prompt and completion, "
        f"instruction and output, or text"
    )


def _text(row: dict, name: str, may_be_empty: bool = False) -> str:
    value = row[name]
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise ValueError(f"{name} is {value!r:.40}, not text")
    value.encode()  # half of a surrogate pair, which JSON can spell, is an error here
    return value


def _answer(row: dict, classes: list[str]) -> tuple[int, list[str]]:
    """The index of the right choice, and the choices, which must be the classes, if there are."""
    choices, answer = row["choices"], row["answer"]
    choices = json.loads(choices) if isinstance(choices, str) else choices
    if not isinstance(choices, list) or len(set(map(str, choices))) < max(len(choices), 2):
        raise ValueError(f"choices are {choices!r:.40}, not two or more different texts")
    choices = [_text({"a choice": choice}, "a choice") for choice in choices]
    if classes and [choice.strip() for choice in choices] != classes:
        raise ValueError(f"choices {choices} are not the classes of the export, {classes}")
    if isinstance(answer, str) and re.fullmatch(r"\s*-?\d+\s*", answer):
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer!r:.40}, not an index of the choices from 0")
    return answer, choices


def _entries(path: Path) -> dict[str, tuple[int, type, list[int]]]:
    """What a safetensors file holds: offset in the file, type and shape of every tensor."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {
        name: (8 + size + entry["data_offsets"][0], _TYPES[entry["dtype"]], entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file, read-only, its pages read when they are used."""
    data = np.memmap(path, mode="r")
    found = {}
    for name, (begin, dtype, shape) in _entries(path).items():
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
        found[name] = data[begin:end].view(dtype).reshape(shape)
    return found


def read_tensors(path: Path, into: dict[str, np.ndarray]) -> None:
    """A safetensors file, read to where `into` has each tensor, or to new memory."""
    with path.open("rb") as file:
        for name, (begin, dtype, shape) in _entries(path).items():
            tensor = into.setdefault(name, np.empty(shape, dtype))
            file.seek(begin)
            if file.readinto(memoryview(tensor.reshape(-1)).cast("B")) != tensor.nbytes:
                raise SystemExit(f"{path} ends inside {name}: copy it again.")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file, whole or not at all, whenever the power fails."""
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def options(threads: int = 0) -> onnxruntime.SessionOptions:
    """A tensor lives until its last use: the runtime's reuse of buffers, which it plans by shape,
    keeps each through all layers."""
    chosen = onnxruntime.SessionOptions()
    chosen.enable_mem_reuse = False
    chosen.enable_mem_pattern = False  # patterns are kept for every shape there was
    chosen.intra_op_num_threads = threads
    return chosen


def session(path: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A graph, ready to run on the CPU.

    Args:
        threads: 0 for the runtime's choice.
    """
    return onnxruntime.InferenceSession(path, options(threads), providers=PROVIDERS)


class Graph:
    """A graph whose tensors stay where they are: it reads them there, and writes the next value of
    each over the last. The graphs are made so that every use of a value comes before its end.

    Args:
        path: of the graph.
        tensors: contiguous, by the names of the graph's inputs.
        threads: see `session`.
    """

    def __init__(self, path: Path, tensors: dict[str, np.ndarray], threads: int = 0) -> None:
        self.session = session(path, threads)
        self.binding = self.session.io_binding()
        self.inputs, self.outputs = [], []
        values = {}
        for name in (i.name for i in self.session.get_inputs()):
            if name in tensors:
                values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(tensors[name])
                self.binding.bind_ortvalue_input(name, values[name])
            else:
                self.inputs.append(name)
        for name in (o.name for o in self.session.get_outputs()):
            if name.endswith(NEXT):
                self.binding.bind_ortvalue_output(name, values[name[: -len(NEXT)]])
            else:
                self.outputs.append(name)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs that are not tensors' next values."""
        for name in self.inputs:
            self.binding.bind_cpu_input(name, np.asarray(inputs[name]))
        for name in self.outputs:
            self.binding.bind_output(name)
        self.session.run_with_iobinding(self.binding)
        found = (
            self.binding.get_outputs()[-len(self.outputs) :] if self.outputs else []
        )  # bound last
        return {name: value.numpy() for name, value in zip(self.outputs, found)}


class Job:
    """The graphs of a folder and the state of their training.

    Args:
        folder: an export.
        threads: see `session`.

    Attributes:
        state: what training changes, in place.
        steps: taken so far.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.folder, self.job = folder, json.loads((folder / "job.json").read_text())
        self.state: dict[str, np.ndarray] = {}
        read_tensors(folder / "initial.safetensors", self.state)
        for name in self.job["moments"]:
            self.state[name] = np.zeros_like(self.state[name.rpartition("/")[0]])
        frozen = folder / "frozen.safetensors"
        self.frozen = map_tensors(frozen) if frozen.exists() else {}
        self.zeroth, self.steps = self.job["method"] == "mezo", 0
        name = "forward.onnx" if self.zeroth else "step.onnx"
        self.graph = Graph(folder / name, {**self.state, **self.frozen}, threads)
        if self.zeroth:
            self.update = Graph(folder / "update.onnx", self.state, threads)

    def step(self, inputs: dict[str, np.ndarray], lr: float) -> dict[str, np.ndarray]:
        """One step; returns the loss, and in zeroth order each probe's projected gradient."""
        inputs, lr = {**inputs, **self.scalars()}, np.float32(lr)
        if not self.zeroth:
            found = self.graph.run({**inputs, "lr": lr})
            _check(found["loss"], self.steps)
            self.steps += 1
            return found
        probes, eps = range(self.job["config"]["probes"]), self.job["config"]["eps"]

        def at(probe: int, scale: float) -> float:
            point = {"probe": np.int64(probe), "scale": np.float32(scale)}
            found = self.graph.run({**inputs, **point})["loss"]
            _check(found, self.steps)
            return float(found)

        estimator = self.job["config"]["estimator"]
        if estimator == "two-sided":
            values = np.array([[at(p, eps), at(p, -eps)] for p in probes], np.float64)
            loss, g = values.mean(), (values[:, 0] - values[:, 1]) / (2 * eps)
        else:  # the losses' differences, in units of their spread
            values = np.array([at(p, eps) for p in probes], np.float64)
            loss = at(0, 0.0) if estimator == "one-sided" else values.mean()
            spread = values.std(ddof=1)
            g = (values - loss) / spread if spread > 0 else np.zeros(len(values))
            g = np.clip(g, -65504.0, 65504.0).astype(np.float16)  # as in torch, which stores it so
        self.replay(np.array([[lr, *g]], np.float32))
        return {"loss": np.float32(loss), "projected_gradients": g.astype(np.float32)}

    def log(self, lr: float, found: dict[str, np.ndarray]) -> None:
        """Zeroth order: note the last step, what `step` returned, for `resume`."""
        if self.zeroth:
            with (self.folder / "steps.f32").open("ab") as file:
                file.write(np.array([lr, *found["projected_gradients"]], "<f4").tobytes())

    def replay(self, records: np.ndarray) -> None:
        """Zeroth order: the updates of `(lr, projected gradients)`, float32 (steps, 1 + probes)."""
        for lr, *gradients in records:
            for probe, g in enumerate(gradients):
                c = np.float32(float(lr) * float(g) / len(gradients))
                if c:  # -0.0 - 0.0 would already change a bit
                    self.update.run({"c": c, "probe": np.int64(probe), **self.scalars()})
            self.steps += 1

    def resume(self) -> None:
        """Go on from what was saved in the folder, if anything was."""
        log, checkpoint = self.folder / "steps.f32", self.folder / "checkpoint.safetensors"
        if self.zeroth and log.exists():  # some bytes a step are the whole state
            data, columns = log.read_bytes(), 1 + self.job["config"]["probes"]
            data = data[: len(data) // (4 * columns) * 4 * columns]
            os.truncate(log, len(data))  # the last record may be torn
            self.replay(np.frombuffer(data, "<f4").reshape(-1, columns))
        elif checkpoint.exists():
            steps = {"steps": np.zeros((), np.int64)}
            read_tensors(checkpoint, {**self.state, **steps})
            self.steps = int(steps["steps"])

    def save(self) -> None:
        """State and steps, for `resume`; in zeroth order the log holds both."""
        if not self.zeroth:
            state = {**self.state, "steps": np.array(self.steps, np.int64)}
            write_tensors(self.folder / "checkpoint.safetensors", state)

    def trained(self) -> dict[str, np.ndarray]:
        """The trainable tensors."""
        return {n: t for n, t in self.state.items() if n not in self.job["moments"]}

    def scalars(self) -> dict[str, np.ndarray]:
        """What a graph draws this step's directions from."""
        return {"step": np.int64(self.steps), "seed": np.int64(self.job["seed"])}


class Artefacts:
    """onnxruntime-training's own artefacts: `Job`, for graphs that this runtime differentiates.

    Args:
        folder, threads: as for `Job`.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self.api, self.folder = training_package("api"), folder
        self.job = json.loads((folder / "job.json").read_text())
        self.options = options(threads)
        self._load(folder / "checkpoint")

    def _load(self, checkpoint: Path) -> None:
        self.state = self.api.CheckpointState.load_checkpoint(str(checkpoint))
        self.model = self.api.Module(
            str(self.folder / "training_model.onnx"),
            self.state,
            str(self.folder / "eval_model.onnx"),
            device="cpu",
            session_options=self.options,
        )
        path = str(self.folder / "optimizer_model.onnx")
        self.optimizer = self.api.Optimizer(path, self.model)
        self.steps = self.state.properties["steps"] if "steps" in self.state.properties else 0

    def gradients(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The loss; every trainable parameter's gradient is then in `state.parameters`."""
        loss = self.model.train()(*[inputs[name] for name in self.model.input_names()])
        _check(loss, self.steps)
        return loss

    def step(self, inputs: dict[str, np.ndarray], lr: float) -> dict[str, np.ndarray]:
        """One step; returns the loss."""
        loss = self.gradients(inputs)
        self.optimizer.set_learning_rate(float(lr))
        self.optimizer.step()
        self.model.lazy_reset_grad()
        self.steps += 1
        return {"loss": loss}

    def log(self, lr: float, found: dict[str, np.ndarray]) -> None:
        """Nothing: `save` holds all there is."""

    def resume(self) -> None:
        """As `Job.resume`."""
        if (self.folder / "resumed").exists():
            self._load(self.folder / "resumed")

    def save(self) -> None:
        """As `Job.save`."""
        self.state.properties["steps"] = self.steps
        part = self.folder / "resumed.part"
        self.api.CheckpointState.save_checkpoint(self.state, str(part), True)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(self.folder / "resumed")

    def trained(self) -> dict[str, np.ndarray]:
        """As `Job.trained`."""
        return {name: p.data for name, p in self.state.parameters if p.requires_grad}


def _check(loss: np.ndarray, step: int) -> None:
    if not np.isfinite(loss):
        raise SystemExit(f"The loss at step {step} is {loss}: export with a lower --lr.")


def training_package(name: str) -> types.ModuleType:
    """A module of `onnxruntime.training`, whose own `__init__` would import torch for nothing."""
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
    sys.modules.setdefault(package.__name__, package)
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except ImportError:
        raise SystemExit(
            f"This needs onnxruntime-training (or onnxruntime-training-cpu) 1.19.2; here is "
            f"onnxruntime {onnxruntime.__version__}, which has the same name: install one of them."
        ) from None


def learning_rate(step: int, total: int, job: dict) -> float:
    """Of step `step` (from 0) of `total`: linear warm-up, then constant or half a cosine to 0."""
    peak, warmup = job["lr"], job["warmup"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if job["schedule"] == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fine-tune on this device.")
    parser.add_argument("--data", type=Path, required=True, help="examples, JSONL")
    parser.add_argument("--steps", type=int, required=True, help="steps in all")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (20)")
    parser.add_argument("--threads", type=int, default=0, help="default: the runtime's choice")
    arguments = parser.parse_args()
    if arguments.save_every < 1:
        parser.error(f"--save-every {arguments.save_every} must be at least 1")
    folder = Path(__file__).resolve().parent
    runtime = json.loads((folder / "job.json").read_text())["runtime"]
    made = Artefacts if runtime == "onnxruntime-training" else Job
    job = made(folder, arguments.threads)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batches = Rows(read_rows(arguments.data), tokenizer, job.job)
    job.resume()
    for step in range(job.steps, arguments.steps):
        lr = np.float32(learning_rate(step, arguments.steps, job.job))
        found = job.step(batches.batch(step), lr)
        job.log(lr, found)
        # Said before it is saved: what a kill lets through is said twice and never left out.
        print(f"step {job.steps}  loss {found['loss']:.6f}", flush=True)
        if job.steps % arguments.save_every == 0 or job.steps == arguments.steps:
            job.save()
    write_tensors(folder / "trained.safetensors", job.trained())
    print(f"trained {job.steps} steps: {folder / 'trained.safetensors'}")


if __name__ == "__main__":
    sys.exit(main())
