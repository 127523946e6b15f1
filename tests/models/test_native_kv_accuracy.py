"""What int8 keys and values cost on real weights: SmolLM2's perplexity of this project's own documents."""

import math
from pathlib import Path

import pytest
import torch

from native_steps import native_decoder
from paged_decoding import PagedDecoding, PagedSequence
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.program import StepProgram

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "DESIGN.md", "LICENSE", "CONTRIBUTING.md")
WINDOW_TOKENS = 512


def perplexity(decoder: StepProgram, token_ids: list[int], kv_dtype: torch.dtype | None = None) -> float:
    """Over windows that each begin anew."""
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - WINDOW_TOKENS + 1, WINDOW_TOKENS):
        window = token_ids[start : start + WINDOW_TOKENS]
        decoding = PagedDecoding(decoder, num_blocks=40, kv_dtype=kv_dtype)
        (logits_TV,) = decoding.step([(PagedSequence(window), WINDOW_TOKENS)])
        total += float(torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(window[1:]), reduction="sum"))
        count += WINDOW_TOKENS - 1
    return math.exp(total / count)


@pytest.mark.parametrize(
    ("num_windows", "limit"),
    [
        pytest.param(2, 1.005, id="two windows"),
        pytest.param(15, 1.002, id="all windows", marks=pytest.mark.slow),
    ],
)
def test_int8_keys_and_values_cost_little_perplexity(num_windows: int, limit: float) -> None:
    checkpoint = open_checkpoint(ModelOptions(model="smollm2-135m"))
    text = "".join((ROOT / name).read_text() for name in DOCUMENTS)
    token_ids = checkpoint.tokenizer.encode(text)[: num_windows * WINDOW_TOKENS]
    decoder = native_decoder(checkpoint.config, checkpoint.load_weights(torch.bfloat16, torch.device("cpu")))
    ratio = perplexity(decoder, token_ids, torch.int8) / perplexity(decoder, token_ids)
    assert 1 / limit < ratio < limit
