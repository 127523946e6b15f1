"""The GPU's runner on Triton's interpreter says what the CPU's runner says."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuda_world import CudaWorld, InterpretedGpu
from guides import COLOURS, DIGITS, EOS, PERSON, tiny_guides
from runner_world import BLOCK_SIZE_TOKENS, RunnerWorld, Running, tiny_config
from triode.cache.messages import BlockCopy
from triode.models.cuda import passes
from triode.models.cuda.arena import Arena, ArenaLayout, Changes
from triode.models.cuda.rehearsal import Rehearsal
from triode.models.guided import GuidedRows
from triode.models.runner import HandsOver
from triode.models.sampling import SamplingParams
from triode.models.step import Output, Pooling, StepResult, TableChange

GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.95)
PENALISED = SamplingParams(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=3, logprobs=2)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 37 + index * 101 + 7) % 499 for index in range(length)]


def outputs(make: Callable[[], RunnerWorld], play: Callable[[RunnerWorld], list[Running]]) -> list[list[int]]:
    return [running.output for running in play(make())]


def play_alone(world: RunnerWorld) -> list[Running]:
    running = world.admit(2, prompt(9), GREEDY, seed=3)
    world.prefill(running, chunk=5)
    world.decode(running, num_tokens=3)
    return [running]


def play_together(world: RunnerWorld) -> list[Running]:
    drawn = world.admit(1, prompt(4, 1), DRAWN, seed=5, sample_index=1)
    penalised = world.admit(3, prompt(5, 2), PENALISED, seed=6, stop_token_ids=(7, 8))
    world.step((drawn, 4, Output.SAMPLE), (penalised, 3, Output.NONE))
    greedy = world.admit(0, prompt(3, 3), GREEDY)
    world.step((drawn, 1, Output.SAMPLE), (penalised, 2, Output.SAMPLE), (greedy, 3, Output.SAMPLE))
    world.decode(greedy, drawn, penalised, num_tokens=3)
    world.decode(penalised, greedy, num_tokens=1)
    return [drawn, penalised, greedy]


def play_shared_blocks(world: RunnerWorld) -> list[Running]:
    first = world.admit(0, prompt(18), GREEDY)
    world.prefill(first)
    second = world.admit(1, prompt(18), GREEDY)
    copy = world.free.pop()
    world.copies.append(BlockCopy(first.blocks[1], copy))
    second.blocks = [first.blocks[0], copy]
    world.changes.append(TableChange(second.slot, 0, tuple(second.blocks)))
    second.num_computed = 17
    world.step((second, 1, Output.SAMPLE), (first, 1, Output.SAMPLE))
    world.decode(first, second, num_tokens=1)
    return [first, second]


@pytest.mark.parametrize("play", [play_alone, play_together, play_shared_blocks])
def test_the_tokens_are_those_of_the_eager_runner(play: Callable[[RunnerWorld], list[Running]]) -> None:
    assert outputs(CudaWorld, play) == outputs(RunnerWorld, play)


def test_logprobs_are_those_of_the_eager_runner() -> None:
    worlds = CudaWorld(), RunnerWorld()
    entries = []
    for world in worlds:
        running = world.admit(1, prompt(6), SamplingParams(temperature=0, logprobs=3, prompt_logprobs=1))
        world.step((running, 6, Output.PROMPT_LOGPROBS_AND_SAMPLE))
        world.decode(running, num_tokens=1)
        entries.append(running.prompt_logprobs + running.logprobs)
    for got, want in zip(*entries, strict=True):
        assert (got.token_id, got.rank, got.top_ids) == (want.token_id, want.rank, want.top_ids)
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)


@pytest.mark.parametrize("pooling", Pooling)
def test_an_embedding_is_that_of_the_eager_runner(pooling: Pooling) -> None:
    embeddings = []
    for world in (CudaWorld(), RunnerWorld()):
        running = world.admit(1, prompt(6), pooling=pooling)
        world.step((running, 4, Output.HIDDEN))
        world.step((running, 2, Output.HIDDEN))
        embeddings.append(running.embedding)
    assert embeddings[0] == pytest.approx(embeddings[1], abs=1e-4)


def test_a_steady_decode_step_sends_nothing_and_replays_what_was_captured() -> None:
    world = CudaWorld()
    running = world.admit(0, prompt(3), GREEDY)
    world.prefill(running)
    world.decode(running, num_tokens=2)
    world.gpu.uploads.clear()
    world.decode(running, num_tokens=3)
    assert world.gpu.uploads == []
    assert world.gpu.num_captured == 2


def test_changes_travel_with_a_short_step_unless_there_are_too_many() -> None:
    layout = ArenaLayout(num_slots=3, num_rows=4, num_entries=8)
    arena, changes = Arena(layout, InterpretedGpu()), Changes(layout)
    changes.set_table(1, 2, np.array([5], np.int32))
    at = layout.table + 8 + 2
    assert arena.pairs(changes, 2).tolist() == [at, layout.spare, 5, layout.spare]
    assert not arena.table_SX.any()
    changes.set_table(1, 0, np.array([7, 8, 9], np.int32))
    assert arena.pairs(changes, 2).tolist() == [layout.spare] * 4
    assert arena.table_SX[1].tolist() == [7, 8, 9, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("max_step_tokens", [64, 4096])
def test_the_largest_steps_can_be_rehearsed_however_short_the_context_is(max_step_tokens: int) -> None:
    world = CudaWorld()
    rehearsal = Rehearsal(BLOCK_SIZE_TOKENS, tiny_config().max_context_tokens)
    for plan in (rehearsal.read(rehearsal.longest(max_step_tokens)), rehearsal.decode(8), rehearsal.decode(8)):
        world.runner.launch(plan)
        assert len(world.runner.collect().token_ids) == len(plan.slots)


def test_all_ways_of_sampling_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a request may ask for, torch has loaded what it takes."""
    kinds = {kind for kind in vars(passes).values() if isinstance(kind, type) and "__call__" in vars(kind)}
    kinds -= {passes.Pass}
    called: set[type] = set()

    def noting(kind: type, call: Callable[..., None]) -> Callable[..., None]:
        def noted(self: object, *arguments: object) -> None:
            called.add(kind)
            call(self, *arguments)

        return noted

    for kind in kinds:
        monkeypatch.setattr(kind, "__call__", noting(kind, vars(kind)["__call__"]))
    for num_rows in (1, 8):
        world = CudaWorld()
        results = []
        for plan in Rehearsal(BLOCK_SIZE_TOKENS, tiny_config().max_context_tokens).sample_in_all_ways(num_rows):
            assert plan.copies
            world.runner.launch(plan)
            results.append(world.runner.collect())
        assert called == kinds
        assert results[0].logprobs is not None
        if num_rows == 1:
            assert results[0].prompt_logprobs is not None
            assert results[1].embeddings is not None
        called.clear()


