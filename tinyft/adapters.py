"""Low-rank adapters: surgery on a model, and PEFT's files.

LoRA (Hu et al. 2021, arXiv:2106.09685): `y = W x + (alpha / rank) B A x`, with W frozen, A
(rank, in) Kaiming-uniform and B (out, rank) zero, as PEFT starts them. A and B are `nn.Linear`
modules: whoever works on linear layers (perturbs, prunes, counts them) needs nothing special here.
They are float32 when the base is in half precision or packed, as PEFT keeps them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tinyft.errors import InputError
from tinyft.kernels.lora_linear import add_low_rank, lora_linear
from tinyft.modules import is_plain_linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT puts before every name
# Beginnings of A and B that PEFT takes out of the base, to which they are then no update.
_OUT_OF_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _conv1d() -> type:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, weight (in, out)

    return Conv1D


class LoRALinear(nn.Module):
    """`base(x) + alpha / rank * lora_B(lora_A(dropout(x)))`, base frozen.

    Args:
        base: `nn.Linear`, transformers' `Conv1D`, or bitsandbytes' `Linear4bit`, `Linear8bitLt`.
        rank: of the update.
        alpha: the update is scaled by `alpha / rank`.
        dropout: probability of zeroing an input of the update.
        generator: draws A; without one A stays uninitialised, to be loaded.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        n_in, n_out = _sizes(base)
        device, dtype = base.weight.device, base.weight.dtype
        dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.base = base
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = skip_init(nn.Linear, n_in, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = skip_init(nn.Linear, rank, n_out, bias=False, device=device, dtype=dtype)
        if generator is not None:
            drawn = torch.empty(rank, n_in, dtype=dtype)  # on the CPU: the same on every device
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.lora_A.weight.data.copy_(drawn)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), dtype of the base."""
        base, A, B = self.base, self.lora_A, self.lora_B
        drops = self.training and getattr(self.dropout, "p", 0.0) > 0
        # Under autocast torch chooses the precision of each product.
        fused = not drops and not torch.is_autocast_enabled(x.device.type)
        if fused and is_plain_linear(A) and is_plain_linear(B):
            if is_plain_linear(base) and not any(p.requires_grad for p in base.parameters()):
                return lora_linear(x, base.weight, A.weight, B.weight, self.scale, bias=base.bias)
            return add_low_rank(base(x), x, A.weight, B.weight, self.scale)
        # Through the modules, so that whoever changed A or B (zeroth order, say) is heard.
        y = base(x)
        inner = A(self.dropout(x.to(A.weight.dtype)))
        # Scaled where it is small: `rank` wide and not `out`.
        return y + B(inner * self.scale).to(y.dtype)

    def delta(self) -> Tensor:
        """The update of the weight, (out, in)."""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    # Some models look at their layers' weights (for a dtype, a shape).
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


def adapter_arguments(config: Any) -> dict[str, Any]:
    """What a run's configuration holds for `inject`, as its keyword arguments."""
    same = {name: getattr(config, name) for name in ("rank", "alpha", "dropout", "seed")}
    return {**same, "targets": config.lora_targets}


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> list[str]:
    """Put adapters on a model's linear layers and freeze the rest; returns the layers' names.

    A classifier's head, which is new, stays trainable and is saved with the adapters.

    Args:
        targets: `"all-linear"`: all but the output head. `"attention"`: those inside attention
            modules. Else names, each of a layer or the end of layers' names (`"q_proj"`).
        seed: of A.
    """
    if adapters(model):
        raise InputError("This model has adapters already. Merge or remove them first.")
    names = _chosen(model, targets)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        wrapped = LoRALinear(model.get_submodule(name), rank, alpha, dropout, generator)
        wrapped.train(model.training)
        model.set_submodule(name, wrapped)
    _freeze(model)
    return names


