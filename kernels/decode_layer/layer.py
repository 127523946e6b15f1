"""A decode step's layer from one attention to the next, in one kernel for one token on Hopper GPUs.

The idea. A layer of one token reads its weights once and computes next to nothing, so a chain of kernels loses at their
seams: each ramps up anew, and memory idles while sums are finished, normalised, written and read. Here as many programs as
multiprocessors stay for the whole layer. In each, one warp does nothing but copy this program's share of the o, gate-up,
down and next QKV weights, in this order, into a ring of places in shared memory (`stream.py`); four warps compute. Where a
product needs all of the one before it, they wait for all programs, through a counter in memory; the ring fills meanwhile.
Additions and norms every program does for itself.

Every sum is taken in the order of the kernels of many tokens, and rounded where they round: the bits are theirs.

A program that waits must not keep those it waits for from running: the launch is a cooperative one, which begins when all
programs have a place. The residual is read by all programs and written by one, so it goes to another buffer.

D hidden    A features of attention    F intermediate    N query heads    K KV heads    H head dim
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from triode.kernels import device_code
from triode.kernels.decode_layer.stream import STAGE, copy_pairs, copy_rows, sum_unit
from triode.kernels.decode_layer.vectors import (
    BLOCK,
    CHUNK,
    ROW,
    add,
    arrive,
    clear,
    fetch,
    halves,
    load_line,
    normalise,
    store_line,
    wait_for_all,
)
from triode.kernels.qkv_epilogue import gpu as qkv_epilogue

silu_times = gluon.jit(device_code.silu_times.fn)
rotate = gluon.jit(qkv_epilogue.rotate.fn)
store_part = gluon.jit(qkv_epilogue.store_part.fn)
# Each counter has a cache line.
LINE_WORDS = gl.constexpr(32)


@gluon.jit
def multiply(x, out_ptr, pipe, place, turn, PRODUCT: gl.constexpr):
    """A plain product's units of this program."""
    UNITS: gl.constexpr = PRODUCT[0]
    ROWS: gl.constexpr = PRODUCT[2]
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        acc, place, turn = sum_unit(x, pipe, place, turn, PRODUCT[1], ROWS)
        row = gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))[:, None]
        column = gl.arange(0, 8, gl.SliceLayout(0, acc.type.layout))[None, :]
        at = unit * ROWS + row + column
        gl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(row < ROWS) & (column == 0))
    return place, turn


@gluon.jit
def gate(x, out_ptr, pipe, place, turn, scratch, PRODUCT: gl.constexpr):
    """The gate-up product's units of this program, gated."""
    UNITS: gl.constexpr = PRODUCT[0]
    PAIRS: gl.constexpr = PRODUCT[2]
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        acc, place, turn = sum_unit(x, pipe, place, turn, PRODUCT[1], 2 * PAIRS)
        gates, ups = halves(acc, scratch, PAIRS)
        row = unit * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(1, ROW))[:, None]
        column = gl.arange(0, 8, gl.SliceLayout(0, ROW))[None, :]
        at = row + column
        gated = silu_times(gates, ups, out_ptr.dtype.element_ty)
        gl.store(out_ptr + at, gated.to(out_ptr.dtype.element_ty), mask=at == row)
    return place, turn


