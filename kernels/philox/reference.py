"""Philox4x32-10: random numbers that are a pure function of a key and a counter.

Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). There is no state: whoever knows
the request's seed and the position in the sequence knows the number, so a draw does not depend on its neighbours in the
batch, on preemption, on the number of threads or on the device. Triton and C++ make the same 32-bit words.

What the 192 bits hold, everywhere in Triode:

    key[0]      the seed's low 32 bits          counter[0]  position: the index of the drawn token in its sequence
    key[1]      the seed's high 32 bits         counter[1]  sample index: which of the request's n samples
                                                counter[2]  purpose: what the number is for, see `TOKEN`
                                                counter[3]  lane: counts the calls for one draw, from 0

How words become a uniform number in [0, 1): `uniform` takes the top 52 bits of `words[0] << 32 | words[1]` times 2**-52.
That is exact in float64 and never rounds up to 1.

    R draws
"""

import torch

TOKEN = 0
"""Purpose of a draw: the next token. Each further use of randomness takes a number of its own."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Four int64 tensors of equal shape, each holding 32-bit unsigned values."""


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """The four random words of each counter under its key."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(_NUM_ROUNDS):
        # The 64-bit products wrap into the sign bit; shifting and masking give the unsigned halves all the same.
        product_0 = word_0 * _MULTIPLIERS[0]
        product_1 = word_2 * _MULTIPLIERS[1]
        word_0 = (product_1 >> 32) & _MASK ^ word_1 ^ key_0
        word_2 = (product_0 >> 32) & _MASK ^ word_3 ^ key_1
        word_1 = product_1 & _MASK
        word_3 = product_0 & _MASK
        key_0 = (key_0 + _WEYL[0]) & _MASK
        key_1 = (key_1 + _WEYL[1]) & _MASK
    return word_0, word_1, word_2, word_3


def uniform(
    seed_R: torch.Tensor, sample_index_R: torch.Tensor, position_R: torch.Tensor, purpose: int = TOKEN
) -> torch.Tensor:
    """One float64 in [0, 1) a draw, a multiple of 2**-52.

    Args:
        seed_R: int64 holding the 64 bits of an unsigned seed (two's complement).
        sample_index_R: int64 in [0, 2**32).
        position_R: int64 in [0, 2**32).
        purpose: what the number is for.
    """
    zero_R = torch.zeros_like(position_R)
    key = (seed_R & _MASK, (seed_R >> 32) & _MASK)
    word_0, word_1, _, _ = philox4x32((position_R, sample_index_R, zero_R + purpose, zero_R), key)
    return ((word_0 << 20) | (word_1 >> 12)).to(torch.float64) * 2.0**-52
