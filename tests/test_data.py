"""Reading, encoding and batching, against the libraries' own answers and brute force."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tinyft.data import (
    BadRow,
    Batches,
    Encoded,
    EncodedExample,
    Example,
    Examples,
    collate,
    encode,
    pad_id,
    questions,
    read_examples,
)
from tinyft.errors import InputError

COMPLETION = {"prompt": "The capital of France is", "completion": " Paris"}
CHOICES = {"prompt": "The film was", "choices": [" terrible", " great"], "answer": 1}
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Is the film great?"},
    {"role": "assistant", "content": "im_end"},  # part of the end mark's own text
    {"role": "user", "content": "  the actors?\n"},
    {"role": "assistant", "content": "Yes,\n\nthe actors were great. "},
]
CALLING = {
    "messages": [
        {"role": "user", "content": "Is the film great?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "film", "arguments": "it"}}]},
        {"role": "tool", "content": "great"},
        {"role": "assistant", "content": "yes"},
    ],
    "tools": [{"type": "function", "function": {"name": "film", "description": "how a film was"}}],
}


def write(path, rows):
    """`rows` in the type that the name of `path` says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            for row in rows:
                cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                writer.writerow(cells)
    return path


def labelled_text(tokenizer, item, row=0):
    """The text that a row's loss falls on."""
    ids, labels = item.rows[row], item.labels[row]
    assert ((labels == ids) | (labels == -100)).all()
    return tokenizer.decode(ids[labels != -100])


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (COMPLETION, Example(1, "completion", prompt=COMPLETION["prompt"], completion=" Paris")),
        (
            CHOICES,
            Example(1, "choices", prompt="The film was", choices=(" terrible", " great"), answer=1),
        ),
        (
            {"text": 'Two lines,\n"quoted"\u2028é'},
            Example(1, "text", text='Two lines,\n"quoted"\u2028é'),
        ),
        ({"messages": MESSAGES}, Example(1, "messages", messages=tuple(MESSAGES))),
        (
            CALLING,
            Example(
                1,
                "messages",
                messages=tuple(CALLING["messages"]),
                tools=tuple(CALLING["tools"]),
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Yes?"},
                    {"from": "gpt", "value": "No."},
                ],
                "id": "7",
            },
            Example(
                1,
                "messages",
                messages=(
                    {"role": "user", "content": "Yes?"},
                    {"role": "assistant", "content": "No."},
                ),
            ),
        ),
    ],
    ids=["completion", "choices", "text", "messages", "tools", "sharegpt"],
)
def test_every_format_in_every_file_type(tmp_path, suffix, row, expected):
    examples = read_examples(write(tmp_path / f"data{suffix}", [row, row]))
    first, second = examples.items
    assert examples.bad == []
    assert Example(**{**vars(first), "line": 1}) == expected
    assert Example(**{**vars(second), "line": 1}) == expected
    if suffix == ".csv":  # physical lines, below the header
        assert (first.line, second.line) == ((2, 4) if expected.kind == "text" else (2, 3))
    else:
        assert (first.line, second.line) == (1, 2)


def test_alpaca_rows_get_the_published_prompt(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 {x}", "output": "2", "text": "rendered"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
    ]
    with_input, without = read_examples(write(tmp_path / "a.json", rows)).items
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 {x}\n\n### Response:\n"
    )
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    )
    assert (with_input.kind, with_input.completion) == ("completion", "2")


