"""How a program of `layer.py` streams its weights: one warp copies, the others take what has come.

The copying warp walks the products of a layer in order, each unit of rows from feature 0 on, and waits for nothing but free
places: weights depend on nothing. So the whole ring is on its way, or there, while the other warps wait for other programs,
add and normalise. The two sides count their places alike and never talk otherwise.

A product is (units, features, rows of a unit); unit u belongs to program u modulo their number.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma

# Triton 3.9 calls it as given first; before, it had another name.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def next_place(place, turn, STAGES: gl.constexpr):
    """The ring's next place, and how often it has been gone round."""
    wraps = place == STAGES - 1
    return gl.where(wraps, 0, place + 1), gl.where(wraps, turn + 1, turn)


@gluon.jit
def tiles_of(ring, HEIGHT: gl.constexpr):
    """The ring's places, as tiles of so many rows."""
    STEP: gl.constexpr = ring.shape[1] * ring.shape[2] // HEIGHT
    return ring._reinterpret(ring.dtype, [ring.shape[0], HEIGHT, STEP], ring.layout)


@gluon.jit
def copy_rows(desc, pipe, place, turn, PRODUCT: gl.constexpr):
    """Copy a plain product's units."""
    ring, full, free = pipe
    UNITS: gl.constexpr = PRODUCT[0]
    FEATURES: gl.constexpr = PRODUCT[1]
    ROWS: gl.constexpr = PRODUCT[2]
    tiles = tiles_of(ring, ROWS)
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        for k in range(0, FEATURES, tiles.shape[2]):
            mbarrier.wait(free.index(place), (turn + 1) % 2)
            mbarrier.expect(full.index(place), ROWS * tiles.shape[2] * 2)
            async_load(desc, [unit * ROWS, k], full.index(place), tiles.index(place))
            place, turn = next_place(place, turn, ring.shape[0])
    return place, turn


@gluon.jit
def copy_pairs(desc, pipe, place, turn, PRODUCT: gl.constexpr, APART: gl.constexpr):
    """Copy a product's units of pairs: of each 2 APART rows, row r and row r + APART are a pair."""
    ring, full, free = pipe
    UNITS: gl.constexpr = PRODUCT[0]
    FEATURES: gl.constexpr = PRODUCT[1]
    PAIRS: gl.constexpr = PRODUCT[2]
    tiles = tiles_of(ring, 2 * PAIRS)
    for unit in range(gl.program_id(0), UNITS, gl.num_programs(0)):
        row = unit * PAIRS // APART * (2 * APART) + unit * PAIRS % APART
        for k in range(0, FEATURES, tiles.shape[2]):
            mbarrier.wait(free.index(place), (turn + 1) % 2)
            mbarrier.expect(full.index(place), 2 * PAIRS * tiles.shape[2] * 2)
            tile = tiles.index(place)
            async_load(desc, [row, k], full.index(place), tile.slice(0, PAIRS))
            async_load(desc, [row + APART, k], full.index(place), tile.slice(PAIRS, PAIRS))
            place, turn = next_place(place, turn, ring.shape[0])
    return place, turn


@gluon.jit
def sum_unit(x, pipe, place, turn, FEATURES: gl.constexpr, HEIGHT: gl.constexpr):
    """sum over k of weight[row, k] x[k] of the next unit, in the order of `sums_in_order`. All eight columns are the token's."""
    ring, full, free = pipe
    ROW_WARPS: gl.constexpr = min(4, HEIGHT // 16)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [ROW_WARPS, 4 // ROW_WARPS], [16, 8])
    tiles = tiles_of(ring, HEIGHT)
    STEP: gl.constexpr = tiles.shape[2]
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    parts = x._reinterpret(x.dtype, [x.shape[0] // STEP, STEP], FLAT)
    acc = gl.zeros([HEIGHT, 8], gl.float32, MMA)
    for k in range((FEATURES + STEP - 1) // STEP):
        mbarrier.wait(full.index(place), turn % 2)
        w = tiles.index(place).load(gl.DotOperandLayout(0, MMA, 2))
        column = parts.index(k).load(gl.SliceLayout(1, gl.DotOperandLayout(1, MMA, 2)))
        mbarrier.arrive(free.index(place), count=1)
        acc = mma_v2(w, column[:, None].broadcast_to([STEP, 8]), acc, input_precision="ieee")
        place, turn = next_place(place, turn, ring.shape[0])
    return acc, place, turn
