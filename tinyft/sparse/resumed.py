"""Forward passes that begin at a layer, for many that differ only from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any

from torch import nn

from tinyft.activations import blocks_of


class Resumed:
    """Meanwhile, passes of a model skip its first blocks: what came out of them is used again.

    A context manager. `advance(layer, run)` skips the blocks before `layer` from then on, where
    `run()` is a pass as those blocks have it, on the batch of all passes that follow.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = list(blocks_of(model))
        self._own = [block.__dict__.get("forward") for block in self._blocks]
        self._done = 0

    def __enter__(self) -> Resumed:
        return self

    def __exit__(self, *exception: Any) -> None:
        for block, own in zip(self._blocks, self._own, strict=True):
            block.__dict__.pop("forward", None)
            if own is not None:
                block.forward = own

    def advance(self, layer: int, run: Callable[[], Any]) -> None:
        """In place; layers must not fall from one call to the next."""
        if layer <= self._done or layer > len(self._blocks):
            return
        last, outputs = self._blocks[layer - 1], []
        hook = last.register_forward_hook(lambda module, args, out: outputs.append(out))
        try:
            run()
        finally:
            hook.remove()
        if not outputs:
            return
        # A pass may run the model several times: each time it gets that time's output.
        turn: Iterator[Any] = chain.from_iterable(repeat(outputs))
        for block in self._blocks[: layer - 1]:
            block.forward = lambda *args, **kwargs: outputs[0]
        last.forward = lambda *args, **kwargs: next(turn)
        self._done = layer
