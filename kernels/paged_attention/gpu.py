"""Paged attention on an NVIDIA GPU: prefill chunks and decode rows in one kernel, with bits that no batching changes.

The idea. A token's output must not depend on how its prompt was cut into chunks, on whether it is computed as a prefill
or a decode token, or on how the KV sequence was split among programs. Softmax sums are not associative, so their order
is fixed: the KV sequence is cut, from position 0, into segments of `SEGMENT_TOKENS`, walked in tiles of `TILE_TOKENS`.
A segment's softmax state (maximum, sum, accumulator) is computed alone and merged into the row's in segment order with
explicit fma. A prefill program merges as it goes; split decode programs store the states of their segments, and the
program that arrives last merges them in the same order. Masked tiles and segments leave a state exactly as it is, so
where a walk begins (sliding window) or ends changes nothing either. Segment and tile are constants of the format:
another value is another (equally good) rounding.

Packed GQA: the query heads of one KV head share its tiles, so a program's rows are (query token, head) pairs.
A tile is not a page: each KV position looks up its own page, so any block size works with the same tiles.

T packed query tokens    R rows of the batch    N query heads    K KV heads    H head dim    P blocks    B block size
C blocks in a table      W programs (query tile, KV head)    S segments      M (query token, head) pairs of a program
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import dataclasses
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from triode.kernels.device_code import dot_dtype, wait_for_inputs
from triode.kernels.gpu_traits import GpuTraits

SEGMENT_TOKENS = 512
TILE_TOKENS = 64

KV_AS_STORED = 0
"""`KV_MODE` of float32, float16, bfloat16 and float8 pools: an element is its own value."""

LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two empty maxima is 0 and not NaN


@triton.jit
def row_of_tile(query_start_ptr, tile, num_rows, QUERY_TOKENS: tl.constexpr):
    """The row that owns a query tile. Row r's tiles begin at `query_start[r] // QUERY_TOKENS + r`."""
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // QUERY_TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_kv(pool_ptr, offset, mask, KV_MODE: tl.constexpr, DOT: tl.constexpr):
    """A tile of keys or values, as operand of a matrix product."""
    tl.static_assert(KV_MODE == 0, "this KV format has no kernel")
    return tl.load(pool_ptr + offset, mask=mask, other=0.0).to(DOT)