def test_sharegpt_keeps_the_system_prompt_and_the_tools(tmp_path):
    row = {"system": "Be brief.", "conversations": [{"from": "gpt", "value": "Yes."}]}
    tools = ({"tools": json.dumps(CALLING["tools"])}, {"tools": "[]"}, {"tools": ""}, {})
    given = [{**row, **some} for some in tools]
    first, *others = read_examples(write(tmp_path / "a.jsonl", given)).items
    assert [m["role"] for m in first.messages] == ["system", "assistant"]
    assert first.tools == tuple(CALLING["tools"])
    assert [example.tools for example in others] == [(), (), ()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "completion" "b"}', "is not JSON"),
        ("[1, 2]", "is a list"),
        ("{}", "found fields (none)"),
        ('{"question": "a", "label": 1}', "found fields question, label; expected messages | "),
        ('{"prompt": "a", "choices": ["b", "c"]}', "prompt+choices+answer"),
        ('{"prompt": "a", "completion": null}', "found fields prompt;"),
        ('{"prompt": "a", "completion": " \\n"}', "completion is empty"),
        ('{"prompt": 3, "completion": "b"}', "prompt is 3, not text"),
        ('{"text": ""}', "text is empty"),
        ('{"text": "\\ud83d"}', "surrogate"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is out of range"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": -1}', "answer -1 is out of range"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": "c"}', "must be the index"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "must be the index"),
        ('{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "two or more different"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "choice 1 is empty"),
        ('{"prompt": "a", "choices": "b|c", "answer": 0}', "choices is not a JSON list"),
        ('{"messages": []}', "not a non-empty list"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "message 1 (assistant) is empty"),
        ('{"messages": [{"role": "assistant"}]}', "message 1 (assistant) is None"),
        ('{"messages": [{"role": "user", "tool_calls": [1]}]}', "message 1 (user) is None"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": "film"}',
            "tools is not a JSON list",
        ),
        ('{"conversations": [{"from": "me", "value": "a"}]}', "from 'me'"),
        ("1" * 5000, "is not usable JSON"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_text(f"\ufeff{json.dumps(COMPLETION)}\n\n{line}\n{json.dumps(COMPLETION)}", "utf-8")
    with pytest.raises(InputError, match="1 of 3 rows") as error:
        read_examples(path)
    assert "line 3: " in str(error.value) and reason in str(error.value)
    assert "--skip-bad-rows" in str(error.value)

    examples = read_examples(path, skip_bad_rows=True)
    assert [item.line for item in examples.items] == [1, 4]
    assert [bad.line for bad in examples.bad] == [3] and reason in examples.bad[0].reason


def test_all_problems_at_once_up_to_twenty(tmp_path):
    rows = [COMPLETION] + [{"text": ""}] * 25
    with pytest.raises(InputError) as error:
        read_examples(write(tmp_path / "a.jsonl", rows))
    message = str(error.value)
    assert "25 of 26" in message and "... and 5 more" in message
    assert "line 21:" in message and "line 22:" not in message
    with pytest.raises(InputError, match="No usable row is left"):
        read_examples(write(tmp_path / "a.jsonl", rows[1:]), skip_bad_rows=True)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')
    assert read_examples(tmp_path / "a.jsonl", skip_bad_rows=True).bad == [
        BadRow(2, "is not UTF-8 at byte 10")
    ]


def test_csv_rows_that_do_not_parse_are_named_and_swallow_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\na,b\na,b,c\n"x"y,b\na,"b\nb"\na,b\n"a,b\na,b\n')
    examples = read_examples(path, skip_bad_rows=True)
    assert [item.line for item in examples.items] == [2, 5, 7]
    assert [bad.line for bad in examples.bad] == [3, 4, 8]  # 8: a quote that is never closed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("missing/a/b", None, "does not exist"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n \n", "holds no rows"),
        ("head.csv", "prompt,completion\n", "holds no rows"),
        ("none.json", "[]", "holds no rows"),
        ("broken.json", '[{"text": "a"},\n {"text" "b"}]', "line 2, column 10"),
        ("latin.csv", b"text\n\xe9\n", "not UTF-8 at byte 5"),
        ("words.txt", "words", ".jsonl, .json, .csv, .parquet"),
        ("fake.parquet", "PAR1 not", "not a readable parquet file"),
        ("folder.jsonl", "folder", "is a folder"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert message in str(error.value) and name.rpartition("/")[2] in str(error.value)


def test_json_lines_under_the_name_json(tmp_path):
    write(tmp_path / "a.jsonl", [COMPLETION] * 2).rename(tmp_path / "a.json")
    assert len(read_examples(tmp_path / "a.json").items) == 2


def test_a_format_may_be_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**COMPLETION, "text": "all of it"}])
    assert read_examples(path).items[0].kind == "completion"
    assert read_examples(path, fmt="text").items[0] == Example(1, "text", text="all of it")
    with pytest.raises(InputError, match="expected prompt\\+choices\\+answer"):
        read_examples(path, fmt="choices")
    with pytest.raises(InputError, match="the formats are messages, sharegpt"):
        read_examples(path, fmt="csv")


