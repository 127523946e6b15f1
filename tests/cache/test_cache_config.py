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
        ("kv_cache_bytes", 0, "kv_cache_bytes must be >= 1, got 0"),
        ("kv_cache_fraction", 0.0, r"kv_cache_fraction must be in \(0, 1\], got 0.0"),
        ("kv_cache_fraction", 1.5, r"kv_cache_fraction must be in \(0, 1\], got 1.5"),
        ("kv_cache_fraction", math.nan, r"kv_cache_fraction must be in \(0, 1\], got nan"),
        ("prefix_cache_ttl_s", 0.0, "prefix_cache_ttl_s must be > 0 and finite, got 0.0"),
        ("prefix_cache_ttl_s", math.inf, "prefix_cache_ttl_s must be > 0 and finite, got inf"),
        ("prefix_cache_ttl_s", math.nan, "prefix_cache_ttl_s must be > 0 and finite, got nan"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="block_size"):
        msgspec.convert({"block_size": 16}, CacheConfig)
