"""What was measured, on what: the contents of report.json."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyft.config import TrainConfig
from tinyft.memory import PeakMeter, human
from tinyft.progress import duration
from tinyft.progress import scores as scores_text

if TYPE_CHECKING:
    from tinyft.encoding import Encoded
    from tinyft.models import Loaded

_PACKAGES = ("tinyft", "torch", "transformers", "bitsandbytes", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a bare checkout on the path
            found[package] = _checkout_version() if package == "tinyft" else "not installed"
    return found


def _checkout_version() -> str:
    from tinyft import __version__

    return __version__


def hardware(device: str) -> dict[str, Any]:
    """Of this machine, as far as it explains a time or a peak."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measured(steps: Sequence[Mapping[str, Any]], loaded_bytes: int) -> dict[str, Any]:
    """Totals and medians over the lines of metrics.jsonl, whichever process wrote them."""
    timed = [line for line in steps if line["seconds"] is not None]
    seconds = [line["seconds"] for line in timed]
    last = timed[-1] if timed else {}
    return {
        "peak_memory_bytes": max((line["peak_memory_bytes"] for line in timed), default=0),
        "loaded_memory_bytes": loaded_bytes,
        "flops": last.get("flops", 0),
        "wall_s": round(last.get("wall_s", 0.0), 3),
        "steps": len(steps),
        "step_s_median": statistics.median(seconds) if seconds else 0.0,
        "tokens_per_s": sum(line["tokens"] for line in timed) / sum(seconds) if seconds else 0.0,
    }


def build_report(
    config: TrainConfig,
    model: Any,
    *,
    steps: Sequence[Mapping[str, Any]],
    scores: Mapping[int, Mapping[str, Any]],
    total: int,
    loaded: Loaded,
    loaded_bytes: int,
    encoded: Encoded,
    bad_rows: Sequence[Any],
    padding_share: float,
    info: Mapping[str, Any],
    used: Mapping[str, float],
    meter: PeakMeter,
) -> dict[str, Any]:
    """report.json of a finished run; `kernels` says which implementation of each ran last.

    Args:
        steps: the lines of metrics.jsonl.
        scores: held-out scores by the number of steps done.
        info: hashes of the data, and what the budget led to, as run.json has them.
        used: time and energy of the whole run, from `tinyft.guard.Guard.used`.
    """
    from tinyft.kernels import dispatch

    guard = info.get("guard", {})
    return {
        "method": config.method,
        "model": config.model,
        "config": config.flat(),
        "stopped_by": guard.get("stop", {}).get("by"),
        "guard": {name: value for name, value in guard.items() if name != "stop"},
        "measured": {
            **measured(steps, loaded_bytes),
            **used,
            "eval_peak_memory_bytes": meter.peaks.get("eval", 0),
            "memory_source": meter.source,
        },
        "train": {"loss": [line["loss"] for line in steps]},
        "eval": {
            "before": scores.get(0),
            "after": scores.get(total),
            "between": {str(at): scores[at] for at in sorted(scores) if 0 < at < total},
        },
        "data": {
            "sha256": info["data_sha256"],
            "eval_sha256": info["eval_data_sha256"],
            "examples": len(encoded.items),
            "tokens": encoded.n_tokens,
            "truncated": encoded.n_truncated,
            "split": encoded.n_split,
            "bad_rows": [{"line": row.line, "reason": row.reason} for row in bad_rows],
            "padding_share": padding_share,
        },
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "dtype": loaded.dtype,
            "base_bits": loaded.base_bits,
        },
        "kernels": dict(dispatch.ran),
        "versions": versions(),
        "hardware": hardware(meter.device),
    }


def summary(report: Mapping[str, Any]) -> str:
    """A report in a few lines for a person."""
    got = report["measured"]
    lines = [
        f"{report['method']} on {report['model']}: {got['steps']} steps in "
        f"{duration(got['wall_s'])} ({got['step_s_median']:.3g} s a step, "
        f"{got['tokens_per_s']:,.0f} tokens/s, {got['flops']:.3g} FLOPs)",
        f"memory: peak {human(got['peak_memory_bytes'])}, of which the loaded model "
        f"{human(got['loaded_memory_bytes'])}",
    ]
    if limit := report.get("stopped_by"):
        lines.insert(1, f"ended by --{limit} {report['config'][limit]}")
    for when in ("before", "after"):
        if report["eval"].get(when):
            lines.append(f"held-out {when}: {scores_text(report['eval'][when])}")
    return "\n".join(lines)
