"""Passes over histories on the device change the same logits to the same bits as those over the host's. No interpreter."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from cuda_world import InterpretedGpu
from sampled_rows import sequence
from triode.ids import TokenId
from triode.models.cuda import passes as device_passes
from triode.models.cuda import past
from triode.models.cuda.arena import Arena, ArenaLayout
from triode.models.cuda.passes import Passes
from triode.models.cuda.past import Ends
from triode.models.logits import passes_for
from triode.models.sampling import SamplingParams, pack
from triode.models.slots import SlotState

VOCAB_SIZE = 11
LAYOUT = ArenaLayout(num_slots=6, num_rows=8, num_entries=2, max_context_tokens=48)

token = st.integers(0, VOCAB_SIZE - 1)
# So few that n-grams occur again.
common = st.integers(0, 2)
penalty = st.sampled_from([0.0, 0.0, 0.3, -0.7, 2.0])
params = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=penalty,
    frequency_penalty=penalty,
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3, 5, 40, 2**31 - 1]),
    min_tokens=st.integers(0, 6),
    logit_bias=st.none() | st.dictionaries(token, st.sampled_from([-1.5, 4.0, -float("inf")]), max_size=4),
)


@dataclass
class Row:
    """What a sequence is made of."""

    params: SamplingParams
    tokens: list[int]
    most_prompt: int
    bad_words: list[list[int]]
    stops: list[int]

    def state(self) -> SlotState:
        return sequence(
            self.params,
            self.tokens,
            num_prompt_tokens=min(self.most_prompt, len(self.tokens)),
            stop_token_ids=self.stops,
            bad_word_ids=self.bad_words,
        )


rows_of_batch = st.lists(
    st.builds(
        Row,
        params,
        st.lists(common, min_size=1, max_size=30),
        st.integers(1, 30),
        st.lists(st.lists(common, min_size=1, max_size=4), max_size=4),
        st.lists(token, max_size=2),
    ),
    min_size=1,
    max_size=4,
)


@dataclass
class World:
    """Sequences in slots, which the host knows and the device knows."""

    states: list[SlotState]
    slots: list[int]

    def __post_init__(self) -> None:
        self.gpu = InterpretedGpu()
        self.arena = Arena(LAYOUT, self.gpu)
        # What belonged to others.
        self.arena.words.fill_(7)
        self.columns = pack([state.params for state in self.states])
        for state, slot in zip(self.states, self.slots, strict=True):
            place = LAYOUT.history_of(slot)
            self.arena.words[place : place + state.num_tokens] = torch.from_numpy(state.tokens.copy())
        self.passes = self.passes_of(self.slots)

    def passes_of(self, slots: list[int]) -> Passes:
        return Passes(self.columns, self.states, slots, VOCAB_SIZE, self.arena, self.gpu)

    def ends(self) -> Ends:
        counted = np.array([state.num_tokens for state in self.states], np.int32)
        return Ends(counted, torch.from_numpy(counted.copy()))

    def on_host(self, logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        for change in passes_for(self.columns, self.states):
            change(changed)
        return changed

    def on_device(self, logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        self.passes.change(changed, self.ends())
        return changed

    def sample(self, tokens: list[int]) -> None:
        """To the device it is told as its own tensor, to the host one by one."""
        self.passes.record(torch.tensor(tokens, dtype=torch.int32), self.ends())
        for state, token_id in zip(self.states, tokens, strict=True):
            state.append(TokenId(max(token_id, 0)))


def bits(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(torch.int32)


def logits_of(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.fixture(autouse=True, scope="module")
def little_room() -> Iterator[None]:
    """So that entries are laid out anew within a few steps, and n-grams compared part by part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past, "_ROOM_TOKENS", 2)
        patch.setattr(device_passes, "_MOST_COMPARED", 2)
        yield


@settings(max_examples=60)
@given(rows_of_batch, st.randoms(use_true_random=False))
def test_step_for_step_they_are_the_passes_of_the_cpu(rows: list[Row], random: Random) -> None:
    states = [row.state() for row in rows]
    world = World(states, random.sample(range(LAYOUT.num_slots), len(states)))
    for step in range(5):
        logits = logits_of(len(states), step)
        want = world.on_host(logits)
        assert torch.equal(bits(world.on_device(logits)), bits(want))
        # -1 where a row failed.
        world.sample([random.choice([-1, 0, 1, 2, 2, 10]) for _ in states])


@settings(max_examples=30)
@given(rows_of_batch)
def test_a_row_gets_the_same_bits_alone(rows: list[Row]) -> None:
    states = [row.state() for row in rows]
    logits = logits_of(len(states), 3)
    together = World(states, list(range(len(states)))).on_device(logits)
    for index, state in enumerate(states):
        alone = World([state], [5 - index]).on_device(logits[index : index + 1])
        assert torch.equal(bits(alone[0]), bits(together[index]))


def test_without_such_parameters_there_is_nothing_to_do_and_nothing_is_sent() -> None:
    world = World([sequence(SamplingParams(temperature=0.3, top_k=4))], [2])
    assert not world.passes
    assert world.gpu.uploads == []


def test_in_steady_steps_nothing_is_sent() -> None:
    every = SamplingParams(
        repetition_penalty=1.2, frequency_penalty=0.1, no_repeat_ngram_size=3, min_tokens=9, logit_bias={3: 1.0}
    )
    world = World([sequence(every, [1, 2, 3], stop_token_ids=[4], bad_word_ids=[[1, 2]])], [1])
    world.on_device(logits_of(1, 0))
    world.gpu.uploads.clear()
    for _ in range(2):
        world.sample([5])
        world.on_device(logits_of(1, 0))
    assert world.gpu.uploads == []


def test_a_word_that_is_longer_than_the_sequence_is_not_completed() -> None:
    world = World([sequence(SamplingParams(), [1], bad_word_ids=[[1, 1, 2], [1, 3]])], [0])
    logits = logits_of(1, 0)
    changed = world.on_device(logits)
    assert torch.equal(changed, world.on_host(logits))
    assert changed[0, 3] == -torch.inf
    assert changed[0, 2] == logits[0, 2]


def test_a_row_may_outgrow_its_room_alone() -> None:
    """With forced tokens it grows by several."""
    world = World([sequence(SamplingParams(repetition_penalty=1.5), [index]) for index in (1, 2)], [0, 1])
    world.on_device(logits_of(2, 0))
    for position, token_id in enumerate([3, 4, 5, 6, 7], 1):
        world.arena.words[LAYOUT.history_of(0) + position] = token_id
        world.states[0].append(TokenId(token_id))
    logits = logits_of(2, 1)
    assert torch.equal(world.on_device(logits), world.on_host(logits))
