"""How fast a machine is and what a process takes there: measured here, or from a target's profile.

Measured once per machine and set of libraries, in a process of its own (`python -m
tinyft.machine`), and kept in the user's cache. The process does what every run does (imports, a
step in float32 and in bfloat16, a packed layer), so what is resident afterwards is what a run
brings along before its own tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from tinyft.assets import cache_directory
from tinyft.checkpoint import write_atomic
from tinyft.errors import TinyFTError
from tinyft.targets.profiles import DeviceProfile

if TYPE_CHECKING:
    from tinyft.pricing import Work

# On a target whose libraries cannot be measured: PyTorch's process, and a GPU's context.
_ASSUMED_PROCESS_BYTES, _ASSUMED_CONTEXT_BYTES = 400 << 20, 450 << 20
_ASSUMED_OVERHEAD_S = {"cpu": 60e-6, "gpu": 10e-6}
_REACHED_BANDWIDTH = 0.7  # of a memory bus's peak; programs reach 60 to 90%


@dataclass(frozen=True)
class Machine:
    """What turns a `Trace` into seconds and whole-process bytes.

    Attributes:
        name: for people.
        memory_bytes: what a process may take.
        process_bytes: interpreter and libraries, after their first use.
        packing_bytes: bitsandbytes on top, where base or moments are packed.
        flops_per_s: reached by matrix products, by dtype; float32 always.
        bandwidth_bytes_per_s: reached.
        overhead_s: of one operation, whatever its size.
        startup_s: before anything is read.
        compiled_dtypes: whose products oneDNN multiplies, which keeps a program for every shape.
        power_w: drawn under load, or None if unknown.
    """

    name: str
    memory_bytes: int
    process_bytes: int
    packing_bytes: int
    flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    overhead_s: float
    startup_s: float = 0.0
    compiled_dtypes: Sequence[str] = ("bfloat16", "float16")
    power_w: float | None = None

    def seconds(self, work: Work) -> float:
        """Products at their rate or at the bandwidth, all else at the bandwidth, and every
        operation's overhead."""
        slowest = min(self.flops_per_s.values())
        products = sum(
            flops / self.flops_per_s.get(dtype, slowest)
            for dtype, flops in work.flops_by_dtype.items()
        )
        products = max(products, work.product_bytes / self.bandwidth_bytes_per_s)
        rest = work.other_bytes / self.bandwidth_bytes_per_s
        return products + rest + work.operations * self.overhead_s

    @classmethod
    def of_target(cls, profile: DeviceProfile) -> Machine:
        """From a device's profile; its shares of the peak are documented or assumed there."""
        share = profile.utilisation or profile.assumed_utilisation or 1.0
        on_gpu = profile.kind == "gpu"
        return cls(
            name=profile.title,
            memory_bytes=profile.usable_memory_bytes,
            process_bytes=_ASSUMED_CONTEXT_BYTES if on_gpu else _ASSUMED_PROCESS_BYTES,
            packing_bytes=0,
            flops_per_s={d: share * rate for d, rate in profile.peak_flops_per_s.items()},
            bandwidth_bytes_per_s=_REACHED_BANDWIDTH * profile.memory_bandwidth_bytes_per_s,
            overhead_s=_ASSUMED_OVERHEAD_S[profile.kind],
            power_w=profile.power_w,
        )


def this_machine() -> Machine:
    """The machine that this runs on, measured on first use (some ten seconds).

    Raises:
        TinyFTError: the measuring process failed.
    """
    path = cache_directory() / f"machine-{_fingerprint()}.json"
    try:
        measured = json.loads(path.read_text())
    except (OSError, ValueError):
        done = subprocess.run(
            [sys.executable, "-m", "tinyft.machine"], capture_output=True, text=True
        )
        if done.returncode:
            reason = "".join(done.stderr.strip().splitlines()[-1:])
            if done.returncode < 0:
                reason = "a signal ended it, as the system does where memory is short"
            raise TinyFTError(
                f"The process that measures this machine failed: {reason}. It takes some 600 MiB, "
                f"once; plan for a --target without it, or name --method and no limits."
            ) from None
        measured = json.loads(done.stdout)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(measured))
        except OSError:
            pass  # measured anew the next time
    return Machine(**measured, memory_bytes=available_bytes())


