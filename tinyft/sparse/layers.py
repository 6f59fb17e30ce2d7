"""MLPs and attention of a model that leave out channels for the tokens of the context.

An MLP stays compact from its first product to its last: what it keeps for the backward pass
shrinks with the selection, and adapters on it are sliced along. In attention the base's part of
queries, keys, values and output is sparse and the adapters are dense; biases always count.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tinyft import dry_run
from tinyft.errors import InputError
from tinyft.importance import undisturbed
from tinyft.kernels.rows import join, split
from tinyft.losses import close
from tinyft.sparse.channels import kept, qk_channels, top, vo_channels
from tinyft.sparse.estimator import Estimator
from tinyft.sparse.projection import Projection
from tinyft.sparse.tokens import Tokens

log = logging.getLogger(__name__)

# Gathering an element of a weight, and moving an element of an activation out and in again, cost
# about as much as so many multiply-adds of a product: a dense pass is faster below that.
GATHER, MOVE = 25, 50
_KEEP = 8  # slices are kept for the backward pass if they take 1/8 of what is spared, or less
# Families whose rotary positions pair channels d and d + head_dim / 2, or that have none.
_ROTARY = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"),
    *("granite", "olmo2", "smollm3"),
}
_FUSED = {"gpt2"}
_GATED = ("gate_proj", "up_proj", "down_proj")
_PLAIN = (
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn")


@dataclass
class Context:
    """What the sparse layers are told of the pass that runs.

    Attributes:
        tokens: None while everything is dense.
        sparsity: `{(layer, part): share of channels to leave out}`.
        break_even: whether a dense pass is taken where it should be faster.
        block: channels of an MLP that are chosen together.
    """

    tokens: Tokens | None
    sparsity: dict[tuple[int, str], float]
    break_even: bool = True
    block: int = 1

    def of(self, layer: int, part: str, x: Tensor, channels: int) -> float:
        """The sparsity of a part of a layer for an input x (R, T, D) and so many channels; 0 where
        it had better be dense."""
        tokens, sparsity = self.tokens, self.sparsity.get((layer, part), 0.0)
        if tokens is None or sparsity <= 0 or tuple(x.shape[:-1]) != tokens.shape:
            return 0.0
        n, k = len(tokens.sparse), kept(channels, sparsity)
        moves = MOVE * x.shape[0] * x.shape[1] if len(tokens.dense) else 0
        if not n or (self.break_even and n * (channels - k) <= GATHER * k + moves):
            return 0.0
        return sparsity


def shared_out(
    x: Tensor,
    tokens: Tokens,
    sparse: Callable[[Tensor], Tensor],
    dense: Callable[[Tensor], Tensor],
    parts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`sparse` on the context's tokens of x (R, T, D) and `dense` on the others: (R, T, out).

    Args:
        parts: x taken apart already.
    """
    if not len(tokens.dense):
        return sparse(x.flatten(0, 1)).view(*tokens.shape, -1)
    first, second = tokens.sparse, tokens.dense
    a, b = parts or split(x.flatten(0, 1), first, second)
    return join(sparse(a), dense(b), first, second).view(*tokens.shape, -1)


