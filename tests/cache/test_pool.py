import pytest
import torch

from triode.cache.config import CacheConfig
from triode.cache.messages import BlockCopy
from triode.cache.pool import KVPool, bytes_per_block, free_memory_bytes, num_blocks_for
from triode.errors import InsufficientMemory
from triode.ids import BlockId

GIB = 2**30


def pool(dtype: torch.dtype = torch.float32) -> KVPool:
    """3 layers, 5 blocks of random content."""
    made = KVPool(
        5,
        block_size_tokens=16,
        num_layers=3,
        num_kv_heads=2,
        head_dim=4,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*made.keys, *made.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return made


def test_each_layer_has_its_own_keys_and_values() -> None:
    made = pool()
    assert len(made.keys) == len(made.values) == 3
    assert {tensor.shape for tensor in (*made.keys, *made.values)} == {(5, 16, 2, 4)}
    assert len({tensor.data_ptr() for tensor in (*made.keys, *made.values)}) == 6
    assert all(tensor.is_contiguous() for tensor in (*made.keys, *made.values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pool_takes_as_many_bytes_as_were_planned(dtype: torch.dtype) -> None:
    planned = bytes_per_block(block_size_tokens=16, num_layers=3, num_kv_heads=2, head_dim=4, dtype=dtype)
    assert pool(dtype).num_bytes == 5 * planned


def test_a_copy_moves_a_block_of_all_layers_and_touches_no_other() -> None:
    made = pool()
    before = [tensor.clone() for tensor in (*made.keys, *made.values)]
    made.copy([BlockCopy(BlockId(1), BlockId(3))])
    for tensor, old in zip((*made.keys, *made.values), before, strict=True):
        assert torch.equal(tensor[3], old[1])
        assert torch.equal(tensor[[0, 1, 2, 4]], old[[0, 1, 2, 4]])


def test_sources_are_read_before_targets_are_written() -> None:
    made = pool()
    before = [tensor.clone() for tensor in made.keys]
    made.copy([BlockCopy(BlockId(1), BlockId(2)), BlockCopy(BlockId(3), BlockId(1))])
    for tensor, old in zip(made.keys, before, strict=True):
        assert torch.equal(tensor[2], old[1])
        assert torch.equal(tensor[1], old[3])


def test_no_copies_change_nothing() -> None:
    made = pool()
    before = made.keys[0].clone()
    made.copy([])
    assert torch.equal(made.keys[0], before)


def test_a_share_of_the_free_memory_is_taken_but_no_more_than_is_useful() -> None:
    config = CacheConfig(kv_cache_fraction=0.5)
    assert num_blocks_for(config, 1000, free_bytes=20_000, useful_blocks=100) == 10
    assert num_blocks_for(config, 1000, free_bytes=20_000, useful_blocks=4) == 5


def test_memory_in_bytes_is_taken_as_it_stands() -> None:
    config = CacheConfig(kv_cache_bytes=7_999)
    assert num_blocks_for(config, 1000, free_bytes=20_000, useful_blocks=4) == 7


def test_a_budget_beyond_what_is_free_is_refused_and_says_what_to_lower() -> None:
    with pytest.raises(InsufficientMemory, match=r"wants 2 GiB .* but 1 GiB are free: lower kv_cache_bytes"):
        num_blocks_for(CacheConfig(kv_cache_bytes=2 * GIB), 1000, free_bytes=GIB, useful_blocks=4)


def test_no_space_for_a_single_block_is_refused_and_says_what_to_change() -> None:
    message = (
        r"gets 0.5 GiB \(0.5 \(kv_cache_fraction\) of the 1 GiB that are free\), but needs 2 GiB .* lower block_size"
    )
    with pytest.raises(InsufficientMemory, match=message):
        num_blocks_for(CacheConfig(kv_cache_fraction=0.5), GIB, free_bytes=GIB, useful_blocks=4)
    with pytest.raises(InsufficientMemory, match="kv_cache_bytes"):
        num_blocks_for(CacheConfig(kv_cache_bytes=1999), 1000, free_bytes=GIB, useful_blocks=4)


def test_this_machine_has_memory() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 0
