"""Examples to tokens and labels: what the model reads, and where it is asked to predict.

Where a completion begins. Prompt and completion are tokenised together, as the text they are, so
that a token may span the seam ("A: " + "yes" is "A", ":", " yes"); the prompt is tokenised alone as
well, and the loss begins at the first token in which the two differ. So the model is taught every
token that the prompt alone does not already give it, no completion character goes unlabelled, and
leading spaces fall where the tokenizer puts them. It needs no offsets, so any tokenizer will do.

Special tokens. What the tokenizer itself puts before a text (BOS, [CLS]) is put there, and survives
truncation, since many models break without it; EOS ends completions and texts, if there is an EOS,
and choices one of which begins another.

Chat templates. The loss is on each assistant turn, from the end of the generation prompt to the
turn's end mark (`chat.py`); its tokens are found as those of completions are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from tinyft.chat import Rendered, render, shared
from tinyft.errors import InputError
from tinyft.examples import BadRow, Example, Examples, UnusableRow

NO_LOSS = -100  # the label that Hugging Face models and torch's cross-entropy ignore
OBJECTIVES = ("auto", "lm", "choice", "class", "accuracy", "f1")

_Row = tuple[int, list[int], list[int]]  # length of the head to spare, ids, labels
_CHUNK = 512  # texts a tokenizer call: its lists of Python integers are nine times our arrays


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One example's tokens.

    Attributes:
        line: where the example stands in its source.
        rows: token ids, int32 (T,): one row, or one for each choice.
        labels: for each row its ids where they carry loss and -100 elsewhere, int32 (T,), the
            first always -100 since nothing predicts it; () where the answer is the only target.
        answer: index of the right choice or class, else -1.
        choice_ids: the token of each choice, if each is a single one.
    """

    line: int
    rows: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...] = ()
    answer: int = -1
    choice_ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))

    @property
    def highest_id(self) -> int:
        """Of all tokens that the model reads or predicts."""
        return max((*(int(row.max()) for row in self.rows), *self.choice_ids))