def test_steps_may_be_launched_before_the_tokens_of_the_last_are_read() -> None:
    world = CudaWorld()
    running = world.admit(0, prompt(3), PENALISED, seed=2)
    world.runner.launch(world.plan((running, 3, Output.SAMPLE)))
    for computed in (3, 4, 5):
        running.num_computed = computed
        world.runner.launch(world.plan((running, 1, Output.SAMPLE)))
    ahead = [world.runner.collect().token_ids[0] for _ in range(4)]
    check = CudaWorld(seed=4)
    again = check.admit(5, prompt(3), PENALISED, seed=2)
    check.prefill(again)
    check.decode(again, num_tokens=3)
    assert ahead == again.output


def test_a_result_may_go_before_the_masks_that_follow_from_it_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    world = CudaWorld(guides=tiny_guides())
    running = world.admit(0, prompt(3), SamplingParams(guide=DIGITS, max_tokens=20), seed=2)
    happened: list[str | StepResult] = []
    fill = GuidedRows.fill

    def told(*arguments: Any) -> None:
        happened.append("masks")
        fill(*arguments)

    monkeypatch.setattr(GuidedRows, "fill", told)
    world.runner.launch(world.plan((running, 3, Output.SAMPLE)))
    assert isinstance(world.runner, HandsOver)
    world.runner.hand_over = lambda: happened.append(world.runner.collect())
    running.num_computed = 3
    world.runner.launch(world.plan((running, 1, Output.SAMPLE)))
    first, result, second = happened
    assert (first, second) == ("masks", "masks")
    assert isinstance(result, StepResult)
    assert result.token_ids


def play_guided(world: RunnerWorld) -> list[Running]:
    person = world.admit(0, prompt(3), SamplingParams(guide=PERSON, logprobs=1), seed=1)
    drawn = world.admit(1, prompt(4, 1), DRAWN, seed=5)
    colour = world.admit(2, prompt(5, 2), SamplingParams(temperature=0, guide=COLOURS, logprobs=0))
    world.step((person, 3, Output.SAMPLE), (drawn, 4, Output.SAMPLE), (colour, 5, Output.SAMPLE))
    world.decode(person, drawn, colour, num_tokens=4)
    world.decode(person, drawn, num_tokens=1)
    return [person, drawn, colour]


def test_guided_tokens_are_those_of_the_eager_runner() -> None:
    want, got = (play_guided(make(guides=tiny_guides())) for make in (RunnerWorld, CudaWorld))
    assert [running.output for running in got] == [running.output for running in want]
    assert got[2].output[-1] == EOS
    assert all(running.errors == [] for running in got)


def test_a_step_without_guides_sends_no_mask() -> None:
    world = CudaWorld(guides=tiny_guides())
    drawn = world.admit(1, prompt(4, 1), DRAWN, seed=5)
    guided = world.admit(2, prompt(4, 2), SamplingParams(guide=DIGITS, max_tokens=20), seed=5)
    world.prefill(drawn)
    world.prefill(guided)
    world.decode(drawn, guided, num_tokens=1)
    assert world.gpu.uploads[-1] == 1 + tiny_guides().masks.num_words
    world.decode(drawn, num_tokens=1)
    world.gpu.uploads.clear()
    world.decode(drawn, num_tokens=2)
    assert world.gpu.uploads == []
