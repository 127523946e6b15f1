"""Waking a runner that computes nothing is seen by nobody."""

from collections.abc import Callable

import pytest

from cuda_world import CudaWorld
from runner_world import Running
from triode.models.cuda.gpu import Mark
from triode.models.cuda.runner import CudaRunner
from triode.models.runner import Wakes
from triode.models.sampling import SamplingParams

DRAWN = SamplingParams(temperature=0.9, top_k=40)


class SlowMark:
    """Passed when the test says so."""

    def __init__(self) -> None:
        self.has_passed = False
        self.num_released = 0

    def is_passed(self) -> bool:
        return self.has_passed

    def wait(self) -> None:
        raise AssertionError("nobody waits for a wake")

    def seconds_since(self, earlier: Mark) -> float:
        raise AssertionError("nobody times a wake")

    def release(self) -> None:
        self.num_released += 1


def wake(world: CudaWorld, has_come: Callable[[], bool] | None = None) -> None:
    assert isinstance(world.runner, Wakes)
    world.runner.wake(has_come or (lambda: False))


def play(world: CudaWorld, *, wakes: bool) -> Running:
    running = world.admit(0, [3, 1, 4, 1, 5], DRAWN, seed=3)
    if wakes:
        wake(world)
    world.prefill(running)
    if wakes:
        wake(world)
    world.decode(running, num_tokens=1)
    return running


def test_a_runner_that_is_woken_again_and_again_samples_the_same_tokens() -> None:
    assert play(CudaWorld(), wakes=True).output == play(CudaWorld(), wakes=False).output


def test_waking_leaves_the_batch_on_the_device_as_it_was() -> None:
    world = CudaWorld()
    play(world, wakes=False)
    assert isinstance(world.runner, CudaRunner)
    steps = world.runner._steps
    assert steps is not None
    before = steps.arena.words.clone()
    wake(world)
    assert steps.arena.words.equal(before)


@pytest.mark.parametrize("num_pieces", [1, 2, 3])
def test_a_wake_that_a_plan_cuts_short_sends_nothing_and_the_next_one_does(num_pieces: int) -> None:
    world = CudaWorld()
    world.gpu.uploads.clear()
    asked: list[bool] = []

    def has_come() -> bool:
        asked.append(len(asked) + 1 == num_pieces)
        return asked[-1]

    for _ in range(3):
        asked.clear()
        wake(world, has_come)
        assert len(asked) == num_pieces
        assert not world.gpu.uploads
    assert play(world, wakes=True).output == play(CudaWorld(), wakes=False).output


def test_wakes_that_are_cut_short_leave_nothing_for_the_next_one() -> None:
    world = CudaWorld()
    assert isinstance(world.runner, CudaRunner)
    waking = world.runner._waking
    assert waking is not None
    kept = []
    for _ in range(3):
        wake(world, lambda: True)
        kept.append(len(waking._changes._indices))
    assert kept[0] == kept[1] == kept[2]


def test_a_wake_whose_transfer_is_still_under_way_is_not_repeated() -> None:
    world, marks = CudaWorld(), [SlowMark(), SlowMark()]
    world.gpu.end_step = lambda: marks[len(world.gpu.uploads) - 1]  # type: ignore[method-assign]
    world.gpu.uploads.clear()
    for _ in range(3):
        wake(world)
    assert len(world.gpu.uploads) == 1
    marks[0].has_passed = True
    wake(world)
    assert len(world.gpu.uploads) == 2
    assert [mark.num_released for mark in marks] == [1, 0]
