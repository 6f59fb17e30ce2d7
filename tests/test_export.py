"""From `tinyft export` to the device and back."""

import ast
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from tinyft.cli import main
from tinyft.config import TrainConfig
from tinyft.errors import InputError
from tinyft.models import load, save_model
from tinyft.targets.export import _prepared, _settings, collect

pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch's exporter
ROWS = [
    {"prompt": f"Film {i}: it was", "completion": f" {w}"}
    for i, w in enumerate(["great", "terrible", "a bore", "great and a bore"] * 3)
]
# What the device reads of job.json to make batches, for the tiny tokenizer.
JOB = {"kind": "lm", "head": [], "tail": [], "eos": [2], "max_length": 10, "pad_id": 2}
JOB |= {"batch_size": 2, "seed": 7, "classes": []}
ONE = {"num_hidden_layers": 1}  # layer, where a whole export is made: `test_graphs` has two
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # bitsandbytes wants 64
# On a device nothing of this exists.
FORBID = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'tinyft', 'onnx', 'transformers']))\n"
)


def prepared(folder, tokenizer, method, family="llama", *, rows=ROWS, fields=None, **changes):
    """What an export shares with its gate, of a tiny model with `changes`; no graph is made."""
    base = save_tiny_model(folder / "base", family, tokenizer, **changes)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"model": str(base), "data": str(data), "method": method, **(fields or {})}
    return _prepared(TrainConfig.build({**values, "output": str(folder / "out")}))


def trained_elsewhere(folder, tokenizer, method, *given, **changes):
    """A folder as a device leaves it, of what `collect` reads; every number one larger."""
    job = prepared(folder, tokenizer, method, *given, **changes)
    out = folder / "out"
    out.mkdir()
    (out / "job.json").write_text(json.dumps(_settings(job, [])))
    save_file({n: t + 1 for n, t in job.parameters().items()}, out / "trained.safetensors")
    return out


