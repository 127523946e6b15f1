"""The kernel of prefill attention on Hopper GPUs: the sums of `attend.py`, bit for bit, in two thirds of its time.

The idea is FlashAttention-3's (Shah et al., 2024). One warp only copies: it has the tensor memory accelerator fetch the
blocks of one KV tile after the other. Two warp groups compute, each for its own half of a query tile's (query token,
head) pairs, on the same tiles of keys and values: while one takes exponentials, the tensor cores serve the other. Each
asks for the scores of the next tile and for the products with this one's values at once. `attend.py` cannot say so:
Triton divides no program's warps among tasks on this GPU. Gluon, the language below it, can.

The order of every sum is that of `attend.py`: tiles in order, segments from position 0, and a row's weights summed as a
product with ones. Programs are as many as multiprocessors and walk the query tiles, the longest first, so that the
copying warp fetches a query tile's first keys while the last one is being finished.

Where there are fewer query tiles than multiprocessors, programs may share a query tile's KV (SPLIT): each leaves the
states of its segments in memory, and `states.merge_long_rows` merges them in their order.

T packed query tokens    R rows of the batch    N query heads    K KV heads    H head dim    B block size
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from triode.kernels.paged_attention import work
from triode.kernels.paged_attention.hopper_walk import (
    GROUP_PAIRS,
    ONES,
    Pipe,
    Pipes,
    States,
    barrier,
    empty_state,
    merge,
    store_state,
    walk_segment,
)

locate = gluon.jit(work.locate.fn)
kv_of_tile = gluon.jit(work.kv_of_tile.fn)
share_of_kv = gluon.jit(work.share_of_kv.fn)
# Triton 3.9 calls it as given first; before, it had another name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


class Rows(NamedTuple):
    """All work of a launch."""

    query_start_ptr: gl.tensor
    start_ptr: gl.tensor
    num_rows: gl.tensor
    num_tiles: gl.tensor
    num_kv_heads: gl.tensor
    num_shares: gl.tensor
    """Of each query tile's KV."""


class Work(NamedTuple):
    """What a program computes in one turn: the queries of a query tile and KV head, over a part of their KV."""

    row: gl.tensor
    kv_head: gl.tensor
    row_start: gl.tensor
    """The row's first token, among the packed ones."""
    first_token: gl.tensor
    """The query tile's, in the row."""
    num_tokens: gl.tensor
    """Of the row."""
    start_position: gl.tensor
    """Of the row."""
    number: gl.tensor
    """Of the query tile and KV head, as states are told."""
    first_segment: gl.tensor
    begin: gl.tensor
    """Where the KV begins; where there is no work, it begins and ends at 0."""
    end: gl.tensor


