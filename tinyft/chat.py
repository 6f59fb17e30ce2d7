"""Which characters of a rendered conversation the assistant wrote.

Chat templates are programs: nothing in their output says which part is whose. So each assistant
turn is found from outside, with no help of `{% generation %}` marks, which few templates have:
render the conversation with the turn, with other content in it, and before it with the generation
prompt; what differs is the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinyft.examples import UnusableRow

Messages = tuple[dict[str, Any], ...]

_PROBE = "\ue000"  # a private-use character: differs from whatever a turn begins or ends with


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation, up to the end of its last assistant turn.

    Attributes:
        text: as the template writes it.
        spans: (begin, end) of each assistant turn that is to be learnt, in characters: from the
            end of the generation prompt to the end of the mark that closes the turn.
        mark: what the template closes the last turn with; without one, "", it wants an EOS.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    mark: str


def render(
    tokenizer: Any, messages: Messages, tools: tuple[dict[str, Any], ...] = ()
) -> list[Rendered]:
    """Renders a conversation, with the tools it may call: once, or once for each assistant turn.

    The latter for a template that writes an earlier turn in another way once others follow (Qwen3
    drops its reasoning): each turn is then learnt in the context that the model will see in use.

    Raises:
        UnusableRow: the template refuses the conversation (its own words are in the message), or
            writes none of a turn's tool calls.
    """
    from jinja2 import TemplateError

    def apply(part: Messages, generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            list(part),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )

    try:
        turns = [
            _turn(apply, messages[: i + 1], TemplateError)
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    except (TemplateError, TypeError, ValueError) as error:
        raise UnusableRow(f"the chat template refuses the conversation: {error}") from error
    last = turns[-1]
    if all(last.text.startswith(turn.text) for turn in turns):
        return [Rendered(last.text, tuple(turn.spans[0] for turn in turns), last.mark)]
    return turns


def _turn(
    apply: Callable[..., str], messages: Messages, template_error: type[Exception]
) -> Rendered:
    """A conversation that ends in an assistant turn, with that turn's span alone."""
    text = apply(messages)
    probed = {**messages[-1], "content": _PROBE}
    # Without tool calls, which templates write behind the content or instead of it.
    calls = probed.pop("tool_calls", None)
    probe = apply((*messages[:-1], probed))
    if calls and apply((*messages[:-1], {**probed, "tool_calls": calls})) == probe:
        raise ValueError("it leaves out tool calls")
    begin = shared(text, probe)
    after = text[len(text) - shared(text[begin:][::-1], probe[begin:][::-1]) :]
    if len(messages) > 1:
        # The model is given the generation prompt in use, and has to write what a template puts
        # between it and the content: a space, an empty <think> block.
        try:
            prompt = apply(messages[:-1], generation_prompt=True)
        except template_error:
            prompt = text  # some templates render no conversation that stops here
        if prompt != text and text.startswith(prompt):
            begin = len(prompt)
    # White space behind an end mark is never generated; without a mark, it is the mark.
    mark = after.strip()
    end = len(text.rstrip()) if mark else len(text)
    return Rendered(text[:end], ((begin, end),), mark)


def shared(a: Sequence, b: Sequence) -> int:
    """Length of the common prefix of two strings or lists."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
