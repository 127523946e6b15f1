"""The random number of each row's next token, made for many positions at a time.

Philox in torch costs the same for one number as for a few hundred, so a row's numbers are made ahead and kept. They are
a function of seed, sample index and position alone: numbers that are never used change nothing.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from triode.kernels.philox.reference import uniform
from triode.models.slots import SlotState

_NUM_AHEAD = 64


def uniform_draws(states: Sequence[SlotState]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for the next token of each sequence."""
    dry = [state for state in states if not 0 <= state.num_tokens - state.first_draw < len(state.draws)]
    if dry:
        _refill(dry)
    return np.array([state.draws[state.num_tokens - state.first_draw] for state in states])


def _refill(states: Sequence[SlotState]) -> None:
    first = torch.tensor([state.num_tokens for state in states])
    position = first[:, None] + torch.arange(_NUM_AHEAD)
    # int64 holds the unsigned seed's bits.
    seed = torch.from_numpy(np.array([state.seed for state in states], np.uint64).view(np.int64))
    index = torch.tensor([state.sample_index for state in states])
    drawn = uniform(seed[:, None].expand_as(position), index[:, None].expand_as(position), position)
    for state, draws in zip(states, drawn.tolist(), strict=True):
        state.first_draw, state.draws = state.num_tokens, draws
