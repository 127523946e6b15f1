"""How a warp group of `hopper.py` walks tiles of keys and values: scores, weights and sums, in the order of `attend.py`.

A row's maximum, sum and accumulator lie in registers as the products of scores, ones and values do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triode.kernels.paged_attention import states
from triode.kernels.paged_attention.states import State

LOWEST = gl.constexpr(states.LOWEST.value)
ONES = gl.constexpr(states.ONES.value)
# Pairs of one warp group: the rows of its instruction.
GROUP_PAIRS = gl.constexpr(64)
# Triton 3.7 calls it as given first; before, it had another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


class States(NamedTuple):
    """Where programs that share a query tile's KV leave the states of segments."""

    state_ptr: gl.tensor
    """Maxima and sums, in turn."""
    partial_ptr: gl.tensor
    """Accumulators."""
    max_segments: gl.tensor
    """Of a query tile."""
    num_states: gl.tensor
    """Of a segment."""


class Pipe(NamedTuple):
    """Tiles of keys, or of values, on their way from the copying warp to those that compute: one place for each stage."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    """Barriers: a tile has come."""
    free: gl.shared_memory_descriptor
    """Barriers: both warp groups have read it."""


class Pipes(NamedTuple):
    """What warp groups multiply by."""

    of_keys: Pipe
    of_values: Pipe
    ones: gl.shared_memory_descriptor


@gluon.jit
def filled(pipe, stage, step):
    """The tile of a step, once it is there."""
    mbarrier.wait(pipe.full.index(stage), step // pipe.tiles.shape[0] % 2)
    return pipe.tiles.index(stage)


@gluon.jit
def release(pipe, stage):
    """This warp group has read the tile in this place."""
    barrier()
    mbarrier.arrive(pipe.free.index(stage))


@gluon.jit
def weigh(s, peak, first, position, scale, unmasked_end, WINDOW: gl.constexpr, DOT: gl.constexpr):
    """A tile's scores become weights; also the new maximum, and the factor that the sums so far take on."""
    if first + s.shape[1] > unmasked_end:
        kv = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        visible = kv[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (kv[None, :] > position[:, None] - WINDOW)
        s = gl.where(visible, s, -float("inf"))
    new = gl.maximum(peak, gl.max(s, 1))
    alpha = gl.exp2((peak - new) * scale)
    return new, alpha, gl.exp2(gl.fma(s, gl.to_tensor(scale), -(new * scale)[:, None])).to(DOT)


@gluon.jit
def times(x, factor):
    """Rows of `x` times their factors, whatever layout these are in."""
    return x * gl.convert_layout(factor, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def clear_from(tile, num_rows, LAYOUT: gl.constexpr):
    """Make the rows from `num_rows` on zero: what a block holds behind a row's end may be NaN, which 0 times is NaN.

    Both warp groups do, with the same zeros.
    """
    x = tile.load(LAYOUT)
    inside = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT)) < num_rows
    barrier()
    tile.store(gl.where(inside[:, None], x, gl.full_like(x, 0.0)))
    fence_async_shared()
    barrier()


@gluon.jit
def empty_state(TILE: gl.constexpr, HEAD: gl.constexpr):
    """The softmax state of no keys at all, as the products of scores, ones and values lie in registers."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ONES, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD, 16])
    peak = gl.full([GROUP_PAIRS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    mass = gl.full([GROUP_PAIRS, ONES], 0.0, gl.float32, SUM)
    return State(peak, mass, gl.full([GROUP_PAIRS, HEAD], 0.0, gl.float32, ACC))


@gluon.jit
def ask_for_scores(q_tile, k_tile, TILE: gl.constexpr):
    """The products of the queries with a tile's keys, which are waited for later."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    nothing = gl.full([GROUP_PAIRS, TILE], 0.0, gl.float32, SCORES)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def ask_for_sums(weights, ones, v_tile, mass, acc):
    """The sums so far and those of one more tile's weights and weighted values, which are waited for later."""
    TO_SUM: gl.constexpr = gl.DotOperandLayout(0, mass.type.layout, 2)
    sums = warpgroup_mma(gl.convert_layout(weights, TO_SUM), ones, mass, is_async=True)
    return sums, warpgroup_mma(weights, v_tile, acc, is_async=True)


