"""Sequences as the sampler sees them, without a runner."""

from collections.abc import Sequence

import torch

from triode.ids import SlotId, TokenId, pack_tokens
from triode.models.sampler import SampledRows
from triode.models.sampling import SamplingParams
from triode.models.slots import Slots, SlotState
from triode.models.step import Admission


def sequence(
    params: SamplingParams,
    tokens: Sequence[int] = (0,),
    *,
    num_prompt_tokens: int | None = None,
    seed: int = 0,
    sample_index: int = 0,
    stop_token_ids: Sequence[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
) -> SlotState:
    """One sequence, in a batch of its own."""
    slots = Slots(1, max_context_tokens=len(tokens) + 1000, block_size_tokens=16)
    slots.admit(
        Admission(
            slot=SlotId(0),
            epoch=1,
            packed_ids=pack_tokens(tokens),
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            params=params,
            seed=seed,
            sample_index=sample_index,
            stop_token_ids=tuple(map(TokenId, stop_token_ids)),
            bad_word_ids=tuple(tuple(map(TokenId, word)) for word in bad_word_ids),
        )
    )
    return slots.state(SlotId(0), 1)


def rows_of(*states: SlotState) -> SampledRows:
    """Rows that sample together."""
    return SampledRows(states, torch.device("cpu"))