@triton.jit
def pages_of_tile(table, first, kv_end, tile_position, BLOCK: tl.constexpr):
    """The blocks that hold each position of the tile that begins at `first`."""
    return tl.load(table + (first + tile_position) // BLOCK, mask=first + tile_position < kv_end, other=0)


@triton.jit
def add_tile(
    peak,
    mass,
    acc,
    q,
    position,
    key_ptr,
    value_ptr,
    block,
    first,
    kv_end,
    kv_head,
    tile_position,
    dim,
    scale,
    unmasked_end,
    HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_MODE: tl.constexpr,
    DOT: tl.constexpr,
):
    """A segment's softmax state after one more tile. Every row sees all of a tile that ends by `unmasked_end`."""
    kv = first + tile_position
    kv_row = (block.to(tl.int64) * BLOCK + kv % BLOCK) * NUM_KV_HEADS + kv_head
    kv_offset = kv_row[:, None] * HEAD + dim[None, :]
    kv_mask = (kv < kv_end)[:, None] & (dim < HEAD)[None, :]
    k = load_kv(key_ptr, kv_offset, kv_mask, KV_MODE, DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if first + kv.shape[0] > unmasked_end:
        visible = kv[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (kv[None, :] > position[:, None] - WINDOW)
        s = tl.where(visible, s, -float("inf"))
    new = tl.maximum(peak, tl.max(s, 1))
    alpha = tl.exp2((peak - new) * scale)
    p = tl.exp2(tl.math.fma(s, scale, -(new * scale)[:, None])).to(DOT)
    mass = tl.math.fma(mass, alpha, tl.sum(p.to(tl.float32), 1))
    v = load_kv(value_ptr, kv_offset, kv_mask, KV_MODE, DOT)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
    return new, mass, acc


@triton.jit
def merge(peak, mass, acc, peak2, mass2, acc2, scale):
    """Add a segment's softmax state to a row's. Both multiply-adds are explicit: no compiler may choose the rounding."""
    new = tl.maximum(peak, peak2)
    a = tl.exp2((peak - new) * scale)
    b = tl.exp2((peak2 - new) * scale)
    return new, tl.math.fma(mass, a, mass2 * b), tl.math.fma(acc, a[:, None], acc2 * b[:, None])


@triton.jit(do_not_specialize=["num_rows", "table_stride", "max_segments", "num_states"])
def attend(
    q_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    query_start_ptr,
    start_ptr,
    out_ptr,
    state_ptr,
    partial_ptr,
    arrivals_ptr,
    num_rows,
    table_stride,
    max_segments,
    num_states,
    scale,
    q_stride,
    out_stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    LONG_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    KV_MODE: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query tile of one KV head; with SPLIT one share of its KV segments. `scale` includes log2(e)."""
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if LONG_ROWS:
        # The last tiles of a prompt walk the most KV: starting them first evens out the end of the launch.
        tile = tl.num_programs(0) - 1 - tile
        row = row_of_tile(query_start_ptr, tile, num_rows, QUERY_TOKENS)
        row_start = tl.load(query_start_ptr + row)
        first_token = (tile - (row_start // QUERY_TOKENS + row)) * QUERY_TOKENS
    else:
        row = tile
        row_start = tl.load(query_start_ptr + row)
        first_token = 0
    num_tokens = tl.load(query_start_ptr + row + 1) - row_start
    if first_token >= num_tokens:
        return

    start_position = tl.load(start_ptr + row)
    pair = tl.arange(0, PAIRS)
    token = first_token + pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    valid = (pair < QUERY_TOKENS * GROUP) & (token < num_tokens)
    position = start_position + token
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD
    q_offset = (row_start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD + dim[None, :]
    q = tl.load(q_ptr + q_offset, mask=valid[:, None] & in_head[None, :], other=0.0).to(DOT)

    kv_end = start_position + tl.minimum(first_token + QUERY_TOKENS, num_tokens)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(start_position + first_token - WINDOW + 1, 0) // TILE * TILE
    end = kv_end
    first_segment = begin // SEGMENT
    num_segments = tl.cdiv(kv_end, SEGMENT) - first_segment
    if SPLIT:
        share = tl.cdiv(num_segments, tl.num_programs(2))
        num_workers = tl.cdiv(num_segments, share)
        if tl.program_id(2) >= num_workers:
            return
        my_segment = first_segment + tl.program_id(2) * share
        begin = tl.maximum(begin, my_segment * SEGMENT)
        end = tl.minimum(kv_end, (my_segment + share) * SEGMENT)
    work = (tile * NUM_KV_HEADS + kv_head).to(tl.int64)
    work_states = work * max_segments * num_states + pair

    row_peak = tl.full([PAIRS], LOWEST, tl.float32)
    row_mass = tl.zeros([PAIRS], tl.float32)
    row_acc = tl.zeros([PAIRS, HEAD_PADDED], tl.float32)
    table = table_ptr + row.to(tl.int64) * table_stride
    tile_position = tl.arange(0, TILE)
    unmasked_end = 0
    if WINDOW == 0:
        unmasked_end = start_position + first_token + 1
    for segment in range(begin // SEGMENT, tl.cdiv(end, SEGMENT)):
        peak = tl.full([PAIRS], LOWEST, tl.float32)
        mass = tl.zeros([PAIRS], tl.float32)
        acc = tl.zeros([PAIRS, HEAD_PADDED], tl.float32)
        tile_begin = tl.maximum(begin, segment * SEGMENT)
        tile_end = tl.minimum(end, (segment + 1) * SEGMENT)
        block = pages_of_tile(table, tile_begin, kv_end, tile_position, BLOCK)
        for first in range(tile_begin, tile_end, TILE):
            # A tile ahead, so that keys and values need not wait for their block numbers.
            next_block = pages_of_tile(table, first + TILE, kv_end, tile_position, BLOCK)
            peak, mass, acc = add_tile(
                peak, mass, acc, q, position, key_ptr, value_ptr, block, first, kv_end, kv_head, tile_position,
                dim, scale, unmasked_end, HEAD, NUM_KV_HEADS, BLOCK, WINDOW, KV_MODE, DOT,
            )  # fmt: skip
            block = next_block
        if SPLIT:
            at = work_states + (segment - first_segment) * num_states
            tl.store(state_ptr + at * 2, peak, mask=valid)
            tl.store(state_ptr + at * 2 + 1, mass, mask=valid)
            tl.store(partial_ptr + at[:, None] * HEAD + dim[None, :], acc, mask=valid[:, None] & in_head[None, :])
        row_peak, row_mass, row_acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)

    if SPLIT:  # noqa: SIM102 - a compile-time condition around a run-time one
        if num_workers > 1:
            # All threads' stores come before the arrival, and the last arrival sees every store before it.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + work, 1, sem="acq_rel", scope="gpu")
            if arrived != num_workers - 1:
                return
            tl.store(arrivals_ptr + work, 0)
            row_peak = tl.full([PAIRS], LOWEST, tl.float32)
            row_mass = tl.zeros([PAIRS], tl.float32)
            row_acc = tl.zeros([PAIRS, HEAD_PADDED], tl.float32)
            for segment in tl.range(num_segments, num_stages=MERGE_STAGES):
                # Past L1, which another launch on this multiprocessor may have filled.
                at = work_states + segment * num_states
                peak = tl.load(state_ptr + at * 2, mask=valid, other=LOWEST, cache_modifier=".cg")
                mass = tl.load(state_ptr + at * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")
                acc_mask = valid[:, None] & in_head[None, :]
                acc_at = at[:, None] * HEAD + dim[None, :]
                acc = tl.load(partial_ptr + acc_at, mask=acc_mask, other=0.0, cache_modifier=".cg")
                row_peak, row_mass, row_acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)

    out_offset = (row_start + token).to(tl.int64)[:, None] * out_stride + head[:, None] * HEAD + dim[None, :]
    out = row_acc / tl.where(row_mass > 0, row_mass, 1.0)[:, None]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_head[None, :])


@dataclasses.dataclass(frozen=True)
class AttentionWorkspace:
    """Where programs that share a row's KV leave their segments' states. Serves every layer of one stream in turn."""

    state_WSM2: torch.Tensor
    """float32: maximum and sum."""
    partial_WSMH: torch.Tensor
    """float32: accumulators."""
    arrivals_W: torch.Tensor
    """int32: how many programs have finished; every launch leaves it zero."""

    @classmethod
    def allocate(
        cls, num_programs: int, max_segments: int, num_pairs: int, head_dim: int, device: torch.device
    ) -> "AttentionWorkspace":
        """A workspace for launches of at most `num_programs` programs of `num_pairs` pairs each.

        A decode row has one program for each KV head, with as many pairs as query heads share it.
        """
        states = (num_programs, max_segments, num_pairs)
        return cls(
            state_WSM2=torch.empty(*states, 2, dtype=torch.float32, device=device),
            partial_WSMH=torch.empty(*states, head_dim, dtype=torch.float32, device=device),
            arrivals_W=torch.zeros(num_programs, dtype=torch.int32, device=device),
        )


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """How many (query token, head) pairs a program takes, and how it is compiled. No choice here changes a bit."""

    pairs: int
    num_warps: int
    num_stages: int


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


def _first_that_fits(
    tiles: Sequence[AttentionTile], head_dim: int, dtype: torch.dtype, traits: GpuTraits
) -> AttentionTile:
    """The first tile whose queries, and keys and values of every stage, fit into shared memory; else the last."""
    row_bytes = max(16, triton.next_power_of_2(head_dim)) * max(2, dtype.itemsize)
    room = traits.shared_memory_bytes // row_bytes
    return next((tile for tile in tiles if tile.pairs + 2 * TILE_TOKENS * tile.num_stages <= room), tiles[-1])


def paged_attention(
    q_TNH: torch.Tensor,
    key_PBKH: torch.Tensor,
    value_PBKH: torch.Tensor,
    block_table_RC: torch.Tensor,
    query_start_R1: torch.Tensor,
    start_R: torch.Tensor,
    out_TNH: torch.Tensor,
    *,
    scale: float,
    max_query_tokens: int,
    traits: GpuTraits,
    window_tokens: int = 0,
    num_splits: int = 1,
    workspace: AttentionWorkspace | None = None,
    tile: AttentionTile | None = None,
) -> None:
    """Attend from every query token to its row's KV, its own included, and write `out_TNH`.

    Row r's query tokens are `query_start[r]:query_start[r + 1]`, at positions from `start[r]` on; their keys and
    values are in the pool already. Nothing is read back from the device.

    Args:
        q_TNH: may be a view whose token stride is not N * H.
        key_PBKH: contiguous, like `value_PBKH`; float32, float16, bfloat16 or float8_e4m3fn.
        block_table_RC: int32; entries past a row's last block are never read.
        query_start_R1: int32, R + 1 entries.
        start_R: int32.
        max_query_tokens: no row has more query tokens; T when nothing better is known.
        window_tokens: a token sees itself and the `window_tokens - 1` before it; 0 means everything before it.
        num_splits: programs that share one row's KV; more than 1 needs a workspace.
        tile: for measuring; None takes the one that suits `max_query_tokens`.

    Raises:
        ValueError: shapes, strides or types do not fit together, or the workspace is too small.
    """
    num_tokens, num_heads, head_dim = q_TNH.shape
    _, block_size, num_kv_heads, _ = key_PBKH.shape
    num_rows = start_R.shape[0]
    if num_heads % num_kv_heads:
        raise ValueError(f"query heads must be a multiple of the {num_kv_heads} KV heads, got {num_heads}")
    if not (key_PBKH.is_contiguous() and value_PBKH.is_contiguous()):
        raise ValueError("the KV pool must be contiguous")
    if key_PBKH.dtype == torch.float8_e4m3fn and not traits.has_fp8:
        raise ValueError("a float8_e4m3fn KV cache needs compute capability >= 8.9")
    group = num_heads // num_kv_heads
    small = decode_tile(group, head_dim, key_PBKH.dtype, traits)
    if tile is None:
        long_rows = max_query_tokens > small.pairs // group
        tile = prefill_tile(group, head_dim, q_TNH.dtype, traits) if long_rows else small
    query_tokens = tile.pairs // group
    long_rows = max_query_tokens > query_tokens
    num_tiles = num_tokens // query_tokens + num_rows if long_rows else num_rows
    num_states = min(query_tokens, max_query_tokens) * group
    if num_splits > 1 and (workspace is None or not _holds(workspace, num_tiles * num_kv_heads, num_states, head_dim)):
        raise ValueError("workspace must hold every program's segments when num_splits > 1")
    split = workspace is not None and num_splits > 1
    attend[(num_tiles, num_kv_heads, num_splits)](
        q_TNH,
        key_PBKH,
        value_PBKH,
        block_table_RC,
        query_start_R1,
        start_R,
        out_TNH,
        workspace.state_WSM2 if workspace is not None else out_TNH,
        workspace.partial_WSMH if workspace is not None else out_TNH,
        workspace.arrivals_W if workspace is not None else query_start_R1,
        num_rows,
        block_table_RC.stride(0),
        workspace.state_WSM2.shape[1] if workspace is not None else 0,
        workspace.state_WSM2.shape[2] if workspace is not None else 0,
        scale * math.log2(math.e),
        q_TNH.stride(0),
        out_TNH.stride(0),
        GROUP=group,
        HEAD=head_dim,
        HEAD_PADDED=max(16, triton.next_power_of_2(head_dim)),
        NUM_KV_HEADS=num_kv_heads,
        BLOCK=block_size,
        PAIRS=tile.pairs,
        QUERY_TOKENS=query_tokens,
        TILE=TILE_TOKENS,
        SEGMENT=SEGMENT_TOKENS,
        WINDOW=window_tokens,
        LONG_ROWS=long_rows,
        SPLIT=split,
        MERGE_STAGES=_merge_stages(tile.pairs, head_dim, traits),
        KV_MODE=KV_AS_STORED,
        DOT=dot_dtype(q_TNH.dtype, traits),
        PDL=traits.dependent_launch,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **traits.launch_options,
    )


def splits_for(num_rows: int, num_kv_heads: int, max_segments: int, traits: GpuTraits) -> int:
    """How many programs should share a row's KV so that decode rows fill the GPU twice over.

    Depends on nothing that lives on the device, so that it can be fixed when a CUDA graph is captured.
    """
    return max(1, min(max_segments, math.ceil(2 * traits.num_sms / (num_rows * num_kv_heads))))


def _merge_stages(pairs: int, head_dim: int, traits: GpuTraits) -> int:
    """How many segments' states are in flight while they are merged: one in registers, the others in shared memory."""
    state_bytes: int = pairs * (triton.next_power_of_2(head_dim) + 2) * 4
    # The rest is for what the compiler itself puts there.
    room_bytes = traits.shared_memory_bytes - 8192
    return max(1, min(4, 1 + room_bytes // state_bytes))


def _holds(workspace: AttentionWorkspace, num_programs: int, num_states: int, head_dim: int) -> bool:
    programs, _, states, head = workspace.partial_WSMH.shape
    return programs >= num_programs and states >= num_states and head == head_dim
