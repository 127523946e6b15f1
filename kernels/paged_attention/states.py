"""Softmax states of segments: how they are merged, left for others in memory, and become outputs.

H head dim    M (query token, head) pairs of a program
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from typing import NamedTuple

import triton
import triton.language as tl

from triode.kernels.device_code import let_next_start, wait_for_previous
from triode.kernels.paged_attention.work import kv_of_tile, locate, offset_of_pairs, pairs_of_tile

ONES = tl.constexpr(8)  # Columns of the product that sums a row's weights, all equal: the fewest that there may be.
LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two empty maxima is 0 and not NaN


class State(NamedTuple):
    """What softmax has of some keys, for each pair."""

    peak: tl.tensor
    """The maximum of the scores; M."""
    mass: tl.tensor
    """The sum of the weights, M x ONES: all columns are equal."""
    acc: tl.tensor
    """The sum of the weighted values; M x H."""


class Places(NamedTuple):
    """Where the programs that share a query tile's KV leave the states of its segments."""

    state_ptr: tl.tensor
    """Maxima and sums, in turn."""
    partial_ptr: tl.tensor
    """Accumulators."""
    first: tl.tensor
    """Which state is each pair's in segment 0; M."""
    num_states: tl.tensor
    """From one segment's to the next one's."""


@triton.jit
def empty_state(PAIRS: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """The state of no keys at all."""
    peak = tl.full([PAIRS], LOWEST, tl.float32)
    return State(peak, tl.zeros([PAIRS, ONES], tl.float32), tl.zeros([PAIRS, HEAD_PADDED], tl.float32))


@triton.jit
def merge(row, segment, scale):
    """Add a segment's state to a row's. Both multiply-adds are explicit: no compiler may choose the rounding."""
    peak = tl.maximum(row.peak, segment.peak)
    a = tl.exp2((row.peak - peak) * scale)
    b = tl.exp2((segment.peak - peak) * scale)
    mass = tl.math.fma(row.mass, a[:, None], segment.mass * b[:, None])
    return State(peak, mass, tl.math.fma(row.acc, a[:, None], segment.acc * b[:, None]))


@triton.jit
def store_state(places, segment, state, valid, HEAD: tl.constexpr):
    """Leave a segment's state for the program that merges them."""
    at = places.first + segment * places.num_states
    dim = tl.arange(0, state.acc.shape[1])
    mask = valid[:, None] & (dim < HEAD)[None, :]
    tl.store(places.state_ptr + at * 2, state.peak, mask=valid)
    tl.store(places.state_ptr + at * 2 + 1, tl.max(state.mass, 1), mask=valid)
    tl.store(places.partial_ptr + at[:, None] * HEAD + dim[None, :], state.acc, mask=mask)


@triton.jit
def load_state(places, segment, valid, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """What `store_state` left, past L1, which another launch on this multiprocessor may have filled."""
    at = places.first + segment * places.num_states
    peak = tl.load(places.state_ptr + at * 2, mask=valid, other=LOWEST, cache_modifier=".cg")
    mass = tl.load(places.state_ptr + at * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")
    mass = tl.broadcast_to(mass[:, None], [at.shape[0], ONES])
    dim = tl.arange(0, HEAD_PADDED)
    acc_mask = valid[:, None] & (dim < HEAD)[None, :]
    acc_at = at[:, None] * HEAD + dim[None, :]
    acc = tl.load(places.partial_ptr + acc_at, mask=acc_mask, other=0.0, cache_modifier=".cg")
    return State(peak, mass, acc)


@triton.jit
def merge_shares(
    places, num_segments, scale, valid, HEAD: tl.constexpr, HEAD_PADDED: tl.constexpr, MERGE_STAGES: tl.constexpr
):
    """The row's state from those that all its programs have left, in the order in which one program would merge."""
    row = empty_state(valid.shape[0], HEAD_PADDED)
    for segment in tl.range(num_segments, num_stages=MERGE_STAGES):
        row = merge(row, load_state(places, segment, valid, HEAD, HEAD_PADDED), scale)
    return row


@triton.jit
def store_outputs(out_ptr, at, state, mask):
    """The quotients of accumulators and sums."""
    mass = tl.max(state.mass, 1)
    out = state.acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_ahead(places, num_segments, scale, valid, HEAD: tl.constexpr, AHEAD: tl.constexpr):
    """What `merge_shares` computes; the states of AHEAD segments are fetched at once, into registers."""
    row = empty_state(valid.shape[0], HEAD)
    for first in range(0, num_segments, AHEAD):
        states = ()
        for ahead in tl.static_range(AHEAD):
            segment = first + ahead
            state = load_state(places, segment, valid & (segment < num_segments), HEAD, HEAD)
            states = states + (state,)  # noqa: RUF005 - Triton knows no starred elements
        for ahead in tl.static_range(AHEAD):
            # Triton 3.6 forgets the names in a tuple that is in a tuple.
            peak, mass, acc = states[ahead]
            merged = merge(row, State(peak, mass, acc), scale)
            there = first + ahead < num_segments
            peak, mass = tl.where(there, merged.peak, row.peak), tl.where(there, merged.mass, row.mass)
            row = State(peak, mass, tl.where(there, merged.acc, row.acc))
    return row


@triton.jit(do_not_specialize=["max_segments", "num_states", "num_rows"])
def merge_long_rows(
    query_start_ptr, start_ptr, out_ptr, state_ptr, partial_ptr,
    max_segments, num_states, num_rows, scale, out_stride,
    GROUP: tl.constexpr, HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, WINDOW: tl.constexpr,
    PAIRS: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The outputs of some pairs of one query tile and KV head, whose segments' states `hopper.py` has left."""
    let_next_start(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    # That kernel lets this one start when all before itself has finished: rows are in L2 by then, whatever L1 holds.
    row, row_start, num_tokens, first_token = locate(query_start_ptr, tile, num_rows, QUERY_TOKENS, True, ".cg")
    first_pair = tl.program_id(2) * PAIRS
    if first_token + first_pair // GROUP >= num_tokens:
        return
    start_position = tl.load(start_ptr + row, cache_modifier=".cg")
    _begin, _end, _first, num_segments = kv_of_tile(
        start_position, first_token, num_tokens, QUERY_TOKENS, TILE, SEGMENT, WINDOW
    )
    pairs = pairs_of_tile(first_pair, first_token, num_tokens, kv_head, GROUP, QUERY_TOKENS, PAIRS)
    dim = tl.arange(0, HEAD)
    first_state = (tile * NUM_KV_HEADS + kv_head).to(tl.int64) * max_segments * num_states + pairs.number
    places = Places(state_ptr, partial_ptr, first_state, num_states)
    wait_for_previous(PDL)
    state = merge_ahead(places, num_segments, scale, pairs.valid, HEAD, AHEAD)
    store_outputs(out_ptr, offset_of_pairs(pairs, row_start, dim, out_stride, HEAD), state, pairs.valid[:, None])