@dataclass(frozen=True, eq=False)
class Encoded:
    """A data set in tokens.

    Attributes:
        items: the examples; windows of one text and turns of one chat are items of their own.
        kind: "lm", "choice" or "class".
        n_truncated: items that lost the start of their prompt (encoders: its end).
        n_split: texts cut into windows; they lost nothing.
        labels: names of the classes.
        bad: rows left out here because they do not fit or cannot be used.
        source: where the items' lines are counted, as errors say it ("train.jsonl, line").
    """

    items: list[EncodedExample]
    kind: str
    n_truncated: int = 0
    n_split: int = 0
    labels: tuple[str, ...] = ()
    bad: list[BadRow] = field(default_factory=list)
    source: str = "row"

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows, padding apart."""
        return sum(len(row) for item in self.items for row in item.rows)


def encode(
    examples: Examples,
    tokenizer: Any,
    *,
    max_length: int,
    objective: str = "auto",
    encoder: bool = False,
    classes: Sequence[str] = (),
) -> Encoded:
    """Tokenises examples and labels the tokens that carry loss.

    Prompts too long lose their beginning, so that completions and choices stay whole; all choices
    of an example lose the same tokens. Texts too long are cut into windows that share one token,
    so that every token but the first is predicted exactly once. Choices are compared as
    continuations, without EOS; but where one of a row's choices begins another (2, 25) all of the
    row's end in it, since the longer one could never be the likelier.

    Args:
        examples: from `read_examples`, or built by hand.
        tokenizer: a Hugging Face tokenizer.
        max_length: most tokens a row, special ones included.
        objective: "lm" learns completions, texts and assistant turns (of a choices row the right
            choice); "choice", "accuracy" and "f1" compare the choices; "class" classifies;
            "auto" is "choice" where all rows have choices and "lm" where none has.
        encoder: the model is a BERT-type encoder, which can only classify: a class is a choice,
            the input is the prompt, and all rows must offer the same choices.
        classes: an encoder's, in the order of its outputs (`Encoded.labels` of what it was
            trained on); those of the first row if there are none.

    Raises:
        InputError: an objective that the rows cannot serve, no chat template, or rows that do not
            fit in `max_length`: all named, unless `examples.skip_bad_rows`.
    """
    if max_length < 2:
        raise InputError(f"--max-length {max_length} leaves nothing to predict; give at least 2.")
    kind = _kind(examples, objective, encoder)
    chats = [example for example in examples.items if example.kind == "messages"]
    if kind == "lm" and chats and not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{examples.source}: {examples.unit} {chats[0].line} is a conversation, and the "
            "tokenizer has no chat template. Use an instruct model, or prompt and completion."
        )
    encoding = _Encoding(tokenizer, max_length)
    one, continuations = {
        "lm": (encoding.lm, _target),
        "choice": (encoding.choice, lambda example: example.choices),
        "class": (partial(encoding.classify, examples, tuple(classes)), lambda example: ()),
    }[kind]
    items: list[EncodedExample] = []
    bad: list[BadRow] = []
    for example, prompt, joint in encoding.tokenised(examples.items, continuations):
        try:
            items += one(example, prompt, joint)
        except UnusableRow as error:
            bad.append(BadRow(example.line, str(error)))
    examples.check(items, bad)
    return Encoded(
        items=_single_tokens(items) if kind == "choice" else items,
        kind=kind,
        n_truncated=encoding.n_truncated,
        n_split=encoding.n_split,
        labels=(tuple(classes) or _classes(examples.items[0])) if kind == "class" else (),
        bad=bad,
        source=f"{examples.source}, {examples.unit}",
    )


def encode_held_out(
    examples: Examples, tokenizer: Any, trained: Encoded, *, objective: str, **shape: Any
) -> Encoded:
    """Rows that a run is scored on: by what suits them, as for "auto", or where only some have
    choices by the run's own objective; an encoder's of the classes that it is trained on.

    Args:
        trained: the rows that it is trained on.
        objective: its own.
        shape: `max_length` and `encoder`, as for `encode`, which says the rest.
    """
    kinds = {example.kind == "choices" for example in examples.items}
    return encode(
        examples,
        tokenizer,
        objective=objective if len(kinds) > 1 else "auto",
        classes=trained.labels,
        **shape,
    )


def questions(
    examples: Examples, tokenizer: Any
) -> tuple[list[tuple[list[int], list[int]]], set[int]]:
    """What a causal model is asked, and what it should write: the tokens of objective lm, uncut.

    Of choices it is the right one that it should write, of a conversation the last assistant turn.

    Returns:
        (prompt, answer) of each example, token ids, the answer with its end; and the tokens that
        end answers: EOS, and what closes the template's assistant turns.

    Raises:
        InputError: rows of text, which ask nothing, or conversations that the chat template
            refuses: all named, unless `examples.skip_bad_rows`.
    """
    encoding = _Encoding(tokenizer, max_length=0)  # which only fitting asks for
    asked: list[tuple[list[int], list[int]]] = []
    bad: list[BadRow] = []
    for example, prompt, joint in encoding.tokenised(examples.items, _target):
        try:
            if example.kind == "text":
                raise UnusableRow(
                    "a row of text asks nothing that could be answered. Leave --generate out "
                    "(perplexity fits texts), or give prompts"
                )
            *_, (_, ids, labels) = encoding.lm_rows(example, prompt, joint)
        except UnusableRow as error:
            bad.append(BadRow(example.line, str(error)))
            continue
        begin = _run_start(labels)
        asked.append((ids[:begin], ids[begin:]))
    examples.check(asked, bad)
    return asked, encoding.ends


def pad_id(tokenizer: Any) -> int:
    """A token to pad with. Any will do, since padding is masked; many tokenizers name none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def _kind(examples: Examples, objective: str, encoder: bool) -> str:
    if objective not in OBJECTIVES:
        raise InputError(f"Unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}.")
    others = [example for example in examples.items if example.kind != "choices"]
    if encoder and objective == "lm":
        raise InputError("An encoder cannot learn objective lm. Use a causal model, or auto.")
    if objective == "class" and not encoder:
        raise InputError("Objective class needs an encoder. For a causal model use choice.")
    no_choices = len(others) == len(examples.items)
    if not encoder and (objective == "lm" or (objective == "auto" and no_choices)):
        return "lm"
    if others:
        asked = "An encoder" if encoder else f"Objective {objective}"
        raise InputError(
            f"{asked} needs rows of prompt, choices and answer; {examples.source} has "
            f"{len(others)} others among {len(examples.items)}, the first at {examples.unit} "
            f"{others[0].line} ({others[0].kind}). "
            + ("Remove them." if encoder else "Remove them, or use --objective lm.")
        )
    return "class" if encoder else "choice"


