"""Scores against transformers' own losses, logits and `generate`, row by row."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tiny_models import CAUSAL

from tinyft import models, prefix
from tinyft.data import Example, Examples, encode
from tinyft.errors import InputError
from tinyft.evaluate import evaluate, generate, generate_and_score, predictions
from tinyft.library import score

PROMPTS = (
    "The film was",
    "Question: what is the capital of France? Answer:",
    "It was a bore",
    "You are",
    "A terrible film, a bore from the start, and the actors were",
)


def completions():
    endings = (" great", " Paris, of course, the capital of France", "!", " a helpful assistant")
    return Examples(
        [
            Example(i + 1, "completion", prompt=prompt, completion=endings[i % 4])
            for i, prompt in enumerate(PROMPTS)
        ]
    )


def choices(*options):
    return Examples(
        [
            Example(i + 1, "choices", prompt=prompt, choices=options, answer=i % len(options))
            for i, prompt in enumerate(PROMPTS)
        ]
    )


def log_likelihood(model, tokenizer, prompt, ending):
    """Of the ending's tokens, one row at a time, by transformers alone."""
    n = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + ending)["input_ids"]])
    assert ids[0, :n].tolist() == tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logs = model(ids).logits[0].double().log_softmax(-1)
    return sum(logs[t - 1, ids[0, t]].item() for t in range(n, ids.shape[1])), ids.shape[1] - n


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loss_and_perplexity(tiny_model_dir, family, batch_size):
    loaded = models.load(tiny_model_dir(family))
    encoded = encode(completions(), loaded.tokenizer, max_length=64)
    found = evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=batch_size)
    parts = [
        log_likelihood(loaded.model, loaded.tokenizer, e.prompt, e.completion + "<|im_end|>")
        for e in completions().items
    ]
    total, tokens = -sum(part[0] for part in parts), sum(part[1] for part in parts)
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


@pytest.mark.parametrize("options", [(" terrible", " great"), (" a bore", " great", " Paris")])
def test_choices(tiny_model_dir, options):
    loaded = models.load(tiny_model_dir("llama"))
    examples = choices(*options)
    encoded = encode(examples, loaded.tokenizer, max_length=64)
    found = evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=2)
    expected = torch.tensor(
        [
            [log_likelihood(loaded.model, loaded.tokenizer, e.prompt, c)[0] for c in e.choices]
            for e in examples.items
        ]
    ).softmax(1)
    guesses, answers = expected.argmax(1).tolist(), [e.answer for e in examples.items]
    assert found["n"] == len(PROMPTS)
    pairs = list(zip(guesses, answers, strict=True))
    assert found["accuracy"] == pytest.approx(sum(g == a for g, a in pairs) / len(pairs))
    right = expected[torch.arange(len(answers)), answers]
    assert found["loss"] == pytest.approx(-right.log().mean().item(), rel=1e-4)
    f1 = []
    for c in sorted({*guesses, *answers}):
        true = sum(g == a == c for g, a in pairs)
        f1.append(2 * true / (guesses.count(c) + answers.count(c)))
    assert found["f1"] == pytest.approx(sum(f1) / len(f1))

    for row, probabilities in zip(
        predictions(loaded.model, loaded.tokenizer, examples), expected, strict=True
    ):
        assert row.choices == options
        assert row.predicted == probabilities.argmax()
        assert row.probabilities == pytest.approx(probabilities.tolist(), rel=1e-3)


def test_classes(tiny_model_dir):
    loaded = models.load(tiny_model_dir("bert"), num_labels=2)
    examples = choices(" terrible", " great")
    encoded = encode(examples, loaded.tokenizer, max_length=64, encoder=True)
    found = evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=2)
    answers = torch.tensor([e.answer for e in examples.items])
    with torch.no_grad():
        logits = torch.cat(
            [
                loaded.model(torch.tensor([loaded.tokenizer(e.prompt)["input_ids"]])).logits
                for e in examples.items
            ]
        )
    loss = torch.nn.functional.cross_entropy(logits, answers)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(1) == answers).double().mean()
    rows = predictions(loaded.model, loaded.tokenizer, examples, batch_size=3)
    torch.testing.assert_close(torch.tensor([r.probabilities for r in rows]), logits.softmax(1))