@gluon.jit
def work_of(
    turn, rows,
    QUERY_TOKENS: gl.constexpr, WINDOW: gl.constexpr, TILE: gl.constexpr, SEGMENT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """This program's work in its `turn`. All partitions ask.

    Work comes longest first, and every other turn hands it out backwards, so that programs get equal shares.
    """
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = gl.num_programs(0) - 1 - place
    item = turn * gl.num_programs(0) + place
    kv_head = item % rows.num_kv_heads
    tile = gl.maximum(rows.num_tiles - 1 - item // rows.num_kv_heads, 0)
    if SPLIT:
        tile = gl.maximum(rows.num_tiles - 1 - item // (rows.num_kv_heads * rows.num_shares), 0)
    row, row_start, num_tokens, first_token = locate(rows.query_start_ptr, tile, rows.num_rows, QUERY_TOKENS, True, "")
    start_position = gl.load(rows.start_ptr + row)
    begin, end, first_segment, num_segments = kv_of_tile(
        start_position, first_token, num_tokens, QUERY_TOKENS, TILE, SEGMENT, WINDOW
    )
    if SPLIT:
        which = item // rows.num_kv_heads % rows.num_shares
        begin, end, _ = share_of_kv(begin, end, first_segment, num_segments, which, rows.num_shares, SEGMENT)
    num_items = rows.num_tiles * rows.num_kv_heads * rows.num_shares
    if (item >= num_items) | (first_token >= num_tokens) | (begin >= end):
        begin = gl.to_tensor(0)
        end = begin
    number = tile * rows.num_kv_heads + kv_head
    return Work(row, kv_head, row_start, first_token, num_tokens, start_position, number, first_segment, begin, end)


@gluon.jit
def num_turns(rows):
    """How often a program asks for work."""
    return gl.cdiv(rows.num_tiles * rows.num_kv_heads * rows.num_shares, gl.num_programs(0))


@gluon.jit
def copy_tiles(
    key_desc, value_desc, table_ptr, table_stride, rows, pipes,
    HEAD: gl.constexpr, BLOCK: gl.constexpr, QUERY_TOKENS: gl.constexpr, WINDOW: gl.constexpr,
    TILE: gl.constexpr, SEGMENT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The copying warp: the tiles of keys and values of every turn, each as soon as its place is free."""
    step = 0
    for turn in range(num_turns(rows)):
        work = work_of(turn, rows, QUERY_TOKENS, WINDOW, TILE, SEGMENT, SPLIT)
        table = table_ptr + work.row.to(gl.int64) * table_stride
        for first in range(work.begin, work.end, TILE):
            copy_tile(pipes.of_keys, step, key_desc, table, first, work.end, work.kv_head, HEAD, BLOCK)
            copy_tile(pipes.of_values, step, value_desc, table, first, work.end, work.kv_head, HEAD, BLOCK)
            step += 1


@gluon.jit
def copy_tile(pipe, step, desc, table, first, end, kv_head, HEAD: gl.constexpr, BLOCK: gl.constexpr):
    """Have a tile's blocks copied, as soon as its place is free. Blocks from `end` on are block 0, for nobody."""
    STAGES: gl.constexpr = pipe.tiles.shape[0]
    TILE: gl.constexpr = pipe.tiles.shape[1]
    ROWS: gl.constexpr = desc.block_shape[0]
    stage = step % STAGES
    mbarrier.wait(pipe.free.index(stage), (step // STAGES + 1) % 2)
    tile, full = pipe.tiles.index(stage), pipe.full.index(stage)
    mbarrier.expect(full, TILE * HEAD * tile.dtype.primitive_bitwidth // 8)
    for part in gl.static_range(TILE // ROWS):
        at = first + part * ROWS
        block = gl.load(table + at // BLOCK, mask=at < end, other=0)
        async_load(desc, [block * BLOCK + at % BLOCK, kv_head * HEAD], full, tile.slice(part * ROWS, ROWS))


@gluon.jit
def place_of_pairs(
    work, stride,
    WHICH: gl.constexpr, GROUP: gl.constexpr, QUERY_TOKENS: gl.constexpr, HEAD: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where a warp group's queries or outputs are, and which of them there are."""
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, LAYOUT))
    token = work.first_token + pair // GROUP
    column = (work.kv_head * GROUP + pair % GROUP) * HEAD
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, LAYOUT))
    at = ((work.row_start + token).to(gl.int64) * stride + column)[:, None] + dim[None, :]
    return at, ((pair < QUERY_TOKENS * GROUP) & (token < work.num_tokens))[:, None]


@gluon.jit
def walk_kv(
    q_tile, pipes, step, work, pair, states, scale, WHICH: gl.constexpr, GROUP: gl.constexpr, QUERY_TOKENS: gl.constexpr,
    LAYOUT: gl.constexpr, WINDOW: gl.constexpr, SEGMENT: gl.constexpr, DOT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The rows' state after a turn's KV, and the next step; with SPLIT the states of segments are left in memory instead."""
    TILE: gl.constexpr = pipes.of_keys.tiles.shape[1]
    first_position = work.start_position + work.first_token
    position = first_position + pair // GROUP
    unmasked_end = first_position + 1
    if WINDOW > 0:
        unmasked_end = gl.to_tensor(0)
    row = empty_state(TILE, pipes.of_keys.tiles.shape[2])
    for segment in range(work.begin // SEGMENT, gl.cdiv(work.end, SEGMENT)):
        first = gl.maximum(work.begin, segment * SEGMENT)
        end = gl.minimum(work.end, (segment + 1) * SEGMENT)
        state, step = walk_segment(q_tile, pipes, step, first, end, position, scale, unmasked_end, LAYOUT, WINDOW, DOT)
        if SPLIT:
            num_pairs = gl.minimum(QUERY_TOKENS, work.num_tokens - work.first_token) * GROUP
            store_state(states, work.number, segment - work.first_segment, state, num_pairs, WHICH)
        else:
            row = merge(row, state, scale)
    return row, step


@gluon.jit
def compute(
    q_ptr, out_ptr, q_stride, out_stride, rows, states, q_tiles, pipes, scale,
    WHICH: gl.constexpr, GROUP: gl.constexpr, QUERY_TOKENS: gl.constexpr, WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr, DOT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A computing warp group: its half of the pairs of every turn."""
    TILE: gl.constexpr = pipes.of_keys.tiles.shape[1]
    HEAD: gl.constexpr = pipes.of_keys.tiles.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    q_tile = q_tiles.index(WHICH)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, SCORES))
    step = gl.to_tensor(0)
    for turn in range(num_turns(rows)):
        work = work_of(turn, rows, QUERY_TOKENS, WINDOW, TILE, SEGMENT, SPLIT)
        if work.begin < work.end:
            q_at, valid = place_of_pairs(work, q_stride, WHICH, GROUP, QUERY_TOKENS, HEAD, LAYOUT)
            q_tile.store(gl.load(q_ptr + q_at, mask=valid, other=0.0))
            fence_async_shared()
            barrier()

            row, step = walk_kv(
                q_tile, pipes, step, work, pair, states, scale,
                WHICH, GROUP, QUERY_TOKENS, LAYOUT, WINDOW, SEGMENT, DOT, SPLIT,
            )  # fmt: skip
            if not SPLIT:
                mass = gl.convert_layout(gl.max(row.mass, 1), gl.SliceLayout(1, row.acc.type.layout))
                out = gl.convert_layout((row.acc / mass[:, None]).to(DOT), LAYOUT)
                out_at, valid = place_of_pairs(work, out_stride, WHICH, GROUP, QUERY_TOKENS, HEAD, LAYOUT)
                gl.store(out_ptr + out_at, out, mask=valid)


@gluon.jit
def make_pipes(key_desc, value_desc, TILE: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, DOT: gl.constexpr):
    """Pipes for keys and values, all of whose places are free, and columns of ones."""
    ones = gl.allocate_shared_memory(DOT, [ONES, TILE], gl.NVMMASharedLayout.get_default_for([ONES, TILE], DOT))
    ones.store(gl.full([ONES, TILE], 1.0, DOT, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
    k_tiles = gl.allocate_shared_memory(DOT, [STAGES, TILE, HEAD], key_desc.layout)
    v_tiles = gl.allocate_shared_memory(DOT, [STAGES, TILE, HEAD], value_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Two warp groups free a place.
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    return Pipes(Pipe(k_tiles, k_full, k_free), Pipe(v_tiles, v_full, v_free), ones.permute((1, 0)))


@gluon.jit(do_not_specialize=["max_segments", "num_states", "num_rows", "num_tiles", "num_shares", "table_stride"])
def attend_long_rows(
    q_ptr, key_desc, value_desc, table_ptr, query_start_ptr, start_ptr, out_ptr, state_ptr, partial_ptr,
    max_segments, num_states, num_rows, num_tiles, num_shares, table_stride, scale, q_stride, out_stride,
    GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, BLOCK: gl.constexpr, QUERY_TOKENS: gl.constexpr,
    HEAD: gl.constexpr, TILE: gl.constexpr, SEGMENT: gl.constexpr, WINDOW: gl.constexpr,
    SPLIT: gl.constexpr, STAGES: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Rows of many query tokens. `scale` includes log2(e); a descriptor's box is the rows of a tile in one block.

    With SPLIT `num_shares` programs share a query tile's KV, and leave the states of its segments to `merge_long_rows`.
    """
    if not SPLIT:
        num_shares = gl.to_tensor(1)
    rows = Rows(query_start_ptr, start_ptr, num_rows, num_tiles, gl.to_tensor(NUM_KV_HEADS), num_shares)
    states = States(state_ptr, partial_ptr, max_segments, num_states)
    q_tiles = gl.allocate_shared_memory(DOT, [2, GROUP_PAIRS, HEAD], key_desc.layout)
    pipes = make_pipes(key_desc, value_desc, TILE, HEAD, STAGES, DOT)
    fence_async_shared()
    gdc_wait()
    # Whoever starts now knows that all before this kernel has finished.
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (compute, (
                q_ptr, out_ptr, q_stride, out_stride, rows, states, q_tiles, pipes, scale,
                gl.constexpr(0), GROUP, QUERY_TOKENS, WINDOW, SEGMENT, DOT, SPLIT,
            )),
            (compute, (
                q_ptr, out_ptr, q_stride, out_stride, rows, states, q_tiles, pipes, scale,
                gl.constexpr(1), GROUP, QUERY_TOKENS, WINDOW, SEGMENT, DOT, SPLIT,
            )),
            (copy_tiles, (
                key_desc, value_desc, table_ptr, table_stride, rows, pipes,
                HEAD, BLOCK, QUERY_TOKENS, WINDOW, TILE, SEGMENT, SPLIT,
            )),
        ],
        # Warps and registers of those after the first, which has four warps and the registers that are left.
        [4, 1],
        [240, 24],
    )  # fmt: skip