def _target(example: Example) -> tuple[str, ...]:
    """What follows the (possibly empty) prompt under objective lm."""
    if example.kind == "choices":
        return (example.choices[example.answer],)
    return () if example.kind == "messages" else (example.completion or example.text,)


def _classes(example: Example) -> tuple[str, ...]:
    return tuple(choice.strip() for choice in example.choices)


class _Encoding:
    """A tokenizer and a length, and what became of the examples."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.n_truncated = self.n_split = 0
        # What the tokenizer puts around a text, seen on one; so left truncation can spare it.
        (body,) = self.ids(["a"])
        whole = list(tokenizer("a")["input_ids"])
        at = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
        self.head, self.tail = whole[:at], whole[at + len(body) :]
        self.eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.ends = set(self.eos)
        self.added = set(tokenizer.get_added_vocab().values())

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer.is_fast:
            # Without the offsets that nobody asks for: half the time.
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            made = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in made]
        # verbose=False: no warning about rows beyond the model's length, since they are cut here.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def tokenised(
        self, examples: Sequence[Example], continuations: Callable[[Example], Sequence[str]]
    ) -> Iterator[tuple[Example, list[int], list[list[int]]]]:
        """Each example with the ids of its prompt, and of the prompt with each continuation."""
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            texts = [[e.prompt, *(e.prompt + c for c in continuations(e))] for e in chunk]
            ids = iter(self.ids([text for group in texts for text in group]))
            for example, group in zip(chunk, texts, strict=True):
                yield example, next(ids), [next(ids) for _ in group[1:]]

    # --- one example each ------------------------------------------------------------------------

    def lm(
        self, example: Example, prompt: list[int], joint: list[list[int]]
    ) -> list[EncodedExample]:
        rows = self.lm_rows(example, prompt, joint)
        if example.kind == "text":
            ((_, ids, _),) = rows
            return self._windows(example, ids)
        what = "an assistant turn" if example.kind == "messages" else "the completion"
        return [self._fitted(example, what, [row]) for row in rows]

    def lm_rows(self, example: Example, prompt: list[int], joint: list[list[int]]) -> list[_Row]:
        """As long as they are, each up to the end of a completion, a text or an assistant turn."""
        if example.kind == "messages":
            rendered = render(self.tokenizer, example.messages, example.tools)
            return [self._chat(conversation) for conversation in rendered]
        (ids,) = joint
        ended = self.head + ids + (self.eos if ids[-1:] != self.eos else [])
        begin = len(self.head) + shared(prompt, ids)
        return [(len(self.head), ended, [NO_LOSS] * begin + ended[begin:])]

    def choice(
        self, example: Example, prompt: list[int], joint: list[list[int]]
    ) -> list[EncodedExample]:
        if len(set(map(tuple, joint))) < len(joint):
            raise UnusableRow("some choices are the same tokens to this tokenizer")
        # Sorted, what begins another stands right before one that it begins.
        nested = any(long[: len(short)] == short for short, long in pairwise(sorted(joint)))
        end = self.eos if nested else []
        rows = []
        for ids in joint:
            begin = shared(prompt, ids)
            labels = [NO_LOSS] * (len(self.head) + begin) + ids[begin:] + end
            rows.append((len(self.head), self.head + ids + end, labels))
        return [self._fitted(example, "the longest choice", rows)]

    def classify(
        self,
        examples: Examples,
        classes: tuple[str, ...],
        example: Example,
        prompt: list[int],
        joint: list[list[int]],
    ) -> list[EncodedExample]:
        first = examples.items[0]
        if _classes(example) != (classes or _classes(first)):
            whose = "the model's classes" if classes else f"those of {examples.unit} {first.line}"
            raise UnusableRow(
                f"choices {list(example.choices)} are not {whose}, "
                f"{list(classes or first.choices)}; an encoder needs the same classes, in the same "
                f"order, everywhere"
            )
        room = self.max_length - len(self.head) - len(self.tail)
        if room < 1:
            raise UnusableRow(f"--max-length {self.max_length} leaves no room for the prompt")
        self.n_truncated += len(prompt) > room
        ids = self.head + prompt[:room] + self.tail
        return [EncodedExample(example.line, (_array(ids),), answer=example.answer)]

    def _windows(self, example: Example, ids: list[int]) -> list[EncodedExample]:
        if len(ids) < 2:
            raise UnusableRow("the text is a single token: nothing can be predicted")
        starts = range(0, len(ids) - 1, self.max_length - 1)
        self.n_split += len(starts) > 1
        windows = [_array(ids[start : start + self.max_length]) for start in starts]
        return [EncodedExample(example.line, (w,), (_predicted(w),)) for w in windows]

    def _chat(self, rendered: Rendered) -> _Row:
        text = rendered.text
        edges = [text[:edge] for span in rendered.spans for edge in span]
        ids, mark, *parts = self.ids([text, rendered.mark, *edges])
        # Of a mark in plain words no token ends an answer: each may stand in one.
        self.ends.update([token for token in mark if token in self.added][:1])
        labels = [NO_LOSS] * len(ids)
        for before, through in zip(parts[::2], parts[1::2], strict=True):
            turn = slice(shared(before, ids), shared(through, ids))
            labels[turn] = ids[turn]
        if not rendered.mark:
            ids, labels = ids + self.eos, labels + self.eos
        # Templates write the BOS themselves.
        return len(self.head) if ids[: len(self.head)] == self.head else 0, ids, labels

    def _fitted(self, example: Example, what: str, rows: list[_Row]) -> EncodedExample:
        """Cuts rows, which end in labelled tokens, from the left to `max_length`.

        They are cut behind the head, all by the same number, so that choices keep one context. The
        last labelled run must stay whole, behind at least one token that predicts it.
        """
        excess = max(max(len(ids) for _, ids, _ in rows) - self.max_length, 0)
        if excess:
            spare = min(_run_start(labels) - max(head, 1) for head, _, labels in rows)
            if spare < excess:
                raise UnusableRow(
                    f"{what} does not fit: it needs --max-length {self.max_length + excess - spare}"
                    f", and that is {self.max_length}"
                )
            self.n_truncated += 1
            rows = [
                (head, *(part[:head] + part[head + excess :] for part in (ids, labels)))
                for head, ids, labels in rows
            ]
        arrays = [(_array(ids), _predicted(_array(labels))) for _, ids, labels in rows]
        if any((labels == NO_LOSS).all() for _, labels in arrays):
            raise UnusableRow(f"{what} gives no token that can be predicted")
        ids, labels = zip(*arrays, strict=True)
        return EncodedExample(example.line, ids, labels, example.answer)


def _run_start(labels: Sequence[int]) -> int:
    """Where the run of labelled tokens at the end begins."""
    return next((i + 1 for i in reversed(range(len(labels))) if labels[i] == NO_LOSS), 0)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _predicted(labels: np.ndarray) -> np.ndarray:
    """The labels without the first: no token precedes it to predict it."""
    labels = labels.copy()
    labels[0] = NO_LOSS
    return labels


def _single_tokens(items: list[EncodedExample]) -> list[EncodedExample]:
    """The one-row form, if every choice of every example is one token behind the same context."""

    def single(item: EncodedExample) -> bool:
        return all(
            (labels != NO_LOSS).sum() == 1 and np.array_equal(row[:-1], item.rows[0][:-1])
            for row, labels in zip(item.rows, item.labels, strict=True)
        )

    if not all(map(single, items)):
        return items
    return [
        EncodedExample(
            line=item.line,
            rows=(item.rows[0][:-1],),
            answer=item.answer,
            choice_ids=tuple(int(row[-1]) for row in item.rows),
        )
        for item in items
    ]