def test_modes_come_back(tiny_model_dir):
    loaded = models.load(tiny_model_dir("gpt2"))
    loaded.model.train()
    loaded.model.transformer.h[0].eval()  # some parts may be frozen
    before = [module.training for module in loaded.model.modules()]
    encoded = encode(completions(), loaded.tokenizer, max_length=64)
    one, two = (evaluate(loaded.model, loaded.tokenizer, encoded, batch_size=2) for _ in range(2))
    assert one == two  # no dropout
    generate(loaded.model, loaded.tokenizer, [[5, 6]], max_new_tokens=2)
    assert [module.training for module in loaded.model.modules()] == before


@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_generates_what_each_row_would_alone(tiny_model_dir, family, capfd):
    loaded = models.load(tiny_model_dir(family))
    model, tokenizer = loaded.model, loaded.tokenizer
    with torch.no_grad():  # sharper logits, so that rounding cannot decide between two tokens
        models.head(model).weight.mul_(20)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    capfd.readouterr()
    together = generate(model, tokenizer, prompts, batch_size=3, max_new_tokens=8)
    assert capfd.readouterr().err == ""
    assert sum(map(len, together)) > 10
    assert len(set(map(tuple, together))) > 1
    for prompt, found in zip(prompts, together, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=2,
        )[0, len(prompt) :].tolist()
        assert found == (out[: out.index(2)] if 2 in out else out)


def test_generation_stops_at_the_end_token(tiny_model_dir):
    loaded = models.load(tiny_model_dir("llama"))
    prompt = loaded.tokenizer("The film")["input_ids"]
    (free,) = generate(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=6)
    loaded.model.generation_config.eos_token_id = [2, free[0]]
    assert generate(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=6) == [[]]


def test_generation_is_greedy_whatever_the_model_comes_with(tiny_model_dir):
    loaded = models.load(tiny_model_dir("llama"))
    ids = loaded.tokenizer(PROMPTS[4])["input_ids"]
    greedy = list(ids)
    with torch.no_grad():
        for _ in range(8):
            greedy.append(int(loaded.model(torch.tensor([greedy])).logits[0, -1].argmax()))
    assert 2 not in greedy and len(set(greedy)) < len(greedy)  # penalties would change it
    settings = {"repetition_penalty": 1e3, "no_repeat_ngram_size": 1, "num_beams": 2}
    loaded.model.generation_config.update(suppress_tokens=greedy[-3:], **settings)
    found = generate(loaded.model, loaded.tokenizer, [ids], max_new_tokens=8)
    assert found == [greedy[len(ids) :]]
    assert loaded.model.generation_config.num_beams == 2  # as it was


def test_prompts_beyond_the_positions_lose_their_beginning(tiny_model_dir):
    loaded = models.load(tiny_model_dir("gpt2"))  # 128 learnt positions
    long = [5 + i % 90 for i in range(300)]
    found = generate(loaded.model, loaded.tokenizer, [long, long[-120:]], max_new_tokens=8)
    assert found[0] == found[1]
    with pytest.raises(InputError, match=r"--max-new-tokens 128 .* 128 positions"):
        generate(loaded.model, loaded.tokenizer, [long], max_new_tokens=128)


def test_a_prefix_takes_positions(tiny_model_dir):
    loaded = models.load(tiny_model_dir("gpt2"))
    prefix.inject(loaded.model, tokens=5)
    long = [5 + i % 90 for i in range(300)]
    found = generate(loaded.model, loaded.tokenizer, [long, long[-115:]], max_new_tokens=8)
    assert found[0] == found[1]
    with pytest.raises(InputError, match=r"--max-new-tokens 123 .* 123 positions"):
        generate(loaded.model, loaded.tokenizer, [long], max_new_tokens=123)