def test_hub_ids(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'tinyft\[hub\]'"):
        read_examples("owner/name")

    def load_dataset(name, split):
        if name != "owner/name":
            raise FileNotFoundError(f"no {name}.")
        return [{**COMPLETION, "split": split, "text": None}] * (3 if split == "train" else 2)

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [item.line for item in read_examples("owner/name").items] == [1, 2, 3]
    assert len(read_examples("owner/name:validation").items) == 2
    with pytest.raises(InputError, match=r"no other/name\..* or give a file"):
        read_examples("other/name")


# --- encoding ------------------------------------------------------------------------------------


def with_specials(tokenizer, single):
    """A copy that puts special tokens around a text, as Llama or BERT do."""
    tokenizer = copy.deepcopy(tokenizer)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[(m, tokenizer.convert_tokens_to_ids(m)) for m in marks]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The capital of France is", " Paris"),
        ("Answer: ", "yes"),  # " yes" is one token, so it spans the seam
        ("Answer:\n", "Paris\n\n"),
        ("", "A great film."),
        ("ré", "ë\U0001f600"),
    ],
)
def test_the_loss_falls_on_the_completion_and_eos(tiny_tokenizer, prompt, completion):
    example = Example(1, "completion", prompt=prompt, completion=completion)
    (item,) = encode(Examples([example]), tiny_tokenizer, max_length=64).items
    oracle = tiny_tokenizer(prompt + completion, return_offsets_mapping=True)
    assert item.rows[0].tolist() == [*oracle["input_ids"], tiny_tokenizer.eos_token_id]
    carries = [end > len(prompt) for _, end in oracle["offset_mapping"]] + [True]
    carries[0] = False
    assert (item.labels[0] != -100).tolist() == carries


def test_eos_is_not_doubled_and_may_be_missing(tiny_tokenizer):
    twice = Example(1, "completion", prompt="The", completion=" film<|im_end|>")
    (item,) = encode(Examples([twice]), tiny_tokenizer, max_length=64).items
    assert labelled_text(tiny_tokenizer, item) == " film<|im_end|>"

    bare = copy.deepcopy(tiny_tokenizer)
    bare.eos_token = bare.pad_token = None
    once = Example(1, "completion", prompt="The", completion=" film")
    (item,) = encode(Examples([once]), bare, max_length=64).items
    assert labelled_text(bare, item) == " film"
    assert (pad_id(bare), pad_id(tiny_tokenizer)) == (0, tiny_tokenizer.eos_token_id)
    single = Example(3, "text", text=" film")
    with pytest.raises(InputError, match="line 3: the text is a single token"):
        encode(Examples([single]), bare, max_length=64)


