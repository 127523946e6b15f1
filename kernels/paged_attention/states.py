"""Softmax states of segments: how they are merged, left for others in memory, and become outputs.

M (query token, head) pairs of a program
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

import triton
import triton.language as tl

from triode.kernels.device_code import let_next_start, wait_for_previous
from triode.kernels.paged_attention.work import kv_of_tile, locate, pair_offset

ONES = tl.constexpr(8)  # Columns of the product that sums a row's weights, all equal: the fewest that there may be.
LOWEST = tl.constexpr(-1e30)  # finite, so that the difference of two empty maxima is 0 and not NaN


@triton.jit
def empty_state(PAIRS: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """The softmax state (maximum, sum, accumulator) of no keys at all."""
    peak = tl.full([PAIRS], LOWEST, tl.float32)
    return peak, tl.zeros([PAIRS, ONES], tl.float32), tl.zeros([PAIRS, HEAD_PADDED], tl.float32)


@triton.jit
def merge(peak, mass, acc, peak2, mass2, acc2, scale):
    """Add a segment's softmax state to a row's. Both multiply-adds are explicit: no compiler may choose the rounding."""
    new = tl.maximum(peak, peak2)
    a = tl.exp2((peak - new) * scale)
    b = tl.exp2((peak2 - new) * scale)
    mass = tl.math.fma(mass, a[:, None], mass2 * b[:, None])
    return new, mass, tl.math.fma(acc, a[:, None], acc2 * b[:, None])


@triton.jit
def store_state(state_ptr, partial_ptr, at, peak, mass, acc, valid, dim, in_head, HEAD: tl.constexpr):
    """Leave a segment's softmax state for the program that merges them."""
    tl.store(state_ptr + at * 2, peak, mask=valid)
    tl.store(state_ptr + at * 2 + 1, tl.max(mass, 1), mask=valid)
    tl.store(partial_ptr + at[:, None] * HEAD + dim[None, :], acc, mask=valid[:, None] & in_head[None, :])


@triton.jit
def load_state(state_ptr, partial_ptr, at, valid, dim, in_head, HEAD: tl.constexpr):
    """What `store_state` left, past L1, which another launch on this multiprocessor may have filled."""
    peak = tl.load(state_ptr + at * 2, mask=valid, other=LOWEST, cache_modifier=".cg")
    mass = tl.load(state_ptr + at * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")
    mass = tl.broadcast_to(mass[:, None], [at.shape[0], ONES])
    acc_mask = valid[:, None] & in_head[None, :]
    acc_at = at[:, None] * HEAD + dim[None, :]
    acc = tl.load(partial_ptr + acc_at, mask=acc_mask, other=0.0, cache_modifier=".cg")
    return peak, mass, acc


@triton.jit
def merge_shares(
    state_ptr,
    partial_ptr,
    first_state,
    num_segments,
    num_states,
    scale,
    valid,
    dim,
    in_head,
    HEAD: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
):
    """The row's state from those that all its programs have left, in the order in which one program would merge."""
    row_peak, row_mass, row_acc = empty_state(valid.shape[0], dim.shape[0])
    for segment in tl.range(num_segments, num_stages=MERGE_STAGES):
        at = first_state + segment * num_states
        peak, mass, acc = load_state(state_ptr, partial_ptr, at, valid, dim, in_head, HEAD)
        row_peak, row_mass, row_acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)
    return row_mass, row_acc


@triton.jit
def store_outputs(out_ptr, at, mass, acc, mask):
    """The quotients of accumulators and sums."""
    mass = tl.max(mass, 1)
    out = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_segments(
    state_ptr,
    partial_ptr,
    first_state,
    num_segments,
    num_states,
    scale,
    valid,
    dim,
    HEAD: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """What `merge_shares` computes; the states of AHEAD segments are fetched at once, into registers."""
    row_peak, row_mass, row_acc = empty_state(valid.shape[0], dim.shape[0])
    in_head = dim < HEAD
    for first in range(0, num_segments, AHEAD):
        states = ()
        for ahead in tl.static_range(AHEAD):
            segment = first + ahead
            at = first_state + segment * num_states
            state = load_state(state_ptr, partial_ptr, at, valid & (segment < num_segments), dim, in_head, HEAD)
            states = states + (state,)  # noqa: RUF005 - Triton knows no starred elements
        for ahead in tl.static_range(AHEAD):
            peak, mass, acc = states[ahead]
            peak, mass, acc = merge(row_peak, row_mass, row_acc, peak, mass, acc, scale)
            there = first + ahead < num_segments
            row_peak, row_mass = tl.where(there, peak, row_peak), tl.where(there, mass, row_mass)
            row_acc = tl.where(there, acc, row_acc)
    return row_mass, row_acc


@triton.jit(do_not_specialize=["max_segments", "num_states", "num_rows"])
def merge_long_rows(
    query_start_ptr,
    start_ptr,
    out_ptr,
    state_ptr,
    partial_ptr,
    max_segments,
    num_states,
    num_rows,
    scale,
    out_stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    WINDOW: tl.constexpr,
    PAIRS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The outputs of some pairs of one query tile and KV head, whose segments' states `hopper.py` has left."""
    let_next_start(PDL)
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    # That kernel lets this one start when all before itself has finished: rows are in L2 by then, whatever L1 holds.
    row, row_start, first_token = locate(query_start_ptr, tile, num_rows, QUERY_TOKENS, True, ".cg")
    num_tokens = tl.load(query_start_ptr + row + 1, cache_modifier=".cg") - row_start
    pair = tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)
    if first_token + tl.program_id(2) * PAIRS // GROUP >= num_tokens:
        return
    _begin, _end, _first, num_segments = kv_of_tile(
        tl.load(start_ptr + row, cache_modifier=".cg"), first_token, num_tokens, QUERY_TOKENS, TILE, SEGMENT, WINDOW
    )
    token = first_token + pair // GROUP
    valid = (pair < QUERY_TOKENS * GROUP) & (token < num_tokens)
    dim = tl.arange(0, HEAD)
    first_state = (tile * NUM_KV_HEADS + kv_head).to(tl.int64) * max_segments * num_states + pair
    wait_for_previous(PDL)
    mass, acc = merge_segments(
        state_ptr, partial_ptr, first_state, num_segments, num_states, scale, valid, dim, HEAD, AHEAD
    )
    out_at = pair_offset(row_start + token, kv_head * GROUP + pair % GROUP, dim, out_stride, HEAD)
    store_outputs(out_ptr, out_at, mass, acc, valid[:, None])
