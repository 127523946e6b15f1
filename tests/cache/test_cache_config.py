import math

import msgspec
import pytest

from triode.cache.config import CacheConfig


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_four_block_sizes_are_supported(size: int) -> None:
    assert msgspec.convert({"block_size_tokens": size}, CacheConfig).block_size_tokens == size


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_size_tokens", 24, "block_size_tokens must be 16, 32, 64 or 128, got 24"),
        ("memory_bytes", 0, "memory_bytes must be >= 1, got 0"),
        ("memory_fraction", 0.0, r"memory_fraction must be in \(0, 1\], got 0.0"),
        ("memory_fraction", 1.5, r"memory_fraction must be in \(0, 1\], got 1.5"),
        ("memory_fraction", math.nan, r"memory_fraction must be in \(0, 1\], got nan"),
        ("ttl_s", 0.0, "ttl_s must be > 0 and finite, got 0.0"),
        ("ttl_s", math.inf, "ttl_s must be > 0 and finite, got inf"),
        ("ttl_s", math.nan, "ttl_s must be > 0 and finite, got nan"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="block_size"):
        msgspec.convert({"block_size": 16}, CacheConfig)