@pytest.mark.parametrize("bos", [False, True])
def test_truncation_takes_the_prompt_from_the_left_and_spares_bos(tiny_tokenizer, bos):
    tokenizer = with_specials(tiny_tokenizer, "<|im_start|> $A") if bos else tiny_tokenizer
    example = Example(
        9, "completion", prompt="The film was great and the actors", completion=" were great."
    )
    (whole,) = encode(Examples([example]), tokenizer, max_length=999).items
    ids, labels = whole.rows[0].tolist(), whole.labels[0].tolist()
    n_target = sum(label != -100 for label in labels)
    for max_length in range(2, len(ids) + 2):
        if max_length <= n_target:
            with pytest.raises(
                InputError, match=f"line 9: the completion .* --max-length {n_target + 1}"
            ):
                encode(Examples([example]), tokenizer, max_length=max_length)
            continue
        encoded = encode(Examples([example]), tokenizer, max_length=max_length)
        (item,) = encoded.items
        excess = max(len(ids) - max_length, 0)
        assert encoded.n_truncated == (excess > 0)
        assert item.rows[0].tolist() == ids[:bos] + ids[bos + excess :]
        assert item.labels[0].tolist() == labels[:bos] + labels[bos + excess :]


@pytest.mark.parametrize("max_length", [2, 3, 7, 64])
def test_long_texts_are_cut_into_windows_that_predict_every_token_once(tiny_tokenizer, max_length):
    text = "It was a terrible film, a bore from the start."
    encoded = encode(
        Examples([Example(1, "text", text=text)]), tiny_tokenizer, max_length=max_length
    )
    whole = [*tiny_tokenizer.encode(text), tiny_tokenizer.eos_token_id]
    predicted = [int(x) for item in encoded.items for x in item.labels[0] if x != -100]
    assert predicted == whole[1:]
    assert all(len(item.rows[0]) <= max_length for item in encoded.items)
    assert (encoded.n_split, encoded.n_truncated) == (len(whole) > max_length, 0)
    assert encoded.n_tokens == len(whole) + len(encoded.items) - 1


GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
MISTRAL = (  # no generation prompt, content trimmed, BOS written by the template
    "<|endoftext|>{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}[INST] {{ message['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "first"),
    [(GENERATION, 0), (GENERATION, 1), (GENERATION, 2), (MISTRAL, 0), (MISTRAL, 1)],
    ids=["chatml-system", "chatml-user", "chatml-assistant", "mistral-system", "mistral-user"],
)
@pytest.mark.parametrize("trailing", [False, True])
def test_assistant_spans_are_those_that_generation_marks_give(
    tiny_tokenizer, template, first, trailing
):
    messages = MESSAGES[first:] + [{"role": "user", "content": "thanks"}] * trailing
    marked = copy.deepcopy(tiny_tokenizer)
    marked.chat_template = template
    oracle = marked.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    if template is MISTRAL:
        tokenizer = with_specials(marked, "<|endoftext|> $A")
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = template.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
    else:
        tokenizer = tiny_tokenizer
    example = Example(1, "messages", messages=tuple(messages))
    (item,) = encode(Examples([example]), tokenizer, max_length=999).items

    mask = oracle["assistant_masks"]
    end = len(mask) - mask[::-1].index(1)  # what follows the last turn teaches nothing
    assert item.rows[0].tolist() == oracle["input_ids"][:end]
    assert (item.labels[0] != -100).tolist() == [bool(m) for m in mask[:end]]


