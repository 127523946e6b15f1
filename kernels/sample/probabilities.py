"""What the kernels that choose tokens share: a row's probabilities, and what they weigh as integers.

X blocks of the vocabulary
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

WEIGHT_SCALE = tl.constexpr(2.0**40)


@triton.jit
def row_peak_and_mass(peak_ptr, mass_ptr, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """Maximum and sum of exponentials of a whole row; the sum is NaN where the row is broken."""
    block = tl.arange(0, BLOCKS)
    peak_X = tl.load(peak_ptr + row * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=-float("inf"))
    mass_X = tl.load(mass_ptr + row * NUM_BLOCKS + block, mask=block < NUM_BLOCKS, other=0.0)
    peak = tl.max(peak_X, 0)
    # An empty block's peak is -inf, and so may be the row's: the difference would be NaN.
    scale_X = tl.where(peak_X > -float("inf"), tl.exp(peak_X - peak), 0.0)
    return peak, tl.sum(mass_X * scale_X, 0), tl.max((mass_X != mass_X).to(tl.int32), 0) > 0


@triton.jit
def probability(logit, temperature, peak, mass, BLOCK: tl.constexpr):
    """Softmax, each operation rounded once."""
    ones = tl.full([BLOCK], 1.0, tl.float32)
    return tl.div_rn(tl.exp(tl.div_rn(logit, ones * temperature) - peak), ones * mass)


@triton.jit
def kept_weight(p, token, key, cutoff, least):
    """Integer weights of what the truncations keep: bits above `key`, equal to it up to token `cutoff`, >= `least`."""
    bits = p.to(tl.int32, bitcast=True)
    kept = (bits > key) | ((bits == key) & (token <= cutoff))
    kept = kept & (p.to(tl.float64) >= least)
    return tl.where(kept, (p * WEIGHT_SCALE).to(tl.int64), 0)


@triton.jit
def is_truncated(top_k, top_p, VOCAB: tl.constexpr):
    """Whether top_k or top_p leaves something out."""
    return ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1.0)


@triton.jit
def least_probability(min_p, mass):
    """What min_p asks for: a share of the greatest probability, 1 / mass."""
    return min_p * tl.div_rn(1.0, mass).to(tl.float64)