@gluon.jit
def project(
    x,
    projection,
    pipe,
    place,
    turn,
    scratch,
    PRODUCT: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HALF: gl.constexpr,
    BIAS: gl.constexpr,
):
    """The next layer's queries, keys and values: this program's pairs, as `project_qkv` has them."""
    bias_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, qkv_ptr, key_ptr, value_ptr = projection
    UNITS: gl.constexpr = PRODUCT[0]
    PAIRS: gl.constexpr = PRODUCT[2]
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    rope_at = gl.load(position_ptr).to(gl.int64) * HALF
    slot = gl.load(slot_ptr).to(gl.int64)
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        pair = (unit * PAIRS + gl.arange(0, PAIRS, gl.SliceLayout(1, ROW)))[:, None]
        head = pair // HALF
        dim = pair % HALF
        row = head * 2 * HALF + dim
        # Asked for before the product, which they would wait behind.
        cos = gl.load(cos_ptr + rope_at + dim)
        sin = gl.load(sin_ptr + rope_at + dim)
        if BIAS:
            bias1 = gl.load(bias_ptr + row).to(gl.float32)
            bias2 = gl.load(bias_ptr + row + HALF).to(gl.float32)
        acc, place, turn = sum_unit(x, pipe, place, turn, PRODUCT[1], 2 * PAIRS)
        x1, x2 = halves(acc, scratch, PAIRS)
        x1 = x1.to(dtype).to(gl.float32)
        x2 = x2.to(dtype).to(gl.float32)
        if BIAS:
            x1 += bias1
            x2 += bias2
        is_q = head < NUM_HEADS
        is_v = head >= NUM_HEADS + NUM_KV_HEADS
        y1, y2 = rotate(x1, x2, cos, sin, is_v)
        kv_head = gl.where(is_v, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
        column = gl.arange(0, 8, gl.SliceLayout(0, ROW))[None, :]
        at = row + column
        kv_at = (slot * NUM_KV_HEADS + kv_head) * 2 * HALF + dim + column
        mask = at == row
        is_k = (is_q | is_v) == 0
        store_part(qkv_ptr, key_ptr, value_ptr, y1, at, kv_at, mask, is_q, is_k, is_v)
        store_part(qkv_ptr, key_ptr, value_ptr, y2, at + HALF, kv_at + HALF, mask, is_q, is_k, is_v)
    return place, turn


@gluon.jit
def compute(
    vectors,
    projection,
    counter_ptr,
    eps,
    last,
    x,
    scratch,
    pipe,
    OUT: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
    QKV: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HALF: gl.constexpr,
    BIAS: gl.constexpr,
    HIDDEN: gl.constexpr,
    PADDED: gl.constexpr,
):
    """The computing warps: what they do not wait for, they ask for before they wait."""
    attended_ptr, residual_ptr, next_residual_ptr, o_ptr, gated_ptr, down_ptr, post_norm_ptr, next_norm_ptr = vectors
    place = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    clear(x)
    post_norm = load_line(post_norm_ptr, HIDDEN, PADDED)
    gdc_wait()
    # The last one that programs pass: when one arrives there, all have read it.
    target = gl.load(counter_ptr + 2 * LINE_WORDS, volatile=True) + gl.num_programs(0)
    fetch(x, attended_ptr, OUT[1])
    place, turn = multiply(x, o_ptr, pipe, place, turn, OUT)
    arrive(counter_ptr)
    residual = load_line(residual_ptr, HIDDEN, PADDED)
    wait_for_all(counter_ptr, target)
    residual = add(load_line(o_ptr, HIDDEN, PADDED), residual, x.dtype)
    normalise(x, residual, post_norm, eps, HIDDEN, PADDED)

    place, turn = gate(x, gated_ptr, pipe, place, turn, scratch, GATE_UP)
    arrive(counter_ptr + LINE_WORDS)
    wait_for_all(counter_ptr + LINE_WORDS, target)
    fetch(x, gated_ptr, DOWN[1])
    place, turn = multiply(x, down_ptr, pipe, place, turn, DOWN)
    arrive(counter_ptr + 2 * LINE_WORDS)

    next_norm = load_line(next_norm_ptr, HIDDEN, PADDED)
    # Once more: registers are too few to keep it.
    residual = add(load_line(o_ptr, HIDDEN, PADDED), load_line(residual_ptr, HIDDEN, PADDED), x.dtype)
    if last == 0:
        wait_for_all(counter_ptr + 2 * LINE_WORDS, target)
        residual = add(load_line(down_ptr, HIDDEN, PADDED), residual, x.dtype)
        normalise(x, residual, next_norm, eps, HIDDEN, PADDED)
        project(x, projection, pipe, place, turn, scratch, QKV, NUM_HEADS, NUM_KV_HEADS, HALF, BIAS)
    if gl.program_id(0) == gl.num_programs(0) - 1:
        store_line(next_residual_ptr, residual, HIDDEN, PADDED)


@gluon.jit
def copy(
    o,
    gate_up,
    down,
    qkv,
    last,
    pipe,
    OUT: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
    QKV: gl.constexpr,
    HALF: gl.constexpr,
):
    """The copying warp: weights in the order in which the others take them."""
    place = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    place, turn = copy_rows(o, pipe, place, turn, OUT)
    place, turn = copy_pairs(gate_up, pipe, place, turn, GATE_UP, DOWN[1])
    place, turn = copy_rows(down, pipe, place, turn, DOWN)
    if last == 0:
        copy_pairs(qkv, pipe, place, turn, QKV, HALF)


@gluon.jit(do_not_specialize=["last"])
def decode_layer(
    o,
    gate_up,
    down,
    qkv,
    attended_ptr,
    residual_ptr,
    next_residual_ptr,
    o_ptr,
    gated_ptr,
    down_ptr,
    post_norm_ptr,
    next_norm_ptr,
    bias_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    qkv_ptr,
    key_ptr,
    value_ptr,
    counter_ptr,
    eps,
    last,
    OUT: gl.constexpr,
    GATE_UP: gl.constexpr,
    DOWN: gl.constexpr,
    QKV: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HALF: gl.constexpr,
    BIAS: gl.constexpr,
    HIDDEN: gl.constexpr,
    HIDDEN_PADDED: gl.constexpr,
    WIDEST: gl.constexpr,
    STAGES: gl.constexpr,
    DOT: gl.constexpr,
):
    """A product is (units, features, rows of a unit), of GATE_UP and QKV pairs of rows. The last layer projects nothing."""
    gdc_launch_dependents()
    BARRIERS: gl.constexpr = mbarrier.MBarrierLayout()
    # Behind the ring's end, and the vector's, tiles are read that are less tall than the instruction.
    pipe = (
        gl.allocate_shared_memory(DOT, [STAGES * (STAGE // 1024) + 3, 16, BLOCK], o.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIERS),
    )
    x = gl.allocate_shared_memory(DOT, [WIDEST // CHUNK + 1, CHUNK // BLOCK, BLOCK], o.layout)
    SUMS: gl.constexpr = 8 * max(64, 2 * max(GATE_UP[2], QKV[2]))
    scratch = gl.allocate_shared_memory(gl.float32, [SUMS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for stage in gl.static_range(STAGES):
        mbarrier.init(pipe[1].index(stage), count=1)
        mbarrier.init(pipe[2].index(stage), count=1)
    fence_async_shared()
    vectors = (attended_ptr, residual_ptr, next_residual_ptr, o_ptr, gated_ptr, down_ptr, post_norm_ptr, next_norm_ptr)
    projection = (bias_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, qkv_ptr, key_ptr, value_ptr)
    gl.warp_specialize(
        [
            (compute, (
                vectors, projection, counter_ptr, eps, last, x, scratch, pipe,
                OUT, GATE_UP, DOWN, QKV, NUM_HEADS, NUM_KV_HEADS, HALF, BIAS, HIDDEN, HIDDEN_PADDED,
            )),
            (copy, (o, gate_up, down, qkv, last, pipe, OUT, GATE_UP, DOWN, QKV, HALF)),
        ],
        # Warps and registers of the one that copies.
        [1],
        [24],
    )  # fmt: skip
