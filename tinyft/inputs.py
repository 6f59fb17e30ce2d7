"""What a run reads: its examples, with a hash that tells whether they changed, and its device."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyft.examples import Examples


def read_source(
    source: str | None, rows: Any, skip_bad_rows: bool
) -> tuple[Examples | None, str | None]:
    """Examples and the sha256 of what they came from; `(None, None)` without a source."""
    from tinyft.assets import resolve_data
    from tinyft.data import read_examples

    if rows is not None:
        # Through a file: one parser, with one set of checks, for rows from anywhere.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return read_examples(path, skip_bad_rows=skip_bad_rows), file_sha256(path)
    if source is None:
        return None, None
    path = Path(resolve_data(source)).expanduser()
    examples = read_examples(path if path.exists() else source, skip_bad_rows=skip_bad_rows)
    if path.is_file():
        return examples, file_sha256(path)
    return examples, hashlib.sha256(repr(examples.items).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def pick_device(wanted: str) -> str:
    """`"auto"` is a GPU where there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"
