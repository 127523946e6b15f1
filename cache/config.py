"""How the KV cache is sized and what it remembers."""

import math
from typing import Literal, get_args

import msgspec

BlockSize = Literal[16, 32, 64, 128]
KVDtype = Literal["auto", "int8"]


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the KV cache, checked when they are made.

    Raises ValueError for a value outside its range.
    """

    block_size_tokens: BlockSize = 16
    """16 wastes least: half a block a sequence on average, and prefixes are shared to within 15 tokens. Larger blocks
    make tables and hash chains shorter, which pays for contexts of many ten thousand tokens."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values; None takes `kv_cache_fraction` of what is free."""
    kv_cache_fraction: float = 0.8
    """Of the memory that is free once the weights are loaded, on a GPU also all buffers and graphs; unused when `kv_cache_bytes` is set."""
    kv_dtype: KVDtype = "auto"
    """How keys and values are kept: "auto" as the model computes, "int8" as bytes with a scale for each token and head, which
    take about half the memory of bfloat16; for the compiled CPU step only."""
    prefix_cache: bool = True
    """Whether a request may reuse the blocks that other requests have computed for the same tokens."""
    prefix_cache_ttl_s: float | None = None
    """Cached blocks unused for this long are forgotten; None keeps them until their room is needed."""

    def __post_init__(self) -> None:
        if self.block_size_tokens not in get_args(BlockSize):
            raise ValueError(f"block_size_tokens must be 16, 32, 64 or 128, got {self.block_size_tokens!r}")
        if self.kv_dtype not in get_args(KVDtype):
            raise ValueError(f"kv_dtype must be auto or int8, got {self.kv_dtype!r}")
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ValueError(f"kv_cache_bytes must be >= 1, got {self.kv_cache_bytes}")
        if not 0 < self.kv_cache_fraction <= 1:
            raise ValueError(f"kv_cache_fraction must be in (0, 1], got {self.kv_cache_fraction}")
        if self.prefix_cache_ttl_s is not None and not 0 < self.prefix_cache_ttl_s < math.inf:
            raise ValueError(f"prefix_cache_ttl_s must be > 0 and finite, got {self.prefix_cache_ttl_s}")
