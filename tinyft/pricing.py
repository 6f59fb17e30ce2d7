"""What a run takes: its own step and its own evaluation, traced without arithmetic or weights.

`trace(config, job)` builds the model from its configuration, attaches and prepares the method as
the training loop does, takes a step on the longest batch of the data and scores the longest
held-out rows, all inside `DryRun`; where layers are alike, with few of them, from which the whole
follows (`depth.py`). So any method that trains is priced by registering, and any architecture that
transformers builds from a configuration, whether its weights are at hand or not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tinyft
from tinyft.assets import cache_directory
from tinyft.checkpoint import write_atomic
from tinyft.config import TrainConfig
from tinyft.data import Batch, Batches, Encoded, pad_id
from tinyft.depth import few_layers, with_layers
from tinyft.dry_run import DryRun
from tinyft.encoding import NO_LOSS
from tinyft.evaluate import evaluate
from tinyft.losses import assume_head, objective_of
from tinyft.models import DTYPES, Outline
from tinyft.optim import METHODS
from tinyft.packing import pack


@dataclass(frozen=True)
class Work:
    """What is done for some tokens.

    Attributes:
        flops_by_dtype: by the dtype of the operands.
        product_bytes: read and written by the operations that have FLOPs.
        other_bytes: read and written by all others.
        operations: their number.
        tokens: that it was done for, padding included.
    """

    flops_by_dtype: dict[str, float]
    product_bytes: float
    other_bytes: float
    operations: float
    tokens: int

    @property
    def flops(self) -> float:
        return sum(self.flops_by_dtype.values())

    @classmethod
    def of(cls, run: DryRun, tokens: int) -> Work:
        """What `run` has seen since its reset."""
        flops = {str(dtype).removeprefix("torch."): n for dtype, n in run.flops_by_dtype.items()}
        others = run.moved_bytes - run.product_bytes
        return cls(flops, run.product_bytes, others, run.operations, tokens)

    @classmethod
    def total(cls, works: Sequence[Work], times: Sequence[float]) -> Work:
        """All of them, each so many times, for the tokens of the last."""
        flops = _total([work.flops_by_dtype for work in works], times)
        names = ("product_bytes", "other_bytes", "operations")
        rest = _total([{name: getattr(work, name) for name in names} for work in works], times)
        return cls(flops, **rest, tokens=works[-1].tokens)

    def between(self, other: Work, share: float) -> Work:
        """On the line from this one to `other`: at 0.5 their mean; beyond 1 it goes on."""
        return Work.total((self, other), (1 - share, share))


@dataclass(frozen=True)
class Trace:
    """What one process does beyond loading its libraries, on any machine.

    Attributes:
        bytes_by_kind: alive at the peak of a step: weights, gradients, optimizer, activations,
            workspace.
        eval_bytes: alive at the peak of an evaluation, weights and optimizer included.
        step: the work of one, the mean over the method's period.
        evaluation: of a batch of the longest held-out rows; None without such rows.
    """

    bytes_by_kind: dict[str, int]
    eval_bytes: int
    step: Work
    evaluation: Work | None

    @property
    def peak_bytes(self) -> int:
        """Of steps and evaluations."""
        return max(sum(self.bytes_by_kind.values()), self.eval_bytes)

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """From what `json.dumps(dataclasses.asdict(trace))` gives."""
        values = json.loads(text)
        work = {name: values[name] and Work(**values[name]) for name in ("step", "evaluation")}
        return cls(**values | work)


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be learned: a model's outline and the encoded examples.

    Attributes:
        outline: from `tinyft.models.outline`.
        encoded, held_out: from `tinyft.data.encode`.
        process_bytes: what tokenizer and examples take in memory.
    """

    outline: Outline
    encoded: Encoded
    held_out: Encoded | None
    process_bytes: int = 0

    @cached_property
    def batches(self) -> Callable[[int, int], Batches]:
        """`batches(per_step, seed)`: the training rows in batches, as the run has them."""
        # Without `self`: a job that held itself would stay until the garbage collector comes, and
        # the next one, made in its place, would seem to take nothing (`process_bytes`).
        encoded, padding = self.encoded, pad_id(self.outline.tokenizer)
        return cache(lambda n, seed: Batches(encoded, n, seed=seed, pad_id=padding))

    def tokens_per_step(self, per_step: int, seed: int) -> float:
        """Mean over an epoch, padding included."""
        batches = self.batches(per_step, seed)
        return self.encoded.n_tokens / (1 - batches.padding_share) / len(batches)

    @cached_property
    def few_layers(self) -> tuple[int, int] | None:
        """Numbers of layers that tell what the model takes (`tinyft/depth.py`)."""

        def n_parameters(config: Any) -> int:
            with torch.device("meta"):
                model = self.outline.build(self.outline.dtype, config=config)
            return sum(p.numel() for p in model.parameters())

        return few_layers(self.outline.config, n_parameters)

    @cached_property
    def held_out_tokens(self) -> int:
        return _size(self.held_out.items) if self.held_out else 0

    @cached_property
    def digest(self) -> str:
        """Of everything here that decides a trace."""
        shapes = [
            [(item.length, len(item.rows), _labelled(item)) for item in encoded.items]
            for encoded in (self.encoded, self.held_out)
            if encoded is not None
        ]
        config = self.outline.config.to_json_string(use_diff=False)
        return _digest([config, self.encoded.kind, self.encoded.labels, shapes])


