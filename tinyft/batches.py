"""Encoded examples to batches of tensors, in an order that depends on nothing but seed and step.

Padding is avoided by grouping: an epoch's shuffled examples are cut into groups of some fifty
batches, each group is sorted by length and cut into batches, and the batches are shuffled. The
first batch of a run is its largest, so that what does not fit fails at once and not after an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tinyft.encoding import NO_LOSS, Encoded, EncodedExample
from tinyft.errors import InputError

_GROUP = 50  # batches sorted together: long enough for equal lengths, short enough to stay random


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples as R rows of T tokens, padded on the right. Tensors are int64 unless said.

    R = B, but for choices of several tokens R = B * C, example by example; an example with fewer
    than C choices repeats its choice 0 there, masked. `repeat` multiplies every first dimension.

    Attributes:
        input_ids: (R, T).
        attention_mask: (R, T), 1 on tokens, 0 on padding.
        labels: (R, T), aligned with `input_ids` (not shifted), -100 where there is no loss.
        answers: (B,), the right choice or class.
        choice_ids: (B, C), the token of each choice, where each is a single one.
        choice_mask: (B, C), bool, False where an example has fewer than C choices.
        tokens_per_example: labelled tokens of the optimizer's step over its examples (1 without
            labels). A sum of token losses divided by it has, as its mean over the step's examples,
            the mean over the step's tokens; so it stays the same in the parts of `split`.
        copies: how often the examples are repeated.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None
    answers: Tensor | None = None
    choice_ids: Tensor | None = None
    choice_mask: Tensor | None = None
    tokens_per_example: float = 1.0
    copies: int = 1

    @property
    def size(self) -> int:
        """B, the examples, each copy counted once."""
        return len(self.input_ids if self.answers is None else self.answers) // self.copies

    @property
    def sizes(self) -> tuple[int, ...]:
        """(1, R, T, R T, R T^2, labelled tokens): the FLOPs of passes over a batch are linear in
        these. (A product goes over tokens, attention over pairs of them in a row, a head over what
        is labelled or over rows, and a table of positions is made once.)"""
        (rows, length), labels = self.input_ids.shape, self.labels
        labelled = 0 if labels is None else int((labels != NO_LOSS).sum())
        return 1, rows, length, rows * length, rows * length**2, labelled

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def repeat(self, n: int) -> Batch:
        """All rows, then all rows again, ... : `n` times."""
        repeated = self._map(lambda tensor: tensor.repeat(n, *[1] * (tensor.dim() - 1)))
        return replace(repeated, copies=self.copies * n)

    def split(self, n_parts: int) -> list[Batch]:
        """At most `n_parts` batches of consecutive examples, as equal in size as can be, each with
        the padding that all its rows share cut off."""
        bounds = np.linspace(0, self.size, min(n_parts, self.size) + 1).round().astype(int)
        return [self.examples(*pair) for pair in pairwise(bounds)]

    def examples(self, begin: int, end: int) -> Batch:
        """Those from `begin` to before `end`, of every copy, without the padding of all."""

        def rows(tensor: Tensor) -> Tensor:
            by_example = tensor.unflatten(0, (self.copies, self.size, -1))
            return by_example[:, begin:end].flatten(0, 2)

        chosen = self._map(rows)
        width = int(chosen.attention_mask.sum(1).max())
        narrow = {
            name: getattr(chosen, name)[:, :width]
            for name in ("input_ids", "attention_mask", "labels")
            if getattr(chosen, name) is not None
        }
        return replace(chosen, **narrow)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def collate(items: Sequence[EncodedExample], pad_id: int) -> Batch:
    """One batch of `items`, all of the same kind, in their order."""
    n_choices = max(len(item.choice_ids) or len(item.rows) for item in items)
    compared = items[0].answer >= 0 and n_choices > 1
    # Several rows an example: pad the choices, too.
    fill = 0 if items[0].choice_ids else n_choices
    rows = [row for item in items for row in _padded(item.rows, fill)]
    labels = [row for item in items for row in _padded(item.labels, fill)]
    batch = Batch(
        input_ids=_stack(rows, pad_id),
        attention_mask=_stack([np.ones_like(row) for row in rows], 0),
        labels=_stack(labels, NO_LOSS) if labels else None,
        answers=torch.tensor([item.answer for item in items]) if items[0].answer >= 0 else None,
    )
    if batch.labels is not None:
        labelled = int((batch.labels != NO_LOSS).sum())
        batch = replace(batch, tokens_per_example=labelled / len(items))
    if compared:
        counts = torch.tensor([[len(item.choice_ids) or len(item.rows)] for item in items])
        batch = replace(batch, choice_mask=torch.arange(n_choices) < counts)
    if items[0].choice_ids:
        ids = [_padded(item.choice_ids, n_choices) for item in items]
        batch = replace(batch, choice_ids=torch.tensor(ids))
    return batch


class Batches:
    """Endless epochs of batches: `batches[step]` is a pure function of `seed` and `step`.

    So a run resumes from its step number alone. `len` is the batches an epoch; iterating goes
    through the first epoch once. Every epoch holds every example once; its last batch may be short.

    Args:
        encoded: from `encode`.
        batch_size: B, examples a batch.
        seed: of the order.
        pad_id: the token of padding.
        shuffle: group by length and shuffle; else keep the order of `encoded` in every epoch.

    Example:
        >>> ids = np.arange(3, dtype=np.int32)
        >>> encoded = Encoded([EncodedExample(line=1, rows=(ids,), labels=(ids,))], kind="lm")
        >>> Batches(encoded, 1, seed=0, pad_id=0)[7].input_ids
        tensor([[0, 1, 2]])
    """

    def __init__(
        self, encoded: Encoded, batch_size: int, *, seed: int, pad_id: int, shuffle: bool = True
    ) -> None:
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size} holds no example; give at least 1.")
        if seed < 0:
            raise InputError(f"--seed {seed} is negative; give 0 or more.")
        self.items, self.batch_size, self.pad_id = encoded.items, batch_size, pad_id
        self.seed, self.shuffle = seed, shuffle
        self._lengths = np.array([item.length for item in self.items])
        self._n_rows = np.array([len(item.rows) for item in self.items])
        self._epoch, self._plan = 0, self._planned(0)

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step {step}: steps count from 0")
        epoch, index = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._planned(epoch)
        return collate([self.items[i] for i in self._plan[index]], self.pad_id)

    @cached_property
    def padding_share(self) -> float:
        """Padding over all tokens of the first epoch's batches."""
        tokens = sum(len(row) for item in self.items for row in item.rows)
        return 1 - tokens / sum(map(self._size, self._planned(0)))

    def _size(self, batch: np.ndarray) -> int:
        """R * T of the batch of these examples."""
        return int(len(batch) * self._n_rows[batch].max() * self._lengths[batch].max())

    def _planned(self, epoch: int) -> list[np.ndarray]:
        """Indices of the examples of each batch of an epoch."""
        n, cut = len(self.items), range(self.batch_size, len(self.items), self.batch_size)
        if not self.shuffle:
            return np.split(np.arange(n), cut)
        # MT19937 under RandomState: the stream that NumPy promises never to change.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        rng = np.random.RandomState(bits)
        order = rng.permutation(n)
        # The last group takes the remainder, so that the short batch, cut from a group's end, holds
        # short examples; the longest is in a full batch, and batch 0 bounds all epochs.
        grouped = _GROUP * self.batch_size
        group = np.minimum(np.arange(n) // grouped, max(n // grouped - 1, 0))
        batches = np.split(order[np.lexsort((-self._lengths[order], group))], cut)
        batches = [batches[i] for i in rng.permutation(len(batches))]
        if epoch == 0:
            largest = max(range(len(batches)), key=lambda i: self._size(batches[i]))
            batches[0], batches[largest] = batches[largest], batches[0]
        return batches


def _padded(values: tuple, n: int) -> tuple:
    """`values` filled up to `n` with the first of them."""
    return values + values[:1] * (n - len(values))


def _stack(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    """Rows (T_i,) as one int64 (R, max T_i), filled on the right."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(out)