def test_a_template_that_rewrites_earlier_turns_gives_a_row_a_turn(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (  # as Qwen3: only the last turn shows its thoughts
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    example = Example(1, "messages", messages=tuple(MESSAGES))
    items = encode(Examples([example]), tokenizer, max_length=999).items
    for item, turn in zip(items, (2, 4), strict=True):
        prompt = tokenizer.apply_chat_template(MESSAGES[:turn], add_generation_prompt=True)
        prompt = prompt["input_ids"]
        assert item.rows[0][: len(prompt)].tolist() == prompt
        assert (item.labels[0][: len(prompt)] == -100).all()
        reply = f"<think>\n\n</think>\n\n{MESSAGES[turn]['content']}<|im_end|>"
        assert labelled_text(tokenizer, item) == reply


_CALLS = "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}"


@pytest.mark.parametrize(
    ("turn", "content"),
    [
        ("{{ message.content or '' }}" + _CALLS, None),
        ("{{ message.content or '' }}" + _CALLS, "no"),
        (_CALLS + "{% if not message.tool_calls %}{{ message.content }}{% endif %}", None),
    ],
    ids=["qwen", "content", "llama"],
)
def test_tool_calls_are_learnt_with_the_tools_in_sight(tiny_tokenizer, turn, content):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}"
        "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
        + turn
        + "<|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    user, call, result, reply = CALLING["messages"]
    call = call if content is None else {**call, "content": content}
    chat = Example(
        1, "messages", messages=(user, call, result, reply), tools=tuple(CALLING["tools"])
    )
    (item,) = encode(Examples([chat]), tokenizer, max_length=999).items
    before = (
        f"<tool>{json.dumps(CALLING['tools'][0])}</tool><|im_start|>user\nIs the film great?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    written = (content or "") + '<call>{"name": "film", "arguments": "it"}</call><|im_end|>'
    after = "\n<|im_start|>tool\ngreat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(item.rows[0]) == f"{before}{written}{after}yes<|im_end|>"
    assert labelled_text(tokenizer, item) == f"{written}yes<|im_end|>"

    asked = Example(1, "messages", messages=(user, call), tools=chat.tools)
    ((prompt, answer),), _ = questions(Examples([asked]), tokenizer)
    assert (tokenizer.decode(prompt), tokenizer.decode(answer)) == (before, written)


def test_a_template_that_leaves_out_tool_calls_is_refused(tiny_tokenizer):
    user, call, *_ = CALLING["messages"]
    chat = Example(3, "messages", messages=(user, {**call, "content": ""}))
    with pytest.raises(InputError, match=r"line 3: the chat template .*: it leaves out tool calls"):
        encode(Examples([chat]), tiny_tokenizer, max_length=99)


def test_a_template_without_end_marks_gets_eos(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    example = Example(1, "messages", messages=tuple(MESSAGES[1:3]))
    (item,) = encode(Examples([example]), tokenizer, max_length=999).items
    assert labelled_text(tokenizer, item) == " im_end\n<|im_end|>"


def test_conversations_too_long_lose_their_beginning(tiny_tokenizer):
    chat = Example(4, "messages", messages=tuple(MESSAGES))
    (whole,) = encode(Examples([chat]), tiny_tokenizer, max_length=999).items
    encoded = encode(Examples([chat]), tiny_tokenizer, max_length=40)
    assert encoded.n_truncated == 1
    assert encoded.items[0].rows[0].tolist() == whole.rows[0][-40:].tolist()
    with pytest.raises(InputError, match="line 4: an assistant turn does not fit"):
        encode(Examples([chat]), tiny_tokenizer, max_length=5)


def test_what_a_template_refuses_is_a_bad_row(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    good, bad = Example(1, "text", text="a film"), Example(2, "messages", messages=(*MESSAGES,))
    with pytest.raises(InputError, match=r"line 2: the chat template refuses .*must alternate"):
        encode(Examples([good, bad]), tokenizer, max_length=99)
    encoded = encode(Examples([good, bad], skip_bad_rows=True), tokenizer, max_length=99)
    assert [item.line for item in encoded.items] == [1]
    assert [row.line for row in encoded.bad] == [2]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="line 2 is a conversation"):
        encode(Examples([good, bad]), tokenizer, max_length=99)


def choices(line=1, prompt="The film was", options=(" terrible", " great"), answer=1):
    return Example(line, "choices", prompt=prompt, choices=tuple(options), answer=answer)


@pytest.mark.parametrize("prompt", ["The film was", "The film was "])
def test_single_token_choices_share_one_row(tiny_tokenizer, prompt):
    options = [o if prompt == "The film was" else o.strip() for o in (" terrible", " great")]
    encoded = encode(Examples([choices(1, prompt, options)]), tiny_tokenizer, max_length=64)
    (item,) = encoded.items
    assert (encoded.kind, item.answer, item.labels) == ("choice", 1, ())
    assert item.rows[0].tolist() == tiny_tokenizer.encode("The film was")
    assert tiny_tokenizer.convert_ids_to_tokens(item.choice_ids) == ["Ġterrible", "Ġgreat"]


def test_choices_of_several_tokens_are_rows_with_one_context(tiny_tokenizer):
    rows = [choices(1), choices(2, options=(" great", " a bore from the start", " bore"))]
    encoded = encode(Examples(rows), tiny_tokenizer, max_length=64)
    for item, example in zip(encoded.items, rows, strict=True):
        assert item.choice_ids == ()
        for i, choice in enumerate(example.choices):
            assert tiny_tokenizer.decode(item.rows[i]) == example.prompt + choice
            assert labelled_text(tiny_tokenizer, item, i) == choice
    tight = encode(Examples(rows[1:]), tiny_tokenizer, max_length=encoded.items[1].length - 1)
    assert tight.n_truncated == 1
    assert {
        tiny_tokenizer.decode(row[labels == -100])
        for row, labels in zip(tight.items[0].rows, tight.items[0].labels, strict=True)
    } == {" film was"}


def test_choices_end_where_one_begins_another(tiny_tokenizer):
    nested = choices(1, options=(" great", " Paris", " great film"))
    encoded = encode(Examples([nested, choices(2)]), tiny_tokenizer, max_length=64)
    texts = [
        [labelled_text(tiny_tokenizer, item, row) for row in range(len(item.rows))]
        for item in encoded.items
    ]
    ended = [" great<|im_end|>", " Paris<|im_end|>", " great film<|im_end|>"]
    assert texts == [ended, [" terrible", " great"]]
    bare = copy.deepcopy(tiny_tokenizer)
    bare.eos_token = None
    (item,) = encode(Examples([nested]), bare, max_length=64).items
    assert [labelled_text(bare, item, row) for row in range(3)] == list(nested.choices)


def test_objectives(tiny_tokenizer):
    rows, text = Examples([choices()]), Example(8, "text", text="a film")
    (item,) = encode(rows, tiny_tokenizer, max_length=64, objective="lm").items
    assert labelled_text(tiny_tokenizer, item) == " great<|im_end|>"
    for objective in ("choice", "accuracy", "f1"):
        assert encode(rows, tiny_tokenizer, max_length=64, objective=objective).kind == "choice"
    for objective, encoder, message in [
        ("auto", False, "line 8 \\(text\\).*--objective lm"),
        ("accuracy", False, "1 others among 2"),
        ("auto", True, "An encoder needs rows"),
        ("lm", True, "cannot learn objective lm"),
        ("class", False, "needs an encoder"),
        ("rouge", False, "Unknown objective"),
    ]:
        mixed = Examples([choices(), text])
        with pytest.raises(InputError, match=message):
            encode(mixed, tiny_tokenizer, max_length=64, objective=objective, encoder=encoder)
    with pytest.raises(InputError, match="at least 2"):
        encode(rows, tiny_tokenizer, max_length=1)


@pytest.mark.parametrize("max_length", [3, 5, 64])
def test_encoders_classify_the_prompt(tiny_tokenizer, max_length):
    tokenizer = with_specials(tiny_tokenizer, "<|im_start|> $A <|im_end|>")
    rows = [choices(1), choices(2, "A great film", answer=0)]
    encoded = encode(Examples(rows), tokenizer, max_length=max_length, encoder=True)
    assert (encoded.kind, encoded.labels) == ("class", ("terrible", "great"))
    oracle = [
        tokenizer(r.prompt, truncation=True, max_length=max_length)["input_ids"] for r in rows
    ]
    assert [item.rows[0].tolist() for item in encoded.items] == oracle
    assert [item.answer for item in encoded.items] == [1, 0]
    assert encoded.n_truncated == sum(
        len(tokenizer(r.prompt)["input_ids"]) > max_length for r in rows
    )
    other = choices(3, options=("no", "yes"))
    with pytest.raises(InputError, match=r"row 3: choices .* are not those of row 1"):
        encode(Examples([*rows, other], unit="row"), tokenizer, max_length=9, encoder=True)


def test_an_encoders_classes_keep_their_order(tiny_tokenizer):
    def held_out(*classes, **given):
        rows = [choices(options=(" great", " terrible")), choices(2)]
        examples = Examples(rows, **given)
        return encode(examples, tiny_tokenizer, max_length=9, encoder=True, classes=classes)

    with pytest.raises(
        InputError, match=r"1: choices .* not the model's classes, \['terrible', 'gr"
    ):
        held_out("terrible", "great")
    kept = held_out("terrible", "great", skip_bad_rows=True)
    assert [item.line for item in kept.items] == [2]
    assert kept.labels == ("terrible", "great")


# --- batches -------------------------------------------------------------------------------------


def lm_items(lengths):
    """Examples that are told apart by their tokens: example i repeats the token i + 1."""
    rows = [np.full(n, i + 1, dtype=np.int32) for i, n in enumerate(lengths)]
    items = []
    for i, row in enumerate(rows):
        labels = row.copy()
        labels[: 1 + i % 3] = -100
        items.append(EncodedExample(i, (row,), (labels,)))
    return items


@pytest.mark.parametrize("n", [1, 5, 16, 203])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_a_pure_function_of_seed_and_step(n, shuffle):
    lengths = np.random.default_rng(0).integers(4, 40, n)
    encoded = Encoded(lm_items(lengths), "lm")

    def make(seed=3):
        return Batches(encoded, 4, seed=seed, pad_id=0, shuffle=shuffle)

    batches, n_batches = make(), -(-n // 4)
    assert len(batches) == n_batches
    epochs = [
        [batches[epoch * n_batches + i].input_ids for i in range(n_batches)] for epoch in range(3)
    ]
    for epoch in epochs:
        seen = [int(row[0]) - 1 for ids in epoch for row in ids]
        assert sorted(seen) == list(range(n))
        assert shuffle or seen == list(range(n))
    for step in np.random.default_rng(1).permutation(3 * n_batches):
        fresh = make()[int(step)].input_ids
        assert torch.equal(fresh, epochs[step // n_batches][step % n_batches])
    if shuffle and n > 16:  # every epoch and every seed has an order of its own
        epochs.append([batch.input_ids for batch in make(seed=4)])
        assert len({str([ids.tolist() for ids in epoch]) for epoch in epochs}) == 4
    if shuffle:
        assert epochs[0][0].numel() == max(ids.numel() for ids in itertools.chain(*epochs))
    with pytest.raises(IndexError):
        batches[-1]


def test_grouping_avoids_padding():
    lengths = np.random.default_rng(0).integers(4, 100, 2000)
    encoded = Encoded(lm_items(lengths), "lm")
    grouped, plain = (
        Batches(encoded, 8, seed=0, pad_id=0, shuffle=shuffle) for shuffle in (True, False)
    )
    for batches in (grouped, plain):
        masks = [batch.attention_mask for batch in batches]
        padding = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        assert batches.padding_share == pytest.approx(padding)
    assert grouped.padding_share < 0.05 < 0.4 < plain.padding_share


def test_refused_sizes_and_seeds():
    encoded = Encoded(lm_items([3]), "lm")
    with pytest.raises(InputError, match="--batch-size 0"):
        Batches(encoded, 0, seed=0, pad_id=0)
    with pytest.raises(InputError, match="--seed -1"):
        Batches(encoded, 1, seed=-1, pad_id=0)


def assert_types(batch):
    for name in ("input_ids", "attention_mask", "labels", "answers", "choice_ids"):
        tensor = getattr(batch, name)
        assert tensor is None or tensor.dtype == torch.int64
    assert batch.choice_mask is None or batch.choice_mask.dtype == torch.bool


def test_an_lm_batch():
    items = lm_items([5, 3, 4])
    batch = collate(items, pad_id=9)
    assert batch.input_ids.tolist() == [[1, 1, 1, 1, 1], [2, 2, 2, 9, 9], [3, 3, 3, 3, 9]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 4]
    assert batch.labels.tolist()[1] == [-100, -100, 2, -100, -100]
    assert (batch.size, batch.sizes) == (3, (1, 3, 5, 15, 75, 6))
    assert batch.tokens_per_example == 2
    assert_types(batch)


def test_choice_batches(tiny_tokenizer):
    fast = encode(
        Examples([choices(), choices(prompt="A film was", options=(" a", " great", " film"))]),
        tiny_tokenizer,
        max_length=64,
    )
    batch = collate(fast.items, pad_id=0)
    assert (batch.size, len(batch.input_ids), batch.labels) == (2, 2, None)
    assert batch.choice_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.choice_ids[0, 2] == batch.choice_ids[0, 0]
    assert batch.tokens_per_example == 1
    assert_types(batch)

    slow = encode(
        Examples([choices(), choices(options=(" a", " film great", " film"))]),
        tiny_tokenizer,
        max_length=64,
    )
    batch = collate(slow.items, pad_id=0)
    assert (batch.size, len(batch.input_ids), batch.choice_ids) == (2, 6, None)
    assert batch.choice_mask.tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(batch.input_ids[2], batch.input_ids[0])
    texts = [
        tiny_tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]
    ended = [f"{choice}<|im_end|>" for choice in (" a", " film great", " film")]
    assert texts == [" terrible", " great", " terrible", *ended]
    assert_types(batch)


def test_repeat_and_split(tiny_tokenizer):
    prompts = ["A film", "The film was great and it was", "It was a", "The bore was"]
    examples = Examples([choices(prompt=p, options=(" a", " film great")) for p in prompts])
    slow = encode(examples, tiny_tokenizer, max_length=64)
    for batch in (collate(slow.items, 0), collate(lm_items([7, 4, 3, 5]), 0)):
        per = len(batch.input_ids) // 4
        twice = batch.repeat(3)
        assert (twice.copies, twice.size) == (3, 4)
        assert torch.equal(twice.input_ids, torch.cat([batch.input_ids] * 3))
        parts = twice.split(3)
        assert [part.size for part in parts] == [1, 2, 1]
        assert len(batch.split(9)) == 4
        begin = 0
        for part in parts:
            assert part.copies == 3 and part.tokens_per_example == batch.tokens_per_example
            rows = batch.input_ids[begin * per : (begin + part.size) * per]
            width = int((rows != 0).sum(1).max())  # the padding that all share is gone
            assert torch.equal(part.input_ids, torch.cat([rows[:, :width]] * 3))
            assert part.labels.shape == part.attention_mask.shape == part.input_ids.shape
            if batch.answers is not None:
                answers = batch.answers[begin : begin + part.size]
                assert torch.equal(part.answers, torch.cat([answers] * 3))
                assert part.choice_mask.shape == (3 * part.size, 2)
            begin += part.size


def test_parts_weigh_tokens_as_the_whole_does():
    batch = collate(lm_items([9, 4, 12, 5, 6]), pad_id=0)
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def per_example(part):
        token_losses = losses[part.input_ids * 7 % 100] * (part.labels != -100)
        return token_losses.sum(1) / part.tokens_per_example

    labelled = batch.labels != -100
    token_mean = losses[batch.input_ids * 7 % 100][labelled].mean()
    split = torch.cat([per_example(part) for part in batch.split(2)])
    torch.testing.assert_close(per_example(batch).mean(), token_mean)
    torch.testing.assert_close(split.mean(), token_mean)
