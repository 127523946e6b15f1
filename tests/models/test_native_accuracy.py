"""What rounding costs on real weights: SmolLM2 reading real text, each format beside float32 (benchmarks/accuracy.py)."""

import pytest
from accuracy import VARIANTS, Accuracy, measure

from native_steps import native_library
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint

# More perplexity than float32, and divergence from it in nats. The table in benchmarks/README.md has what is measured.
LIMITS = {
    "bfloat16": (0.002, 0.001),
    "bfloat16, int8 KV cache": (0.003, 0.003),
    "a16w8": (0.006, 0.008),
    "a16w8 g64": (0.003, 0.004),
    "a8w8": (0.01, 0.012),
    "a8w8 g32": (0.009, 0.007),
    "a8w8 per channel": (0.055, 0.055),
    "a8w8, int8 KV cache": (0.013, 0.013),
    "a16w4 g32": (0.006, 0.003),
    "a8w4 g32": (0.007, 0.007),
    "a16gguf": (0.002, 0.001),
    "a8gguf": (0.008, 0.006),
}


def accuracies(names: list[str], num_windows: int) -> list[Accuracy]:
    checkpoint = open_checkpoint(ModelOptions(model="smollm2-135m"))
    return measure(checkpoint, native_library(), {name: VARIANTS[name] for name in names}, num_windows)


def test_rounding_costs_little_in_two_windows() -> None:
    for found in accuracies(["a8w8"], 2):
        perplexity, kl = LIMITS[found.variant]
        assert found.more_perplexity < 3 * perplexity, found
        assert found.kl < 2 * kl, found
        assert found.agreement > 0.9, found


@pytest.mark.slow
def test_rounding_costs_no_more_than_the_published_table_says() -> None:
    for found in accuracies(list(LIMITS), 15):
        perplexity, kl = LIMITS[found.variant]
        assert found.more_perplexity < perplexity, found
        assert found.kl < kl, found
