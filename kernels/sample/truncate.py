"""top_k and top_p without a sort: the least probability that a row keeps, found by bisection over float bits.

Positive floats are ordered as their bits are, so 29 passes over a row that sits in L2 find it exactly, and no scratch
memory is needed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.sample.probabilities import (
    WEIGHT_SCALE,
    is_truncated,
    kept_weight,
    least_probability,
    row_peak_and_mass,
)

# Bits of 2**-40, below which a probability has no weight, and of the float32 after 1.
LEAST_KEY = tl.constexpr(0x2B800000)
PAST_KEYS = tl.constexpr(0x3F800001)


@triton.jit
def above(p_ptr, key, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """How many probabilities of a row have at least the bits `key`, and what they weigh."""
    lane = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    weight = tl.zeros([TILE], tl.int64)
    for first in range(0, VOCAB, TILE):
        p = tl.load(p_ptr + first + lane, mask=first + lane < VOCAB, other=0.0)
        is_above = p.to(tl.int32, bitcast=True) >= key
        count += is_above.to(tl.int32)
        weight += tl.where(is_above, (p * WEIGHT_SCALE).to(tl.int64), 0)
    return tl.sum(count, 0), tl.sum(weight, 0)


@triton.jit
def keep_top_k(p_ptr, top_k, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The least probability of the `top_k` greatest, how many of its equals belong to them, and what all weigh."""
    key = LEAST_KEY + 0
    past = PAST_KEYS + 0
    while past - key > 1:
        middle = (key + past) // 2
        count, _ = above(p_ptr, middle, VOCAB, TILE)
        key, past = tl.where(count >= top_k, middle, key), tl.where(count >= top_k, past, middle)
    count_above, weight_above = above(p_ptr, key + 1, VOCAB, TILE)
    count_all, weight_all = above(p_ptr, key, VOCAB, TILE)
    num_equals = tl.minimum(top_k, count_all) - count_above
    equal_weight = (weight_all - weight_above) // tl.maximum(count_all - count_above, 1)
    total = weight_above + num_equals.to(tl.int64) * equal_weight
    return key, num_equals, total


@triton.jit
def keep_top_p(p_ptr, top_p, key, num_equals, total, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The same for the fewest that reach a share of `total`. What top_k left out has been left out."""
    goal = top_p * total.to(tl.float64)
    low = key + 0
    past = PAST_KEYS + 0
    _, weight_low = above(p_ptr, low, VOCAB, TILE)
    # Where rounding down has left all weights together short of the goal, nothing is left out.
    if weight_low.to(tl.float64) >= goal:
        while past - low > 1:
            middle = (low + past) // 2
            _, weight = above(p_ptr, middle, VOCAB, TILE)
            reaches = weight.to(tl.float64) >= goal
            low, past = tl.where(reaches, middle, low), tl.where(reaches, past, middle)
        count_above, weight_above = above(p_ptr, low + 1, VOCAB, TILE)
        count_all, weight_all = above(p_ptr, low, VOCAB, TILE)
        equal_weight = (weight_all - weight_above) // tl.maximum(count_all - count_above, 1)
        # A quotient of float64 may be one off: start below, and step up while the goal is not reached.
        enough = ((goal - weight_above.to(tl.float64)) / equal_weight.to(tl.float64)).to(tl.int64) - 1
        enough = tl.maximum(enough, 1)
        for step in tl.static_range(3):  # noqa: B007 - a name that no branch gives another type
            enough += ((weight_above + enough * equal_weight).to(tl.float64) < goal).to(tl.int64)
        # What top_k leaves of the equals of its own least probability limits top_p too.
        room = tl.where(low > key, enough.to(tl.int32), num_equals)
        num_equals = tl.minimum(room, enough.to(tl.int32))
        key = low
    return key, num_equals


@triton.jit
def weigh_kept(
    p_row,
    weight_row,
    key,
    num_equals,
    least,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store each block's weight, where of the tokens that weigh `key` the first `num_equals` are kept; return the last."""
    cutoff = -1
    num_seen = 0
    for block in range(NUM_BLOCKS):
        token = block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(p_row + token, mask=token < VOCAB, other=0.0)
        is_equal = (p.to(tl.int32, bitcast=True) == key).to(tl.int32)
        rank = num_seen + tl.cumsum(is_equal, 0)
        cutoff = tl.maximum(cutoff, tl.max(tl.where((is_equal > 0) & (rank <= num_equals), token, -1), 0))
        num_seen += tl.sum(is_equal, 0)
        # The cutoff of the tokens so far serves: what comes after it in this block is kept by no rank.
        tl.store(weight_row + block, tl.sum(kept_weight(p, token, key, cutoff, least), 0))
    return cutoff


@triton.jit
def truncate(
    p_ptr, slot_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, peak_ptr, mass_ptr,
    weight_ptr, key_ptr, cutoff_ptr, p_stride,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The least probability that top_k and top_p keep of one row, the last token among its equals, and the weights."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    if (tl.load(temperature_ptr + slot) == 0) | (is_truncated(top_k, top_p, VOCAB) == 0):
        return
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    if is_broken | (peak == -float("inf")):
        return
    p_row = p_ptr + row * p_stride

    key = LEAST_KEY + 0
    num_equals = VOCAB + 0
    total = tl.full([], 1, tl.int64) << 40
    if (top_k > 0) & (top_k < VOCAB):
        key, num_equals, total = keep_top_k(p_row, top_k, VOCAB, TILE)
    if top_p < 1.0:
        key, num_equals = keep_top_p(p_row, top_p, key, num_equals, total, VOCAB, TILE)
    least = least_probability(tl.load(min_p_ptr + slot), mass)
    cutoff = weigh_kept(p_row, weight_ptr + row * NUM_BLOCKS, key, num_equals, least, VOCAB, NUM_BLOCKS, BLOCK)
    tl.store(key_ptr + row, key)
    tl.store(cutoff_ptr + row, cutoff)