def available_bytes() -> int:
    """Memory that a process of ours could have now: free, or held by caches that give way; no more
    than its control groups (a container) allow."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_group_limits()])


def _group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Bytes allowed to the process's control group and to each above it, of either version."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        top, name = root, "memory.max"
        if controllers:
            top, name = root / "memory", "memory.limit_in_bytes"
            if "memory" not in controllers.split(","):
                continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / name
            if folder.is_relative_to(top) and limit.is_file():
                text = limit.read_text().strip()
                if text.isdigit():  # else "max"
                    yield int(text)


def import_libraries() -> None:
    """All that every run imports sooner or later."""
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import tinyft.evaluate
    import tinyft.models
    import tinyft.optim
    import tinyft.output
    import tinyft.progress
    import tinyft.report
    import tinyft.trainer  # noqa: F401


def _fingerprint() -> str:
    """Of the processor, the threads and the libraries that decide the figures, and of where those
    lie: the same versions took 441 MiB from one virtual environment and 452 from another; and of
    whether energy could be measured."""
    from tinyft.guard import EnergyMeter
    from tinyft.kernels import cpu_products

    libraries = [
        next((d.version for d in metadata.distributions(name=name)), None)
        for name in ("torch", "transformers", "bitsandbytes", "triton")
    ]
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    names = [field.name for field in fields(Machine)]
    facts = [
        names,
        platform.processor(),
        platform.node(),
        platform.python_version(),
        sys.prefix,
        threads,
        *libraries,
        *map(str, cpu_products.missing()),
        *map(str, cpu_products.slow_in_mkl()),
        *(["energy"] if EnergyMeter.where_readable() else []),
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _measure() -> Machine:
    """In a fresh process: import and use all that a run does, then look at the clock and at the
    memory."""
    began = perf_counter()
    import_libraries()
    startup_s = perf_counter() - began
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tinyft.data import Batch
    from tinyft.dry_run import DryRun
    from tinyft.guard import EnergyMeter
    from tinyft.kernels import cpu_products
    from tinyft.losses import objective
    from tinyft.memory import resident_bytes, trim
    from tinyft.optim.lora import LoRA

    def time_of(function: Callable[[], object], times: int = 7) -> float:
        seconds = []
        for _ in range(times + 1):
            began = perf_counter()
            function()
            seconds.append(perf_counter() - began)
        return median(seconds[1:])

    shape = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}
    config = LlamaConfig(**shape, num_hidden_layers=12, num_attention_heads=4)
    ids = torch.randint(0, 320, (2, 8))
    batch = Batch(ids, torch.ones_like(ids), ids.clone(), tokens_per_example=7.0)
    loss = objective("lm")

    def step_in(dtype: torch.dtype) -> Callable[[], object]:
        optimizer = LoRA(LlamaForCausalLM(config).to(dtype))
        return lambda: optimizer.step(lambda part: loss(optimizer.model, part), batch)

    step_in(torch.float32)()
    trim()
    process_bytes = resident_bytes()
    overheads = []
    for dtype in (torch.float32, torch.bfloat16):
        step = step_in(dtype)
        step()
        with DryRun() as run:
            step()
        overheads.append(time_of(step) / run.operations)
    trim()
    before_packing = resident_bytes()
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 64)
    layer.to("cpu")
    layer(torch.ones(2, 64))
    trim()
    packing_bytes = resident_bytes() - before_packing

    cpu_products.install()  # as a run does
    rates, meter, began = {}, EnergyMeter.where_readable(), perf_counter()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w = torch.ones(512, 768, dtype=dtype), torch.ones(2048, 768, dtype=dtype)
        seconds = time_of(lambda x=x, w=w: torch.nn.functional.linear(x, w), times=15)
        rates[str(dtype)[6:]] = 2 * 512 * 768 * 2048 / seconds
    # Of a machine that is busy with products alone, and 0 where counters stand still.
    power_w = meter.joules() / (perf_counter() - began) if meter else None
    missing = cpu_products.missing()
    for dtype in missing:  # multiplied as float32: faster only by the clock's noise
        name = str(dtype)[6:]
        rates[name] = min(rates[name], rates["float32"])
    native = {torch.bfloat16, torch.float16}.difference(missing).union(cpu_products.slow_in_mkl())
    # Larger than most caches, and little where little is allowed.
    block = torch.ones(min(64 << 20, available_bytes() // 32))
    bandwidth = 3 * 4 * block.numel() / time_of(lambda: torch.add(block, block, out=block))
    return Machine(
        name="this machine",
        memory_bytes=0,
        process_bytes=process_bytes,
        packing_bytes=packing_bytes,
        flops_per_s=rates,
        bandwidth_bytes_per_s=bandwidth,
        overhead_s=median(overheads),
        startup_s=startup_s,
        compiled_dtypes=sorted(str(dtype)[6:] for dtype in native),
        power_w=power_w or None,
    )


if __name__ == "__main__":
    found = asdict(_measure())
    del found["memory_bytes"]
    print(json.dumps(found))
