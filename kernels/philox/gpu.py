"""Philox4x32-10 inside Triton kernels: the same words, and the same number in [0, 1), as `reference.py`."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def uniform(seed, sample_index, position, PURPOSE: tl.constexpr):
    """One float64 in [0, 1), a multiple of 2**-52.

    `seed` is an int64 that holds the unsigned seed's bits; `sample_index` and `position` are int32.
    """
    zero = position * 0
    word_0, word_1, _, _ = tl.philox(seed, position, sample_index, zero + PURPOSE, zero)
    bits = (word_0.to(tl.int64) << 20) | (word_1.to(tl.int64) >> 12)
    return bits.to(tl.float64) * 2.220446049250313e-16  # 2**-52, which a float64 constant holds exactly
