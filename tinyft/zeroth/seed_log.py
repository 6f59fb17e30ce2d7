"""The seed log: a zeroth-order run as a file of a few bytes a step, which replays into the weights.

One line of JSON (what the directions need: family, seed, shapes' digest, estimator, ...), then a
fixed-size record a step, little-endian: `lr` in float32 and the projected gradient of every probe
in what `estimators.STORED_AS` says.
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

_FORMAT = "tinyft-seed-log-2"
_MAX_HEADER_BYTES = 1 << 16


class SeedLog:
    """An open seed log.

    Attributes:
        header: the run's description, JSON values.
        steps: number of whole records.
        record: a step's, as numpy's dtype.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], steps: int, offset: int) -> None:
        self.path, self.header, self.steps = path, dict(header), steps
        self._offset, self.record = offset, _record(header)

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> SeedLog:
        """Start a log at `path`, replacing what was there; `header["probes"]` and
        `header["stored_as"]` set the record."""
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
            size = _record(header).itemsize
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a seed log of this version ({_FORMAT}): its first line is "
                f"{line[:60]!r}. Give the folder that `tinyft train --method mezo` wrote."
            ) from error
        offset = len(line) + 1
        return cls(path, header, (len(data) - offset) // size, offset)

    def append(self, lr: float, projected_gradients: Sequence[float]) -> None:
        """Write one record; after it returns the record survives the death of the process."""
        assert len(projected_gradients) == self.header["probes"]
        record = np.array([(lr, projected_gradients)], self.record).tobytes()
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._offset + self.steps * self.record.itemsize)
            file.truncate()
            if file.write(record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.steps += 1

    def cut(self, steps: int) -> None:
        """Drop the records after `steps`, where there are any."""
        if steps < self.steps:
            os.truncate(self.path, self._offset + steps * self.record.itemsize)
            self.steps = steps

    def records(self) -> Iterator[tuple[float, list[float]]]:
        """`(lr, projected gradients)` of every step, as the values that were used."""
        for row in np.fromfile(self.path, self.record, self.steps, offset=self._offset):
            yield float(row["lr"]), row["g"].tolist()


def _record(header: Mapping[str, Any]) -> np.dtype:
    stored = {"float32": "<f4", "float16": "<f2"}[header["stored_as"]]
    return np.dtype([("lr", "<f4"), ("g", stored, (header["probes"],))])


def fingerprint(names: Sequence[str], tensors: Sequence[Tensor]) -> str:
    """CRC-32 of names, shapes, dtypes and every byte: tells whether weights are the same bits."""
    crc = 0
    for name, tensor in zip(names, tensors, strict=True):
        crc = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), crc)
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"
