"""The command line: train, eval, merge, demo. Wiring only.

Exit codes: 0 done, 2 bad input or usage, 3 does not fit the budget, 128 + n stopped by signal n.
Heavy modules are imported by the command that needs them, so that `tinyft --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinyft.errors import InputError, TinyFTError

_EPILOG = """examples:
  tinyft demo
  tinyft train --model smollm2-135m --data film-reviews:train --eval-data film-reviews:dev \\
               --method lora --steps 100 --output runs/lora
  tinyft train --output runs/lora --resume
  tinyft eval --model runs/lora --data film-reviews:dev
  tinyft merge --output runs/merged runs/lora
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
    if unknown and wanted != "train":  # train explains unknown flags with everything else
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
    from tinyft.progress import make_reporter
    from tinyft.report import summary

    config = _train_config(arguments)
    reporter = make_reporter(as_json=arguments.json)
    from tinyft.train import run

    result = run(config, reporter)
    if arguments.json:
        print(json.dumps({"event": "report", **result.report}), flush=True)
    else:
        print(summary(result.report))
        print(f"model, report.json and loss.png: {result.output}")
    return 0


def _train_config(arguments: argparse.Namespace) -> Any:
    """The layers: what the folder's run began with (to resume), the YAML file, the flags."""
    from tinyft.config import TrainConfig, as_flag, read_yaml
    from tinyft.output import OutputFolder

    given = {k: v for k, v in vars(arguments).items() if k not in _NOT_FIELDS}
    given |= _unknown_flags(arguments.unknown)
    layers = [read_yaml(arguments.config) if arguments.config else {}, given]
    last = layers[0] | given
    if last.get("resume") and last.get("output"):
        saved = OutputFolder(Path(last["output"])).saved_config()
        if last.get("method", saved.get("method")) == saved.get("method"):
            layers.insert(0, saved)
    values: dict[str, Any] = {}
    for layer in layers:
        # The two ways to say how long exclude each other; the later layer's way holds.
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if layer.get(one) is not None and layer.get(other) is None:
                values.pop(other, None)
        values |= layer
    return TrainConfig.build(values, require=("output",), spell=as_flag)


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


_NOT_FIELDS = {"config", "json", "run", "unknown", "debug"}


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


# demo


def _fill_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fine-tune SmolLM2-135M on film-review sentiment within ten minutes."
    parser.add_argument("--method", default="lora", help="lora, full or mezo (default: lora)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="(runs/demo)")
    parser.add_argument("--steps", type=_positive, help="(default: the method's own)")
    parser.add_argument("--json", action="store_true", help="JSON lines on standard output")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from tinyft.demo import demo

    demo(arguments.method, arguments.output, steps=arguments.steps, as_json=arguments.json)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return int(text)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("fetch a small model and data, and fine-tune it", _fill_demo),
    "train": ("fine-tune a model on a file of examples", _fill_train),
    "eval": ("score a model on a file of examples", _fill_eval),
    "merge": ("write an adapter or a seed log as a plain model folder", _fill_merge),
}

if __name__ == "__main__":
    sys.exit(main())