def on_device(folder, data, steps, kill_at=None):
    """What `train.py` prints; with `kill_at`, it is killed when it has printed so many lines."""
    code = FORBID + "import runpy; sys.argv[0] = sys.argv[1]; del sys.argv[1]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [str(folder / "train.py"), "--data", str(data), "--steps", str(steps)]
    words += ["--save-every", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    lines = []
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if len(lines) == kill_at:
                process.kill()
    assert kill_at or process.returncode == 0
    return "".join(lines)


TWO_SIDED = ["--trainable", "lora", "--estimator", "two-sided"]


@pytest.mark.parametrize(
    "method, flags",
    [
        ("mezo", ["--lr", "1e-4", "--probes", "3"]),
        ("mezo", [*TWO_SIDED, "--rank", "2", "--base-bits", "4", "--dtype", "float16"]),
        ("lora", ["--rank", "2", "--base-bits", "4"]),
        ("green_trainer", ["--rho", "0.6", "--optimizer", "sgd"]),
    ],
)
def test_export_train_resume_import(method, flags, tmp_path, tiny_tokenizer):
    base = save_tiny_model(tmp_path / "base", "llama", tiny_tokenizer, **WIDE, **ONE)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["export", "--model", str(base), "--data", str(data), "--method", method]
    words += ["--target", "raspberry-pi-5", "--output", str(out), "--batch-size", "4"]
    assert main([*words, *flags, "--schedule", "constant"]) == 0
    parity = json.loads((out / "parity.json").read_text())
    assert parity["steps"] == 20 and parity["loss_error"] <= 1e-5
    assert parity.get("packed") == (7 if "--base-bits" in flags else None)
    if "float16" in flags:
        table = load_file(out / "frozen.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(table, load(base).model.get_input_embeddings().weight.half())
    trained = load_file(out / "initial.safetensors")
    if method == "green_trainer":  # the graph trains a part
        assert set(trained) < {name for name, _ in load(base).model.named_parameters()}

    on_device(out, data, 40, kill_at=3)
    if method == "mezo":  # a record cut short by a kill
        with (out / "steps.f32").open("ab") as file:
            file.write(b"\1\2\3")
    assert not on_device(out, data, 40).startswith("step 1 ")
    resumed = load_file(out / "trained.safetensors")
    for name in ("steps.f32", "checkpoint.safetensors", "trained.safetensors"):
        (out / name).unlink(missing_ok=True)
    on_device(out, data, 40)
    straight = load_file(out / "trained.safetensors")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)

    assert main(["import", str(out), "--output", str(tmp_path / "back")]) == 0
    before, after = load(base).model, load(tmp_path / "back").model
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert moved
    if method == "mezo" and "lora" not in flags:
        assert all(np.array_equal(straight[n], after.get_parameter(n).detach()) for n in straight)


def test_an_operator_that_is_not_known_is_named(tmp_path):
    import onnx

    from tinyft.targets.gate import operators

    class Chunks(torch.nn.Module):
        def forward(self, x):
            a, b = x.chunk(2, dim=-1)
            return torch.fft.rfft(a).real.sum() + b.sum()

    torch.onnx.export(
        Chunks(), (torch.ones(2, 4),), tmp_path / "step.onnx", dynamo=True, verbose=False
    )
    assert onnx.load(tmp_path / "step.onnx")
    with pytest.raises(InputError, match=r"step.onnx needs the operator \S+ for \S+, which is not"):
        operators(tmp_path)


def test_a_wrong_gradient_is_named(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    """The gate's other half: the loss of step 0 is right, a gradient is not."""
    from tinyft.targets import graphs

    right = graphs.gradient_step

    def wrong(*arguments):
        step = right(*arguments)

        def scaled(tensors):
            found = step(tensors)
            name = next(n for n in found if n.endswith(f"up_proj.lora_B.weight{graphs.GRADIENT}"))
            return found | {name: found[name] * 1.001}

        return scaled

    monkeypatch.setattr(graphs, "gradient_step", wrong)
    base = save_tiny_model(tmp_path / "base", "llama", tiny_tokenizer, **ONE)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["export", "--model", str(base), "--data", str(data), "--method", "lora"]
    words += ["--target", "raspberry-pi-5", "--output", str(out), "--lora-targets", "up_proj"]
    assert main(words) == 2
    assert "up_proj.lora_B.weight is off by 0.001" in capsys.readouterr().err
    assert not out.exists()


def test_losses_that_rounding_moves():
    """What float32 takes apart in torch, too, is held to float64, at twice torch's own error."""
    from tinyft.targets.gate import TOLERANCE, compare_losses

    exact = [1.0, 0.5, 2.0]
    single = [1.0, 0.5 * (1 + 3e-5), 2.0]  # an error that a run has made it keeps
    engine = [1.0, 0.5, 2.0]

    def found(error):
        return [1.0, 0.5, 2.0 * (1 + error)]

    def plain():
        return single, exact

    assert compare_losses(engine, found(0.9 * TOLERANCE))["loss_error"] < TOLERANCE
    report = compare_losses(engine, found(6e-5), plain)
    assert report["loss_error_in_float64"] == pytest.approx(6e-5)
    assert report["loss_error_of_torch_in_float64"] == pytest.approx(3e-5)
    for compared in ((found(8e-5), plain), (found(2 * TOLERANCE),)):
        with pytest.raises(InputError, match="the loss of step 2 is"):
            compare_losses(engine, *compared)
    with pytest.raises(InputError, match="the loss of step 0 is"):  # before torch's own error
        compare_losses(engine, [1 + 6e-5, 0.5, 2.0], plain)


def test_the_gate_trains_in_torch_alone(tmp_path, tiny_tokenizer, monkeypatch):
    """What it holds losses to: the engine's, in float32 and nearer still in float64."""
    from tinyft.targets import gate

    right, taken = gate.compare_losses, []

    def compare(wanted, found, plain):
        taken.append((wanted, found, *plain()))
        return right(wanted, found, plain)

    monkeypatch.setattr(gate, "compare_losses", compare)
    base = save_tiny_model(tmp_path / "base", "llama", tiny_tokenizer, **ONE)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["export", "--model", str(base), "--data", str(data), "--method", "full"]
    words += ["--target", "raspberry-pi-5", "--output", str(out), "--lr", "1e-3"]
    assert main([*words, "--weight-decay", "3"]) == 0
    ((wanted, found, single, exact),) = taken
    assert single != exact and len(exact) == gate.STEPS
    for losses in (found, single, exact):
        np.testing.assert_allclose(losses, wanted, rtol=gate.TOLERANCE)


def test_an_update_that_is_another(tmp_path, tiny_tokenizer, monkeypatch, capsys):
    """Without the weight decay that was asked for, losses are neither torch's nor float64's."""
    from tinyft.targets import gate, graphs

    right = graphs.gradient_step
    monkeypatch.setattr(graphs, "gradient_step", lambda *a: right(*a[:3], 0.0))
    monkeypatch.setattr(gate, "_MOST_LR", 1e-2)
    base = save_tiny_model(tmp_path / "base", "llama", tiny_tokenizer, **ONE)
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["export", "--model", str(base), "--data", str(data), "--method", "full"]
    words += ["--target", "raspberry-pi-5", "--output", str(out), "--lr", "1e-2"]
    assert main([*words, "--weight-decay", "3"]) == 2
    assert "the loss of step 1 is" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [{"text": "It was a great film."}, {"text": "A bore."}],
        [{"prompt": "", "completion": "It was great"}, *ROWS],  # all of it is to be learnt
        [  # the fields of one format among another's, and nulls
            {"instruction": "Add.", "input": "1 {x}", "output": " 2", "text": "rendered"},
            {"instruction": "Say it.", "input": None, "output": "a bore"},
            {"prompt": "It was", "completion": " great", "text": "another"},
            {"prompt": "It was", "choices": None, "text": "A bore."},
        ],
        [  # answers are indices, as a CSV spells them, too
            {"prompt": "One is", "choices": ["1", "2", "3"], "answer": "1", "completion": "a"},
            {"prompt": "It was", "choices": '[" great", " a bore"]', "answer": 1},
        ],
        [{"prompt": "A\u2028B\x85", "completion": " b\u2029o"}, *ROWS],
    ],
)
def test_the_device_reads_rows_as_the_engine_does(rows, tiny_tokenizer, tmp_path):
    from tokenizers import Tokenizer

    from tinyft.data import Batches, encode, read_examples
    from tinyft.examples import alpaca_prompt
    from tinyft.targets.device import Rows, read_rows
    from tinyft.targets.gate import wide
    from tinyft.targets.graphs import batch_inputs

    path = tmp_path / "rows.jsonl"  # as a Windows editor saves it
    lines = "\n".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    path.write_bytes(lines.encode("utf-8-sig"))
    tiny_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    job = {**JOB, "alpaca": [alpaca_prompt("{instruction}", given) for given in ("", "{input}")]}
    batches = Rows(read_rows(path), Tokenizer.from_file(str(tmp_path / "tokenizer.json")), job)
    encoded = encode(read_examples(path), tiny_tokenizer, max_length=10, objective="lm")
    found, wanted = batches.items, encoded.items
    engine = Batches(encoded, 2, seed=7, pad_id=2)
    for step in (0, 1, len(engine), 2 * len(engine) - 1):  # two epochs
        got, want = batches.batch(step), batch_inputs(wide(engine[step]))
        assert all(np.array_equal(got[name], tensor) for name, tensor in want.items())
    assert len(found) == len(wanted)
    for (ids, begin), item in zip(found, wanted, strict=True):
        assert ids.dtype == np.int32 and ids.tolist() == item.rows[0].tolist()
        assert ids[begin:].tolist() == [t for t in item.labels[0].tolist() if t != -100]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "It was", "choices": ["pos", "neg"], "answer": 0},
        {"prompt": "It was", "choices": ["neg", "pos"], "answer": -1},
        {"prompt": "It was", "choices": ["neg", "pos"], "answer": 2},
        {"prompt": "It was", "choices": ["neg", "pos"], "answer": True},
        {"prompt": "It was", "choices": ["neg", "pos"], "answer": "pos"},
        {"prompt": " ", "choices": ["neg", "pos"], "answer": 1},
        {"prompt": "It was", "choices": "neg", "answer": 1},
        {"prompt": "It was", "completion": " neg"},
    ],
)
def test_the_device_has_the_classes_of_the_export(row, tiny_tokenizer, tmp_path):
    from tinyft.data import encode, read_examples
    from tinyft.targets.device import Rows

    right = {"prompt": "It was a bore", "choices": [" neg", "pos"], "answer": "1"}
    job = {**JOB, "kind": "class", "head": [1], "tail": [2], "classes": ["neg", "pos"]}

    def on_device(*rows):
        return Rows(enumerate(rows, 1), tiny_tokenizer.backend_tokenizer, job)

    ((ids, answer),) = on_device(right).items
    assert (ids[0], ids[-1], answer) == (1, 2, 1)
    with pytest.raises(SystemExit, match="Line 2: "):
        on_device(right, row)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(right) + "\n" + json.dumps(row))
    with pytest.raises(InputError):
        encode(read_examples(path), tiny_tokenizer, max_length=10, encoder=True)


