"""Models of a known shape with random weights and SmolLM2's tokenizer, for tests and benchmarks.

Weights are normal, scaled by the square root of each matrix's input size, so that activations and logits have the size
of one and no token is certain. They come from one table of random numbers that every tensor reads from another place:
15 GB then cost the time of writing them, and a seed gives the same weights on every device.
"""

import itertools
import zlib
from collections.abc import Mapping

import torch

from triode.errors import ModelNotFound
from triode.models.config import ModelConfig
from triode.models.hf_config import parse_config
from triode.models.weights import allocate, places

# A prime, so that no two rows of a matrix are equal: their starts differ modulo the table's length.
_TABLE_ELEMENTS = 4_194_301

# SmolLM2's, whose tokenizer goes with these models.
_TOKENS: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2}
_TINY: dict[str, object] = {
    "vocab_size": 49_152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
# What each model's config.json says, as far as it describes the shape.
_CONFIGS: dict[str, dict[str, object]] = {
    "tiny": {**_TINY, "model_type": "llama", "tie_word_embeddings": True},
    "tiny-llama": {**_TINY, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tiny-mistral": {**_TINY, "model_type": "mistral", "sliding_window": 24},
    "tiny-qwen2": {
        **_TINY,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "tiny-qwen3": {**_TINY, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "dtype": "bfloat16",
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "dtype": "bfloat16",
    },
}
RANDOM_NAMES = tuple(_CONFIGS)


def random_config(name: str) -> ModelConfig:
    """The config of the model called `random:NAME`; ModelNotFound if there is none."""
    if name not in _CONFIGS:
        raise ModelNotFound(f"there is no random model {name!r}; there are {', '.join(_CONFIGS)}")
    return parse_config(f"random:{name}", {**_CONFIGS[name], **_TOKENS}, {})


class RandomTensors:
    """A `TensorReader` that makes the tensors up; equal seeds make equal tensors."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._seed = seed
        meta = allocate(config, torch.float32, "meta")
        self._shapes = {name: tuple(view.shape) for name, view in places(config, meta)}
        self._tables: dict[tuple[float, torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Exactly what the config calls for."""
        return self._shapes

    def label(self, name: str) -> str:
        """The tensor."""
        return f"random tensor {name}"

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Fills the tensor from its own place in the table, over and over."""
        table = self._table(_scale(self._shapes[name]), destination)
        start = zlib.crc32(name.encode()) % _TABLE_ELEMENTS
        # A row range of a contiguous tensor is contiguous, so this is a view.
        flat = destination.view(-1)
        for begin, end in itertools.pairwise(
            [0, *range(_TABLE_ELEMENTS - start, len(flat), _TABLE_ELEMENTS), len(flat)]
        ):
            flat[begin:end].copy_(table[start : start + end - begin])
            start = 0
        if name.endswith("norm.weight"):
            destination.add_(1)

    def _table(self, scale: float, like: torch.Tensor) -> torch.Tensor:
        key = (scale, like.dtype, like.device)
        if key not in self._tables:
            generator = torch.Generator().manual_seed(self._seed)
            table = torch.randn(_TABLE_ELEMENTS, generator=generator)
            self._tables[key] = table.mul_(scale).to(like.device, like.dtype)
        return self._tables[key]


def _scale(shape: tuple[int, ...]) -> float:
    """The standard deviation: of a matrix by its inputs; of a bias, and of a norm around one, a tenth."""
    return float(shape[-1] ** -0.5) if len(shape) == 2 else 0.1
