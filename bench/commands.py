"""What the benches share: one `tinyft train`, in a process of its own, that is never done twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def tinyft(*words: str, catch: bool = False) -> str:
    """Run a command, and say so; returns what it printed, if caught."""
    print("$ tinyft", *words, flush=True)
    command = [sys.executable, "-m", "tinyft.cli", *words]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if catch else None)
    return done.stdout or ""


def train(flags: Sequence[str], output: Path) -> None:
    """Train into `output`, unless its report is there already; what was interrupted goes on."""
    if not (output / "report.json").exists():
        resume = ["--resume"] if (output / "run.json").exists() else []
        tinyft("train", *flags, f"--output={output}", *resume)
