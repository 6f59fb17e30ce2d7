"""The one loop: every method trains, resumes and reports through `run`.

A step is a pure function of the state before it and of (seed, step): data order, learning rate and
random numbers all follow from the step's number. So a run that was killed goes on from its last
checkpoint, or from the method's own log, to the same final bits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from tinyft.checkpoint import RunState, is_disk_full, restore_weights, trainable
from tinyft.config import LIMITS, TrainConfig
from tinyft.errors import BudgetError, InputError, TransientError
from tinyft.guard import Guard, out_of_memory
from tinyft.inputs import pick_device, read_source
from tinyft.interrupt import Stopped, StopSignals
from tinyft.memory import PeakMeter, human, trim
from tinyft.output import OutputFolder
from tinyft.progress import Reporter, Step, TensorBoardReporter, check_tensorboard
from tinyft.references import lineage
from tinyft.report import build_report
from tinyft.schedule import SavingClock, learning_rate, step_seed

_NEAR = 0.95  # of the limit on memory
_FITTED = ("probed_bytes", "eval_batch_size")  # of the memo: known where the limit is kept to


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
        InputError: bad input, a folder that holds another run, a loss that is not finite.
        TransientError: a full disk, a hub that does not answer.
        BudgetError: out of memory, or a budget that allows for no step.
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
        self.said = ""  # of the kernels
        self.guard = Guard(config.budget)
        self.limit_bytes = config.budget.memory_bytes
        saved = folder.saved_config() if folder and resuming else config.flat()
        if config.lr is None:
            self.config = config.model_copy(update={"lr": saved.get("lr")})
        self.changed = {name for name in LIMITS if saved.get(name) != getattr(config, name)}

    def run(self, loaded: Any, rows: Mapping[str, Any]) -> Result:
        import torch

        from tinyft import prefix
        from tinyft.data import Batches, encode, encode_held_out, pad_id
        from tinyft.kernels import dispatch
        from tinyft.losses import objective_of
        from tinyft.models import check_rows, load, name_classes
        from tinyft.optim import METHODS

        config = self.config
        dispatch.ran.clear()  # what an earlier run of this process did is not this one's
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
        if loaded.base_bits < 16 and config.trainable == "all":
            raise InputError(
                f"{config.model} is packed to {loaded.base_bits} bits, hence frozen, and "
                f"{config.method} trains all: use --trainable lora, or begin from the model that "
                f"it was made from."
            )
        if prefix.is_attached(loaded.model) and (config.trainable == "all" or method.packs_base):
            raise InputError(
                f"{config.model} has a prefix, which is no part of the weights that "
                f"{config.method} trains: use --method mezo --trainable prefix, or begin from the "
                f"model that it was made from."
            )
        self.loaded, self.model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        device = str(next(self.model.parameters()).device)
        if config.energy and device != "cpu":
            raise InputError(
                f"--energy {config.energy} cannot be held on {device}: only the processor's energy "
                f"is measured. Limit the time instead (--time)."
            )
        self.meter = PeakMeter(device)
        trim()  # what loading freed is no part of the model
        loaded_bytes = self.loaded_bytes = self.meter.now_bytes()
        if self.limit_bytes is not None and loaded_bytes > self.limit_bytes:
            raise BudgetError(self.too_small("for the model alone", loaded_bytes))
        self.reporter.info(
            f"{config.model}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
            f"{loaded.dtype}, {human(loaded_bytes)} on {device}"
        )

        shape = {"max_length": config.max_length, "encoder": loaded.kind == "encoder"}
        encoded = encode(train, self.tokenizer, objective=config.objective, **shape)
        self.held_out = held_out and encode_held_out(
            held_out, self.tokenizer, encoded, objective=config.objective, **shape
        )
        for part in filter(None, (encoded, self.held_out)):
            check_rows(self.model, part, for_prefix=config.trainable == "prefix")
        name_classes(self.model, encoded.labels)
        self.objective = objective_of(config.objective, encoded.kind)
        self.batches = Batches(
            encoded,
            self.per_step,
            seed=config.seed,
            pad_id=pad_id(self.tokenizer),
        )
        self.total = config.steps or max(1, round(config.epochs * len(self.batches)))
        config = self.config = config.with_lr(self.model.config, self.total)
        self.say_data(train, encoded)
        if self.resuming:
            self.check_length()

        # Only now, with all input read and found good, does anything in the folder change.
        if self.folder:
            self.folder.begin(config, self.info, resuming=self.resuming)
            if config.tensorboard:
                self.reporter = TensorBoardReporter(self.reporter, self.folder.tensorboard)
        if self.must_fit("eval_batch_size"):
            self.fit_evaluation()
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
            self.scores[self.done] = after
        report = build_report(
            config,
            self.model,
            steps=self.lines,
            scores=self.scores,
            total=self.done,
            loaded=loaded,
            loaded_bytes=loaded_bytes,
            encoded=encoded,
            bad_rows=[*train.bad, *encoded.bad],
            padding_share=self.batches.padding_share,
            info=self.info,
            used=self.guard.used(),
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

        problems: list[InputError] = []
        found = []
        for name in ("data", "eval_data"):
            source = getattr(self.config, name)
            try:
                examples, digest = read_source(source, rows.get(name), self.config.skip_bad_rows)
                found.append(examples)
                self.info[f"{name}_sha256"] = digest
            except InputError as error:
                problems.append(error)
        try:
            kind = loaded.kind if loaded else kind_of(self.config.model)
            self.check_overwrite(loaded.base_ref if loaded else self.config.model)
        except InputError as error:
            problems.append(error)
        if problems:
            transient = all(isinstance(error, TransientError) for error in problems)
            raise (TransientError if transient else InputError)("\n".join(map(str, problems)))
        return *found, kind == "encoder"

    def check_overwrite(self, ref: str) -> None:
        """What begins a run must outlive it: an adapter or a seed log is nothing without its base,
        and a base that is mapped from a file is read until the end."""
        if not (self.folder and self.config.overwrite and Path(ref).expanduser().exists()):
            return
        output = self.folder.directory.resolve()
        if output in (source.path for source in lineage(ref)):
            raise InputError(
                f"--overwrite would discard the run in --output {self.folder.directory}, and "
                f"--model {ref} is made of it: name another folder."
            )

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
        self.guard.evaluation_s = self.memo.get("evaluation_s", 0.0)
        if self.changed - {"memory"}:
            self.memo.pop("stop", None)
        if "memory" in self.changed:  # forgotten before the new limit is written down
            for name in _FITTED:
                self.memo.pop(name, None)

    def check_length(self) -> None:
        """To resume: no fewer steps than are done."""
        assert self.folder is not None
        if (done := self.folder.steps_done) > self.total:
            raise InputError(
                f"The run has already done {done} steps, more than the {self.total} asked for: "
                f"leave --steps and --epochs out, or ask for more."
            )

    @property
    def memo(self) -> dict[str, Any]:
        """What the budget led to, as run.json keeps it, so that a resumed run does the same:

        * `stop`: the step after which the run ends, and by which limit. A clock decides once.
        * `settings`: how steps are taken, `{"step": from which on, attribute: value}`.
        * `probed_bytes`: what a step on the longest batch takes in the first of them.
        * `eval_batch_size`, `evaluation_s`.
        """
        return self.info.setdefault("guard", {})

    def note(self, **values: Any) -> None:
        self.memo.update(values)
        if self.folder:
            self.folder.save_info(self.info)

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
        self.keeps_state = self.folder is not None and not method.keeps_log
        self.model.train(method.uses_gradients)
        self.hold(optimizer.heap)
        optimizer.prepare(
            self.loss,
            (self.batches[i].to(self.meter.device) for i in range(len(self.batches))),
        )
        taken_bytes = self.meter.peak_bytes("train")
        if self.limit_bytes is not None and taken_bytes > self.limit_bytes:
            raise BudgetError(self.too_small(f"to prepare {self.config.method}", taken_bytes))
        with self.meter.phase("restore"):
            if self.loaded.kind == "causal":
                check_head(self.model)  # once, here, so that no step's FLOPs include it
            start = self.restore(optimizer)
        self.fit_memory(start)
        self.plan_end(method)
        self.reporter.begin(self.total, start)
        last = next((x for x in reversed(self.lines) if x["seconds"] is not None), {})
        flops = FlopMeter()
        flops_before, wall_s = last.get("flops", 0), last.get("wall_s", 0.0)
        peak_before = last.get("peak_memory_bytes", 0)
        saving = SavingClock(self.config.checkpoint_every)
        with StopSignals() as stop:
            self.done = start
            ends = self.is_over()
            while not ends:
                self.score_if_due(self.done)
                with self.guard.step():
                    began = perf_counter()
                    taken = self.step_in_memory(flops)
                    seconds = perf_counter() - began
                    wall_s += seconds
                    self.done += 1
                    line = {
                        "step": self.done,
                        **taken,
                        "seconds": seconds,
                        "wall_s": wall_s,
                        "flops": flops_before + flops.flops,
                        "peak_memory_bytes": max(peak_before, self.meter.peak_bytes("train")),
                        **self.guard.used(),
                    }
                    self.guard.count(line["flops"], line.get("renewal_flops", 0))
                    self.record(line)
                    self.say_what_ran()
                self.watch_memory()
                ends = self.is_over()
                # After the last step a long evaluation may follow, and a kill in it.
                is_last = bool(stop.number) or (ends and bool(self.held_out))
                if self.keeps_state and (is_last or saving.due(self.done)):
                    began = perf_counter()
                    self.save(self.done)
                    seconds = perf_counter() - began
                    saving.saved(seconds)
                    wall_s += seconds
                if stop.number:
                    raise self.stopped(stop.number, self.done)

    def say_what_ran(self) -> None:
        """A line after the first step, and where it changes: kernels in torch or in Triton."""
        from tinyft.kernels import dispatch

        if (said := dispatch.said()) and said != self.said:
            self.said = said
            self.reporter.info(f"kernels: {said}")

    def restore(self, optimizer: Any) -> int:
        """Bring back weights, optimizer and books; returns the number of steps already done."""
        if self.folder is None:
            return 0
        start = 0
        if optimizer.keeps_log:
            # With a limit on FLOPs, steps without a line (of which at most the last has none) are
            # done again, so that their FLOPs are known.
            known = None
            if self.config.flops and self.resuming:
                known = sum("eval" not in line for line in self.folder.read_metrics())
            start = optimizer.open_log(self.folder.log, resume=self.resuming, at_most=known)
        elif self.resuming and (state := RunState.load(self.folder.checkpoint)):
            restore_weights(self.model, state.weights)
            optimizer.load_state_tensors(state.optimizer)
            start = state.step
        if self.resuming:
            self.reporter.info(f"resuming after step {start} of {self.total}")
        kept = self.folder.cut_metrics(start)
        self.scores |= {line["step"]: line["eval"] for line in kept if "eval" in line}
        self.lines = [line for line in kept if "eval" not in line]
        self.guard.go_on(self.lines)
        # A kill between a log's entry and the line about it loses that line's numbers alone.
        for step in range(len(self.lines), start):
            self.record({"step": step + 1, "loss": None, "seconds": None}, quiet=True)
        return start

    def is_over(self) -> bool:
        """Whether the run ends here, and if a limit is why, once and for all."""
        stop = self.memo.get("stop")
        if self.done >= self.total:
            return True
        if stop is None:
            by = self.guard.over(
                evaluation_first=self.is_due(self.done), renews=self.optimizer.renews
            )
            if by is None:
                return False
            if self.done == 0:
                raise BudgetError(self.too_short(by))
            stop = {"step": self.done, "by": by}
            self.note(stop=stop)
        if self.done < stop["step"]:
            return False
        rest = "another step may not fit into the rest"
        if stop["by"] != "flops":
            rest = "the rest is for the end"
        self.reporter.info(
            f"--{stop['by']} {getattr(self.config, stop['by'])} ends the run after step "
            f"{self.done} of {self.total}: {rest}."
        )
        return True

    def too_short(self, by: str) -> str:
        used = self.guard.used()
        return (
            f"--{by} {getattr(self.config, by)} is over before the first step: to load and to "
            f"evaluate took {used['elapsed_s']:.1f} s, and the end will take about "
            f"{self.guard.finish_s:.1f} s. Give more, evaluate less, or take a smaller model."
        )

    def plan_end(self, method: Any) -> None:
        """What the end will write: the artefact, and before a last evaluation a checkpoint."""
        weights = trainable(self.model).values()
        n_bytes = sum(p.numel() * p.element_size() for p in weights)
        if self.folder and not (method.keeps_log and self.config.trainable == "all"):
            self.guard.saving_bytes = n_bytes
        if self.keeps_state and self.held_out:
            self.guard.saving_bytes += 3 * n_bytes  # with moments, at most

    def step(self, optimizer: Any, flops: Any, step: int) -> dict[str, Any]:
        """One optimizer step; returns what its line says of it."""
        import torch

        from tinyft.optim.base import check_finite

        batch = self.batches[step].to(self.meter.device)
        lr = learning_rate(step, self.total, self.config, self.guard.flops_share)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(step_seed(self.config.seed, step))
        before, renewal = flops.flops, {}
        if optimizer.renews:
            flops.step(("renewal", step), (1,), lambda: optimizer.renew(self.loss, batch))
            renewal = {"renewal_flops": flops.flops - before}
        loss = flops.step(*optimizer.cost_key(batch), lambda: optimizer.step(self.loss, batch))
        check_finite(loss, step + 1)
        tokens = int(batch.attention_mask.sum())
        return {"loss": float(loss), "lr": lr, "tokens": tokens, **renewal}

    def loss(self, part: Any) -> Any:
        """One loss an example."""
        return self.objective(self.model, part)

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
        with self.guard.evaluating():
            with self.meter.phase("eval"):
                found = self.evaluate(self.held_out)
            self.reporter.evaluation(when, found)
        self.memo["evaluation_s"] = self.guard.evaluation_s
        return found

    def evaluate(self, encoded: Any) -> dict[str, Any]:
        from tinyft.activations import blocks_of
        from tinyft.evaluate import evaluate
        from tinyft.heap import HeapWatch

        size = self.memo.get("eval_batch_size", self.config.batch_size)
        heap = HeapWatch()  # batches of other lengths leave holes; there may be no optimizer yet
        self.hold(heap)
        with heap.before(blocks_of(self.model)):
            return evaluate(self.model, self.tokenizer, encoded, batch_size=size)

    def hold(self, heap: Any) -> None:
        """Let no holes in the heap break a limit on the process's memory."""
        if self.limit_bytes is not None and self.meter.device == "cpu":
            heap.hold_below(_NEAR * self.limit_bytes)

    def score_if_due(self, done: int) -> None:
        """At every `eval_every`-th step, unless the books have it from before a resume."""
        if self.is_due(done):
            self.scores[done] = self.score(f"step {done}")
            if self.folder:
                self.folder.append_metrics({"step": done, "eval": self.scores[done]})

    def is_due(self, done: int) -> bool:
        every = self.config.eval_every
        return bool(self.held_out and every and done and done % every == 0) and (
            done not in self.scores
        )

    def save(self, step: int) -> None:
        assert self.folder is not None
        state = RunState(step, trainable(self.model), self.optimizer.state_tensors())
        tensors = [*state.weights.values(), *state.optimizer.values()]
        began = perf_counter()
        self.folder.save_state(state)
        n_bytes = sum(t.numel() * t.element_size() for t in tensors)
        self.guard.wrote(n_bytes, perf_counter() - began)

    # Within the memory.

    # The longest batch and the longest evaluation are tried before the first step; the training
    # loop and `run` call what follows at their moments.

    def fit_evaluation(self, kept_bytes: int = 0) -> None:
        """Find how many examples an evaluation can score at a time, by trying the longest.

        Args:
            kept_bytes: what training will have added by then.
        """
        if not self.held_out:
            return
        longest = sorted(self.held_out.items, key=lambda item: -item.length)
        while True:
            size = self.memo.get("eval_batch_size", self.config.batch_size)
            encoded = replace(self.held_out, items=longest[:size])
            needed = self.probed(lambda encoded=encoded: self.evaluate(encoded) and kept_bytes)
            if needed <= self.limit_bytes:
                break
            if size == 1:
                raise BudgetError(self.too_small("to score one example at a time", needed))
            self.memo["eval_batch_size"] = size // 2
        self.memo.setdefault("eval_batch_size", size)

    def fit_memory(self, start: int) -> None:
        """Find the quickest way to take steps within the limit, by trying the longest batch; when
        resuming, what was found before holds."""
        if not self.must_fit("probed_bytes"):
            return
        batch = self.batches[0].to(self.meter.device)
        kept = 0

        def probe() -> int:
            nonlocal kept
            kept = self.optimizer.probe(self.loss, batch)
            return kept

        needs = []
        for setting in self.optimizer.settings(batch.size):
            self.set(setting)
            needs.append(self.probed(probe))
            if needs[-1] <= self.limit_bytes:
                break
        else:
            raise BudgetError(self.too_small("for a step, however it is taken", min(needs)))
        earlier = [entry for entry in self.memo.get("settings", []) if entry["step"] < start]
        self.note(settings=[*earlier, {"step": start, **setting}], probed_bytes=needs[-1])
        if len(needs) > 1:
            self.reporter.info(
                f"--memory {self.config.memory}: a step would take {_found(needs[0])}; "
                f"{_in_words(setting)} it takes {_found(needs[-1])}."
            )
        self.fit_evaluation(kept)
        self.note()

    def must_fit(self, name: str) -> bool:
        """Whether there is a limit on memory, and not what fits it (one of `_FITTED`)."""
        return self.limit_bytes is not None and name not in self.memo

    def probed(self, function: Callable[[], int]) -> float:
        """The peak of memory meanwhile and what it returns; infinite if there was not enough."""
        self.meter.peaks.pop("probe", None)
        found: float = float("inf")
        try:
            with self.meter.phase("probe"):
                found = function()
        except Exception as error:
            if not out_of_memory(error):
                raise
        gc.collect()
        return found + self.meter.peaks["probe"]

    def set(self, setting: Mapping[str, Any]) -> None:
        for name, value in setting.items():
            if name != "step":
                setattr(self.optimizer, name, value)

    def step_in_memory(self, flops: Any) -> dict[str, Any]:
        """`step`; under a limit on memory a failed allocation leads to leaner ways."""
        while True:
            for entry in self.memo.get("settings", []):
                if entry["step"] <= self.done:
                    self.set(entry)
            try:
                return self.step(self.optimizer, flops, self.done)
            except Exception as error:
                if self.limit_bytes is None or not out_of_memory(error):
                    raise
                reason = (str(error) or type(error).__name__).splitlines()[0]
            # Out here the failed step's tensors are gone with the traceback.
            gc.collect()
            trim()
            clean = self.optimizer.clean
            self.go_leaner(f"memory ran out in step {self.done + 1} ({reason})", may_save=clean)
            if not clean:
                raise BudgetError(
                    f"Memory ran out in the middle of an update ({reason}), which cannot be taken "
                    f"back. {self.saved_so_far()} --resume goes on from there, and takes this step "
                    f"{_in_words(self.memo['settings'][-1])}."
                )

    def watch_memory(self) -> None:
        """After a step: near the limit hand free pages back, above it take leaner steps."""
        if self.limit_bytes is None:
            return
        peak_bytes = self.meter.lap_bytes()
        if peak_bytes > _NEAR * self.limit_bytes:
            trim()
        if peak_bytes > self.limit_bytes and self.done < self.total:
            self.go_leaner(f"step {self.done} took {human(peak_bytes)}")

    def go_leaner(self, why: str, *, may_save: bool = True) -> None:
        """From the next step on. Written down, so that a resumed run does so, too."""
        examples = min(self.per_step, len(self.batches.items))
        leaner = self.optimizer.leaner(examples)
        if leaner is None:
            if self.keeps_state and may_save:
                self.save(self.done)
            raise BudgetError(
                f"--memory {self.config.memory} is too small: {why}, and there is no leaner way. "
                f"{self.saved_so_far()} Go on with --resume and a larger --memory."
            )
        self.set(leaner)
        self.note(settings=[*self.memo.get("settings", []), {"step": self.done, **leaner}])
        self.reporter.info(
            f"--memory {self.config.memory}: {why}; from here steps are taken {_in_words(leaner)}."
        )

    def saved_so_far(self) -> str:
        return self.folder.saved_so_far() if self.folder else "Nothing is saved without --output."

    def too_small(self, what: str, needed: float) -> str:
        return (
            f"--memory {self.config.memory} is too small {what}: {self.config.method} on "
            f"{self.config.model} needs {_found(needed)}, of which {human(self.loaded_bytes)} are "
            f"the process with the model loaded. Give that much, or try a smaller --max-length, "
            f"--dtype bfloat16, --base-bits 4 with lora, or --method mezo."
        )

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
        accuracy = [self.scores.get(at, {}).get("accuracy") for at in (0, self.done)]
        if None not in accuracy:
            subtitle += "; held-out accuracy {:.1%} before, {:.1%} after".format(*accuracy)
        report["artefact"] = self.folder.finish(
            manifest,
            self.save_artefact,
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

    def save_artefact(self, directory: Path) -> str:
        """What the method made, and its own pictures, into a folder; returns the kind."""
        kind = self.optimizer.save_artefact(
            self.model, self.tokenizer, directory, self.loaded.base_ref
        )
        for name, draw in self.optimizer.plots().items():
            draw(directory / name)
        return kind


def _grows(folder: OutputFolder, config: TrainConfig) -> bool:
    """Whether a finished run is asked to go on for longer.

    Raises:
        InputError: it is, and its method left nothing to go on from.
    """
    from tinyft.optim import METHODS

    saved, now = folder.saved_config(), config.flat()
    by = folder.read_report().get("stopped_by")
    if all(saved.get(name) == now[name] for name in ("steps", "epochs", by) if name):
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
            raise TransientError(
                f"There is no room to write to {folder.directory} ({error}). "
                f"{folder.saved_so_far()} Free some space there, then: "
                f"tinyft train --output {folder.directory} --resume"
            ) from error
        if out_of_memory(error):
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BudgetError(
                f"{config.method} on {config.model} with batches of {config.batch_size} does not "
                f"fit the memory ({reason}). Try a smaller --batch-size (with "
                f"--grad-accumulation for the same result), --checkpointing full, --dtype "
                f"bfloat16, --base-bits 4 with lora, or --method mezo."
            ) from error
        raise


def _found(n_bytes: float) -> str:
    return "more than there is" if n_bytes == float("inf") else human(n_bytes)


def _in_words(setting: Mapping[str, Any]) -> str:
    """`{"checkpointing": "full", "grad_accumulation": 4}` -> `with 4 parts, ...`."""
    words = {
        "grad_accumulation": "batches in {} parts",
        "splits": "forward passes in {} times as many parts",
        "checkpointing": "{} checkpointing",
    }
    return "with " + " and ".join(words[k].format(v) for k, v in setting.items() if k in words)
