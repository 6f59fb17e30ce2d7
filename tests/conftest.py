"""Fixtures that several test files share. Everything is made here: no network, no files."""

from __future__ import annotations

import os

# Tiny models are fastest on one thread, and two workers with two threads each would fight over two
# cores. Before torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Triton's kernels run on a GPU where there is one and else in Triton's interpreter, which must be
# asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

CORPUS = (
    "The film was great and the actors were great. It was a terrible film, a bore from the start.",
    "Question: what is the capital of France? Answer: the capital of France is Paris.",
    "You are a helpful assistant. The user asks, the assistant answers: yes, no, or it depends.",
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, 375 tokens, with ChatML; eos and pad are <|im_end|>, no BOS, as SmolLM2's.

    Any text round-trips; " great", " terrible" and " film" are single tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=375,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Figures are made in every test, and rendered in those that look at them (`pictures`)."""
    if not request.node.get_closest_marker("pictures"):
        import blank_picture

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", blank_picture.save)


@pytest.fixture
def tiny_model_dir(tmp_path, tiny_tokenizer):
    """`tiny_model_dir("llama", **config changes)` -> a folder with a random model and tokenizer."""
    from tiny_models import save_tiny_model

    def make(family: str = "llama", **changes):
        return save_tiny_model(tmp_path / f"base-{family}", family, tiny_tokenizer, **changes)

    return make
