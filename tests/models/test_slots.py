"""Slots: histories and tables of many sequences in two arrays, and the counts that penalties look at."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triode.ids import BlockId, SlotId, TokenId, pack_tokens
from triode.models.counts import TokenCounts
from triode.models.sampling import SamplingParams
from triode.models.slots import Slots
from triode.models.step import Admission, TableChange

TOKENS = st.lists(st.integers(0, 9), max_size=150)


def admission(slot: int, epoch: int, tokens: list[int], num_prompt_tokens: int | None = None) -> Admission:
    return Admission(
        slot=SlotId(slot),
        epoch=epoch,
        packed_ids=pack_tokens(tokens),
        num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
        params=SamplingParams(),
        seed=0,
        sample_index=0,
        stop_token_ids=(),
    )


def change(slot: int, first_block: int, *block_ids: int) -> TableChange:
    return TableChange(SlotId(slot), first_block, tuple(map(BlockId, block_ids)))


@given(TOKENS, TOKENS, TOKENS)
def test_counts_are_those_of_a_counter(prompt: list[int], output: list[int], appended: list[int]) -> None:
    counts = TokenCounts(np.array([*prompt, *output], np.int32), len(prompt))
    for token in appended:
        counts.add(token)
    expected = Counter([*output, *appended])
    first_seen = list(dict.fromkeys([*prompt, *output, *appended]))
    assert counts.token_ids.tolist() == first_seen
    assert counts.output_counts.tolist() == [expected[token] for token in first_seen]


def test_counts_grow_past_their_first_room() -> None:
    counts = TokenCounts(np.array([0], np.int32), 1)
    for token in range(1000):
        counts.add(token)
    assert counts.token_ids.tolist() == list(range(1000))
    assert counts.output_counts.tolist() == [1] * 1000


def test_a_sequence_grows_in_its_own_slot_alone() -> None:
    slots = Slots(3, max_context_tokens=8, block_size_tokens=4)
    for slot in range(3):
        slots.admit(admission(slot, slot, [slot, slot]))
    state = slots.state(SlotId(1), 1)
    for token in (7, 8):
        state.append(TokenId(token))
    assert (state.tokens.tolist(), state.num_generated) == ([1, 1, 7, 8], 2)
    assert slots.tokens_SC[:, :4].tolist() == [[0, 0, 0, 0], [1, 1, 7, 8], [2, 2, 0, 0]]


def test_counts_asked_for_late_include_every_token_so_far() -> None:
    slots = Slots(1, max_context_tokens=16, block_size_tokens=4)
    slots.admit(admission(0, 1, [5, 6, 6], num_prompt_tokens=2))
    state = slots.state(SlotId(0), 1)
    state.append(TokenId(7))
    assert dict(zip(state.counts.token_ids.tolist(), state.counts.output_counts.tolist(), strict=True)) == {
        5: 0,
        6: 1,
        7: 1,
    }
    state.append(TokenId(5))
    assert state.counts.output_counts.tolist() == [1, 1, 1]


def test_table_changes_land_where_they_say() -> None:
    slots = Slots(2, max_context_tokens=20, block_size_tokens=4)
    slots.admit(admission(0, 1, [1]))
    slots.change_table(change(0, 0, 9, 8))
    slots.change_table(change(0, 2, 7))
    slots.change_table(change(0, 1, 6))
    assert slots.table_SX.tolist() == [[9, 6, 7, 0, 0], [0, 0, 0, 0, 0]]


def test_a_new_admission_forgets_tokens_counts_and_table() -> None:
    slots = Slots(1, max_context_tokens=16, block_size_tokens=4)
    slots.admit(admission(0, 1, [1, 2, 3]))
    slots.change_table(change(0, 0, 5, 6))
    assert slots.state(SlotId(0), 1).counts.token_ids.tolist() == [1, 2, 3]
    slots.admit(admission(0, 2, [4]))
    state = slots.state(SlotId(0), 2)
    assert (state.tokens.tolist(), state.counts.token_ids.tolist()) == ([4], [4])
    assert not slots.table_SX.any()


def test_a_stale_epoch_is_a_bug() -> None:
    slots = Slots(1, max_context_tokens=16, block_size_tokens=4)
    slots.admit(admission(0, 2, [1]))
    with pytest.raises(AssertionError, match="slot 0 is at epoch 2, the plan says 1"):
        slots.state(SlotId(0), 1)


def test_a_sequence_cannot_outgrow_the_context() -> None:
    slots = Slots(1, max_context_tokens=2, block_size_tokens=4)
    slots.admit(admission(0, 1, [1, 2]))
    with pytest.raises(IndexError):
        slots.state(SlotId(0), 1).append(TokenId(3))