# What decides a trace besides the job; `options` are the method's.
_FIELDS = (
    *("method", "options", "trainable", "rank", "lora_targets", "dropout", "objective", "seed"),
    *("batch_size", "grad_accumulation", "grad_clip", "optimizer", "checkpointing"),
    *("dtype", "base_bits"),
)


def trace(config: TrainConfig, job: Job) -> Trace:
    """Price a run. The same question asked again is answered from a file in the user's cache.

    Args:
        config: resolved; `dtype` is not "auto". Only what decides memory and FLOPs matters.
        job: model and data.
    """
    facts = [str(getattr(config, name)) for name in _FIELDS]
    path = cache_directory() / "traces" / f"{_digest([job.digest, _versions(), facts])}.json"
    try:
        return Trace.from_json(path.read_text())
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or not ours
        pass
    found = _traced(config, job)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(dataclasses.asdict(found)))
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return found


def _traced(config: TrainConfig, job: Job) -> Trace:
    whole = job.outline.config
    if METHODS[config.method].layers_alike and job.few_layers:
        few = [_look(config, job, with_layers(whole, n)) for n in job.few_layers]
        first, second = job.few_layers
        rounds = (whole.get_text_config().num_hidden_layers - first) / (second - first)
        if few[0].is_like(few[1]):
            return few[0].towards(few[1], rounds).as_trace()
    return _look(config, job, whole).as_trace()


@dataclass(frozen=True)
class _Look:
    """What was seen of a model, or is to be expected of one.

    Attributes:
        peaks: of attaching and preparing the method, and of its steps' passes (`DryRun.peaks`).
        eval_peaks: of those of an evaluation.
        works: of which a mean step consists: what comes once a period, and a usual step.
        times: how much of each.
        evaluation: its work.
    """

    peaks: list[dict[str, float]]
    eval_peaks: list[dict[str, float]]
    works: list[Work]
    times: list[float]
    evaluation: Work | None

    def is_like(self, other: _Look) -> bool:
        """Whether both did the same, one after the other."""
        return (len(self.peaks), len(self.eval_peaks)) == (len(other.peaks), len(other.eval_peaks))

    def towards(self, other: _Look, rounds: float) -> _Look:
        """What follows when as much again is added `rounds` times as `other` has more."""
        return _Look(
            _each(_between, self.peaks, other.peaks, rounds),
            _each(_between, self.eval_peaks, other.eval_peaks, rounds),
            _each(Work.between, self.works, other.works, rounds),
            self.times,
            self.evaluation and self.evaluation.between(other.evaluation, rounds),
        )

    def as_trace(self) -> Trace:
        peak = max(self.peaks, key=lambda kinds: sum(kinds.values()))
        return Trace(
            {kind: round(n) for kind, n in peak.items()},
            round(max((sum(kinds.values()) for kinds in self.eval_peaks), default=0)),
            Work.total(self.works, self.times),
            self.evaluation,
        )