def test_exact_match_and_rouge(tiny_model_dir):
    loaded = models.load(tiny_model_dir("llama"))
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes, no"})
    template = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(text)["input_ids"] for text in (PROMPTS[0], PROMPTS[1], template, "")]
    texts = [
        tokenizer.decode(new, skip_special_tokens=True)
        for new in generate(model, tokenizer, ids, max_new_tokens=8)
    ]
    examples = Examples(
        [
            Example(1, "completion", prompt=PROMPTS[0], completion=f"  {texts[0].strip()}\n"),
            Example(2, "choices", prompt=PROMPTS[1], choices=(" Rome", texts[1] + " x"), answer=1),
            Example(3, "messages", messages=chat),
            Example(4, "completion", prompt="", completion=" great"),
        ]
    )
    found = generate_and_score(
        model, tokenizer, examples, max_new_tokens=8, batch_size=2, n_samples=3
    )
    assert found["exact_match"] == 0.25
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    references = (texts[0], texts[1] + " x", "yes, no", " great")
    scores = [scorer.score(r, t) for r, t in zip(references, texts, strict=True)]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(sum(s[name].fmeasure for s in scores) / 4)
    assert [s["generated"] for s in found["samples"]] == [t.strip() for t in texts[:3]]
    assert found["samples"][2]["prompt"] == template
    assert found["samples"][1]["reference"] == (texts[1] + " x").strip()
    with pytest.raises(InputError, match="row of text"):
        generate_and_score(model, tokenizer, Examples([Example(7, "text", text="a b c")]))


@pytest.mark.parametrize("mark", ["<|im_end|>", "<end>"], ids=["special", "added"])
def test_what_ends_a_turn_ends_an_answer(tiny_model_dir, monkeypatch, mark):
    loaded = models.load(tiny_model_dir("llama"))
    tokenizer = copy.deepcopy(loaded.tokenizer)  # whose EOS is not the template's, as Qwen3-Base's
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", mark)
    loaded.model.generation_config.eos_token_id = tokenizer.eos_token_id
    stops = []

    def as_taught(ids, attention_mask):
        stops.append(loaded.model.generation_config.eos_token_id)
        written = tokenizer(f"yes, no{mark}\n<|im_start|>user\n")["input_ids"]
        return torch.cat([ids, torch.tensor([written] * len(ids))], 1)

    monkeypatch.setattr(loaded.model, "generate", as_taught)
    chat = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes, no"})
    examples = Examples([Example(1, "messages", messages=chat)])
    found = generate_and_score(loaded.model, tokenizer, examples)
    assert (found["exact_match"], found["samples"][0]["generated"]) == (1.0, "yes, no")
    assert stops == [sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", mark]))]


def test_answers_begin_where_the_loss_does(tiny_model_dir):
    loaded = models.load(tiny_model_dir("llama"))
    row = {"prompt": "Answer: ", "completion": "yes"}  # " yes" is one token
    found = score((loaded.model, loaded.tokenizer), [row], generate=True, max_new_tokens=4)
    (new,) = generate(
        loaded.model, loaded.tokenizer, [loaded.tokenizer("Answer:")["input_ids"]], max_new_tokens=4
    )
    text = loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert found["samples"] == [{"prompt": "Answer:", "generated": text, "reference": "yes"}]


def test_answers_are_asked_for_of_the_rows_that_were_scored(tiny_model_dir):
    loaded = models.load(tiny_model_dir("llama"))
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    user = {"role": "user", "content": "Hi"}
    reply, long = ({"role": "assistant", "content": c} for c in ("yes", "yes, no " * 30))
    rows = [
        {"messages": messages}
        for messages in ([user, reply], [{**user, "role": "system"}, reply], [reply], [user, long])
    ]
    found = score(
        (loaded.model, tokenizer),
        rows,
        generate=True,
        max_length=60,
        max_new_tokens=2,
        skip_bad_rows=True,
    )
    header = "<|im_start|>assistant\n"  # all that stands before a turn that comes first
    assert [(s["prompt"], s["reference"]) for s in found["samples"]] == [
        (f"<|im_start|>user\nHi<|im_end|>\n{header}", "yes"),
        (header, "yes"),
    ]
    system = Example(2, "messages", messages=tuple(rows[1]["messages"]))
    with pytest.raises(InputError, match=r"line 2: the chat template refuses .*no system"):
        generate_and_score(loaded.model, tokenizer, Examples([system]))
