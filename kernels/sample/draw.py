"""The kernels that every row goes through: maxima and sums, integer weights, one random number.

X blocks of the vocabulary
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from triode.kernels.device_code import wait_for_inputs
from triode.kernels.philox.gpu import uniform
from triode.kernels.sample.probabilities import (
    is_truncated,
    kept_weight,
    least_probability,
    probability,
    row_peak_and_mass,
)


@triton.jit
def peaks(
    logits_ptr, slot_ptr, temperature_ptr, peak_ptr, mass_ptr, best_ptr, logits_stride,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Maximum of one block of one row, its lowest token, and the sum of exponentials (NaN where a logit is broken)."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    temperature = tl.load(temperature_ptr + tl.load(slot_ptr + row))
    token = block * BLOCK + tl.arange(0, BLOCK)
    real = token < VOCAB
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=real, other=-float("inf"))
    is_broken = tl.max(((logit != logit) | (logit == float("inf"))).to(tl.int32), 0) > 0
    if temperature > 0:
        logit = tl.div_rn(logit, tl.full([BLOCK], 1.0, tl.float32) * temperature)
    peak = tl.max(logit, 0)
    mass = 0.0
    if (temperature > 0) & (peak > -float("inf")):
        mass = tl.sum(tl.exp(logit - peak), 0)
    if is_broken:
        mass = float("nan")
    at = row * NUM_BLOCKS + block
    tl.store(peak_ptr + at, peak)
    tl.store(mass_ptr + at, mass)
    tl.store(best_ptr + at, tl.min(tl.where((logit == peak) & real, token, VOCAB), 0))


@triton.jit
def weigh(
    logits_ptr, slot_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, peak_ptr, mass_ptr, weight_ptr, logits_stride,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight of one block of one row; the probabilities themselves where the row is truncated."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(slot_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    if temperature == 0:
        return
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    if is_broken | (peak == -float("inf")):
        return
    token = block * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * logits_stride + token
    logit = tl.load(at, mask=token < VOCAB, other=-float("inf"))
    p = probability(logit, temperature, peak, mass, BLOCK)
    if is_truncated(tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), VOCAB):
        tl.store(at, p, mask=token < VOCAB)
    else:
        least = least_probability(tl.load(min_p_ptr + slot), mass)
        tl.store(weight_ptr + row * NUM_BLOCKS + block, tl.sum(kept_weight(p, token, 0, 0, least), 0))


@triton.jit
def most_probable(peak_ptr, best_ptr, row, peak, VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """The lowest token of a row that has the row's maximum."""
    block_X = tl.arange(0, BLOCKS)
    in_row = block_X < NUM_BLOCKS
    peak_X = tl.load(peak_ptr + row * NUM_BLOCKS + block_X, mask=in_row, other=-float("inf"))
    best_X = tl.load(best_ptr + row * NUM_BLOCKS + block_X, mask=in_row, other=VOCAB)
    return tl.min(tl.where(peak_X == peak, best_X, VOCAB), 0)


@triton.jit
def weights_of_block(
    logits_row, block, key_ptr, cutoff_ptr, is_cut, temperature, peak, mass, least,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The integer weight of each token of a block; a truncated row (`is_cut`) holds its probabilities already."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    loaded = tl.load(logits_row + token, mask=token < VOCAB, other=-float("inf"))
    if is_cut:
        p = tl.where(token < VOCAB, loaded, 0.0)
        weight = kept_weight(p, token, tl.load(key_ptr), tl.load(cutoff_ptr), least)
    else:
        p = probability(loaded, temperature, peak, mass, BLOCK)
        weight = kept_weight(p, token, 0, 0, least)
    return weight


@triton.jit
def drawn(
    draw, logits_row, weight_row, key_ptr, cutoff_ptr, is_cut, temperature, peak, mass, least,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token that stands at the share `draw` of all weights: first its block, then its place there."""
    block_X = tl.arange(0, BLOCKS)
    weight_X = tl.load(weight_row + block_X, mask=block_X < NUM_BLOCKS, other=0)
    sum_X = tl.cumsum(weight_X, 0)
    target = (draw * tl.sum(weight_X, 0).to(tl.float64)).to(tl.int64)
    block = tl.sum((sum_X <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(block_X < block, weight_X, 0), 0)
    weight = weights_of_block(
        logits_row, block, key_ptr, cutoff_ptr, is_cut, temperature, peak, mass, least, VOCAB, BLOCK
    )
    inside = before + tl.cumsum(weight, 0)
    return block * BLOCK + tl.sum((inside <= target).to(tl.int32), 0)


@triton.jit
def choose(
    logits_ptr, slot_ptr, end_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sample_index_ptr,
    peak_ptr, mass_ptr, best_ptr, weight_ptr, key_ptr, cutoff_ptr, last_token_ptr, position_ptr, token_ptr,
    logits_stride, nobody,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, PURPOSE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The token of one row, which becomes its slot's last one, at position `end`."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row)
    end = tl.load(end_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    peak, mass, is_broken = row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS, BLOCKS)
    chosen = VOCAB * 0
    if is_broken:
        chosen = chosen - 2
    elif peak == -float("inf"):
        chosen = chosen - 1
    elif temperature == 0:
        chosen = most_probable(peak_ptr, best_ptr, row, peak, VOCAB, NUM_BLOCKS, BLOCKS)
    else:
        draw = uniform(tl.load(seed_ptr + slot), tl.load(sample_index_ptr + slot), end, PURPOSE)
        is_cut = is_truncated(tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), VOCAB)
        least = least_probability(tl.load(min_p_ptr + slot), mass)
        chosen = drawn(
            draw, logits_ptr + row * logits_stride, weight_ptr + row * NUM_BLOCKS, key_ptr + row, cutoff_ptr + row,
            is_cut, temperature, peak, mass, least, VOCAB, NUM_BLOCKS, BLOCK, BLOCKS,
        )  # fmt: skip
    tl.store(token_ptr + row, chosen)
    if slot != nobody:
        # A row without a token has failed. Any token takes its place, because a step that was planned before the
        # scheduler knew goes on from there.
        tl.store(last_token_ptr + slot, tl.maximum(chosen, 0))
        tl.store(position_ptr + slot, end)
