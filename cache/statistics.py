"""What the KV cache is doing, in numbers."""

import msgspec


class CacheStatistics(msgspec.Struct, frozen=True):
    """A snapshot; the counters count from the start."""

    block_size_tokens: int
    num_blocks: int
    """Blocks that can hold tokens: the pool's without block 0. Always free + evictable + used."""
    num_free_blocks: int
    num_evictable_blocks: int
    """Remembered for later requests, in use by none: as good as free."""
    num_used_blocks: int
    """In a table or held for one, pinned, or before such a block in the prefix tree."""
    num_cached_blocks: int
    """In the prefix tree, evictable or used."""
    num_pinned_blocks: int
    num_sequences: int
    """Matched and not yet released."""
    num_query_tokens: int
    """Known tokens of the sequences admitted so far; a sequence counts again when it returns from a preemption."""
    num_hit_tokens: int
    """Of those, the tokens that were found in the cache."""
    num_evicted_blocks: int
    """Forgotten because their room was needed."""
    num_expired_blocks: int
    """Forgotten because nobody used them for `ttl_s`."""
    num_copied_blocks: int
    num_preemptions: int
