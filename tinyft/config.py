"""What a run is: one frozen, validated `TrainConfig`, from flags, YAML or keyword arguments.

The command line's flags are derived from the fields here and from the `Options` of every registered
method, so a new field or a new method is a new flag with no other edit. `TrainConfig.build` takes
one flat mapping, `{"model": ..., "method": "mezo", "eps": 1e-3}`, and reports all that is wrong
with it at once.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from tinyft.budget import Budget
from tinyft.errors import InputError

_Bits = Annotated[Literal[16, 8, 4], BeforeValidator(lambda v: int(v) if str(v).isdigit() else v)]
_Names = BeforeValidator(lambda v: tuple(v.split(",")) if isinstance(v, str) and "," in v else v)
# As it was written, or a number of a YAML file or a program as its digits.
_Limit = Annotated[
    str | None,
    BeforeValidator(lambda v: str(v) if type(v) in (int, float) else v),
]
# Which runs a field means something for; elsewhere, setting it is a mistake worth an error.
_LORA: dict[str, Any] = {"only": "lora"}
_GRADIENT: dict[str, Any] = {"only": "gradients"}


class TrainConfig(BaseModel):
    """Everything that decides a run's result, and how it is watched and saved.

    Build it with `TrainConfig.build`, which also fills in the method's defaults: after that
    `trainable` is never None, and one of `steps` and `epochs` is set. `lr` may be, until the model
    is known (`with_lr`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="hub id, folder of safetensors, GGUF file, or smollm2-135m")
    data: str = Field(description="training examples: .jsonl .json .csv .parquet, or a hub id")
    method: str = Field(description="the fine-tuning method")
    output: Path | None = Field(None, description="folder for the result, the report and the plot")
    eval_data: str | None = Field(None, description="held-out examples, scored before and after")

    steps: int | None = Field(None, ge=1, description="optimizer steps (or --epochs)")
    epochs: float | None = Field(None, gt=0, description="passes over the data (default: 1)")
    batch_size: int = Field(8, ge=1, description="examples in a batch")
    max_length: int = Field(512, ge=2, description="tokens of an example; what is longer is cut")
    lr: float | None = Field(
        None, ge=0, description="learning rate (default: the method's, for the model's width)"
    )
    schedule: Literal["constant", "cosine"] = Field("cosine", description="learning rate over time")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    seed: int = Field(0, ge=0, lt=2**63, description="of the initialisation and the data order")
    objective: Literal["auto", "lm", "choice", "class", "accuracy", "f1"] = Field(
        "auto", description="what is minimised; accuracy and f1 need a zeroth-order method"
    )

    trainable: Literal["all", "lora", "prefix"] | None = Field(
        None, description="parameters that change (default: the method's own)"
    )
    rank: int = Field(8, ge=1, description="rank of the adapters", json_schema_extra=_LORA)
    alpha: float = Field(
        16.0, gt=0, description="adapters are scaled by alpha / rank", json_schema_extra=_LORA
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout before the adapters", json_schema_extra=_LORA
    )
    lora_targets: Annotated[str | tuple[str, ...], _Names] = Field(
        "all-linear",
        description="all-linear, attention, or names of modules separated by commas",
        json_schema_extra=_LORA,
    )

    optimizer: Literal["adamw", "sgd", "adamw8bit"] = Field(
        "adamw", description="the update rule", json_schema_extra=_GRADIENT
    )
    grad_accumulation: int = Field(
        1, ge=1, description="batches summed into one step", json_schema_extra=_GRADIENT
    )
    grad_clip: float | None = Field(
        None, gt=0, description="largest norm of the gradient", json_schema_extra=_GRADIENT
    )
    checkpointing: Literal["none", "selective", "full"] = Field(
        "selective",
        description="activations recomputed in the backward pass to save memory",
        json_schema_extra=_GRADIENT,
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and activations"
    )
    base_bits: _Bits = Field(16, description="bits of the frozen base's weights")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="CPU threads (default: torch's choice)")

    memory: _Limit = Field(None, description="limit on the process (on a GPU: there), e.g. 1.5GiB")
    flops: _Limit = Field(None, description="limit on all training steps, e.g. 2e15 or 2PFLOPs")
    time: _Limit = Field(None, description="limit on the run, evaluations included, e.g. 1h30min")
    energy: _Limit = Field(None, description="limit on what the processor draws, e.g. 50Wh")

    eval_every: int | None = Field(None, ge=1, description="steps between evaluations")
    checkpoint_every: int | None = Field(
        None,
        ge=1,
        description="steps between checkpoints (default: as many as keep saving under 5% of time)",
    )
    skip_bad_rows: bool = Field(False, description="leave bad rows out instead of stopping")
    tensorboard: bool = Field(False, description="also write a TensorBoard log")
    resume: bool = Field(False, description="go on with the run that --output holds")
    overwrite: bool = Field(False, description="discard the run that --output holds")

    options: Any = Field(None, description="the method's own options, an instance of its Options")

    @classmethod
    def build(
        cls,
        values: Mapping[str, Any],
        *,
        require: Iterable[str] = (),
        spell: Callable[[str], str] = str,
    ) -> TrainConfig:
        """Validate flat values, the method's options among them, and fill in its defaults.

        Args:
            values: `{field or option: value}`; strings are converted, None means "not given".
            require: fields that this caller needs although they are optional.
            spell: how errors name a field, e.g. as a flag.

        Raises:
            InputError: naming every problem.
        """
        from tinyft.optim import METHODS

        values = {name: value for name, value in values.items() if not _absent(name, value)}
        method = METHODS.get(str(values.get("method")))
        problems = [
            f"{spell(name)} is missing"
            for name in dict.fromkeys(("model", "data", "method", *require))
            if name not in values
        ]
        if "method" in values and method is None:
            problems.append(
                f"{spell('method')} {values['method']} is unknown: choose from "
                f"{', '.join(METHODS)}{_did_you_mean(str(values['method']), METHODS)}"
            )
        owners = {name: [m for m in METHODS if name in _options(m)] for name in values}
        own, options = {}, {}
        for name, value in values.items():
            if name in cls.model_fields:
                own[name] = value
            elif not owners[name]:
                known = [*cls.model_fields, *(name for m in METHODS for name in _options(m))]
                hint = _did_you_mean(name, known, spell)
                problems.append(f"{spell(name)} is not known{hint}")
            elif method is not None and method.name not in owners[name]:
                problems.append(
                    f"{spell(name)} belongs to {' and '.join(owners[name])}, not to {method.name}"
                )
            elif method is not None:
                options[name] = value
        if method is not None:
            own["options"], wrong = _validate(TypeAdapter(method.Options), options, spell)
            if hasattr(own["options"], "problems"):
                problems += [_spell_first(text, spell) for text in own["options"].problems()]
            problems += wrong.values()
        adapter = TypeAdapter(cls)
        # What is missing has been said: stand-ins let the rest be checked, and so below.
        own = dict.fromkeys(("model", "data", "method"), "?") | own
        config, wrong = _validate(adapter, own, spell)
        problems += wrong.values()
        if method is not None:
            right = {name: value for name, value in own.items() if name not in wrong}
            config = adapter.validate_python(right)._with_defaults(method)
            problems += config._conflicts(method, spell)
        if problems:
            raise InputError("; ".join(problems) + ".")
        return config

    def _with_defaults(self, method: Any) -> TrainConfig:
        trainable = self.trainable or method.needs or next(iter(method.default_lr))
        epochs = 1.0 if self.steps is None and self.epochs is None else self.epochs
        options = method.completed(self.options, trainable)
        update = {"trainable": trainable, "epochs": epochs, "options": options}
        return self.model_copy(update=update)

    def with_lr(self, model_config: Any, steps: int | None = None) -> TrainConfig:
        """With the method's rate for the model and for so many steps (`Optimizer.learning_rate`),
        if none was given. Without `steps`: those of the configuration, if it says."""
        from tinyft.optim import METHODS

        if self.lr is not None:
            return self
        method, steps = METHODS[self.method], steps or self.steps
        lr = method.learning_rate(self.trainable, model_config, self.options, steps)
        return self.model_copy(update={"lr": lr})

    def _conflicts(self, method: Any, spell: Callable[[str], str]) -> list[str]:
        """Fields that are right one by one and wrong together."""
        problems = []
        if self.steps is not None and self.epochs is not None:
            problems.append(f"{spell('steps')} and {spell('epochs')} exclude each other")
        if self.resume and self.overwrite:
            problems.append(f"{spell('resume')} and {spell('overwrite')} exclude each other")
        if method.needs and self.trainable != method.needs:
            problems.append(
                f"{method.name} trains {method.needs}: {spell('trainable')} {self.trainable} "
                f"does not go with it"
            )
        elif self.trainable not in method.default_lr:
            problems.append(
                f"{method.name} cannot train {self.trainable}: {spell('trainable')} is one of "
                f"{', '.join(method.default_lr)}"
            )
        if self.base_bits < 16 and self.trainable == "all":
            problems.append(
                f"{spell('base_bits')} {self.base_bits} keeps the base frozen, and {method.name} "
                f"trains it: train adapters (lora), or leave {spell('base_bits')} at 16"
            )
        if self.base_bits < 16 and method.packs_base:
            problems.append(
                f"{method.name} packs the base itself (adapters: to 4 bits), once it is rotated: "
                f"leave {spell('base_bits')} at 16"
            )
        if self.objective in ("accuracy", "f1") and method.uses_gradients:
            problems.append(
                f"{spell('objective')} {self.objective} has no gradient: use a zeroth-order "
                f"method (mezo), or the likelihood (choice) that it follows from"
            )
        if self.dropout and self.trainable == "lora" and not method.uses_gradients:
            problems.append(
                f"{spell('dropout')} is for methods with gradients: {method.name} compares losses "
                f"without it"
            )
        if self.eval_every is not None and self.eval_data is None:
            problems.append(f"{spell('eval_every')} needs {spell('eval_data')}")
        try:
            Budget.parse(**{name: getattr(self, name) for name in LIMITS}, spell=spell)
        except InputError as error:
            problems.append(str(error).removesuffix("."))
        for name, info in type(self).model_fields.items():
            if self.applies(name, method) or getattr(self, name) == info.default:
                continue
            lora = info.json_schema_extra == _LORA
            needs = "adapters (--trainable lora)" if lora else "gradients"
            problems.append(f"{spell(name)} needs {needs}, and this run has none")
        return problems

    @property
    def budget(self) -> Budget:
        """The limits, in numbers."""
        return Budget.parse(**{name: getattr(self, name) for name in LIMITS})

    def applies(self, name: str, method: Any) -> bool:
        """Whether a field means anything in this run."""
        only = (type(self).model_fields[name].json_schema_extra or {}).get("only")
        if only == "lora":
            return self.trainable == "lora"
        return only != "gradients" or method.uses_gradients

    def flat(self) -> dict[str, Any]:
        """The run as plain values, options among them: what `build` takes and config.yaml holds.

        Fields that mean nothing to the method, and those about this invocation only, are left out.
        """
        from tinyft.optim import METHODS

        method = METHODS[self.method]
        hidden = {"options", "resume", "overwrite"}
        values = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in hidden and self.applies(name, method)
        }
        values |= dataclasses.asdict(self.options)
        return {name: _plain(value) for name, value in values.items()}


