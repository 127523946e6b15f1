"""How a program of `layer.py` streams its weights: one warp copies, the others take what has come.

The copying warp walks the products of a layer in order, each unit of rows from feature 0 on, and waits for nothing but free
places: weights depend on nothing. So the whole ring is there, or on its way, while the other warps wait for other programs,
add and normalise. It asks for a few places at a time, since all that a program reads comes behind what it has asked for. The
two sides count their places alike and never talk otherwise.

A product is (units, features, rows of a unit); unit u belongs to program u modulo their number.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from triode.kernels.decode_layer.plan import ASKED_PLACES, BLOCK_FEATURES, STAGE_NUMBERS

STAGE = gl.constexpr(STAGE_NUMBERS)
ASKED = gl.constexpr(ASKED_PLACES)
BLOCK = gl.constexpr(BLOCK_FEATURES)
# Triton 3.9 calls it as given first; before, it had another name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def next_place(place, turn, STAGES: gl.constexpr):
    """The ring's next place, and how often it has been gone round."""
    wraps = place == STAGES - 1
    return gl.where(wraps, 0, place + 1), gl.where(wraps, turn + 1, turn)


@gluon.jit
def tiles_of(ring, HEIGHT: gl.constexpr, STAGES: gl.constexpr):
    """The ring's places, as tiles of so many rows."""
    return ring._reinterpret(ring.dtype, [STAGES, HEIGHT, STAGE // HEIGHT], ring.layout)


@gluon.jit
def wait_to_ask(pipe, place, turn):
    """Wait until the place is free, and what was asked for ASKED places before is there."""
    _ring, full, free = pipe
    mbarrier.wait(free.index(place), (turn + 1) % 2)
    is_same_turn = place >= ASKED
    before = gl.where(is_same_turn, place - ASKED, place - ASKED + full.shape[0])
    # In turn 0 nobody has asked for what is before place 0: a new barrier lets pass whoever waits for the turn before.
    mbarrier.wait(full.index(before), gl.where(is_same_turn, turn, turn + 1) % 2)


@gluon.jit
def copy_rows(desc, pipe, place, turn, PRODUCT: gl.constexpr):
    """Copy a plain product's units."""
    ring, full, _free = pipe
    UNITS: gl.constexpr = PRODUCT[0]
    FEATURES: gl.constexpr = PRODUCT[1]
    ROWS: gl.constexpr = PRODUCT[2]
    tiles = tiles_of(ring, ROWS, full.shape[0])
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        for k in range(0, FEATURES, tiles.shape[2]):
            wait_to_ask(pipe, place, turn)
            mbarrier.expect(full.index(place), STAGE * 2)
            async_load(desc, [unit * ROWS, k], full.index(place), tiles.index(place))
            place, turn = next_place(place, turn, full.shape[0])
    return place, turn


@gluon.jit
def copy_pairs(desc, pipe, place, turn, PRODUCT: gl.constexpr, APART: gl.constexpr):
    """Copy a product's units of pairs: of each 2 APART rows, row r and row r + APART are a pair."""
    ring, full, _free = pipe
    UNITS: gl.constexpr = PRODUCT[0]
    FEATURES: gl.constexpr = PRODUCT[1]
    PAIRS: gl.constexpr = PRODUCT[2]
    tiles = tiles_of(ring, 2 * PAIRS, full.shape[0])
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        row = unit * PAIRS // APART * (2 * APART) + unit * PAIRS % APART
        for k in range(0, FEATURES, tiles.shape[2]):
            wait_to_ask(pipe, place, turn)
            mbarrier.expect(full.index(place), STAGE * 2)
            tile = tiles.index(place)
            async_load(desc, [row, k], full.index(place), tile.slice(0, PAIRS))
            async_load(desc, [row + APART, k], full.index(place), tile.slice(PAIRS, PAIRS))
            place, turn = next_place(place, turn, full.shape[0])
    return place, turn


@gluon.jit
def sum_unit(x, pipe, place, turn, FEATURES: gl.constexpr, HEIGHT: gl.constexpr):
    """sum over k of weight[row, k] x[k] of the next unit, in the order of `sums_in_order`: column 0, rows up to HEIGHT.

    The instruction multiplies 64 rows with 8 columns, and takes a block of 64 features from consecutive rows of 128 bytes.
    Of fewer weight rows, the others are what lies behind them: the next blocks. Of the one token's features, the other
    columns are what lies behind the block: the next features. What comes of those nobody looks at.
    """
    ring, full, free = pipe
    STAGES: gl.constexpr = full.shape[0]
    BLOCKS: gl.constexpr = STAGE // HEIGHT // BLOCK
    TALL: gl.constexpr = max(64, HEIGHT)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks = ring._reinterpret(ring.dtype, [STAGES * BLOCKS, HEIGHT * BLOCK], FLAT)
    parts = x._reinterpret(x.dtype, [x.shape[0] * x.shape[1], BLOCK], FLAT)
    acc = gl.zeros([TALL, 8], gl.float32, ACC)
    for stage in range((FEATURES + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)):
        mbarrier.wait(full.index(place), turn % 2)
        for block in gl.static_range(BLOCKS):
            w = blocks.index(place * BLOCKS + block)._reinterpret(ring.dtype, [TALL, BLOCK], ring.layout)
            part = parts.index(stage * BLOCKS + block)._reinterpret(x.dtype, [8, BLOCK], x.layout)
            acc = warpgroup_mma(w, part.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(free.index(place), count=1)
        place, turn = next_place(place, turn, STAGES)
    return acc, place, turn