@gluon.jit
def walk_segment(
    q_tile, pipes, step, first, end, position, scale, unmasked_end,
    LAYOUT: gl.constexpr, WINDOW: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """The state of one segment, whose tiles begin at `first` and end before `end`, and the next step."""
    keys, values, ones = pipes
    STAGES: gl.constexpr = keys.tiles.shape[0]
    TILE: gl.constexpr = keys.tiles.shape[1]
    peak, mass, acc = empty_state(TILE, keys.tiles.shape[2])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)

    stage = step % STAGES
    s = warpgroup_mma_wait(0, [ask_for_scores(q_tile, filled(keys, stage, step), TILE)])
    release(keys, stage)
    peak, alpha, p = weigh(s, peak, first, position, scale, unmasked_end, WINDOW, DOT)
    weights = gl.convert_layout(p, WEIGHTS)
    for next_first in range(first + TILE, end, TILE):
        next_stage = (step + 1) % STAGES
        scores = ask_for_scores(q_tile, filled(keys, next_stage, step + 1), TILE)
        sums, products = ask_for_sums(weights, ones, filled(values, stage, step), mass, acc)
        s = warpgroup_mma_wait(2, [scores])
        release(keys, next_stage)
        peak, alpha, p = weigh(s, peak, next_first, position, scale, unmasked_end, WINDOW, DOT)
        acc, mass, weights = warpgroup_mma_wait(0, [products, sums, weights])
        release(values, stage)
        acc, mass = times(acc, alpha), times(mass, alpha)
        weights = gl.convert_layout(p, WEIGHTS)
        step += 1
        # Counted anew from the step, places cost a windowed prefill of 2,048 tokens 79.2 us instead of 74.9 on an H100.
        stage = next_stage
    v_tile = filled(values, stage, step)
    if end % TILE > 0:
        clear_from(v_tile, end % TILE, LAYOUT)
    sums, products = ask_for_sums(weights, ones, v_tile, mass, acc)
    acc, mass, weights = warpgroup_mma_wait(0, [products, sums, weights])
    release(values, stage)
    return State(peak, mass, acc), step + 1


@gluon.jit
def scaled_sum(x, a, x2, b):
    """x times a plus x2 times b, for rows: the multiply-adds of `states.merge`."""
    a = gl.convert_layout(a, gl.SliceLayout(1, x.type.layout))
    return gl.fma(x, a[:, None] + gl.full_like(x, 0.0), times(x2, b))


@gluon.jit
def merge(row, segment, scale):
    """A row's state with a segment's, as `states.merge` has it."""
    peak = gl.maximum(row.peak, segment.peak)
    a = gl.exp2((row.peak - peak) * scale)
    b = gl.exp2((segment.peak - peak) * scale)
    return State(peak, scaled_sum(row.mass, a, segment.mass, b), scaled_sum(row.acc, a, segment.acc, b))


@gluon.jit
def store_state(states, work, segment, state, num_pairs, WHICH: gl.constexpr):
    """Leave a segment's state as `states.store_state` does, from the registers where it is."""
    peak, mass, acc = state
    HEAD: gl.constexpr = acc.shape[1]
    first = (work.to(gl.int64) * states.max_segments + segment) * states.num_states
    total = gl.max(mass, 1)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, peak.type.layout)
    gl.store(states.state_ptr + (first + pair) * 2, peak, mask=pair < num_pairs)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, total.type.layout)
    gl.store(states.state_ptr + (first + pair) * 2 + 1, total, mask=pair < num_pairs)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, acc.type.layout))
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, acc.type.layout))
    at = pair[:, None] * HEAD + dim[None, :]
    gl.store(states.partial_ptr + first * HEAD + at, acc, mask=(pair < num_pairs)[:, None])
