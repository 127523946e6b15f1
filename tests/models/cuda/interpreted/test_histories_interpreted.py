"""Logits that depend on tokens which only the device has: what is sampled is what the CPU's runner samples, and no launch
waits for a token."""

from collections.abc import Callable

import pytest

from cuda_world import CudaWorld, PassedMark
from runner_world import RunnerWorld, Running
from triode.models.sampling import SamplingParams
from triode.models.step import Output

# From few tokens, so that tokens and n-grams occur again.
FEW = dict.fromkeys(range(20, 26), 60.0)
PENALISED = SamplingParams(
    temperature=2, logit_bias=FEW, repetition_penalty=1.1, presence_penalty=2, frequency_penalty=3
)
UNREPEATED = SamplingParams(temperature=2, logit_bias=FEW, no_repeat_ngram_size=2)
LATE = SamplingParams(temperature=2, logit_bias={20: 90.0, **FEW}, min_tokens=4)
PLAIN = SamplingParams(temperature=2, logit_bias=FEW)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [20 + (seed * 37 + index * 101 + index**2) % 6 for index in range(length)]


def play_together(world: RunnerWorld) -> list[Running]:
    """Beside one that reads its prompt in chunks, in a slot that was another's."""
    former = world.admit(3, prompt(30, 5), PENALISED, seed=9)
    world.step((former, 30, Output.SAMPLE))
    world.decode(former, num_tokens=1)
    rows = [
        world.admit(0, prompt(9), PENALISED, seed=1),
        world.admit(1, prompt(12, 1), UNREPEATED, seed=2),
        world.admit(2, prompt(3, 2), LATE, seed=3, stop_token_ids=(20,)),
        world.admit(5, prompt(4, 3), PLAIN, seed=4, bad_word_ids=[(21,), (22, 23), (24, 25, 22)]),
    ]
    world.step(*[(row, len(row.tokens), Output.SAMPLE) for row in rows])
    late = world.admit(3, prompt(7, 4), PENALISED, seed=5)
    world.step(*[(row, 1, Output.SAMPLE) for row in rows], (late, 4, Output.NONE))
    world.step((late, 3, Output.SAMPLE), *[(row, 1, Output.SAMPLE) for row in rows])
    world.decode(late, *reversed(rows), num_tokens=2)
    return [former, late, *rows]


def play_readmitted(world: RunnerWorld) -> list[Running]:
    """Preempted, and computed again in other slots, in chunks."""
    kinds = [(PENALISED, ()), (UNREPEATED, ()), (LATE, ()), (PLAIN, [(22, 23)])]
    first = [
        world.admit(slot, prompt(6), params, seed=slot, stop_token_ids=(20,), bad_word_ids=words)
        for slot, (params, words) in enumerate(kinds)
    ]
    world.step(*[(row, 6, Output.SAMPLE) for row in first])
    world.decode(*first, num_tokens=2)
    again = [
        world.admit(
            (slot + 2) % 4, row.tokens, params, num_prompt_tokens=6, seed=slot, stop_token_ids=(20,), bad_word_ids=words
        )
        for slot, (row, (params, words)) in enumerate(zip(first, kinds, strict=True))
    ]
    world.step(*[(row, 5, Output.NONE) for row in again])
    world.step(*[(row, 4, Output.SAMPLE) for row in again])
    world.decode(*again, num_tokens=2)
    return first + again


@pytest.mark.parametrize("play", [play_together, play_readmitted])
def test_the_tokens_are_those_of_the_eager_runner(play: Callable[[RunnerWorld], list[Running]]) -> None:
    got, want = ([running.output for running in play(make())] for make in (CudaWorld, RunnerWorld))
    assert got == want
    assert all(set(output) <= set(range(20, 26)) for output in want), "tokens occur again"


class WatchedMark(PassedMark):
    """Knows whether anyone has waited for it."""

    def __init__(self) -> None:
        self.is_awaited = False

    def wait(self) -> None:
        self.is_awaited = True


def test_no_launch_waits_for_the_tokens_of_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for is_ahead in (True, False):
        world = CudaWorld()
        marks: list[WatchedMark] = []

        def end_step(marks: list[WatchedMark] = marks) -> WatchedMark:
            marks.append(WatchedMark())
            return marks[-1]

        monkeypatch.setattr(world.gpu, "end_step", end_step)
        rows = [
            world.admit(0, prompt(5), PENALISED, seed=1),
            world.admit(1, prompt(6, 1), UNREPEATED, seed=2),
            world.admit(2, prompt(3, 2), LATE, seed=3, stop_token_ids=(20,)),
            world.admit(3, prompt(3, 4), PLAIN, seed=4, bad_word_ids=[(21,), (22, 23)]),
        ]
        world.begin(*[(row, len(row.tokens), Output.SAMPLE) for row in rows])
        for _ in range(3):
            if not is_ahead:
                world.finish()
            world.begin(*[(row, 1, Output.SAMPLE) for row in rows])
            assert [mark.is_awaited for mark in marks[:-1]] == [not is_ahead] * (len(marks) - 1)
        while world.begun:
            world.finish()
        outputs.append([row.output for row in rows])
    assert outputs[0] == outputs[1]
