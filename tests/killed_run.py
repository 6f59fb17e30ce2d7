"""A run in a process of its own that is killed at a chosen moment. For `test_resume.py`.

Kept apart so that a fork server can import it, and with it everything slow to import, once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import blank_picture
import matplotlib.backends.backend_agg  # these are imported here so that forked runs need not
import matplotlib.figure
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import tinyft.data
import tinyft.evaluate
import tinyft.models
import tinyft.optim
import tinyft.plots
import tinyft.train
from tinyft.config import TrainConfig


def child(values: dict[str, Any], at_operation: int | None, after_s: float | None) -> None:
    """Train, and die of SIGKILL at the given file operation, or after a time.

    A file operation is anything of Python's audit events that names a path in the output folder:
    opening, renaming, removing, making a folder. Dying at each of them is dying at every state that
    the folder can be in, which no sleep would hit.
    """
    torch.set_num_threads(1)
    matplotlib.figure.Figure.savefig = blank_picture.save
    output, seen = str(Path(values["output"])), 0

    def audit(event: str, args: tuple) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if any(isinstance(a, (str, bytes, os.PathLike)) and output in os.fsdecode(a) for a in args):
            seen += 1
            if seen == at_operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if after_s is not None:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    tinyft.train.run(TrainConfig.build(values))
    Path(f"{output}.operations").write_text(str(seen))
    os._exit(0)  # without waiting for the timer
