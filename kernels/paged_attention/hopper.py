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

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from triode.kernels.paged_attention import work
from triode.kernels.paged_attention.hopper_walk import (
    GROUP_PAIRS,
    ONES,
    barrier,
    empty_state,
    merge,
    store_state,
    walk_segment,
)

row_of_tile = gluon.jit(work.row_of_tile.fn)
kv_of_tile = gluon.jit(work.kv_of_tile.fn)
share_of_kv = gluon.jit(work.share_of_kv.fn)
# Triton 3.9 calls it as given first; before, it had another name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def work_of(
    turn,
    rows,
    QUERY_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    TILE: gl.constexpr,
    SEGMENT: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """What this program computes in its `turn`: row, KV head, query tokens, states, begin and end of KV.

    All partitions ask. States are told by the number of the query tile and KV head, and by their first segment.
    Work comes longest first, and every other turn hands it out backwards, so that programs get equal shares. Where
    there is no work, the KV begins and ends at 0.
    """
    query_start_ptr, start_ptr, num_rows, num_tiles, num_kv_heads, num_shares = rows
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = gl.num_programs(0) - 1 - place
    item = turn * gl.num_programs(0) + place
    kv_head = item % num_kv_heads
    tile = gl.maximum(num_tiles - 1 - item // num_kv_heads, 0)
    if SPLIT:
        tile = gl.maximum(num_tiles - 1 - item // (num_kv_heads * num_shares), 0)
    row = row_of_tile(query_start_ptr, tile, num_rows, QUERY_TOKENS, "")
    row_start = gl.load(query_start_ptr + row)
    first_token = (tile - (row_start // QUERY_TOKENS + row)) * QUERY_TOKENS
    num_tokens = gl.load(query_start_ptr + row + 1) - row_start
    start_position = gl.load(start_ptr + row)
    begin, end, first_segment, num_segments = kv_of_tile(
        start_position, first_token, num_tokens, QUERY_TOKENS, TILE, SEGMENT, WINDOW
    )
    if SPLIT:
        which = item // num_kv_heads % num_shares
        begin, end, _ = share_of_kv(begin, end, first_segment, num_segments, which, num_shares, SEGMENT)
    if (item >= num_tiles * num_kv_heads * num_shares) | (first_token >= num_tokens) | (begin >= end):
        begin = gl.to_tensor(0)
        end = begin
    tokens = (row_start, first_token, num_tokens, start_position)
    return row, kv_head, tokens, (tile * num_kv_heads + kv_head, first_segment), begin, end


@gluon.jit
def num_turns(rows):
    """How often a program asks for work."""
    return gl.cdiv(rows[3] * rows[4] * rows[5], gl.num_programs(0))


@gluon.jit
def copy_tiles(
    key_desc,
    value_desc,
    table_ptr,
    table_stride,
    rows,
    pipes,
    HEAD: gl.constexpr,
    BLOCK: gl.constexpr,
    QUERY_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    TILE: gl.constexpr,
    SEGMENT: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The copying warp: the tiles of keys and values of every turn, each as soon as its place is free."""
    k_tiles, v_tiles, k_full, v_full, k_free, v_free, _ones = pipes
    step = 0
    for turn in range(num_turns(rows)):
        row, kv_head, _tokens, _left, begin, end = work_of(turn, rows, QUERY_TOKENS, WINDOW, TILE, SEGMENT, SPLIT)
        table = table_ptr + row.to(gl.int64) * table_stride
        for first in range(begin, end, TILE):
            stage = step % STAGES
            freed = (step // STAGES + 1) % 2
            mbarrier.wait(k_free.index(stage), freed)
            copy_tile(key_desc, table, first, end, kv_head, k_tiles.index(stage), k_full.index(stage), HEAD, BLOCK)
            mbarrier.wait(v_free.index(stage), freed)
            copy_tile(value_desc, table, first, end, kv_head, v_tiles.index(stage), v_full.index(stage), HEAD, BLOCK)
            step += 1


@gluon.jit
def copy_tile(desc, table, first, end, kv_head, tile, full, HEAD: gl.constexpr, BLOCK: gl.constexpr):
    """Have a tile's blocks copied; `full` tells when they are there. Blocks from `end` on are block 0, for nobody."""
    TILE: gl.constexpr = tile.shape[0]
    ROWS: gl.constexpr = desc.block_shape[0]
    mbarrier.expect(full, TILE * HEAD * tile.dtype.primitive_bitwidth // 8)
    for part in gl.static_range(TILE // ROWS):
        at = first + part * ROWS
        block = gl.load(table + at // BLOCK, mask=at < end, other=0)
        async_load(desc, [block * BLOCK + at % BLOCK, kv_head * HEAD], full, tile.slice(part * ROWS, ROWS))


@gluon.jit
def place_of_pairs(
    tokens,
    kv_head,
    stride,
    WHICH: gl.constexpr,
    GROUP: gl.constexpr,
    QUERY_TOKENS: gl.constexpr,
    HEAD: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Where a warp group's queries or outputs are, and which of them there are."""
    row_start, first_token, num_tokens, _start_position = tokens
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, LAYOUT))
    token = first_token + pair // GROUP
    column = (kv_head * GROUP + pair % GROUP) * HEAD
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, LAYOUT))
    at = ((row_start + token).to(gl.int64) * stride + column)[:, None] + dim[None, :]
    return at, ((pair < QUERY_TOKENS * GROUP) & (token < num_tokens))[:, None]


@gluon.jit
def compute(
    q_ptr,
    out_ptr,
    q_stride,
    out_stride,
    rows,
    states,
    q_tiles,
    pipes,
    scale,
    WHICH: gl.constexpr,
    GROUP: gl.constexpr,
    QUERY_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    SEGMENT: gl.constexpr,
    STAGES: gl.constexpr,
    DOT: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """A computing warp group: its half of the pairs of every turn."""
    TILE: gl.constexpr = pipes[0].shape[1]
    HEAD: gl.constexpr = pipes[0].shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD, HEAD // 8], [4, 1], [1, 0])
    q_tile = q_tiles.index(WHICH)
    score_pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, SCORES))
    step = gl.to_tensor(0)
    for turn in range(num_turns(rows)):
        _row, kv_head, tokens, left, begin, kv_end = work_of(turn, rows, QUERY_TOKENS, WINDOW, TILE, SEGMENT, SPLIT)
        if begin < kv_end:
            q_at, valid = place_of_pairs(tokens, kv_head, q_stride, WHICH, GROUP, QUERY_TOKENS, HEAD, LAYOUT)
            q_tile.store(gl.load(q_ptr + q_at, mask=valid, other=0.0))
            fence_async_shared()
            barrier()

            first_position = tokens[3] + tokens[1]
            position = first_position + score_pair // GROUP
            unmasked_end = first_position + 1
            if WINDOW > 0:
                unmasked_end = gl.to_tensor(0)
            row_peak, row_mass, row_acc = empty_state(TILE, HEAD)
            for segment in range(begin // SEGMENT, gl.cdiv(kv_end, SEGMENT)):
                first = gl.maximum(begin, segment * SEGMENT)
                end = gl.minimum(kv_end, (segment + 1) * SEGMENT)
                peak, mass, acc, step = walk_segment(
                    q_tile, pipes, step, first, end, position, scale, unmasked_end, LAYOUT, WINDOW, STAGES, DOT
                )
                if SPLIT:
                    num_pairs = gl.minimum(QUERY_TOKENS, tokens[2] - tokens[1]) * GROUP
                    store_state(states, left[0], segment - left[1], peak, mass, acc, num_pairs, WHICH)
                else:
                    row_peak, row_mass, row_acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)
            if not SPLIT:
                mass = gl.convert_layout(gl.max(row_mass, 1), gl.SliceLayout(1, row_acc.type.layout))
                out = gl.convert_layout((row_acc / mass[:, None]).to(DOT), LAYOUT)
                out_at, valid = place_of_pairs(tokens, kv_head, out_stride, WHICH, GROUP, QUERY_TOKENS, HEAD, LAYOUT)
                gl.store(out_ptr + out_at, out, mask=valid)


@gluon.jit
def make_pipes(desc, TILE: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, DOT: gl.constexpr):
    """Places for tiles of keys and of values; whether they are there, and whether their places are free; the ones."""
    ones = gl.allocate_shared_memory(DOT, [ONES, TILE], gl.NVMMASharedLayout.get_default_for([ONES, TILE], DOT))
    ones.store(gl.full([ONES, TILE], 1.0, DOT, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])))
    k_tiles = gl.allocate_shared_memory(DOT, [STAGES, TILE, HEAD], desc.layout)
    v_tiles = gl.allocate_shared_memory(DOT, [STAGES, TILE, HEAD], desc.layout)
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
    return k_tiles, v_tiles, k_full, v_full, k_free, v_free, ones.permute((1, 0))


@gluon.jit(do_not_specialize=["max_segments", "num_states", "num_rows", "num_tiles", "num_shares", "table_stride"])
def attend_long_rows(
    q_ptr,
    key_desc,
    value_desc,
    table_ptr,
    query_start_ptr,
    start_ptr,
    out_ptr,
    state_ptr,
    partial_ptr,
    max_segments,
    num_states,
    num_rows,
    num_tiles,
    num_shares,
    table_stride,
    scale,
    q_stride,
    out_stride,
    GROUP: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    BLOCK: gl.constexpr,
    QUERY_TOKENS: gl.constexpr,
    HEAD: gl.constexpr,
    TILE: gl.constexpr,
    SEGMENT: gl.constexpr,
    WINDOW: gl.constexpr,
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,
    DOT: gl.constexpr,
):
    """Rows of many query tokens. `scale` includes log2(e); a descriptor's box is the rows of a tile in one block.

    With SPLIT `num_shares` programs share a query tile's KV, and leave the states of its segments to `merge_long_rows`.
    """
    if not SPLIT:
        num_shares = gl.to_tensor(1)
    rows = (query_start_ptr, start_ptr, num_rows, num_tiles, gl.to_tensor(NUM_KV_HEADS), num_shares)
    states = (state_ptr, partial_ptr, max_segments, num_states)
    q_tiles = gl.allocate_shared_memory(DOT, [2, GROUP_PAIRS, HEAD], key_desc.layout)
    pipes = make_pipes(key_desc, TILE, HEAD, STAGES, DOT)
    fence_async_shared()
    gdc_wait()
    # Whoever starts now knows that all before this kernel has finished.
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (compute, (
                q_ptr, out_ptr, q_stride, out_stride, rows, states, q_tiles, pipes, scale, gl.constexpr(0),
                GROUP, QUERY_TOKENS, WINDOW, SEGMENT, STAGES, DOT, SPLIT,
            )),
            (compute, (
                q_ptr, out_ptr, q_stride, out_stride, rows, states, q_tiles, pipes, scale, gl.constexpr(1),
                GROUP, QUERY_TOKENS, WINDOW, SEGMENT, STAGES, DOT, SPLIT,
            )),
            (copy_tiles, (
                key_desc, value_desc, table_ptr, table_stride, rows, pipes,
                HEAD, BLOCK, QUERY_TOKENS, WINDOW, TILE, SEGMENT, STAGES, SPLIT,
            )),
        ],
        # Warps and registers of those after the first, which has four warps and the registers that are left.
        [4, 1],
        [240, 24],
    )  # fmt: skip