@pytest.mark.parametrize(
    "row",
    [
        *({"prompt": "a", "completion": " "}, {"text": ""}, {"text": 3}, {"text": "\ud800"}),
        *({"prompt": None, "completion": "a"}, [1], {}),
        *({"prompt": "a", "choices": ["b"], "answer": 0}, {"instruction": "", "output": "a"}),
    ],
)
def test_rows_that_the_engine_refuses_are_refused_on_the_device(row, tiny_tokenizer, tmp_path):
    from tinyft.data import read_examples
    from tinyft.targets.device import Rows

    job = {**JOB, "alpaca": ["{instruction}", "{instruction} {input}"]}
    with pytest.raises(SystemExit, match="Line 7: "):
        Rows([(7, row)], tiny_tokenizer.backend_tokenizer, job)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError):
        read_examples(path)


def test_conversations_are_refused(tiny_tokenizer, tmp_path, capsys):
    from tinyft.targets.device import Rows

    row = {"messages": [{"role": "assistant", "content": "a"}], "text": "rendered"}
    with pytest.raises(SystemExit, match="Line 1: conversations are not read"):
        Rows([(1, row)], tiny_tokenizer.backend_tokenizer, JOB)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(row))
    words = ["export", "--model", "m", "--data", str(data), "--method", "lora", "--target"]
    assert main([*words, "raspberry-pi-5", "--output", str(tmp_path / "out")]) == 2
    assert "line 1 is a conversation" in capsys.readouterr().err