def ensure(model: nn.Module, *arguments: Any, **named: Any) -> None:
    """Adapters to train: those that are there, or new ones as `inject` puts them with these.

    Those of a packed model come frozen, as all of it does: they are trained on.
    """
    if not adapters(model):
        inject(model, *arguments, **named)
    elif not any(p.requires_grad for p in model.parameters()):
        for layer in adapters(model).values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def remove(model: nn.Module) -> None:
    """Undo `inject`: the base layers are back, untouched, and as trainable as they were."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.base)
    for parameter in model.__dict__.pop("_frozen_by_adapters", ()):
        parameter.requires_grad_(True)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter into its base weight, in place, and remove it.

    A packed base becomes an `nn.Linear` of full precision: packing it again would lose the update.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for layer in adapters(model).values():
        if _is_packed(layer.base):
            layer.base = _unpacked(layer.base, dtype)
        weight, delta = layer.base.weight, layer.delta()
        weight.add_((delta.t() if isinstance(layer.base, _conv1d()) else delta).to(weight.dtype))
    remove(model)


def save_adapter(model: nn.Module, directory: str | Path, base_ref: str) -> None:
    """Write the adapters (and a classifier's head) as PEFT does: a config and safetensors."""
    layers = adapters(model)
    if not layers:
        raise InputError("This model has no adapters to save.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    first = next(iter(layers.values()))
    heads = _new_heads(model)
    config = {
        "peft_type": "LORA",
        "task_type": _task(model),
        "base_model_name_or_path": base_ref,
        "r": first.rank,
        "lora_alpha": _whole(first.alpha),
        "rank_pattern": {n: m.rank for n, m in layers.items() if m.rank != first.rank},
        "alpha_pattern": {n: _whole(m.alpha) for n, m in layers.items() if m.alpha != first.alpha},
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": _shortest(model, list(layers)),
        "modules_to_save": heads or None,
        "fan_in_fan_out": any(isinstance(m.base, _conv1d()) for m in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{name}.{part}.weight"] = getattr(layer, part).weight
    for head in heads:
        for name, tensor in model.get_submodule(head).state_dict().items():
            tensors[f"{_PREFIX}{head}.{name}"] = tensor
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        directory / WEIGHTS,
        metadata={"format": "pt"},
    )
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Put a saved adapter, PEFT's or ours, on a model, ready to train on; returns the layers.

    Raises:
        InputError: no adapter there, a kind that is not LoRA's plain form, or one made for another
            model; the model is then as it was.
    """
    directory = Path(directory)
    if adapters(model):
        raise InputError("This model has adapters already. Merge or remove them first.")
    config, tensors = _read(directory)
    own = model.state_dict()
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif name in own and own[name].shape == tensor.shape:
            whole[name] = tensor
        else:
            problems.append(f"{name} {tuple(tensor.shape)}")
    for name, pair in layers.items():
        try:
            base = model.get_submodule(name)
            (n_in, n_out), a, b = _sizes(base), pair["lora_A"], pair["lora_B"]
            assert a.shape[1] == n_in and b.shape == (n_out, a.shape[0])
        except (AttributeError, KeyError, AssertionError):
            problems.append(f"{name} {[tuple(t.shape) for t in pair.values()]}")
    if problems or not layers:
        raise InputError(
            f"The adapter in {directory} does not fit this {type(model).__name__}: "
            f"{'; '.join(problems[:5]) or 'it adapts no layer'}"
            f"{' and more' if len(problems) > 5 else ''}. Load it on the model that it was trained "
            f"on ({config.get('base_model_name_or_path')})."
        )
    for name, tensor in whole.items():
        own[name].copy_(tensor)
    for name, pair in layers.items():
        rank = pair["lora_A"].shape[0]
        alpha = _alpha(config, name)
        if config.get("use_rslora"):  # which scales by alpha / sqrt(rank)
            alpha *= math.sqrt(rank)
        base = model.get_submodule(name)
        layer = LoRALinear(base, rank, alpha, config.get("lora_dropout", 0.0))
        for part, tensor in pair.items():
            getattr(layer, part).weight.copy_(tensor)
        layer.train(model.training)
        model.set_submodule(name, layer)
    _freeze(model)
    return list(layers)


def saved_classes(directory: Path) -> int | None:
    """Outputs of the classification head that was saved with an adapter; None without one.

    Of the matrices that are whole the last has the fewest rows.
    """
    try:
        with safe_open(directory / WEIGHTS, "pt") as file:
            shapes = [
                file.get_slice(name).get_shape() for name in file.keys() if "lora_" not in name
            ]
    except (OSError, SafetensorError):
        return None
    return min((shape[0] for shape in shapes if len(shape) == 2), default=None)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's configuration and tensors, or an InputError that says what to do."""
    if not (directory / WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"{directory} holds a pickle (adapter_model.bin), which can run code when opened. "
            f"Save the adapter again with PEFT's save_pretrained(safe_serialization=True)."
        )
    try:
        config = json.loads((directory / CONFIG).read_text())
        with safe_open(directory / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"No readable adapter in {directory}: {error}. It needs {CONFIG} and {WEIGHTS}."
        ) from error
    start = str(config.get("init_lora_weights")).lower()
    tokens = config.get("alora_invocation_tokens")
    refused = [
        name
        for name, refuse in {
            f"peft_type {config.get('peft_type')}": config.get("peft_type") != "LORA",
            "DoRA": config.get("use_dora"),
            f"bias {config.get('bias')}": config.get("bias", "none") != "none",
            "layer replication": config.get("layer_replication"),
            f"init_lora_weights {start}": start.startswith(_OUT_OF_BASE),
            f"alora_invocation_tokens {tokens}": tokens,
        }.items()
        if refuse
    ]
    if refused:
        way_out = "Merge it into its base with PEFT (merge_and_unload) and load the result."
        if start.startswith(_OUT_OF_BASE):
            way_out = (
                "Save it again, where it was trained, with PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)."
            )
        if tokens:
            way_out = "What acts only behind some tokens is no update of weights: train without."
        raise InputError(
            f"The adapter in {directory} has {', '.join(refused)}; plain LoRA is what can be read. "
            f"{way_out}"
        )
    return config, tensors


def _whole(alpha: float) -> float:
    """An int where it is one, as PEFT writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _alpha(config: dict[str, Any], name: str) -> float:
    """A layer's alpha: PEFT allows patterns of names with their own."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return config["lora_alpha"]


# Which layers.


def _chosen(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    heads = _new_heads(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _conv1d()))
        and module is not output
        and name.split(".")[0] not in heads
    ]
    if targets == "all-linear":
        names = linear
    elif targets == "attention":
        names = [name for name in linear if re.search(r"(^|[._])(attn|attention)[._]", name)]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        missing = [t for t in wanted if not any(_ends(name, t) for name in linear)]
        if missing:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise InputError(
                f"No linear layer is called {', '.join(missing)}. This {type(model).__name__} has: "
                f"{', '.join(known)}; or say all-linear or attention."
            )
        names = [name for name in linear if any(_ends(name, t) for t in wanted)]
    if not names:
        raise InputError(f"This {type(model).__name__} has no linear layers for {targets}.")
    return names


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _shortest(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of `names` if they mean these layers and no others to PEFT, else full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = [name for name, _ in model.named_modules() if any(_ends(name, s) for s in short)]
    return short if sorted(meant) == sorted(names) else names


def _new_heads(model: nn.Module) -> list[str]:
    """Children outside the backbone that hold parameters, when they are no language-model head."""
    backbone = getattr(model, "base_model", model)
    if backbone is model or model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, child in model.named_children()
        if child is not backbone and any(True for _ in child.parameters())
    ]


def _task(model: nn.Module) -> str | None:
    kind = type(model).__name__
    return (
        "SEQ_CLS"
        if kind.endswith("ForSequenceClassification")
        else "CAUSAL_LM"
        if kind.endswith(("ForCausalLM", "LMHeadModel"))
        else None
    )


def _freeze(model: nn.Module) -> None:
    """Leave adapters and new heads trainable; remember what else was, for `remove`."""
    heads = _new_heads(model)
    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if not re.search(r"\.lora_[AB]\.weight$", name)
        and name.split(".")[0] not in heads
        and parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.__dict__["_frozen_by_adapters"] = frozen


# What a base layer is.


def _sizes(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    if isinstance(base, _conv1d()):
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features


def _is_packed(base: nn.Module) -> bool:
    return type(base).__module__.startswith("bitsandbytes")


def dense_weight(base: nn.Module) -> Tensor:
    """The weight (out, in) that a base layer multiplies by: its own, or made from packed bits."""
    weight = base.weight
    if not _is_packed(base):
        return weight.t() if isinstance(base, _conv1d()) else weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.data.float() * (absmax(base).float() / 127).unsqueeze(1)


def absmax(base: nn.Module) -> Tensor:
    """(out,) of an int8 layer, whose forward pass moves it into `state`."""
    return base.weight.SCB if base.weight.SCB is not None else base.state.SCB


def _unpacked(base: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """bitsandbytes' layer as a plain `nn.Linear`."""
    linear = skip_init(nn.Linear, base.in_features, base.out_features, bias=base.bias is not None)
    linear.weight = nn.Parameter(dense_weight(base).to(dtype), requires_grad=False)
    linear.bias = base.bias
    return linear
