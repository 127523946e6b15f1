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

from typing import NamedTuple

import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.paged_attention.states import (
    ONES,
    Places,
    State,
    empty_state,
    merge,
    merge_shares,
    store_outputs,
    store_state,
)
from triode.kernels.paged_attention.work import kv_of_tile, locate, offset_of_pairs, pairs_of_tile, share_of_kv


class Keys(NamedTuple):
    """Where a row has the keys and values of one KV head."""

    key_ptr: tl.tensor
    value_ptr: tl.tensor
    table: tl.tensor
    """The row's block table."""
    kv_head: tl.tensor


class Queries(NamedTuple):
    """What is asked of keys."""

    q: tl.tensor
    """M x H."""
    position: tl.tensor
    """M."""
    unmasked_end: tl.tensor
    """Every pair sees all of a tile that ends by this position."""
    scale: tl.tensor
    """Of scores, log2(e) included."""


@triton.jit
def load_kv(at, mask, KV_MODE: tl.constexpr, DOT: tl.constexpr):
    """A tile of keys or values, as operand of a matrix product."""
    tl.static_assert(KV_MODE == 0, "this KV format has no kernel")
    return tl.load(at, mask=mask, other=0.0).to(DOT)


@triton.jit
def blocks_of_tile(table, first, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The blocks that hold each position of the tile that begins at `first`."""
    tile_position = tl.arange(0, TILE)
    if TILE % BLOCK == 0:
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
def hide_unseen(s, position, kv, WINDOW: tl.constexpr):
    """The scores of keys at `kv` for queries at `position`, -inf where a query does not see the key."""
    visible = kv[None, :] <= position[:, None]
    if WINDOW > 0:
        visible = visible & (kv[None, :] > position[:, None] - WINDOW)
    return tl.where(visible, s, -float("inf"))


@triton.jit
def add_tile(
    state, queries, keys, block, first, end,
    HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, KV_MODE: tl.constexpr,
):  # fmt: skip
    """A segment's state after one more tile, whose positions are in the blocks `block`."""
    q = queries.q
    tile_position = tl.arange(0, block.shape[0])
    dim = tl.arange(0, q.shape[1])
    kv = first + tile_position
    place = place_in_block(first, tile_position, keys.kv_head, dim, HEAD, NUM_KV_HEADS, BLOCK)
    block_at = block.to(tl.int64)[:, None] * (BLOCK * NUM_KV_HEADS * HEAD)
    mask = (kv < end)[:, None]
    if dim.shape[0] > HEAD:
        mask = mask & (dim < HEAD)[None, :]
    k = load_kv(keys.key_ptr + place + block_at, mask, KV_MODE, q.dtype)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if first + kv.shape[0] > queries.unmasked_end:
        s = hide_unseen(s, queries.position, kv, WINDOW)
    peak = tl.maximum(state.peak, tl.max(s, 1))
    alpha = tl.exp2((state.peak - peak) * queries.scale)
    p = tl.exp2(tl.math.fma(s, queries.scale, -(peak * queries.scale)[:, None])).to(q.dtype)
    ones = tl.full([kv.shape[0], ONES], 1.0, q.dtype)
    mass = tl.dot(p, ones, state.mass * alpha[:, None], input_precision="ieee")
    v = load_kv(keys.value_ptr + place + block_at, mask, KV_MODE, q.dtype)
    return State(peak, mass, tl.dot(p, v, state.acc * alpha[:, None], input_precision="ieee"))


@triton.jit
def walk_segment(
    queries, keys, block, first_tile, end, share_end, HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, KV_MODE: tl.constexpr,
):  # fmt: skip
    """The state of one segment, whose tiles begin at `first_tile` and end before `end`.

    Takes the blocks of the first tile and returns those of the tile behind the last: they are looked up a tile ahead, so
    that keys and values need not wait for them. `share_end` is where this program's KV ends.
    """
    state = empty_state(queries.q.shape[0], queries.q.shape[1])
    for first in range(first_tile, end, TILE):
        next_block = blocks_of_tile(keys.table, first + TILE, share_end, BLOCK, TILE)
        state = add_tile(state, queries, keys, block, first, end, HEAD, NUM_KV_HEADS, BLOCK, WINDOW, KV_MODE)
        block = next_block
    return state, block


@triton.jit
def walk_share(
    queries, keys, block, begin, end, places, valid, HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    KV_MODE: tl.constexpr,
):  # fmt: skip
    """A row's state after this program's KV; with SPLIT it also leaves the state of each segment."""
    row = empty_state(queries.q.shape[0], queries.q.shape[1])
    for segment in range(begin // SEGMENT, tl.cdiv(end, SEGMENT)):
        first_tile = tl.maximum(begin, segment * SEGMENT)
        segment_end = tl.minimum(end, (segment + 1) * SEGMENT)
        state, block = walk_segment(
            queries, keys, block, first_tile, segment_end, end, HEAD, NUM_KV_HEADS, BLOCK, TILE, WINDOW, KV_MODE
        )
        if SPLIT:
            store_state(places, segment, state, valid, HEAD)
        row = merge(row, state, queries.scale)
    return row


@triton.jit
def arrives_last(arrivals, num_workers):
    """Whether all others that share a row's KV have left their states; then the count is ready for the next launch."""
    # All threads' stores come before the arrival, and the last arrival sees every store before it.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == num_workers - 1
    if last:
        tl.store(arrivals, 0)
    return last


# Rows that are not the first of a step begin anywhere.
@triton.jit(
    do_not_specialize=["num_rows", "table_stride", "max_segments", "num_states"],
    do_not_specialize_on_alignment=["table_ptr", "query_start_ptr", "start_ptr"],
)
def attend(
    q_ptr, key_ptr, value_ptr, table_ptr, query_start_ptr, start_ptr, out_ptr, state_ptr, partial_ptr, arrivals_ptr,
    num_rows, table_stride, max_segments, num_states, scale, q_stride, out_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr, QUERY_TOKENS: tl.constexpr, TILE: tl.constexpr,
    SEGMENT: tl.constexpr, WINDOW: tl.constexpr, LONG_ROWS: tl.constexpr, SPLIT: tl.constexpr,
    MERGE_STAGES: tl.constexpr, KV_MODE: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One query tile of one KV head; with SPLIT one share of its KV segments. `scale` includes log2(e)."""
    wait_for_inputs(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if LONG_ROWS:
        # The last tiles of a prompt walk the most KV: starting them first evens out the end of the launch.
        tile = tl.num_programs(0) - 1 - tile
    row, row_start, num_tokens, first_token = locate(query_start_ptr, tile, num_rows, QUERY_TOKENS, LONG_ROWS, "")
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
    block = blocks_of_tile(table, begin, end, BLOCK, TILE)

    pairs = pairs_of_tile(0, first_token, num_tokens, kv_head, GROUP, QUERY_TOKENS, PAIRS)
    dim = tl.arange(0, HEAD_PADDED)
    in_pairs = pairs.valid[:, None] & (dim < HEAD)[None, :]
    q = tl.load(q_ptr + offset_of_pairs(pairs, row_start, dim, q_stride, HEAD), mask=in_pairs, other=0.0).to(DOT)
    unmasked_end = start_position + first_token + 1 if WINDOW == 0 else 0
    work = (tile * NUM_KV_HEADS + kv_head).to(tl.int64)
    first_state = work * max_segments * num_states + pairs.number
    # A walk counts segments from position 0, a merge from the first that there is.
    places = Places(state_ptr, partial_ptr, first_state - first_segment * num_states, num_states)
    state = walk_share(
        Queries(q, start_position + pairs.token, unmasked_end, scale), Keys(key_ptr, value_ptr, table, kv_head), block,
        begin, end, places, pairs.valid,
        HEAD, NUM_KV_HEADS, BLOCK, TILE, SEGMENT, WINDOW, SPLIT, KV_MODE,
    )  # fmt: skip
    if SPLIT:  # noqa: SIM102 - a compile-time condition around a run-time one
        if num_workers > 1:
            if not arrives_last(arrivals_ptr + work, num_workers):
                return
            places = Places(state_ptr, partial_ptr, first_state, num_states)
            state = merge_shares(places, num_segments, scale, pairs.valid, HEAD, HEAD_PADDED, MERGE_STAGES)
    store_outputs(out_ptr, offset_of_pairs(pairs, row_start, dim, out_stride, HEAD), state, in_pairs)
