"""The command line: plan, train, eval, merge, export, import, bench, demo, targets. Wiring only.

Exit codes: 0 done, 2 bad input or usage, 3 does not fit the budget, 4 a full disk or no network,
128 + n stopped by signal n.
Heavy modules are imported by the command that needs them, so that `tinyft --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from tinyft.errors import BudgetError, InputError, TinyFTError

_EPILOG = """examples:
  tinyft demo
  tinyft train --model smollm2-135m --data film-reviews:train --eval-data film-reviews:dev \\
               --method lora --steps 100 --output runs/lora
  tinyft train --output runs/lora --resume
  tinyft eval --model runs/lora --data film-reviews:dev
  tinyft merge --output runs/merged runs/lora
  tinyft bench --model minilm-l6 --data film-reviews --flops 1e12 1e13 --output runs/bench
  tinyft targets
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Errors are a paragraph on stderr, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    before = _on_terminate()
    try:
        arguments = _parse([word for word in argv if word != "--debug"])
        return arguments.run(arguments)
    except TinyFTError as error:
        if debug:
            raise
        print(f"tinyft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tinyft: Stopped. What was saved before is intact.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): quietly stop, also when Python flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _on_terminate() -> Any:
    """Let SIGTERM unwind like an exception, so that temporary files go; exit code 143."""

    def stop(number: int, frame: Any) -> NoReturn:
        print("tinyft: Stopped. What was saved before is intact.", file=sys.stderr)
        raise SystemExit(128 + number)

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        return None


class _Parser(argparse.ArgumentParser):
    """argparse with our errors: raised, not printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from tinyft import __version__

    parser = _Parser(
        prog="tinyft",
        description="Fine-tune language models on machines that are too small for it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tinyft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show Python's traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    wanted = next((word for word in argv if not word.startswith("-")), "")
    for name, (help_text, fill) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text, allow_abbrev=False
        )
        if name == wanted:
            fill(command)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and wanted not in _EXPLAIN_UNKNOWN:
        raise InputError(f"Unknown: {' '.join(unknown)}. See `tinyft {wanted} --help`.")
    arguments.unknown = unknown
    return arguments


# train


def _fill_train(parser: argparse.ArgumentParser) -> None:
    from tinyft.config import flags

    parser.description = "Fine-tune a model on a file of examples, and measure everything."
    parser.usage = "tinyft train --model M --data FILE --method METHOD --output DIR [flags]"
    parser.add_argument("--config", type=Path, help="YAML file with the same names; flags win")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    groups: dict[str, Any] = {}
    for flag in flags():
        title = f"options of {' and '.join(flag.methods)}" if flag.methods else flag.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = flag.help.replace("%", "%%")
        if flag.default not in (None, False) and "default" not in text:
            text += f" (default: {flag.default})"
        how: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS, "help": text}
        if flag.is_bool:
            how["action"] = argparse.BooleanOptionalAction
        elif flag.choices:
            how["metavar"] = "{" + ",".join(map(str, flag.choices)) + "}"
        else:
            how["metavar"] = flag.name.split("_")[-1].upper()
        groups[title].add_argument(flag.text, **how)
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from tinyft.config import LIMITS, TrainConfig, as_flag
    from tinyft.progress import make_reporter
    from tinyft.report import summary

    values, resuming = _values(arguments)
    limited = any(values.get(name) is not None for name in LIMITS)
    if not resuming and (limited or values.get("method") == "auto"):
        values |= _planned(values, "event" if arguments.json else "table")
    config = TrainConfig.build(values, require=("output",), spell=as_flag)
    reporter = make_reporter(as_json=arguments.json)
    from tinyft.train import run

    result = run(config, reporter)
    if arguments.json:
        print(json.dumps({"event": "report", **result.report}), flush=True)
    else:
        print(summary(result.report))
        print(f"model, report.json and loss.png: {result.output}")
    return 0


def _train_config(arguments: argparse.Namespace, **defaults: Any) -> Any:
    from tinyft.config import TrainConfig, as_flag

    values, _ = _values(arguments)
    return TrainConfig.build(defaults | values, require=("output",), spell=as_flag)


def _values(arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The fields that are given, and whether a run began with them that is to go on.

    The layers: what the folder's run began with (to resume), the YAML file, the flags.
    """
    from tinyft.config import read_yaml
    from tinyft.output import OutputFolder

    given = {k: v for k, v in vars(arguments).items() if k not in _NOT_FIELDS}
    given |= _unknown_flags(arguments.unknown)
    layers = [read_yaml(arguments.config) if arguments.config else {}, given]
    last = layers[0] | given
    if last.get("resume") and last.get("output"):
        saved = OutputFolder(Path(last["output"])).saved_config()
        if saved and last.get("method", "auto") in ("auto", saved["method"]):
            # The method stays, however it was chosen.
            own = [{k: v for k, v in layer.items() if k != "method"} for layer in layers]
            layers = [saved, *own]
    values: dict[str, Any] = {}
    for layer in layers:
        # The two ways to say how long exclude each other; the later layer's way holds.
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if layer.get(one) is not None and layer.get(other) is None:
                values.pop(other, None)
        values |= layer
    return values, len(layers) > 2


def _unknown_flags(words: Sequence[str]) -> dict[str, Any]:
    """`["--lrr", "1", "x"]` as fields, so that they are reported with all other problems."""
    found: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value or "given"
        elif not found:
            raise InputError(f"{word!r} belongs to no flag. See `tinyft train --help`.")
    return found


_NOT_FIELDS = {
    *("config", "json", "run", "unknown", "debug", "target", "plot", "format"),
    "training_python",
}
_EXPLAIN_UNKNOWN = {"plan", "train", "export"}  # with everything else that is wrong


# plan


def _fill_plan(parser: argparse.ArgumentParser) -> None:
    _fill_train(parser)
    parser.description = "Choose the method that fits a budget, and predict what it will use."
    parser.usage = "tinyft plan --model M --data FILE [--memory 1.5GiB] [--time 30min] [flags]"
    parser.add_argument("--target", help="a device of `tinyft targets` (default: this machine)")
    parser.add_argument("--plot", type=Path, help="write a PNG of memory and FLOPs there")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    values, _ = _values(arguments)
    show = "json" if arguments.json else "table"
    _planned(values, show, target=arguments.target, plot=arguments.plot)
    return 0


def _planned(values: dict[str, Any], show: str, **rest: Any) -> dict[str, Any]:
    """Plan a run, say so, and return its configuration. Nothing of it is left in this process."""
    from tinyft.parallel import Killed, apart

    try:
        return apart(lambda: _plan_and_say(values, show, **rest))
    except Killed:
        raise BudgetError(
            "The process that plans was killed, as happens where memory is short: planning takes "
            "some 650 MiB by itself. Plan on another machine (`tinyft plan --target DEVICE` or "
            "--memory), and give `tinyft train` the configuration that it prints (--json)."
        ) from None


def _plan_and_say(
    values: dict[str, Any], show: str, *, target: str | None = None, plot: Path | None = None
) -> dict[str, Any]:
    """`show`: as a `"table"`, as `"json"`, or as an `"event"`, a line of JSON among others."""
    from tinyft import plan_view
    from tinyft.config import as_flag
    from tinyft.planning import make_plan

    planned = make_plan(values, target=target, spell=as_flag, may_fork=True)
    if plot:
        plan_view.plot(planned, plot)
    if show == "table":
        plan_view.show(planned)
    elif show == "json":
        print(plan_view.as_json(planned), flush=True)
    else:
        print(json.dumps({"event": "plan", **planned.as_dict()}), flush=True)
    return planned.config  # an error where nothing fits


# export, import


def _fill_export(parser: argparse.ArgumentParser) -> None:
    _fill_train(parser)
    parser.description = (
        "Write a training run as ONNX graphs that a device runs without torch, or a model with "
        "its weights packed."
    )
    parser.usage = (
        "tinyft export --model M --data FILE --method METHOD --target T --output DIR\n"
        "       tinyft export --model M [--data FILE] --format packed --output DIR\n"
        "       tinyft export --model M --format {inference,inference-int8} --output DIR"
    )
    parser.add_argument("--target", help="a device of `tinyft targets`")
    parser.add_argument(
        "--training-python",
        type=Path,
        metavar="PYTHON",
        help="an interpreter with onnxruntime-training (or onnxruntime-training-cpu) 1.19.2 and "
        "onnx: write that runtime's training artefacts (default: graphs for any onnxruntime)",
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "packed", "inference", "inference-int8"),
        default="onnx",
        help="onnx: graphs that train; inference, inference-int8: a trained model, merged, as a "
        "graph of its logits, in float32 (a packed model's weights stay packed) or with int8 "
        "weights; packed: a model rotated and quantised as for --method roste, without training, "
        "or what a run left (default: onnx)",
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.format == "packed":
        return _export_packed(arguments)
    if arguments.format.startswith("inference"):
        return _export_inference(arguments)
    if arguments.target is None:
        raise InputError(
            "--target is missing: a device of `tinyft targets`, or --format packed for none."
        )
    config = _train_config(arguments)
    with _extra_of_export():
        from tinyft.targets.export import export
    parity = export(config, arguments.target, arguments.training_python)
    if arguments.json:
        print(json.dumps(parity))
    else:
        dropout = " without the model's dropout" if "dropout_left_out" in parity else ""
        print(
            f"{parity['steps']} steps of objective {parity['objective']} as torch's{dropout}, "
            f"losses to {parity['loss_error']:.1e}. "
            f"On the device: python {config.output}/train.py --data FILE --steps N"
        )
    return 0


_DEVICES = ("target", "training_python")  # flags that are for graphs that train


@contextmanager
def _extra_of_export() -> Iterator[None]:
    """Around an import: what only an extra installs may be missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"This needs {error.name}: pip install 'tinyft[export]'.") from error


def _model_and_output(arguments: argparse.Namespace, what: str) -> tuple[str, Path]:
    """Of an export that takes nothing else, so that a flag which it would ignore is an error."""
    from tinyft.config import as_flag

    values, _ = _values(arguments)
    values |= {name: getattr(arguments, name) for name in _DEVICES}
    values = {name: value for name, value in values.items() if value is not None}
    wanted = ("model", "output")
    problems = [f"{as_flag(name)} is missing" for name in wanted if name not in values]
    problems += [f"{as_flag(name)} is nothing to {what}" for name in values if name not in wanted]
    if problems:
        raise InputError("; ".join(problems) + ". It takes --model and --output alone.")
    return str(values["model"]), Path(values["output"])


def _export_inference(arguments: argparse.Namespace) -> int:
    model, output = _model_and_output(arguments, f"--format {arguments.format}")
    with _extra_of_export():
        from tinyft.targets.inference import export_inference

    found = export_inference(model, output, int8=arguments.format == "inference-int8")
    if arguments.json:
        print(json.dumps(found))
    else:
        print(
            f"{output}/model.onnx, {found['bytes'] / 2**20:.1f} MiB: logits as torch's, "
            f"to {found['logit_error']:.1e} of the largest"
            + (", where both round alike" if "flips" in found else "")
        )
    return 0


def _export_packed(arguments: argparse.Namespace) -> int:
    from tinyft.config import as_flag
    from tinyft.library import copy_packed, is_packed, pack

    values, _ = _values(arguments)
    if "model" in values and is_packed(str(values["model"])):
        model, output = _model_and_output(arguments, "a model that is packed already")
        copy_packed(model, output)
        sizes = {}
    else:
        ignored = [name for name in _DEVICES if getattr(arguments, name) is not None]
        if ignored:
            flags = " and ".join(as_flag(name) for name in ignored)
            raise InputError(f"{flags}: a packed model is for torch on any machine. Leave it out.")
        config = _train_config(arguments, method="roste")
        model, output, sizes = config.model, config.output, pack(config)
    if arguments.json:
        print(json.dumps(sizes))
    else:
        listed = ", ".join(f"{name} {n / 2**20:.1f} MiB" for name, n in sizes.items())
        print(f"packed {model} into {output}" + (listed and f": {listed}"))
    return 0


def _fill_import(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make a model folder, or an adapter, of what a device trained."
    parser.add_argument("source", type=Path, metavar="DIR", help="an export, trained")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    with _extra_of_export():
        from tinyft.targets.export import collect

    collect(arguments.source, arguments.output)
    print(f"made {arguments.output} of what was trained in {arguments.source}")
    return 0


# eval


def _add_loading(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that loads a model."""
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: auto)")
    parser.add_argument("--base-bits", type=int, default=16, help="16, 8 or 4 (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _fill_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, folder, GGUF file, output folder")
    parser.add_argument("--data", required=True, help="examples, as for train")
    parser.add_argument("--batch-size", type=_positive, default=8, help="(default: 8)")
    parser.add_argument("--max-length", type=_positive, default=512, help="(default: 512)")
    parser.add_argument("--generate", action="store_true", help="also write answers and score them")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, help="(default: 64)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_loading(parser)
    parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    from tinyft.library import score
    from tinyft.progress import scores

    found = score(
        arguments.model,
        arguments.data,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        generate=arguments.generate,
        max_new_tokens=arguments.max_new_tokens,
        skip_bad_rows=arguments.skip_bad_rows,
        dtype=arguments.dtype,
        base_bits=arguments.base_bits,
        device=arguments.device,
        threads=arguments.threads,
    )
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(f"{arguments.model} on {arguments.data}: {scores(found)}")
    for sample in found.get("samples", [])[:3]:
        print("\n" + "\n".join(f"{name}: {text}" for name, text in sample.items()))
    return 0