def test_a_completion_without_a_token_to_predict(tiny_tokenizer):
    """Of one token, with nothing before it and no EOS behind it; the engine refuses it, too."""
    from tinyft.data import Example, Examples, encode
    from tinyft.targets.device import Rows

    rows = [{"prompt": "", "completion": " great"}]
    said = "gives no token that can be predicted"
    with pytest.raises(SystemExit, match=said):
        Rows(enumerate(rows, 1), tiny_tokenizer.backend_tokenizer, {**JOB, "eos": []})
    plain = deepcopy(tiny_tokenizer)
    plain.eos_token = None
    with pytest.raises(InputError, match=said):
        encode(Examples([Example(1, "completion", **rows[0])]), plain, max_length=10)


def test_the_device_script_is_for_python_3_8_and_numpy_1():
    """Which on Windows makes int32 of Python's integers."""
    from tinyft.targets import device

    tree = ast.parse(Path(device.__file__).read_text(), feature_version=(3, 8))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.BitOr), "dicts joined by |"
        if isinstance(node, ast.Call):
            assert all(word.arg != "strict" for word in node.keywords)
            if ast.unparse(node.func) == "np.array":
                assert len(node.args) + len(node.keywords) == 2, ast.unparse(node)


def test_devices_train_on_the_cpu(tmp_path, monkeypatch):
    """Whatever else the runtime knows: nothing else was checked."""
    from types import SimpleNamespace

    from tinyft.targets import device

    asked = {}
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(device.onnxruntime, "get_available_providers", lambda: known)
    monkeypatch.setattr(device.onnxruntime, "InferenceSession", lambda *a, **how: asked.update(how))
    device.session(tmp_path / "step.onnx")
    assert asked == {"providers": ["CPUExecutionProvider"]}

    api = SimpleNamespace(
        CheckpointState=SimpleNamespace(
            load_checkpoint=lambda path: SimpleNamespace(properties={})
        ),
        Module=lambda *paths, **how: asked.update(how),
        Optimizer=lambda *of: None,
    )
    monkeypatch.setattr(device, "training_package", lambda name: api)
    (tmp_path / "job.json").write_text("{}")
    device.Artefacts(tmp_path)
    assert asked["device"] == "cpu"


