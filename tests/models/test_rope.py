import warnings

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny_decoders import tiny_config
from triode.models.config import RopeConfig
from triode.models.rope import inverse_frequencies, rope_table

FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(32)], "long_factor": [2.0 + 0.5 * i for i in range(32)]}
OURS = {"original_max_position_embeddings": "original_max_position"}
OURS |= {"short_factor": "short_factors", "long_factor": "long_factors"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALINGS = [
    ("linear", {"factor": 4.0}),
    ("llama3", LLAMA3),
    ("llama3", LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 512}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4096}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 16.0}),
    ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25}),
    ("yarn", {"factor": 1.0, "original_max_position_embeddings": 4096}),
    ("longrope", {"factor": 8.0, "original_max_position_embeddings": 4096} | FACTORS),
    ("longrope", {"factor": 1.0, "original_max_position_embeddings": 4096} | FACTORS),
    ("longrope", {"factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5} | FACTORS),
]


def ours(kind: str, numbers: dict[str, object], theta: float) -> RopeConfig:
    fields = {
        OURS.get(name, name): tuple(value) if isinstance(value, list) else value for name, value in numbers.items()
    }
    return RopeConfig(theta=theta, kind=kind, **fields)  # type: ignore[arg-type]


def theirs(kind: str, numbers: dict[str, object], theta: float, length: int) -> tuple[torch.Tensor, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LlamaConfig(
            hidden_size=128,
            num_attention_heads=2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": kind, "rope_theta": theta, **numbers},
        )
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return frequency, factor


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("length", [2048, 16_384])
@pytest.mark.parametrize(("kind", "numbers"), SCALINGS)
def test_every_scaling_agrees_with_transformers(
    kind: str, numbers: dict[str, object], length: int, theta: float
) -> None:
    frequency, factor = inverse_frequencies(ours(kind, numbers, theta), 64, length)
    expected, expected_factor = theirs(kind, numbers, theta, length)
    torch.testing.assert_close(frequency, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("length", [1000, 4096, 9000])
def test_dynamic_scaling_is_fixed_for_the_longest_context(length: int) -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0, original_max_position=4096)
    expected, _ = theirs("dynamic", {"factor": 4.0}, 10_000.0, length)
    torch.testing.assert_close(inverse_frequencies(rope, 64, length)[0], expected, rtol=1e-6, atol=0)


def test_without_scaling_frequencies_are_powers_of_theta() -> None:
    frequency, factor = inverse_frequencies(RopeConfig(theta=10_000.0), 8, 100)
    torch.testing.assert_close(frequency, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert factor == 1


def test_stored_factors_divide_the_frequencies() -> None:
    rope = RopeConfig(kind="factors", short_factors=(1.0, 2.0, 4.0, 8.0))
    plain, _ = inverse_frequencies(RopeConfig(), 8, 100)
    assert torch.equal(inverse_frequencies(rope, 8, 100)[0], plain / torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_the_table_holds_every_position_and_the_attention_factor() -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_position=32, attention_factor=2.0)
    config = tiny_config(rope=rope, max_context_tokens=100)
    table = rope_table(config, torch.device("cpu"))
    frequency, _ = inverse_frequencies(rope, config.head_dim, 100)
    angle = torch.arange(100).double()[:, None] * frequency.double()
    torch.testing.assert_close(table.cos_XU, (2 * angle.cos()).float(), rtol=0, atol=2e-5)
    torch.testing.assert_close(table.sin_XU, (2 * angle.sin()).float(), rtol=0, atol=2e-5)


def test_a_scaling_without_its_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope\.factor must be given"):
        inverse_frequencies(RopeConfig(kind="linear"), 64, 100)
