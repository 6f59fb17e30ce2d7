"""A benchmark's data: what is trained on, what learning rates are chosen on, and what is scored.

The last two are different rows, so that no method is tuned on what it is judged by.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyft.assets import ASSETS, DATA, resolve_data
from tinyft.checkpoint import write_atomic
from tinyft.errors import InputError

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """A name and its three files of rows."""

    name: str
    train: Path
    validation: Path
    test: Path


def names(sources: Sequence[str]) -> dict[str, str]:
    """`{name: source}` of what `--data` names.

    Raises:
        InputError: two sources of one name.
    """
    found: dict[str, str] = {}
    for source in sources:
        first = source.partition(",")[0]
        name = source if source in DATA else Path(first).stem
        if found.setdefault(name, source) != source:
            raise InputError(f"--data {found[name]} and {source} would both be called {name}.")
    return found


def make(name: str, source: str, folder: Path, rows: int) -> Task:
    """Write the three files, and of what they were made; unless they are there.

    Args:
        source: a built-in name; `FILE.jsonl`; or `TRAIN.jsonl,TEST.jsonl`.
        rows: at most so many to score on, and to choose learning rates on; of one file at most a
            fifth each.

    Raises:
        InputError: no such file, too few rows, or files that are there of other rows.
    """
    if source in DATA:
        contents, digests = [], [ASSETS[source].sha256]
    else:
        contents = [_read(Path(path)) for path in source.split(",")]
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
    note = folder / name / "source.json"
    task = Task(name, *(folder / name / f"{split}.jsonl" for split in _SPLITS))
    if all(path.is_file() for path in (task.train, task.validation, task.test)):
        made_of = json.loads(note.read_text()) if note.is_file() else {"sha256": digests}
        if made_of["sha256"] != digests:
            raise InputError(
                f"--data {source} is not what the rows in {note.parent} were taken from "
                f"({made_of['source']}, sha256 {made_of['sha256'][0][:12]}; now "
                f"{digests[0][:12]}). Put that back, or name another --output."
            )
        return task
    if source in DATA:
        contents = [_read(resolve_data(f"{source}:{split}")) for split in ("train", "dev")]
    read = [_lines(content) for content in contents]
    train = read[0]
    random.Random(0).shuffle(train)
    share = max(1, len(train) // 5)
    test = read[1][:rows] if len(read) > 1 else _take(train, min(rows, share))
    validation = _take(train, min(rows, share))
    if not (train and test and validation):
        raise InputError(f"--data {source} holds too few rows to train, tune and score on.")
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(note, json.dumps({"source": source, "sha256": digests}))
    for path, part in ((task.train, train), (task.validation, validation), (task.test, test)):
        write_atomic(path, "".join(part))
    return task


def _take(rows: list[str], n: int) -> list[str]:
    """The first `n`, which then are no longer in `rows`; nor are others with the same prompt."""
    taken, rest = rows[:n], rows[n:]
    known = {_question(row) for row in taken}
    rows[:] = [row for row in rest if _question(row) not in known]
    return taken


def _question(row: str) -> str:
    try:
        found = json.loads(row)
    except json.JSONDecodeError:  # training says it, with its line
        return row
    return str(found.get("prompt", row)) if isinstance(found, dict) else row


def _read(path: Path) -> bytes:
    if path.suffix != ".jsonl":
        raise InputError(
            f"--data {path}: give a .jsonl file, TRAIN.jsonl,TEST.jsonl, or one of "
            f"{', '.join(DATA)}."
        )
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"--data {path} cannot be read: {error.strerror}.") from error


def _lines(content: bytes) -> list[str]:
    """Of bytes: those of a text also end at U+2028 and others, which JSON allows inside strings."""
    return [line.decode() + "\n" for line in content.splitlines() if line.strip()]