@pytest.mark.parametrize("wrong", [b'{"text": "a"', b'{"text": "\xe9"}', b"[" * 100_000])
def test_the_device_names_a_line_that_is_no_json(wrong, tmp_path):
    from tinyft.targets.device import read_rows

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + wrong)
    with pytest.raises(SystemExit, match="line 3 is not JSON in UTF-8"):
        list(read_rows(path))


def test_what_no_graph_knows_is_refused(tmp_path, capsys):
    words = ["export", "--model", "m", "--data", "d", "--method", "mezo", "--target"]
    words += ["raspberry-pi-5", "--output", str(tmp_path / "o"), "--directions", "hadamard"]
    assert main([*words, "--momentum", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "--directions must be one of" in said and "--momentum" in said
    assert main([*words, "--dtype", "float16", "--memory", "1GiB", "--energy", "1Wh"]) == 2
    said = capsys.readouterr().err
    for flag in ("--dtype float16", "--memory", "--energy"):
        assert f"{flag} is not in the graphs" in said
    assert main([*words, "--training-python", "python"]) == 2
    said = capsys.readouterr().err
    assert (
        "raspberry-pi-5 has no published onnxruntime-training" in said and "mezo has none" in said
    )
    words[words.index("mezo")] = "lora"
    words = words[: words.index("--directions")]
    assert main([*words, "--training-python", "python", "--checkpointing", "full"]) == 2
    assert "leave --checkpointing out" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["inference", "inference-int8", "packed"])
def test_forms_that_take_a_model_alone_refuse_other_flags(form, tmp_path, capsys):
    (tmp_path / "packed.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path}\nbase_bits: 4\n")
    words = ["export", "--format", form, "--config", str(tmp_path / "run.yaml"), "--dtype"]
    assert main([*words, "float16", "--target", "rtx-3060", "--outptu", "x"]) == 2
    said = capsys.readouterr().err
    assert "--output is missing" in said and "--model is missing" not in said
    for flag in ("--base-bits", "--dtype", "--outptu", "--target"):
        assert f"{flag} is nothing to " in said


def test_a_packed_copy_takes_its_model_from_yaml(tmp_path, capsys):
    (tmp_path / "packed.json").write_text("{}")
    lines = f"model: {tmp_path}\noutput: {tmp_path / 'out'}\n"
    (tmp_path / "run.yaml").write_text(lines)
    assert main(["export", "--format", "packed", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "out" / "packed.json").read_text() == "{}"
    assert f"packed {tmp_path} into {tmp_path / 'out'}" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"rank": 2, "base_bits": 8}, {"rank": 2, "base_bits": 4}])
def test_a_packed_base_is_known_again(changes, tmp_path, tiny_tokenizer):
    out = trained_elsewhere(tmp_path, tiny_tokenizer, "lora", fields=changes, **WIDE)
    collect(out, tmp_path / "back")
    assert (tmp_path / "back" / "adapter_model.safetensors").exists()


def test_a_classifier_comes_back_with_its_classes(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "It was", "choices": [" bad", " good"], "answer": i} for i in (0, 1)]
    out = trained_elsewhere(tmp_path, tiny_tokenizer, "full", "bert", rows=rows)
    collect(out, tmp_path / "back")
    model = load(tmp_path / "back").model
    assert model.config.id2label == {0: "bad", 1: "good"}
    for name, tensor in load_file(out / "trained.safetensors").items():
        assert torch.equal(model.get_parameter(name).detach(), tensor)