def _each(function: Callable, these: Sequence, others: Sequence, share: float) -> list:
    return [function(one, other, share) for one, other in zip(these, others, strict=True)]


def _between(one: Mapping[Any, float], other: Mapping[Any, float], share: float) -> dict:
    """On the line from one to the other, at 0 and at 1, or beyond."""
    return _total((one, other), (1 - share, share))


def _total(parts: Sequence[Mapping[Any, float]], times: Sequence[float]) -> dict:
    """Key by key, each part so many times."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(n * p.get(key, 0) for n, p in zip(times, parts, strict=True)) for key in keys}


def _look(config: TrainConfig, job: Job, shape: Any) -> _Look:
    """Steps and an evaluation of a model of this shape, all of it a dry run."""
    # Parts of a batch cost alike: the first holds the longest, a second meets its gradients.
    parts = min(config.grad_accumulation, 2)
    batch = _longest(config, job, config.batch_size * parts)
    config = config.model_copy(update={"grad_accumulation": parts}).with_lr(shape)
    loss = objective_of(config.objective, job.encoded.kind)
    method = METHODS[config.method]
    with DryRun() as run:
        model = job.outline.build(config.dtype, len(job.encoded.labels) or None, shape)
        if config.base_bits < 16:
            pack(model, config.base_bits, DTYPES[config.dtype])
        if job.outline.kind == "causal":
            assume_head(model)
        run.label([*model.parameters(), *model.buffers()], "weights")
        run.reset()
        optimizer = method.attach(model, config)
        optimizer.assume()
        model.train(method.uses_gradients)
        # Apart: with few layers what attaching does to an embedding may be higher than all of
        # what preparing does to layers, with all of them it is not.
        peaks, works, times = run.peaks(), [], []
        run.reset()
        optimizer.prepare(lambda part: loss(model, part), [batch])
        peaks += run.peaks()
        run.label([*model.parameters(), *model.buffers()], "weights")

        def arrived(parameter: Tensor) -> None:
            if parameter.grad is not None:  # of a head that is updated by rows
                run.label([parameter.grad], "gradients")
            run.mark()

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(arrived)

        def take(share: float, work: Callable[..., Any]) -> Any:
            """Do a part of the steps, which is `share` times in each."""
            nonlocal peaks
            run.reset()
            found = work(lambda part: loss(model, part), batch)
            for state in optimizer.state.values():
                run.label((t for t in state.values() if isinstance(t, Tensor)), "optimizer")
            peaks += run.peaks()
            works.append(Work.of(run, batch.input_ids.numel()))
            times.append(share)
            return found

        rare, shares = 1 / optimizer.period, [1.0]
        if not take(rare, optimizer.renew) and rare < 1:  # the first step is another
            shares = [rare, 1 - rare]
        for share in shares:
            take(share, optimizer.step)
        if job.held_out is None:
            return _Look(peaks, [], works, times, None)
        run.reset()
        longest = sorted(job.held_out.items, key=lambda item: -item.length)[: config.batch_size]
        held_out = dataclasses.replace(job.held_out, items=longest)
        evaluate(model.eval(), job.outline.tokenizer, held_out, batch_size=config.batch_size)
        work = Work.of(run, _size(longest))
        return _Look(peaks, run.peaks(), works, times, work)


def _longest(config: TrainConfig, job: Job, per_step: int) -> Batch:
    """The first `per_step` examples of the run's longest batch."""
    batch = job.batches(config.batch_size * config.grad_accumulation, config.seed)[0]
    return batch if batch.size <= per_step else batch.examples(0, per_step)


def _size(items: Sequence[Any]) -> int:
    """Tokens of all rows of some items; near enough to what their batches hold."""
    return sum(item.length * len(item.rows) for item in items)


def _labelled(item: Any) -> int:
    return sum(int((row != NO_LOSS).sum()) for row in item.labels)


@cache
def _versions() -> list[str]:
    """Of the libraries, and of our own sources to the file."""
    root = Path(tinyft.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parent / "kernels").glob("*.py")]
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources)
    return [torch.__version__, transformers.__version__, repr(stamps)]


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