LIMITS = ("memory", "flops", "time", "energy")  # the fields that `Budget.parse` takes

# How `--help` orders the flags; a field that is missing here fails the tests.
GROUPS = {
    "the run": ("model", "data", "eval_data", "method", "output", "resume", "overwrite"),
    "training": (
        *("steps", "epochs", "batch_size", "max_length", "lr", "schedule", "warmup"),
        *("weight_decay", "objective", "seed"),
    ),
    "adapters": ("trainable", "rank", "alpha", "dropout", "lora_targets"),
    "methods with gradients": ("optimizer", "grad_accumulation", "grad_clip", "checkpointing"),
    "the machine": ("dtype", "base_bits", "device", "threads"),
    "the budget": LIMITS,
    "on the way": ("eval_every", "checkpoint_every", "skip_bad_rows", "tensorboard"),
}


@dataclass(frozen=True)
class Flag:
    """One command-line flag, derived from a field."""

    name: str
    help: str
    default: Any
    is_bool: bool
    choices: tuple[Any, ...] = ()
    group: str = ""
    methods: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return as_flag(self.name)


def as_flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Fields as words of a command line, `--batch-size=8`; None is left out."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(as_flag(name) if value else as_flag(f"no_{name}"))
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            words.append(f"{as_flag(name)}={text}")
    return words