class SparseMLP:
    """An MLP, gated or plain, for whose context tokens only some inner channels are computed.

    Attributes:
        first: the projections whose outputs are selected, "gate" (if any) and "up"; `down`.
        guess: the outputs of `first`, side by side; None: channels are chosen by a sample.
    """

    def __init__(self, module: nn.Module, layer: int, context: Context) -> None:
        self.module, self.layer, self.context = module, layer, context
        names = _mlp_names(module)
        assert names is not None
        *first, down = (getattr(module, name) for name in names)
        keys = ("gate", "up") if len(first) == 2 else ("up",)
        self.first = {k: Projection(m, "rows") for k, m in zip(keys, first, strict=True)}
        self.down = Projection(down, "columns")
        self.act = next(getattr(module, a) for a in _ACTIVATIONS if hasattr(module, a))
        self.after = getattr(module, "dropout", None) or nn.Identity()
        self.channels, self.width = self.down.n_in, self.down.n_out
        self.guess: Estimator | None = None

    def estimated(self) -> dict[str, Projection]:
        """What `guess` guesses, in its order."""
        return self.first

    def inner(self, values: dict[str, Any]) -> Tensor:
        """The inner activation from the outputs of `first`."""
        h = self.act(values["gate" if "gate" in values else "up"])
        return h * values["up"] if "gate" in values else h

    @torch.no_grad()
    def scores(self, x: Tensor, tokens: Tokens) -> Tensor:
        """(channels,) float32 for x (R, T, D): how far each inner channel moves the output of a
        sample of the context's tokens, adapters aside. With a `guess` SparseLoRA's eq. 4, the inner
        activation of each row's mean context token, its norm over rows."""
        if self.guess is None:
            at, stands = tokens.sample
            some = x.flatten(0, 1)[at]
            h = {key: p.base(some) for key, p in self.first.items()}
            return _norms(self.inner(h), stands) * self.reach
        counted = tokens.counted.to(x.dtype).unsqueeze(1)
        mean = (counted @ x).squeeze(1) / counted.sum(2).clamp(min=1)
        guessed = self.guess.outputs(mean).split(self.channels, 1)
        return self.inner(dict(zip(self.first, guessed, strict=True))).norm(dim=0)

    def sampled(self) -> list[Projection]:
        """What a sample of tokens goes through to choose channels."""
        return list(self.first.values())

    @cached_property
    def reach(self) -> Tensor:
        """(channels,) float32: norms of `down`'s columns."""
        weight = self.down.dense()
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=0, dtype=wide).float()

    @torch.no_grad()
    def check(self, dtype: torch.dtype) -> None:
        """Compare what is computed here with what the module does, in evaluation mode.

        Raises:
            InputError: it does something else.
        """
        first = next(iter(self.first.values()))
        x = torch.randn(1, 2, first.n_in, generator=torch.Generator().manual_seed(0))
        x = x.to(first.base.weight.device, dtype)
        inner = self.inner({key: p.layer(x) for key, p in self.first.items()})
        if not close(self.after(self.down.layer(inner)), self.module(x)):
            raise InputError(
                f"A {type(self.module).__name__} does more than its layers and its activation, "
                f"which SparseLoRA would leave out. Use --method lora."
            )

    def select(self, x: Tensor, tokens: Tokens, sparsity: float) -> Tensor:
        return top(self.scores(x, tokens), sparsity, self.context.block)

    def run(self, x: Tensor, tokens: Tokens, index: Tensor) -> Tensor:
        """The MLP of x (R, T, D), with inner channels `index` alone for context tokens."""
        rows = x.flatten(0, 1)
        if not len(tokens.dense):
            return self.after(self.sparse_down(self.inner(self.sparse_first(rows, index)), index))
        # Both kinds of tokens step by step: the backward pass then meets neighbours' shared input
        # once, and makes it again once (`tinyft.activations`).
        a, b = split(rows, tokens.sparse, tokens.dense)
        first, rest = self.sparse_first(a, index), {k: p.layer(b) for k, p in self.first.items()}
        h, g = self.inner(first), self.inner(rest)
        y = join(self.sparse_down(h, index), self.down.layer(g), tokens.sparse, tokens.dense)
        return self.after(y)

    def sparse_first(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """Outputs `index` of the first projections, each (N, k), of x (N, D)."""
        keep = self._keeps(len(x), len(index))
        return {k: p.compact(x, index, keep) for k, p in self.first.items()}

    def sparse_down(self, h: Tensor, index: Tensor) -> Tensor:
        """(N, D) of h (N, k), the inner channels `index`."""
        return self.down.from_compact(h, index, self._keeps(len(h), len(index)))

    def _keeps(self, n: int, k: int) -> bool:
        """Whether gathered slices stay for the backward pass."""
        spared = n * len(self.first) * (self.channels - k)
        return _KEEP * (len(self.first) + 1) * k * self.width <= spared

    def bind(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """`(module, its forward meanwhile)`."""
        dense = self.module.forward

        def forward(x: Tensor) -> Tensor:
            sparsity = self.context.of(self.layer, "ffn", x, self.channels)
            if not sparsity:
                return dense(x)
            tokens = self.context.tokens
            return self.run(x, tokens, self.select(x, tokens, sparsity)).view(*tokens.shape, -1)

        return [(self.module, forward)]

    def elements(self, part: str) -> tuple[int, int]:
        """Elements of the base's weights, and of the adapters', that sparsity leaves out of."""
        projections = [*self.first.values(), self.down]
        adapters = sum(self.channels * p.adapter.rank for p in projections if p.adapter is not None)
        return len(projections) * self.channels * self.width, adapters


class SparseAttention:
    """Attention whose projections multiply some channels for context tokens.

    Attributes:
        projections: "q", "k", "v" and "o"; or of GPT-2 "qkv" and "o".
        guess: queries, keys and values, side by side; None: channels are chosen by a sample.
    """

    def __init__(
        self, module: nn.Module, layer: int, context: Context, *, rotary: bool, exact: bool
    ) -> None:
        self.module, self.layer, self.context, self.rotary = module, layer, context, rotary
        fused = hasattr(module, "c_attn")
        names = {"qkv": "c_attn"} if fused else {n: f"{n}_proj" for n in "qkv"}
        self.layers = {key: getattr(module, name) for key, name in names.items()}
        self.layers["o"] = module.c_proj if fused else module.o_proj
        self.projections = {
            key: Projection(m, "columns" if key == "o" else "rows", exact=exact)
            for key, m in self.layers.items()
        }
        self.fused, self.head_dim = fused, module.head_dim
        self.sizes = {
            n: self.projections["qkv"].n_out // 3 if fused else self.projections[n].n_out
            for n in "qkv"
        }
        self.widths = list(self.sizes.values())
        self.heads = self.sizes["q"] // self.head_dim
        self.guess: Estimator | None = None
        self._input: Tensor | None = None
        self._found: Any = None
        self._columns: Tensor | None = None

    def estimated(self) -> dict[str, Any]:
        """What `guess` guesses, in its order."""
        if not self.fused:
            return {n: self.projections[n] for n in "qkv"}
        whole, size = self.projections["qkv"], self.sizes["q"]
        return {n: _Rows(whole, slice(i * size, (i + 1) * size)) for i, n in enumerate("qkv")}

    @torch.no_grad()
    def select(self, x: Tensor, tokens: Tokens, qk: float, vo: float) -> dict[str, Tensor]:
        """Channels to keep of each projection for x (R, T, D): "q", "k", "v", "o", of those parts
        that are sparse; with GPT-2 "qkv" and "o"."""
        norms = dict(zip("qkv", self._norms(x, tokens).split(self.widths), strict=True))
        found: dict[str, Tensor] = {}
        if qk:
            found["q"], found["k"] = qk_channels(
                norms["q"], norms["k"], self.head_dim, qk, rotary=self.rotary
            )
        if vo:
            found["v"], found["o"] = vo_channels(norms["v"], self.heads, self.head_dim, vo)
        if self.fused:
            size = self.sizes["q"]
            every = torch.arange(size, device=x.device)
            rows = [found.pop(n, every) + i * size for i, n in enumerate("qkv")]
            found["qkv"] = torch.cat(rows)
        return found

    def sampled(self) -> list[Projection]:
        """What a sample of tokens goes through to choose channels."""
        return [p for key, p in self.projections.items() if key != "o"]

    def _norms(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Of queries, keys and values, side by side, over the context or a sample of it."""
        rows = x.flatten(0, 1)
        if self.guess is not None:
            return self.guess.norms(rows, tokens.counted.to(x.dtype).view(-1, 1))
        at, stands = tokens.sample
        some = rows[at]
        return torch.cat([_norms(p.base(some), stands) for p in self.sampled()])

    def _look(self, x: Tensor) -> Any:
        """Channels of x and x taken apart, once for q, k and v; None where all is dense."""
        if self._input is not x:
            size = self.sizes["k"]
            qk, vo = (self.context.of(self.layer, part, x, size) for part in ("qk", "vo"))
            tokens, self._input, self._found, self._columns = self.context.tokens, x, None, None
            if qk or vo:
                chosen = self.select(x, tokens, qk, vo)
                self._columns = chosen.get("o")
                parts = None
                if len(tokens.dense):
                    parts = split(x.flatten(0, 1), tokens.sparse, tokens.dense)
                self._found = chosen, parts
        return self._found

    def bind(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """`(module, its forward meanwhile)`."""
        whole = self.module.forward

        def attend(*args: Any, **kwargs: Any) -> Any:
            try:
                return whole(*args, **kwargs)
            finally:
                self._input = self._found = self._columns = None

        def project(key: str, dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            found = self._look(x)
            if found is None or key not in found[0]:
                return dense(x)
            (chosen, parts), projection = found, self.projections[key]
            return shared_out(
                x, self.context.tokens, lambda a: projection.scattered(a, chosen[key]), dense, parts
            )

        def combine(dense: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            index, projection = self._columns, self.projections["o"]
            if index is None:
                return dense(x)
            return shared_out(
                x, self.context.tokens, lambda a: projection.from_some(a, index), dense
            )

        bound: list[tuple[nn.Module, Callable[..., Any]]] = [(self.module, attend)]
        for key, layer in self.layers.items():
            dense = layer.forward
            if key == "o":
                bound.append((layer, lambda x, dense=dense: combine(dense, x)))
            else:
                bound.append((layer, lambda x, key=key, dense=dense: project(key, dense, x)))
        return bound

    def elements(self, part: str) -> tuple[int, int]:
        """Elements of the base's weights that sparsity leaves out of, and 0 of the adapters'."""
        width = self.projections["o"].n_out
        first, second = ("q", "k") if part == "qk" else ("v", "q")  # o is as wide as q
        return width * (self.sizes[first] + self.sizes[second]), 0


def _norms(y: Tensor, stands: Tensor) -> Tensor:
    """Of each column of y (S, n), float32, a row counting as often as it `stands` (S, 1) for."""
    return (y.float().square() * stands).sum(0).sqrt()


@dataclass(frozen=True)
class _Rows:
    """A part of a fused projection, as far as an estimator asks."""

    whole: Projection
    rows: slice

    def dense(self) -> Tensor:
        return self.whole.dense()[self.rows]

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.rows]


def find(
    model: nn.Module, context: Context, *, attention: bool = True, exact: bool = True
) -> tuple[list[SparseMLP], list[SparseAttention]]:
    """The MLPs of a model, and its attention where that is of a known form (or `attention` is
    False: none), in the order of the layers.

    Raises:
        InputError: no MLP of a known form, or one that only seems to be.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    kind = getattr(config, "model_type", "")
    mlps, attentions = [], []
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.[^.]*$", name)
        if number and _mlp_names(module):
            mlps.append(SparseMLP(module, int(number[1]), context))
        elif number and attention and kind in _ROTARY and hasattr(module, "q_proj"):
            attentions.append(
                SparseAttention(module, int(number[1]), context, rotary=True, exact=exact)
            )
        elif number and attention and kind in _FUSED and hasattr(module, "c_attn"):
            attentions.append(
                SparseAttention(module, int(number[1]), context, rotary=False, exact=exact)
            )
    if not mlps:
        raise InputError(
            f"SparseLoRA knows MLPs that are modules with layers {', '.join(_GATED)} or "
            f"{' or '.join(' and '.join(pair) for pair in _PLAIN)} and an activation; this "
            f"{type(model).__name__} has none. Use --method lora."
        )
    if dry_run.current() is None:  # which has no values to compare
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with undisturbed(model, evaluating=True):
            for mlp in mlps:
                mlp.check(dtype)
    if attention and not attentions:
        log.warning(
            "%s: attention of this form stays dense; its MLPs can be sparse.", type(model).__name__
        )
    return mlps, attentions


def _mlp_names(module: nn.Module) -> tuple[str, ...] | None:
    """Names of an MLP's layers, first to last, or None if the module is none of known form."""
    if not any(hasattr(module, name) for name in _ACTIVATIONS) or hasattr(module, "self_attn"):
        return None
    has = dict(module.named_children())
    return next((names for names in (_GATED, *_PLAIN) if all(n in has for n in names)), None)
