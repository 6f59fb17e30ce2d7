"""The one loop: every method trains, resumes and reports through `run`.

A step is a pure function of the state before it and of (seed, step): data order, learning rate and
random numbers all follow from the step's number. So a run that was killed goes on from its last
checkpoint, or from the method's own log, to the same final bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tinyft.checkpoint import RunState, is_disk_full, restore_weights, trainable
from tinyft.config import TrainConfig
from tinyft.errors import BudgetError, InputError
from tinyft.inputs import pick_device, read_source
from tinyft.interrupt import Stopped, StopSignals
from tinyft.memory import PeakMeter, human, trim
from tinyft.output import OutputFolder
from tinyft.progress import Reporter, Step, TensorBoardReporter, check_tensorboard
from tinyft.report import build_report
from tinyft.schedule import SavingClock, learning_rate, step_seed


@dataclass(frozen=True)
class Result:
    """What a run leaves: the report, and the trained model in evaluation mode.

    `model` and `tokenizer` are None when a finished run was only reported again.
    """

    report: dict[str, Any]
    model: Any = None
    tokenizer: Any = None
    output: Path | None = None


def run(
    config: TrainConfig,
    reporter: Reporter | None = None,
    *,
    loaded: Any = None,
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Result:
    """Train as configured.

    Args:
        config: from `TrainConfig.build`.
        reporter: who hears of the progress; nobody by default.
        loaded: a `tinyft.models.Loaded` to train in place, instead of loading `config.model`.
        rows: `{"data": rows, "eval_data": rows}` in place of the files.

    Raises:
        InputError: bad input, a folder that holds another run, a loss that is not finite, a full
            disk.
        BudgetError: out of memory.
        Stopped: SIGINT or SIGTERM; the state has been saved.
    """
    if config.tensorboard:
        check_tensorboard()
    reporter = reporter or Reporter()
    folder = OutputFolder(config.output) if config.output else None
    try:
        with _explained(folder, config):
            resuming = folder.open(config) if folder else False
            if folder and resuming and folder.finished and not _grows(folder, config):
                return Result(folder.read_report(), output=folder.directory)
            return _Session(config, reporter, folder, resuming).run(loaded, rows or {})
    finally:
        if folder:
            folder.close()


class _Session:
    """One process's part of a run. `run` is the whole story, the other methods its chapters."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        folder: OutputFolder | None,
        resuming: bool,
    ) -> None:
        self.config = config
        self.reporter = reporter
        self.folder = folder
        self.resuming = resuming
        self.per_step = config.batch_size * config.grad_accumulation  # examples
        self.info: dict[str, Any] = {}  # what run.json holds
        self.lines: list[dict[str, Any]] = []  # the steps of metrics.jsonl
        self.scores: dict[int, dict[str, Any]] = {}  # held-out scores by steps done

    def run(self, loaded: Any, rows: Mapping[str, Any]) -> Result:
        import torch

        from tinyft.data import Batches, encode, pad_id
        from tinyft.losses import objective
        from tinyft.models import load
        from tinyft.optim import METHODS

        config = self.config
        method = METHODS[config.method]
        if config.threads:
            torch.set_num_threads(config.threads)
        train, held_out, encoder = self.read_inputs(loaded, rows)
        if self.resuming:
            self.check_data()

        if loaded is None:
            loaded = load(
                config.model,
                dtype=config.dtype,
                base_bits=config.base_bits,
                device=pick_device(config.device),
                # An encoder's head has as many outputs as the rows have classes.
                num_labels=len(train.items[0].choices) or None if encoder else None,
                seed=config.seed,
            )
        self.loaded, self.model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        device = str(next(self.model.parameters()).device)
        self.meter = PeakMeter(device)
        trim()  # what loading freed is no part of the model
        loaded_bytes = self.meter.now_bytes()
        self.reporter.info(
            f"{config.model}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
            f"{loaded.dtype}, {human(loaded_bytes)} on {device}"
        )

        shape = {"max_length": config.max_length, "encoder": loaded.kind == "encoder"}
        encoded = encode(train, self.tokenizer, objective=config.objective, **shape)
        self.held_out = held_out and encode(held_out, self.tokenizer, **shape)
        if encoded.kind == "class":
            self.model.config.id2label = dict(enumerate(encoded.labels))
            self.model.config.label2id = {name: i for i, name in enumerate(encoded.labels)}
        direct = config.objective in ("accuracy", "f1")
        self.objective = objective(config.objective if direct else encoded.kind)
        self.batches = Batches(
            encoded,
            self.per_step,
            seed=config.seed,
            pad_id=pad_id(self.tokenizer),
        )
        self.total = config.steps or max(1, round(config.epochs * len(self.batches)))
        self.say_data(train, encoded)

        # Only now, with all input read and found good, does anything in the folder change.
        if self.folder:
            self.folder.begin(config, self.info, resuming=self.resuming)
            if config.tensorboard:
                self.reporter = TensorBoardReporter(self.reporter, self.folder.tensorboard)
        if self.info.get("before") is None and self.held_out:
            self.info["before"] = self.score("before")
            if self.folder:
                self.folder.save_info(self.info)
        if self.info.get("before"):
            self.scores[0] = self.info["before"]
        with self.meter.phase("train"):
            try:
                self.train(method)
            finally:
                self.reporter.end()
        self.model.eval()
        after = self.score("after") if self.held_out else None
        if after:
            self.scores[self.total] = after
        report = build_report(
            config,
            self.model,
            steps=self.lines,
            scores=self.scores,
            total=self.total,
            loaded=loaded,
            loaded_bytes=loaded_bytes,
            encoded=encoded,
            bad_rows=[*train.bad, *encoded.bad],
            padding_share=self.batches.padding_share,
            info=self.info,
            meter=self.meter,
        )
        if self.folder:
            self.finish(report, encoded)
        return Result(report, self.model, self.tokenizer, config.output)

    # What goes in.

    def read_inputs(self, loaded: Any, rows: Mapping[str, Any]) -> tuple[Any, Any, bool]:
        """Both files of examples, hashed, and whether the model is an encoder. All mistakes show at
        once, and before anything large is read."""
        from tinyft.models import kind_of

        problems, found = [], []
        for name in ("data", "eval_data"):
            source = getattr(self.config, name)
            try:
                examples, digest = read_source(source, rows.get(name), self.config.skip_bad_rows)
                found.append(examples)
                self.info[f"{name}_sha256"] = digest
            except InputError as error:
                problems.append(str(error))
        try:
            kind = loaded.kind if loaded else kind_of(self.config.model)
        except InputError as error:
            problems.append(str(error))
        if problems:
            raise InputError("\n".join(problems))
        return *found, kind == "encoder"

    def check_data(self) -> None:
        """To resume: the data must be what the run began with."""
        assert self.folder is not None
        saved = self.folder.info()
        for name in ("data", "eval_data"):
            was, now = saved.get(f"{name}_sha256"), self.info[f"{name}_sha256"]
            if was != now:
                raise InputError(
                    f"{getattr(self.config, name)} has changed since the run in "
                    f"{self.folder.directory} began (sha256 {str(was)[:12]}, now "
                    f"{str(now)[:12]}). Put the old file back to go on with --resume, or start "
                    f"anew with --overwrite."
                )
        self.info = saved

    def say_data(self, train: Any, encoded: Any) -> None:
        notes = [f"{len(encoded.items):,} examples, {encoded.n_tokens:,} tokens"]
        skipped = len(train.bad) + len(encoded.bad)
        for count, what in (
            (skipped, "bad rows left out"),
            (encoded.n_truncated, f"cut to --max-length {self.config.max_length}"),
            (encoded.n_split, "texts split into windows"),
        ):
            if count:
                notes.append(f"{count:,} {what}")
        self.reporter.info(
            f"{self.config.data}: {', '.join(notes)}; {self.total:,} steps of {self.per_step}"
        )

    # Training.

    def train(self, method: Any) -> None:
        from tinyft.cost import FlopMeter
        from tinyft.losses import check_head

        optimizer = self.optimizer = method.attach(self.model, self.config)
        self.model.train(method.uses_gradients)
        with self.meter.phase("restore"):
            if self.loaded.kind == "causal":
                check_head(self.model)  # once, here, so that no step's FLOPs include it
            start = self.restore(optimizer)
        if start > self.total:
            raise InputError(
                f"The run has already done {start} steps, more than the {self.total} asked for: "
                f"leave --steps and --epochs out, or ask for more."
            )
        self.reporter.begin(self.total, start)
        last = next((x for x in reversed(self.lines) if x["seconds"] is not None), {})
        flops = FlopMeter()
        flops_before, wall_s = last.get("flops", 0), last.get("wall_s", 0.0)
        peak_before = last.get("peak_memory_bytes", 0)
        saving = SavingClock(self.config.checkpoint_every)
        keeps_state = self.folder is not None and not method.keeps_log
        with StopSignals() as stop:
            for step in range(start, self.total):
                self.score_if_due(step)
                began = perf_counter()
                loss, lr, batch = self.step(optimizer, flops, step)
                seconds = perf_counter() - began
                wall_s += seconds
                line = {
                    "step": step + 1,
                    "loss": loss,
                    "lr": lr,
                    "tokens": int(batch.attention_mask.sum()),
                    "seconds": seconds,
                    "wall_s": wall_s,
                    "flops": flops_before + flops.flops,
                    "peak_memory_bytes": max(peak_before, self.meter.peak_bytes("train")),
                }
                self.record(line)
                # After the last step a long evaluation may follow, and a kill in it.
                ends = bool(stop.number) or (step + 1 == self.total and bool(self.held_out))
                if keeps_state and (ends or saving.due(step + 1)):
                    began = perf_counter()
                    self.save(optimizer, step + 1)
                    seconds = perf_counter() - began
                    saving.saved(seconds)
                    wall_s += seconds
                if stop.number:
                    raise self.stopped(stop.number, step + 1)

    def restore(self, optimizer: Any) -> int:
        """Bring back weights, optimizer and books; returns the number of steps already done."""
        if self.folder is None:
            return 0
        start = 0
        if optimizer.keeps_log:
            start = optimizer.open_log(self.folder.log, resume=self.resuming)
        elif self.resuming and (state := RunState.load(self.folder.checkpoint)):
            restore_weights(self.model, state.weights)
            optimizer.load_state_tensors(state.optimizer)
            start = state.step
        if self.resuming:
            self.reporter.info(f"resuming after step {start} of {self.total}")
        kept = self.folder.cut_metrics(start)
        self.scores |= {line["step"]: line["eval"] for line in kept if "eval" in line}
        self.lines = [line for line in kept if "eval" not in line]
        # A kill between a log's entry and the line about it loses that line's numbers alone.
        for step in range(len(self.lines), start):
            self.record({"step": step + 1, "loss": None, "seconds": None}, quiet=True)
        return start

    def step(self, optimizer: Any, flops: Any, step: int) -> tuple[float, float, Any]:
        """One optimizer step; returns its loss, its learning rate and its batch."""
        import torch

        from tinyft.optim.base import check_finite

        batch = self.batches[step].to(self.meter.device)
        lr = learning_rate(step, self.total, self.config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(step_seed(self.config.seed, step))
        loss = flops.step(
            batch.signature,
            lambda: optimizer.step(lambda part: self.objective(self.model, part), batch),
        )
        check_finite(loss, step + 1)
        return float(loss), lr, batch

    def record(self, line: dict[str, Any], *, quiet: bool = False) -> None:
        self.lines.append(line)
        if self.folder:
            self.folder.append_metrics(line)
        if not quiet:
            self.reporter.step(
                Step(
                    step=line["step"],
                    total=self.total,
                    loss=line["loss"],
                    lr=line["lr"],
                    tokens=line["tokens"],
                    seconds=line["seconds"],
                    memory_bytes=self.meter.now_bytes(),
                    peak_memory_bytes=line["peak_memory_bytes"],
                )
            )

    def score(self, when: str) -> dict[str, Any]:
        """Held-out scores. Their memory is counted apart from training's."""
        from tinyft.evaluate import evaluate

        with self.meter.phase("eval"):
            found = evaluate(
                self.model, self.tokenizer, self.held_out, batch_size=self.config.batch_size
            )
        self.reporter.evaluation(when, found)
        return found

    def score_if_due(self, done: int) -> None:
        """At every `eval_every`-th step, unless the books have it from before a resume."""
        every = self.config.eval_every
        if self.held_out and every and done and done % every == 0 and done not in self.scores:
            self.scores[done] = self.score(f"step {done}")
            if self.folder:
                self.folder.append_metrics({"step": done, "eval": self.scores[done]})

    def save(self, optimizer: Any, step: int) -> None:
        assert self.folder is not None
        state = RunState(step, trainable(self.model), optimizer.state_tensors())
        self.folder.save_state(state)

    def stopped(self, number: int, step: int) -> Stopped:
        if self.folder is None:
            return Stopped(number, f"Stopped after step {step} of {self.total}; nothing is saved.")
        return Stopped(
            number,
            f"Stopped after step {step} of {self.total}, and saved. To go on: "
            f"tinyft train --output {self.folder.directory} --resume",
        )

    # What comes out.

    def finish(self, report: dict[str, Any], encoded: Any) -> None:
        """Write the result. The report goes last: with it the run is finished."""
        from tinyft import __version__
        from tinyft.plots import loss_plot

        assert self.folder is not None
        manifest = {
            "method": self.config.method,
            "tinyft": __version__,
            **self.loaded.recipe(),
            "labels": list(encoded.labels),
        }
        known = [line for line in self.lines if line["loss"] is not None]
        subtitle = f"{Path(self.config.data).name}, lr {self.config.lr:g}, {self.per_step} a step"
        accuracy = [self.scores.get(at, {}).get("accuracy") for at in (0, self.total)]
        if None not in accuracy:
            subtitle += "; held-out accuracy {:.1%} before, {:.1%} after".format(*accuracy)
        report["artefact"] = self.folder.finish(
            manifest,
            lambda directory: self.optimizer.save_artefact(
                self.model, self.tokenizer, directory, self.loaded.base_ref
            ),
            lambda path: loss_plot(
                path,
                [line["step"] for line in known],
                [line["loss"] for line in known],
                title=f"{self.config.method} on {Path(self.config.model).name}",
                subtitle=subtitle,
                evaluations=dict(sorted(self.scores.items())),
            ),
        )
        self.folder.save_report(report)


def _grows(folder: OutputFolder, config: TrainConfig) -> bool:
    """Whether a finished run is asked to go on for longer.

    Raises:
        InputError: it is, and its method left nothing to go on from.
    """
    from tinyft.optim import METHODS

    saved, now = folder.saved_config(), config.flat()
    if all(saved.get(name) == now[name] for name in ("steps", "epochs")):
        return False
    if METHODS[config.method].keeps_log:
        return True
    raise InputError(
        f"The run in {folder.directory} is finished, and the state of its optimizer is gone: more "
        f"steps need a new run, which may begin from it (--model {folder.directory})."
    )


@contextmanager
def _explained(folder: OutputFolder | None, config: TrainConfig) -> Iterator[None]:
    """A full disk and exhausted memory, in a user's words."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and folder is not None:
            raise InputError(
                f"There is no room to write to {folder.directory} ({error}). "
                f"{folder.saved_so_far()} Free some space there, then: "
                f"tinyft train --output {folder.directory} --resume"
            ) from error
        if _is_out_of_memory(error):
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BudgetError(
                f"{config.method} on {config.model} with batches of {config.batch_size} does not "
                f"fit the memory ({reason}). Try a smaller --batch-size (with "
                f"--grad-accumulation for the same result), --checkpointing full, --dtype "
                f"bfloat16, --base-bits 4 with lora, or --method mezo."
            ) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )
