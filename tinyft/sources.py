"""Rows of files and hub datasets: JSON lines, JSON, CSV and parquet, each row with its place."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinyft.errors import InputError, TransientError

_HUB_ID = r"\w[\w.-]*(/[\w.-]+)?(:[\w.\[\]%-]+)?"  # name, owner/name, owner/name:split


class UnusableRow(ValueError):
    """Why one row cannot be used; whoever knows its line makes a BadRow of it."""


_Rows = Iterator[tuple[int, Any]]  # (line, row)


def open_rows(source: str | Path) -> tuple[_Rows, str]:
    """Opens a source.

    Returns:
        Its rows as (line, row), where a row that cannot be read is the UnusableRow that says why;
        and what `line` counts: "line" of a text file, or "row" of a table or array, from 1.

    Raises:
        InputError: no such source, or one of which no row can be read.
        TransientError: no hub reached.
        OSError: from the file system, now or while the rows are read.
    """
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        raise InputError(f"{source} is a folder. Give one file of {', '.join(_READERS)}.")
    if not path.exists():
        if suffix not in _READERS and re.fullmatch(_HUB_ID, str(source)):
            return _hub_rows(str(source)), "row"
        raise InputError(f"{source} does not exist. Check the path of the data file.")
    if suffix not in _READERS:
        raise InputError(
            f"{source}: files of type {suffix or '(none)'} cannot be read as examples. "
            f"Give {', '.join(_READERS)}."
        )
    if path.stat().st_size == 0:
        raise InputError(f"{source} is empty. Give a file with at least one example.")
    return _READERS[suffix](path)


def _jsonl_rows(path: Path) -> tuple[_Rows, str]:
    # Lines are split as bytes: str.splitlines would also split at U+2028, which JSON allows inside
    # strings. utf-8-sig drops the mark that Windows editors put at the start.
    def rows() -> _Rows:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                    if text.strip():
                        yield line, json.loads(text)
                except UnicodeDecodeError as error:
                    yield line, UnusableRow(f"is not UTF-8 at byte {error.start}")
                except json.JSONDecodeError as error:
                    yield line, UnusableRow(f"is not JSON: {error.msg} at column {error.colno}")
                except (RecursionError, ValueError) as error:  # too deep, or a number too long
                    yield line, UnusableRow(f"is not usable JSON: {error}")

    return rows(), "line"


def _json_rows(path: Path) -> tuple[_Rows, str]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        return _jsonl_rows(path)  # many write JSON lines under this name
    try:
        return enumerate(json.loads(text), start=1), "row"
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error


def _csv_rows(path: Path) -> tuple[_Rows, str]:
    # Strict: otherwise one stray quote would swallow the rest of the file into a single cell.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents exceed the 128 KiB default
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)

    def rows() -> _Rows:
        header: list[str] | None = None
        while True:
            line = reader.line_num + 1  # where the row begins: cells may hold line breaks
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, UnusableRow(f"is not CSV: {error}")
                continue
            if not cells:
                continue
            if header is None:
                header = cells
            elif len(cells) != len(header):
                yield line, UnusableRow(f"has {len(cells)} cells; the header has {len(header)}")
            else:
                yield line, dict(zip(header, cells, strict=True))

    return rows(), "line"


def _parquet_rows(path: Path) -> tuple[_Rows, str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error
    rows = (row for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    return enumerate(rows, start=1), "row"


def _hub_rows(source: str) -> _Rows:
    name, _, split = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{source} is no file here, and reading it as a dataset of the hub needs the package "
            "`datasets`: pip install 'tinyft[hub]', or give a file."
        ) from error
    try:
        return enumerate(load_dataset(name, split=split or "train"), start=1)
    except Exception as error:  # its errors come from requests, fsspec, pyarrow and its own
        raise (TransientError if isinstance(error, ConnectionError) else InputError)(
            f"{source} is no file here, and as a dataset of the hub it cannot be loaded: {error} "
            "Check the name (owner/name or owner/name:split) and the network, or give a file."
        ) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error


_READERS: dict[str, Callable[[Path], tuple[_Rows, str]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
