"""The kernel of paged attention: prefill chunks and decode rows in one, with bits that no batching changes.

The idea. A token's output must not depend on how its prompt was cut into chunks, on whether it is computed as a prefill
or a decode token, or on how the KV sequence was split among programs. Softmax sums are not associative, so their order
is fixed: the KV sequence is cut, from position 0, into segments of SEGMENT tokens, walked in tiles of TILE tokens.
A segment's softmax state (maximum, sum, accumulator) is computed alone and merged into the row's in segment order with
explicit fma. A prefill program merges as it goes; split decode programs store the states of their segments, and the
program that arrives last merges them in the same order. Masked tiles and segments leave a state exactly as it is, so
where a walk begins (sliding window) or ends changes nothing either. Segment and tile are constants of the format:
another value is another (equally good) rounding.

Within a tile the order is that of the tensor core, which takes a row's keys sixteen by sixteen however many rows and
warps a program has. Hence it also adds up a row's weights, as a product with ones: `tl.sum` would add in an order that
depends on how a tile lies in the warps.

Packed GQA: the query heads of one KV head share its tiles, so a program's rows are (query token, head) pairs.
A tile is not a page: each KV position looks up its own page, so any block size works with the same tiles.

T packed query tokens    R rows of the batch    N query heads    K KV heads    H head dim    P blocks    B block size
C blocks in a table      W programs (query tile, KV head)    S segments      M (query token, head) pairs of a program
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.paged_attention.states import ONES, empty_state, merge, merge_shares, store_outputs, store_state
from triode.kernels.paged_attention.work import kv_of_tile, locate, pair_offset, share_of_kv


@triton.jit
def load_kv(at, mask, KV_MODE: tl.constexpr, DOT: tl.constexpr):
    """A tile of keys or values, as operand of a matrix product."""
    tl.static_assert(KV_MODE == 0, "this KV format has no kernel")
    return tl.load(at, mask=mask, other=0.0).to(DOT)


@triton.jit
def pages_of_tile(table, first, end, tile_position, BLOCK: tl.constexpr):
    """The blocks that hold each position of the tile that begins at `first`."""
    if tile_position.shape[0] % BLOCK == 0:
        at = table + first // BLOCK + tile_position // BLOCK
    else:
        at = table + (first + tile_position) // BLOCK
    return tl.load(at, mask=first + tile_position < end, other=0)


@triton.jit
def place_in_block(
    first, tile_position, kv_head, dim, HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a tile's keys (or values) are within their blocks: the same for every tile that is whole blocks."""
    position = tile_position if tile_position.shape[0] % BLOCK == 0 else first + tile_position
    return (position % BLOCK * NUM_KV_HEADS + kv_head)[:, None] * HEAD + dim[None, :]


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
    end,
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
    place = place_in_block(first, tile_position, kv_head, dim, HEAD, NUM_KV_HEADS, BLOCK)
    block_at = block.to(tl.int64)[:, None] * (BLOCK * NUM_KV_HEADS * HEAD)
    mask = (kv < end)[:, None]
    if dim.shape[0] > HEAD:
        mask = mask & (dim < HEAD)[None, :]
    k = load_kv(key_ptr + place + block_at, mask, KV_MODE, DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if first + kv.shape[0] > unmasked_end:
        visible = kv[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (kv[None, :] > position[:, None] - WINDOW)
        s = tl.where(visible, s, -float("inf"))
    new = tl.maximum(peak, tl.max(s, 1))
    alpha = tl.exp2((peak - new) * scale)
    p = tl.exp2(tl.math.fma(s, scale, -(new * scale)[:, None])).to(DOT)
    ones = tl.full([kv.shape[0], ONES], 1.0, DOT)
    mass = tl.dot(p, ones, mass * alpha[:, None], input_precision="ieee")
    v = load_kv(value_ptr + place + block_at, mask, KV_MODE, DOT)
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
    return new, mass, acc


@triton.jit
def walk_segment(
    q,
    position,
    key_ptr,
    value_ptr,
    table,
    block,
    first_tile,
    end,
    share_end,
    kv_head,
    dim,
    scale,
    unmasked_end,
    HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_MODE: tl.constexpr,
    DOT: tl.constexpr,
):
    """The softmax state of one segment, whose tiles begin at `first_tile` and end before `end`.

    Takes the blocks of the first tile and returns those of the tile behind the last: they are looked up a tile ahead, so
    that keys and values need not wait for them. `share_end` is where this program's KV ends.
    """
    peak, mass, acc = empty_state(q.shape[0], q.shape[1])
    tile_position = tl.arange(0, TILE)
    for first in range(first_tile, end, TILE):
        next_block = pages_of_tile(table, first + TILE, share_end, tile_position, BLOCK)
        peak, mass, acc = add_tile(
            peak, mass, acc, q, position, key_ptr, value_ptr, block, first, end, kv_head, tile_position,
            dim, scale, unmasked_end, HEAD, NUM_KV_HEADS, BLOCK, WINDOW, KV_MODE, DOT,
        )  # fmt: skip
        block = next_block
    return peak, mass, acc, block


@triton.jit
def walk_share(
    q,
    start_position,
    token,
    first_token,
    key_ptr,
    value_ptr,
    table,
    block,
    begin,
    end,
    kv_head,
    dim,
    scale,
    state_ptr,
    partial_ptr,
    states_of_segment_0,
    num_states,
    valid,
    in_head,
    HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_MODE: tl.constexpr,
    DOT: tl.constexpr,
):
    """The sums over this program's KV; with SPLIT it also leaves the state of each segment."""
    unmasked_end = 0
    if WINDOW == 0:
        unmasked_end = start_position + first_token + 1
    row_peak, row_mass, row_acc = empty_state(q.shape[0], q.shape[1])
    for segment in range(begin // SEGMENT, tl.cdiv(end, SEGMENT)):
        peak, mass, acc, block = walk_segment(
            q, start_position + token, key_ptr, value_ptr, table, block, tl.maximum(begin, segment * SEGMENT),
            tl.minimum(end, (segment + 1) * SEGMENT), end, kv_head, dim, scale, unmasked_end,
            HEAD, NUM_KV_HEADS, BLOCK, TILE, WINDOW, KV_MODE, DOT,
        )  # fmt: skip
        if SPLIT:
            at = states_of_segment_0 + segment * num_states
            store_state(state_ptr, partial_ptr, at, peak, mass, acc, valid, dim, in_head, HEAD)
        row_peak, row_mass, row_acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)
    return row_mass, row_acc


@triton.jit
def arrives_last(arrivals, num_workers):
    """Whether all others that share a row's KV have left their states; then the count is ready for the next launch."""
    # All threads' stores come before the arrival, and the last arrival sees every store before it.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_workers - 1
    if last:
        tl.store(arrivals, 0)
    return last


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
    row, row_start, first_token = locate(query_start_ptr, tile, num_rows, QUERY_TOKENS, LONG_ROWS, "")
    num_tokens = tl.load(query_start_ptr + row + 1) - row_start
    if first_token >= num_tokens:
        return

    start_position = tl.load(start_ptr + row)
    begin, end, first_segment, num_segments = kv_of_tile(
        start_position, first_token, num_tokens, QUERY_TOKENS, TILE, SEGMENT, WINDOW
    )
    if SPLIT:
        begin, end, num_workers = share_of_kv(
            begin, end, first_segment, num_segments, tl.program_id(2), tl.num_programs(2), SEGMENT
        )
        if tl.program_id(2) >= num_workers:
            return

    table = table_ptr + row.to(tl.int64) * table_stride
    block = pages_of_tile(table, begin, end, tl.arange(0, TILE), BLOCK)

    pair = tl.arange(0, PAIRS)
    token = first_token + pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    valid = (pair < QUERY_TOKENS * GROUP) & (token < num_tokens)
    dim = tl.arange(0, HEAD_PADDED)
    in_head = dim < HEAD
    in_pairs = valid[:, None] & in_head[None, :]
    q = tl.load(q_ptr + pair_offset(row_start + token, head, dim, q_stride, HEAD), mask=in_pairs, other=0.0).to(DOT)
    work = (tile * NUM_KV_HEADS + kv_head).to(tl.int64)
    work_states = work * max_segments * num_states + pair
    row_mass, row_acc = walk_share(
        q, start_position, token, first_token, key_ptr, value_ptr, table, block,
        begin, end, kv_head, dim, scale, state_ptr, partial_ptr, work_states - first_segment * num_states, num_states,
        valid, in_head, HEAD, NUM_KV_HEADS, BLOCK, TILE, SEGMENT, WINDOW, SPLIT, KV_MODE, DOT,
    )  # fmt: skip

    if SPLIT:  # noqa: SIM102 - a compile-time condition around a run-time one
        if num_workers > 1:
            if not arrives_last(arrivals_ptr + work, num_workers):
                return
            row_mass, row_acc = merge_shares(
                state_ptr, partial_ptr, work_states, num_segments, num_states, scale, valid, dim, in_head,
                HEAD, MERGE_STAGES,
            )  # fmt: skip
    out_at = pair_offset(row_start + token, head, dim, out_stride, HEAD)
    store_outputs(out_ptr, out_at, row_mass, row_acc, in_pairs)
