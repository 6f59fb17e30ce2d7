"""The seed log: a zeroth-order run as a file of a few bytes a step, which replays into the weights.

One line of JSON (what the directions need: family, seed, shapes' digest, estimator, ...), then a
fixed-size record a step: `lr` and the projected gradient of every probe, little-endian float32.
z comes from the seed and the step's number, so nothing else is needed. The file is only ever
appended to; a record cut short by a kill is dropped when the log is opened again.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyft.errors import InputError

_FORMAT = "tinyft-seed-log-1"
_MAX_HEADER_BYTES = 1 << 16


class SeedLog:
    """An open seed log.

    Attributes:
        header: the run's description, JSON values.
        steps: number of whole records.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], steps: int, offset: int) -> None:
        self.path, self.header, self.steps = path, dict(header), steps
        self._offset = offset

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> SeedLog:
        """Start a log at `path`, replacing what was there; `header["probes"]` sets the record."""
        line = json.dumps({"format": _FORMAT, **header}, separators=(",", ":")).encode() + b"\n"
        part = path.with_name(path.name + ".part")
        part.write_bytes(line)
        os.replace(part, path)
        return cls(path, json.loads(line), 0, len(line))

    @classmethod
    def open(cls, path: Path) -> SeedLog:
        """Open a log to read or to go on; a torn last record is ignored.

        Raises:
            InputError: no such file, or not a seed log.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"There is no seed log at {path}: {error.strerror}.") from error
        line, newline, _ = data[:_MAX_HEADER_BYTES].partition(b"\n")
        try:
            header = json.loads(line)
            if header["format"] != _FORMAT or not newline:
                raise ValueError
            size = 4 * (1 + header["probes"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a seed log of this version ({_FORMAT}): its first line is "
                f"{line[:60]!r}. Give the folder that `tinyft train --method mezo` wrote."
            ) from error
        offset = len(line) + 1
        return cls(path, header, (len(data) - offset) // size, offset)

    @property
    def record_bytes(self) -> int:
        """Bytes a step."""
        return 4 * (1 + self.header["probes"])

    def append(self, lr: float, projected_gradients: Sequence[float]) -> None:
        """Write one record; after it returns the record survives the death of the process."""
        record = np.array([lr, *projected_gradients], dtype="<f4").tobytes()
        assert len(record) == self.record_bytes
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._offset + self.steps * self.record_bytes)
            file.truncate()
            if file.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.steps += 1

    def cut(self, steps: int) -> None:
        """Drop the records after `steps`, where there are any."""
        if steps < self.steps:
            os.truncate(self.path, self._offset + steps * self.record_bytes)
            self.steps = steps

    def records(self) -> Iterator[tuple[float, list[float]]]:
        """`(lr, projected gradients)` of every step, as the float32 values that were used."""
        data = self.path.read_bytes()[self._offset : self._offset + self.steps * self.record_bytes]
        for row in np.frombuffer(data, dtype="<f4").reshape(self.steps, self.record_bytes // 4):
            yield float(row[0]), [float(g) for g in row[1:]]


def fingerprint(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """CRC-32 of names, shapes, dtypes and every byte: tells whether weights are the same bits."""
    crc = 0
    for name, tensor in zip(names, tensors, strict=True):
        crc = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), crc)
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"