def from_flags(words: Sequence[str]) -> dict[str, Any]:
    """Fields of words as `as_flags` writes them, for `TrainConfig.build`.

    Raises:
        InputError: a word that is none.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            raise InputError(f"{word!r} is no flag; write --NAME=VALUE.")
        if equals:
            values[name] = text
        else:
            values[name.removeprefix("no_")] = not name.startswith("no_")
    return values


def flags() -> list[Flag]:
    """All flags of `tinyft train`: the fields of `TrainConfig`, then the methods' own options."""
    from tinyft.optim import METHODS

    found = [
        Flag(
            name,
            info.description or "",
            None if info.is_required() else info.default,
            info.annotation is bool,
            tuple(METHODS) if name == "method" else _choices(info.annotation),
            next(title for title, names in GROUPS.items() if name in names),
        )
        for name, info in TrainConfig.model_fields.items()
        if name != "options"
    ]
    own: dict[str, dict[str, Flag]] = {}  # by what it means: methods may share a name
    for method, cls in METHODS.items():
        for option in dataclasses.fields(cls.Options):
            text = option.metadata.get("help", "")
            meanings = own.setdefault(option.name, {})
            meanings[text] = Flag(
                option.name,
                text,
                None if option.default is dataclasses.MISSING else option.default,
                option.type in (bool, "bool"),
                tuple(option.metadata.get("choices", ())),
                methods=(*(meanings[text].methods if text in meanings else ()), method),
            )
    return found + [_merged(list(meanings.values())) for meanings in own.values()]


