"""Files that are written whole or not at all, and the state that a run resumes from.

Every writer here goes through a temporary sibling, `fsync` and `rename`, so that a reader sees the
old file or the new one, never a part. Nothing is pickled: tensors are safetensors, the rest JSON.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyft.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors raises its own error class, with the system's number in the text.
_FULL_TEXT = re.compile("|".join(rf"os error {number}\b" for number in _FULL))


def is_disk_full(error: BaseException) -> bool:
    """True when a write failed because there was no room: disk, quota or file-size limit."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and bool(_FULL_TEXT.search(str(error)))


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut. Not so on Windows, which
    opens no directory, and flushes no file that is open to be read."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder must exist.
        content: the bytes or text, or a function that writes the file at the path it is given.
    """
    # The suffix stays last, because some writers (matplotlib) choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def new_folder(output: str | Path | None) -> Path:
    """`output`, of which nothing is there yet.

    Raises:
        InputError: it is a file, or holds something.
    """
    output = Path(str(output))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} is not empty: name a new folder.")
    return output


@contextmanager
def write_directory_atomic(directory: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `directory` when the block ends without an error.

    What stood there before is replaced. Between the two renames there is a moment without the
    directory, in which the old one is still beside it as `.NAME.old`; `recover_directory` brings it
    back after a kill at that moment.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    old = directory.with_name(f".{directory.name}.old")
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync_path(path)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's own 0700 would hide the result from others
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        temporary.rename(directory)
        fsync_path(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Finish or undo a replacement that a kill interrupted, and remove partial leftovers."""
    old = directory.with_name(f".{directory.name}.old")
    if old.is_dir() and not directory.exists():
        old.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
    for leftover in directory.parent.glob(f".{directory.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class RunState:
    """What a gradient method resumes from, to the bit.

    The data order and the random numbers of a step are pure functions of (seed, step), so neither
    a generator's state nor a position in the data is stored.

    Attributes:
        step: optimizer steps done.
        weights: the trainable parameters by name.
        optimizer: `Optimizer.state_tensors()`.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]

    def save(self, directory: Path) -> None:
        """Write the state, replacing the one before only when this one is whole."""
        from safetensors.torch import save_file

        tensors = {f"weights/{name}": tensor.detach() for name, tensor in self.weights.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.items()}
        with write_directory_atomic(directory) as temporary:
            # save_file streams from the tensors' own memory: no second copy of the weights.
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()},
                temporary / "state.safetensors",
            )
            (temporary / "state.json").write_text(json.dumps({"step": self.step}))

    @classmethod
    def load(cls, directory: Path) -> RunState | None:
        """The state in `directory`, or None when no checkpoint was completed."""
        from safetensors import safe_open

        recover_directory(directory)
        if not (directory / "state.json").is_file():
            return None
        try:
            step = json.loads((directory / "state.json").read_text())["step"]
            parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}}
            with safe_open(directory / "state.safetensors", framework="pt") as file:
                for key in file.keys():
                    part, name = key.split("/", 1)
                    parts[part][name] = file.get_tensor(key)
            return cls(step=step, **parts)
        except Exception as error:
            raise InputError(
                f"The checkpoint in {directory} cannot be read ({error}). Start anew with "
                f"--overwrite, or restore that folder."
            ) from error


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a run changes, by name (tied ones once)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy saved weights into the model's trainable parameters, in place.

    Raises:
        InputError: the sets of parameters, or their shapes, differ.
    """
    import torch

    own = trainable(model)
    differing = sorted(own.keys() ^ weights.keys()) or [
        name for name, tensor in weights.items() if tensor.shape != own[name].shape
    ]
    if differing:
        raise InputError(
            f"The checkpoint does not fit this model: {len(differing)} parameters differ, "
            f"{differing[0]} first. Resume with the model and the method that the run began with, "
            f"or start anew with --overwrite."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