def test_import_takes_what_was_exported_alone(tmp_path, tiny_tokenizer):
    out = trained_elsewhere(tmp_path, tiny_tokenizer, "lora", fields={"rank": 2})
    path, back = out / "trained.safetensors", tmp_path / "back"
    whole, data = load_file(path), path.read_bytes()
    first = min(whole)
    others = [
        ({n: t for n, t in whole.items() if n != first}, f"{first} is missing"),
        ({**whole, "model.norm.weight": torch.ones(32)}, "nothing was exported"),
        ({**whole, first: torch.ones(1)}, rf"{first} is \[1\]"),
    ]
    for tensors, said in others:
        save_file(tensors, path)
        with pytest.raises(InputError, match=said):
            collect(out, back)
    path.write_bytes(data[:-4])
    with pytest.raises(InputError, match=r"trained.safetensors cannot be read"):
        collect(out, back)
    path.write_bytes(data)
    with pytest.raises(InputError, match="is not empty"):
        collect(out, path)
    base = load(tmp_path / "base")  # another run's result takes its place
    with torch.no_grad():
        base.model.get_input_embeddings().weight[3, 5] += 1
    save_model(base.model, base.tokenizer, tmp_path / "base")
    with pytest.raises(InputError, match="is no longer the model that was exported"):
        collect(out, back)
    assert not back.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["import", "x", "--output", "y"],
        ["export", "--format", "inference", "--model", "x", "--output", "y"],
        [
            *("export", "--target", "raspberry-pi-5", "--model", "x", "--output", "y"),
            *("--data", "d", "--method", "lora"),
        ],
    ],
)
def test_without_the_extra(words, monkeypatch, capsys):
    for name in ("export", "inference"):  # imported before
        monkeypatch.delitem(sys.modules, f"tinyft.targets.{name}", raising=False)
    for name in ("onnx", "onnx_ir"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(words) == 2
    assert re.search(r"This needs onnx(_ir)?: pip install", capsys.readouterr().err)


def test_an_encoder_has_no_ends_to_narrow(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "It was", "choices": [" bad", " good"], "answer": i} for i in (0, 1)]
    fields = {"trainable": "lora", "base_bits": 4, "dtype": "float16"}
    with pytest.raises(InputError, match="is an encoder: leave it out"):
        prepared(tmp_path, tiny_tokenizer, "mezo", "bert", rows=rows, fields=fields)


def test_weights_that_do_not_move():
    from types import SimpleNamespace

    from tinyft.targets.gate import compare_movement

    start = {"w": np.ones(3, np.float32)}
    job = SimpleNamespace(parameters=lambda: {"w": torch.ones(3)})
    assert compare_movement(job, start, start) == 0
    with pytest.raises(InputError, match="took the weights elsewhere"):
        compare_movement(job, start, {"w": np.float32([1, 1, 2])})


def test_saving_every_0_steps(monkeypatch, capsys):
    from tinyft.targets import device

    words = ["train.py", "--data", "d", "--steps", "1", "--save-every", "0"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        device.main()
    assert "--save-every 0 must be at least 1" in capsys.readouterr().err


def test_choices_are_learnt_as_completions(tmp_path, tiny_tokenizer):
    rows = [{"prompt": "It was", "choices": [" a bore", " great"], "answer": 1}]
    job = prepared(tmp_path, tiny_tokenizer, "lora", rows=rows)
    (item,) = job.batches.items
    labels = [t for t in item.labels[0].tolist() if t != -100]
    assert tiny_tokenizer.decode(labels) == " great<|im_end|>"


@pytest.mark.parametrize("method", ["full", "mezo"])
def test_the_models_own_dropout_is_told(method, tmp_path, tiny_tokenizer):
    from tinyft.targets.export import _dropout

    job = prepared(tmp_path, tiny_tokenizer, method, "opt", dropout=0.25, attention_dropout=0.0)
    assert _dropout(job) == ({"dropout": 0.25} if method == "full" else {})