def _merged(meanings: list[Flag]) -> Flag:
    """One flag of several meanings, each with its methods."""
    first, *others = meanings
    if not others:
        return first
    return dataclasses.replace(
        first,
        help="; ".join(f"{' and '.join(one.methods)}: {one.help}" for one in meanings),
        choices=tuple(choice for one in meanings for choice in one.choices),
        methods=tuple(method for one in meanings for method in one.methods),
    )


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, also inside `... | None`."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat mapping from a YAML file.

    Raises:
        InputError: no such file, no YAML, or not a flat mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise InputError(
            f"--config {path} must hold `name: value` lines, one a flag, without sections."
        )
    # A flag's spelling is welcome too: `batch-size` is `batch_size`.
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _options(method: str) -> tuple[str, ...]:
    from tinyft.optim import METHODS

    return tuple(f.name for f in dataclasses.fields(METHODS[method].Options))


def _validate(
    adapter: TypeAdapter, values: Mapping[str, Any], spell: Callable[[str], str]
) -> tuple[Any, dict[str, str]]:
    """`(value, {})`, or `(None, {name: problem})` with pydantic's findings in a user's words."""
    try:
        return adapter.validate_python(dict(values)), {}
    except ValidationError as error:
        problems = {}
        for found in error.errors():
            name = str(found["loc"][0]) if found["loc"] else ""
            text = found["msg"].replace("Input should be", "must be").partition(", unable")[0]
            # A union reports once for each of its members; the first says enough.
            problems.setdefault(name, f"{spell(name)} {_plain(found['input'])}: {text}")
        return None, problems


def _spell_first(text: str, spell: Callable[[str], str]) -> str:
    """A method's sentence about an option, "eps must be ...", in this caller's spelling."""
    name, _, rest = text.rstrip(".").partition(" ")
    return f"{spell(name)} {rest}"


def _did_you_mean(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {spell(close[0])}?)" if close else ""


def _absent(name: str, value: Any) -> bool:
    """None, or the word "none" for a field that may be None: not given."""
    if value is None:
        return True
    if not isinstance(value, str) or value.lower() not in ("none", "null"):
        return False
    from tinyft.optim import METHODS

    if name in TrainConfig.model_fields:
        return TrainConfig.model_fields[name].default is None
    own = [f for m in METHODS.values() for f in dataclasses.fields(m.Options) if f.name == name]
    return all(f.default is None for f in own)


def _plain(value: Any) -> Any:
    """A value as YAML and JSON have it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
