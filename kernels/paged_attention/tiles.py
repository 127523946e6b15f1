"""How attention is cut into programs: the sizes that belong to its bits, and those that do not.

H head dim    M (query token, head) pairs of a program
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import triton

from triode.kernels.gpu_traits import GpuTraits

SEGMENT_TOKENS = 512
TILE_TOKENS = 64

HOPPER_PAIRS = 128
"""(query token, head) pairs of a query tile of `hopper.py`: 64 for each of two warp groups."""
HOPPER_STAGES = 4
"""Tiles that its copying warp may be ahead. A power of two: each step divides by it."""

MERGED_PAIRS = 4
"""Pairs whose segments' states a program merges when programs of `hopper.py` have shared their KV."""
MERGED_AHEAD = 8
"""States that it fetches at once."""


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """How many (query token, head) pairs a program takes, and how it is compiled. No choice here changes a bit."""

    pairs: int
    num_warps: int
    num_stages: int


_STATES_IN_A_WALK = 150
"""States, one for each query tile, KV head and segment, that go through memory while a segment is walked."""
_MERGE_IN_WALKS = 0.8
"""What the merge and half a segment take, in walks of a segment."""
# The best first.
_DECODE_STAGES = (3, 2, 1)
_DECODE_STAGES_OF_LARGE_HEADS = (2, 1)
_PREFILL_TILES_OF_LARGE_HEADS = (AttentionTile(64, 8, 1), AttentionTile(32, 8, 1), AttentionTile(16, 4, 1))
_PREFILL_TILES = (
    AttentionTile(128, 8, 3),
    AttentionTile(128, 8, 2),
    AttentionTile(64, 8, 2),
    *_PREFILL_TILES_OF_LARGE_HEADS,
)


def decode_tile(group: int, head_dim: int, kv_dtype: torch.dtype, traits: GpuTraits) -> AttentionTile:
    """The tile for rows of few query tokens: one tensor-core instruction high, unless the group is larger.

    An 8-bit operand reaches the small instruction in another order than the warp-group instruction that prefill uses on
    SM90, which shows in the last bits; 64 pairs make decode use that one too.
    """
    least = 64 if kv_dtype.itemsize == 1 else 16
    pairs = max(least, triton.next_power_of_2(group))
    stages = _DECODE_STAGES if head_dim <= 128 else _DECODE_STAGES_OF_LARGE_HEADS
    return _first_that_fits([AttentionTile(pairs, 4, number) for number in stages], head_dim, kv_dtype, traits)


def prefill_tile(group: int, head_dim: int, dtype: torch.dtype, traits: GpuTraits) -> AttentionTile:
    """The tile for rows of many query tokens, as tall as registers and shared memory allow."""
    tiles = _PREFILL_TILES if head_dim <= 128 else _PREFILL_TILES_OF_LARGE_HEADS
    tile = _first_that_fits(tiles, head_dim, dtype, traits)
    return dataclasses.replace(tile, pairs=max(tile.pairs, triton.next_power_of_2(group)))


def hopper_serves(q_TNH: torch.Tensor, key_PBKH: torch.Tensor, traits: GpuTraits) -> bool:
    """Whether `hopper.py` has rows of many query tokens of this form: whole blocks or tiles, copied as they are."""
    num_heads, head_dim = q_TNH.shape[1:]
    block_size, num_kv_heads = key_PBKH.shape[1:3]
    return (
        traits.warp_group_products
        and q_TNH.dtype in (torch.bfloat16, torch.float16)
        and key_PBKH.dtype == q_TNH.dtype
        and head_dim in (64, 128)
        and num_heads // num_kv_heads <= HOPPER_PAIRS
        # The copy engine's pattern in shared memory repeats every eight tokens.
        and block_size % 8 == 0
        and (block_size % TILE_TOKENS == 0 or TILE_TOKENS % block_size == 0)
    )


def _first_that_fits(
    tiles: Sequence[AttentionTile], head_dim: int, dtype: torch.dtype, traits: GpuTraits
) -> AttentionTile:
    """The first tile whose queries, and keys and values of every stage, fit into shared memory; else the last."""
    row_bytes = max(16, triton.next_power_of_2(head_dim)) * max(2, dtype.itemsize)
    room = traits.shared_memory_bytes // row_bytes
    return next((tile for tile in tiles if tile.pairs + 2 * TILE_TOKENS * tile.num_stages <= room), tiles[-1])


def splits_for(num_rows: int, num_kv_heads: int, max_segments: int, traits: GpuTraits) -> int:
    """How many programs should share a row's KV so that decode rows fill the GPU twice over.

    Depends on nothing that lives on the device, so that it can be fixed when a CUDA graph is captured.
    """
    return max(1, min(max_segments, math.ceil(2 * traits.num_sms / (num_rows * num_kv_heads))))


def splits_of_long_rows(num_programs: int, num_segments: int, max_segments: int, traits: GpuTraits) -> int:
    """How many programs of `hopper.py` should share a query tile's KV; 1 where one for each is done sooner.

    Args:
        num_programs: query tiles times KV heads.
        num_segments: of the longest row. It decides between 1 and a number that does not depend on it, so that few CUDA
            graphs are captured.
    """
    splits = min(max_segments, traits.num_sms // num_programs)
    if splits < 2:
        return 1
    longest_share = math.ceil(num_segments / splits)
    # In walks of a segment: how long the states take through memory, and what half a segment and the merge do.
    overhead = num_programs * num_segments / _STATES_IN_A_WALK + _MERGE_IN_WALKS
    return splits if longest_share + overhead < num_segments else 1


def merge_stages(pairs: int, head_dim: int, traits: GpuTraits) -> int:
    """How many segments' states are in flight while they are merged: one in registers, the others in shared memory."""
    state_bytes: int = pairs * (triton.next_power_of_2(head_dim) + 2) * 4
    # The rest is for what the compiler itself puts there.
    room_bytes = traits.shared_memory_bytes - 8192
    return max(1, min(4, 1 + room_bytes // state_bytes))
