"""How a warp group of `hopper.py` walks tiles of keys and values: scores, weights and sums, in the order of `attend.py`.

`pipes` are places for tiles of keys and of values; whether keys and values are there; whether their places are free; and
columns of ones. A row's maximum, sum and accumulator lie in registers as the products of scores, ones and values do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triode.kernels.paged_attention import states

LOWEST = gl.constexpr(states.LOWEST.value)
ONES = gl.constexpr(states.ONES.value)
# Pairs of one warp group: the rows of its instruction.
GROUP_PAIRS = gl.constexpr(64)
# Triton 3.7 calls it as given first; before, it had another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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
    return peak, mass, gl.full([GROUP_PAIRS, HEAD], 0.0, gl.float32, ACC)


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
    q_tile,
    pipes,
    step,
    first,
    end,
    position,
    scale,
    unmasked_end,
    LAYOUT: gl.constexpr,
    WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
    DOT: gl.constexpr,
):
    """The softmax state of one segment, whose tiles begin at `first` and end before `end`, and the next step."""
    k_tiles, v_tiles, k_full, v_full, k_free, v_free, ones = pipes
    TILE: gl.constexpr = k_tiles.shape[1]
    peak, mass, acc = empty_state(TILE, k_tiles.shape[2])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)

    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), step // STAGES % 2)
    s = warpgroup_mma_wait(0, [ask_for_scores(q_tile, k_tiles.index(stage), TILE)])
    barrier()
    mbarrier.arrive(k_free.index(stage))
    peak, alpha, p = weigh(s, peak, first, position, scale, unmasked_end, WINDOW, DOT)
    weights = gl.convert_layout(p, WEIGHTS)
    for next_first in range(first + TILE, end, TILE):
        next_stage = (step + 1) % STAGES
        mbarrier.wait(k_full.index(next_stage), (step + 1) // STAGES % 2)
        scores = ask_for_scores(q_tile, k_tiles.index(next_stage), TILE)
        mbarrier.wait(v_full.index(stage), step // STAGES % 2)
        sums, products = ask_for_sums(weights, ones, v_tiles.index(stage), mass, acc)
        s = warpgroup_mma_wait(2, [scores])
        barrier()
        mbarrier.arrive(k_free.index(next_stage))
        peak, alpha, p = weigh(s, peak, next_first, position, scale, unmasked_end, WINDOW, DOT)
        acc, mass, weights = warpgroup_mma_wait(0, [products, sums, weights])
        barrier()
        mbarrier.arrive(v_free.index(stage))
        acc, mass = times(acc, alpha), times(mass, alpha)
        weights = gl.convert_layout(p, WEIGHTS)
        step += 1
        stage = next_stage
    mbarrier.wait(v_full.index(stage), step // STAGES % 2)
    v_tile = v_tiles.index(stage)
    if end % TILE > 0:
        clear_from(v_tile, end % TILE, LAYOUT)
    sums, products = ask_for_sums(weights, ones, v_tile, mass, acc)
    acc, mass, weights = warpgroup_mma_wait(0, [products, sums, weights])
    barrier()
    mbarrier.arrive(v_free.index(stage))
    return peak, mass, acc, step + 1


@gluon.jit
def scaled_sum(x, a, x2, b):
    """x times a plus x2 times b, for rows: the multiply-adds of `states.merge`."""
    a = gl.convert_layout(a, gl.SliceLayout(1, x.type.layout))
    return gl.fma(x, a[:, None] + gl.full_like(x, 0.0), times(x2, b))


@gluon.jit
def merge(row_peak, row_mass, row_acc, peak, mass, acc, scale):
    """A row's softmax state (maximum, sum, accumulator) with a segment's, as `states.merge` has it."""
    new = gl.maximum(row_peak, peak)
    a = gl.exp2((row_peak - new) * scale)
    b = gl.exp2((peak - new) * scale)
    return new, scaled_sum(row_mass, a, mass, b), scaled_sum(row_acc, a, acc, b)


@gluon.jit
def store_state(states, work, segment, peak, mass, acc, num_pairs, WHICH: gl.constexpr):
    """Leave a segment's softmax state as `states.store_state` does, from the registers where it is."""
    state_ptr, partial_ptr, max_segments, num_states = states
    HEAD: gl.constexpr = acc.shape[1]
    first = (work.to(gl.int64) * max_segments + segment) * num_states
    total = gl.max(mass, 1)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, peak.type.layout)
    gl.store(state_ptr + (first + pair) * 2, peak, mask=pair < num_pairs)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, total.type.layout)
    gl.store(state_ptr + (first + pair) * 2 + 1, total, mask=pair < num_pairs)
    pair = WHICH * GROUP_PAIRS + gl.arange(0, GROUP_PAIRS, gl.SliceLayout(1, acc.type.layout))
    dim = gl.arange(0, HEAD, gl.SliceLayout(0, acc.type.layout))
    at = pair[:, None] * HEAD + dim[None, :]
    gl.store(partial_ptr + first * HEAD + at, acc, mask=(pair < num_pairs)[:, None])
