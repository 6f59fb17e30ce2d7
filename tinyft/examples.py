"""Examples from files: the formats people have, read into one type, with every bad row named.

A source is a `.jsonl`, `.json`, `.csv` or `.parquet` file, or the id of a dataset on the hub
(`owner/name`, `owner/name:split`). The format is told row by row from the fields:

    completion  {"prompt", "completion"}            messages  {"messages": [{"role", "content"}]}
    choices     {"prompt", "choices", "answer"}     sharegpt  {"conversations": [{"from", "value"}]}
    alpaca      {"instruction", "input"?, "output"} text      {"text"}

Other fields are ignored, and null counts as absent. In a CSV the lists are JSON inside the cell.
Alpaca rows become prompt and completion with that project's prompt as torchtune and litgpt write it
(a newline behind "### Response:"), so that they serve models without a chat template too; sharegpt
rows become messages. Conversations may come with "tools", the list of JSON Schemas that a chat
template takes, and their assistant messages with "tool_calls", beside content or instead of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyft.errors import InputError
from tinyft.sources import UnusableRow, open_rows

MAX_LISTED = 20


@dataclass(frozen=True)
class Example:
    """One row. `kind` says which fields hold something; `line` is where it stands in its source."""

    line: int
    kind: str  # "completion" | "messages" | "text" | "choices"
    prompt: str = ""
    completion: str = ""
    choices: tuple[str, ...] = ()
    answer: int = -1
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its line, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Examples:
    """What a source holds.

    Attributes:
        items: the good rows, in order.
        bad: the rows left out; empty unless `skip_bad_rows`.
        source: the file or dataset, for messages.
        unit: what `line` counts: "line" of a text file, or "row" of a table or array, from 1.
        skip_bad_rows: whether later stages, too, leave out rows that they cannot use.
    """

    items: list[Example]
    bad: list[BadRow] = field(default_factory=list)
    source: str = "the examples"
    unit: str = "line"
    skip_bad_rows: bool = False

    def check(self, items: list[Any], bad: list[BadRow]) -> None:
        """Raises InputError if bad rows are not to be skipped, or if nothing is left."""
        if items and (self.skip_bad_rows or not bad):
            return
        n_rows = len(self.items) + len(self.bad)
        listed = [f"  {self.unit} {row.line}: {row.reason}" for row in bad[:MAX_LISTED]]
        if len(bad) > MAX_LISTED:
            listed.append(f"  ... and {len(bad) - MAX_LISTED} more")
        advice = (
            f"Correct the {self.unit}s above, or leave them out with --skip-bad-rows."
            if items
            else "No usable row is left: correct the source."
        )
        lines = [f"{self.source}: {len(bad)} of {n_rows} rows cannot be used.", *listed, advice]
        raise InputError("\n".join(lines))


def read_examples(
    source: str | Path, *, skip_bad_rows: bool = False, fmt: str | None = None
) -> Examples:
    """Reads every row of `source`.

    Args:
        source: a file, or a dataset id of the hub (needs the extra `tinyft[hub]`).
        skip_bad_rows: go on without the rows that cannot be used; they stay named in `.bad`.
        fmt: read every row as this format (see the module's table) instead of telling it from
            the fields.

    Raises:
        InputError: no such source, nothing in it, or rows that cannot be used: all are named.

    Example:
        >>> read_examples("reviews.jsonl").items[0].prompt  # doctest: +SKIP
        'A quiet, moving film. It was'
    """
    if fmt is not None and fmt not in FORMATS:
        raise InputError(f"Unknown data format {fmt!r}; the formats are {', '.join(FORMATS)}.")
    items: list[Example] = []
    bad: list[BadRow] = []
    try:
        rows, unit = open_rows(source)
        for line, row in rows:
            try:
                items.append(_parse(line, row, fmt))
            except UnusableRow as error:
                bad.append(BadRow(line, str(error)))
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror or error}.") from error
    if not items and not bad:
        raise InputError(f"{source} holds no rows. Give a file with at least one example.")
    # `check` counts rows as items + bad, so it is asked on a value that already holds both.
    examples = Examples(items, bad, str(source), unit, skip_bad_rows)
    examples.check(items, bad)
    return examples


# --- a row to an example -------------------------------------------------------------------------

Row = dict[str, Any]


def _completion(line: int, row: Row) -> Example:
    prompt, completion = (
        _text(row["prompt"], "prompt", may_be_empty=True),
        _text(row["completion"], "completion"),
    )
    return Example(line, "completion", prompt=prompt, completion=completion)


def _plain_text(line: int, row: Row) -> Example:
    return Example(line, "text", text=_text(row["text"], "text"))


def _choices(line: int, row: Row) -> Example:
    listed, answer = _list(row, "choices"), row["answer"]
    choices = tuple(_text(choice, f"choice {i}") for i, choice in enumerate(listed))
    if len(set(choices)) < max(len(choices), 2):
        raise UnusableRow(f"needs two or more different choices, found {_shown(listed)}")
    if isinstance(answer, str) and re.fullmatch(r"\s*-?\d+\s*", answer):
        answer = int(answer)  # a CSV cell
    if isinstance(answer, bool) or not isinstance(answer, int):
        found = _shown(answer)
        raise UnusableRow(f"answer is {found}; it must be the index of a choice, counted from 0")
    if not 0 <= answer < len(choices):
        raise UnusableRow(f"answer {answer} is out of range: choices are 0 to {len(choices) - 1}")
    prompt = _text(row["prompt"], "prompt")
    return Example(line, "choices", prompt=prompt, choices=choices, answer=answer)


def _messages(line: int, row: Row) -> Example:
    messages = _list(row, "messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UnusableRow(f"message {number} is not an object with role and content")
        name = f"content of message {number} ({message['role']})"
        answers = message["role"] == "assistant"
        calls = answers and bool(message.get("tool_calls"))
        if not calls or message.get("content") is not None:
            _text(message.get("content"), name, may_be_empty=calls or not answers)
    if not any(message["role"] == "assistant" for message in messages):
        raise UnusableRow("has no assistant message to learn from")
    # Tables fill the fields that a message lacks with null; a template would print "None".
    clean = tuple({k: v for k, v in message.items() if v is not None} for message in messages)
    tools = tuple(_list(row, "tools", may_be_empty=True)) if row.get("tools") else ()
    return Example(line, "messages", messages=clean, tools=tools)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt(line: int, row: Row) -> Example:
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for number, turn in enumerate(_list(row, "conversations"), start=1):
        sender = turn.get("from") if isinstance(turn, dict) else None
        if sender not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise UnusableRow(f"turn {number} is from {sender!r}, which is none of {known}")
        messages.append({"role": _SHAREGPT_ROLES[sender], "content": turn.get("value")})
    return _messages(line, {"messages": messages, "tools": row.get("tools")})


_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def alpaca_prompt(instruction: str, given: str) -> str:
    """That project's prompt for an instruction and its input, which may be ""."""
    return _ALPACA.format(
        paired=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )


def _alpaca(line: int, row: Row) -> Example:
    given = _text(row["input"], "input", may_be_empty=True) if "input" in row else ""
    prompt = alpaca_prompt(_text(row["instruction"], "instruction"), given)
    return Example(line, "completion", prompt=prompt, completion=_text(row["output"], "output"))


# The more telling formats come first: datasets often carry a rendered "text" beside their fields.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[int, Row], Example]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "choices": (("prompt", "choices", "answer"), _choices),
    "completion": (("prompt", "completion"), _completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "text": (("text",), _plain_text),
}


def _parse(line: int, row: Any, fmt: str | None) -> Example:
    if isinstance(row, UnusableRow):
        raise row
    if not isinstance(row, dict):
        raise UnusableRow(f"is a {type(row).__name__}, not an object with fields")
    row = {key: value for key, value in row.items() if value is not None}
    for name in FORMATS if fmt is None else (fmt,):
        fields, parse = FORMATS[name]
        if all(key in row for key in fields):
            return parse(line, row)
    wanted = " | ".join("+".join(FORMATS[name][0]) for name in (FORMATS if fmt is None else (fmt,)))
    raise UnusableRow(f"found fields {', '.join(map(str, row)) or '(none)'}; expected {wanted}")


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is {_shown(value)}, not text")
    if not may_be_empty and not value.strip():
        raise UnusableRow(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell it, no tokenizer takes it
        raise UnusableRow(f"{name} holds half of a surrogate pair, which is no text") from None
    return value


def _list(row: Row, key: str, *, may_be_empty: bool = False) -> list[Any]:
    value = row[key]
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UnusableRow(f"{key} is not a JSON list: {error.msg}") from None
    if not isinstance(value, list) or not (value or may_be_empty):
        wanted = "a list" if may_be_empty else "a non-empty list"
        raise UnusableRow(f"{key} is {_shown(value)}, not {wanted}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