# merge


def _fill_merge(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an adapter or a seed log, with its base, as a plain model folder."
    parser.add_argument("source", metavar="DIR", help="output folder of a run, or an adapter")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--dtype", default="auto", help="of the result (default: as trained)")
    parser.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from tinyft.library import merge

    merge(arguments.source, arguments.output, dtype=arguments.dtype)
    print(f"merged {arguments.source} into {arguments.output}")
    return 0


# bench


def _fill_bench(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS  # what is not given is `bench`'s own
    parser.description = (
        "Compare methods inside budgets: for every task, budget and method the same search for a "
        "learning rate, then a run a seed, with quality, FLOPs, time, memory and energy. The same "
        "command goes on after an interruption, also in several processes at once."
    )
    parser.usage = (
        "tinyft bench --model M --data TASK ... [--flops N ...] [--memory SIZE ...] --output DIR"
    )
    parser.add_argument("--model", required=True, help="hub id, folder, GGUF file, built-in name")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="TASK",
        help="film-reviews, e2e, ... ; FILE.jsonl, of which rows are held out; TRAIN.jsonl,"
        "TEST.jsonl",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all of it")
    parser.add_argument("--flops", nargs="+", help="budgets, as for train")
    parser.add_argument("--memory", nargs="+", help="each with each of --flops")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="all; names; NAME:FIELD=VALUE,...; peers, or of them peft, torch-full and mezo-exact "
        "(default: all)",
    )
    parser.add_argument("--seeds", type=_positive, help="runs of each (default: 1)")
    group = parser.add_argument_group("the search, the same for every method")
    group.add_argument(
        "--lr-search",
        nargs="+",
        type=float,
        metavar="FACTOR",
        help="learning rates to try, in multiples of the method's own (default: 1 4 16)",
    )
    group.add_argument(
        "--search-share",
        type=float,
        metavar="SHARE",
        help="of the budget's steps for each try, on top of them (default: 0.3)",
    )
    group.add_argument(
        "--eval-rows",
        type=_positive,
        metavar="N",
        help="rows to score on, and as many others to choose rates on (default: 500)",
    )
    group = parser.add_argument_group("every run")
    group.add_argument("--batch-size", type=_positive, help="(default: 16)")
    group.add_argument("--max-length", type=_positive, help="(default: 128)")
    group.add_argument("--epochs", type=float, help="at most (default: 10)")
    group.add_argument("--dtype", help="(default: the planner's choice)")
    group.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("energy and CO2")
    group.add_argument(
        "--watts-per-core",
        type=float,
        help="where energy is not counted (default: 12, any processor's in Green Algorithms)",
    )
    group.add_argument(
        "--grams-per-kwh",
        type=float,
        help="CO2 of electricity (default: 436, the world's in 2022 by Ember)",
    )
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from tinyft.benchmark.command import bench

    settings = {k: v for k, v in vars(arguments).items() if k not in ("run", "unknown", "debug")}
    return bench(**settings)


# demo


def _fill_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fine-tune SmolLM2-135M on film-review sentiment within ten minutes."
    parser.add_argument("--method", default="lora", help="lora, full or mezo (default: lora)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="(runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="discard what --output holds")
    parser.add_argument("--steps", type=_positive, help="(default: the method's own)")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from tinyft.demo import demo

    demo(
        arguments.method,
        arguments.output,
        steps=arguments.steps,
        overwrite=arguments.overwrite,
        as_json=arguments.json,
    )
    return 0


# targets


def _fill_targets(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show the known devices: memory, rates, power, runtimes, and their sources."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these (default: all)")
    parser.add_argument("--sources", action="store_true", help="how each figure is known")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=_targets)


def _targets(arguments: argparse.Namespace) -> int:
    from tinyft.targets.listing import as_json, show
    from tinyft.targets.profiles import load_profiles, profile

    names = arguments.names or load_profiles()
    chosen = [profile(name) for name in names]
    if arguments.json:
        print(as_json(chosen))
    else:
        show(chosen, sources=arguments.sources)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("fetch a small model and data, and fine-tune it", _fill_demo),
    "plan": ("choose the method that fits a budget, and predict what it uses", _fill_plan),
    "train": ("fine-tune a model on a file of examples", _fill_train),
    "eval": ("score a model on a file of examples", _fill_eval),
    "merge": ("write an adapter or a seed log as a plain model folder", _fill_merge),
    "export": ("write a run as graphs that a device trains without torch", _fill_export),
    "import": ("bring back what a device trained", _fill_import),
    "bench": ("compare methods inside budgets, with a report", _fill_bench),
    "targets": ("show the known devices: memory, rates, power, runtimes", _fill_targets),
}

if __name__ == "__main__":
    sys.exit(main())
