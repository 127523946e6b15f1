"""SmolLM2 on real prompts: greedy decoding in float32 gives the tokens that transformers gives."""

import pytest
import torch

from paged_decoding import PagedDecoding, PagedSequence
from transformers_llama import in_transformers
from triode.kernels.dispatch import choose_kernels
from triode.models.config import ModelOptions
from triode.models.decoder import Decoder
from triode.models.loader import open_checkpoint

NUM_NEW = 24
QUESTIONS = [
    "What is the capital of France? Explain briefly.",
    "Write a haiku about the sea.",
    "How many legs does a spider have?",
    "Translate to Spanish: good morning, my friend.",
    "用中文介绍一下北京。",
    "什么是机器学习？",
    "Explain this: def f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
    "What does 🚀 mean? And 🤷‍♀️?",
    "List three prime numbers greater than 10.",
    "Qu'est-ce que la photosynthèse ?",
]
TEXTS = [
    "The quick brown fox",
    "Once upon a time, in a village by the river, there lived",
    "import numpy as np\n\ndef softmax(x):\n",
    "#include <stdio.h>\nint main(void) {\n    printf(",
    "从前有座山，山里有座庙，",
    "😀😃😄😁",
    "1, 1, 2, 3, 5, 8, 13,",
    "SELECT name, COUNT(*) FROM users WHERE",
    "To be, or not to be, that is",
    "E = mc² is the formula which",
    '{"name": "Alice", "age": ',
    "Water boils at",
]


@pytest.mark.slow
def test_real_prompts_are_continued_as_transformers_continues_them() -> None:
    """All prompts in one batch; where transformers' best next token is ours after every prefix, its text is ours."""
    checkpoint = open_checkpoint(ModelOptions(model="smollm2-135m", max_context_tokens=512))
    weights = checkpoint.load_weights(torch.float32, torch.device("cpu"))
    tokenizer = checkpoint.tokenizer
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in chats + TEXTS]
    assert len(prompts) >= 20

    decoding = PagedDecoding(
        Decoder(checkpoint.config, weights, choose_kernels(torch.device("cpu"), torch.float32)), num_blocks=200
    )
    sequences = [PagedSequence(list(prompt)) for prompt in prompts]
    for _ in range(NUM_NEW):
        outputs = decoding.step([(s, len(s.token_ids) - s.num_computed) for s in sequences])
        for sequence, output in zip(sequences, outputs, strict=True):
            sequence.token_ids.append(int(output[-1].argmax()))

    theirs = in_transformers(checkpoint.config, weights)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.inference_mode():
            best = theirs(torch.tensor([sequence.token_ids[:-1]])).logits[0].argmax(-1)
        assert best[len(prompt) - 1 :].tolist() == sequence.token_ids[len(prompt) :], tokenizer.decode(prompt)
