"""Data, from files to batches: one door to the stages.

`sources.py` reads rows, `examples.py` makes examples of them, `encoding.py` (with `chat.py`) tokens
and labels, `batches.py` tensors.

Example:
    >>> examples = read_examples("train.jsonl")  # doctest: +SKIP
    >>> encoded = encode(examples, tokenizer, max_length=256)  # doctest: +SKIP
    >>> batches = Batches(encoded, 8, seed=0, pad_id=pad_id(tokenizer))  # doctest: +SKIP
    >>> batches[1000].input_ids.shape  # doctest: +SKIP
    torch.Size([8, 143])
"""

from __future__ import annotations

from tinyft.batches import Batch, Batches, collate
from tinyft.encoding import (
    Encoded,
    EncodedExample,
    encode,
    encode_held_out,
    pad_id,
    questions,
)
from tinyft.examples import FORMATS, BadRow, Example, Examples, read_examples

__all__ = [
    "FORMATS",
    "BadRow",
    "Batch",
    "Batches",
    "Encoded",
    "EncodedExample",
    "Example",
    "Examples",
    "collate",
    "encode",
    "encode_held_out",
    "pad_id",
    "questions",
    "read_examples",
]
