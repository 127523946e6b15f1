"""Steps that are launched while the ones before them are computed."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from native_steps import native_library
from runner_world import RunnerWorld, Running, tiny_config, tiny_weights
from triode.cache.messages import BlockCopy
from triode.models.native import NativeDecoder
from triode.models.runner import HandsOver
from triode.models.sampler import NOT_FINITE
from triode.models.sampling import SamplingParams
from triode.models.step import Output


def decoder_of(poisoned: int | None = None) -> NativeDecoder:
    """One whose logits are not numbers once it has read a token."""
    weights = tiny_weights()
    if poisoned is not None:
        embed_VD = weights.embed_VD.clone()
        embed_VD[poisoned] = torch.nan
        weights = replace(weights, embed_VD=embed_VD)
    with torch.inference_mode():
        return NativeDecoder(tiny_config(), weights, native_library())


def prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(1, 499), k=length)


def sample(*sequences: Running) -> list[tuple[Running, int, Output]]:
    """A step in which each computes all its tokens, those not found yet included, and gets the next one."""
    return [(running, max(1, len(running.tokens) - running.num_computed), Output.SAMPLE) for running in sequences]


def history(world: RunnerWorld, depth: int) -> list[list[int]]:
    """What sequences become that come, go, share blocks and draw at random; `depth` steps are under way at most."""

    def step(*rows: tuple[Running, int, Output]) -> None:
        world.begin(*rows)
        while len(world.begun) >= depth:
            world.finish()

    def decode(*sequences: Running, num_tokens: int) -> None:
        for _ in range(num_tokens):
            step(*[(running, 1, Output.SAMPLE) for running in sequences])

    first, second = world.admit(0, prompt(21)), world.admit(1, prompt(15))
    step(*sample(first, second))
    decode(first, second, num_tokens=40)
    third = world.admit(2, prompt(50))
    step((first, 1, Output.SAMPLE), (third, 30, Output.NONE))
    step((third, 20, Output.SAMPLE), (first, 1, Output.SAMPLE))
    decode(third, first, num_tokens=20)
    # The slot of one that is done, whose last step may be under way.
    drawn = world.admit(1, prompt(9), SamplingParams(temperature=1.0), seed=3)
    step((first, 1, Output.SAMPLE), (drawn, 9, Output.SAMPLE))
    decode(first, drawn, num_tokens=5)
    decode(first, num_tokens=18)
    block = world.free.pop()
    world.copies.append(BlockCopy(first.blocks[0], block))
    decode(first, third, num_tokens=18)
    while world.begun:
        world.finish()
    return [running.output for running in (first, second, third, drawn)]


def test_launching_ahead_changes_no_token() -> None:
    native = decoder_of()
    expected = history(RunnerWorld(native=native), depth=1)
    assert [len(output) for output in expected] == [105, 41, 39, 6]
    for depth in (1, 2, 3):
        assert history(RunnerWorld(native=native, ahead=True, seed=depth), depth) == expected


def test_a_step_is_done_without_anyone_waiting_for_it() -> None:
    world = RunnerWorld(native=decoder_of(), ahead=True)
    assert not world.runner.is_ready()
    world.begin(*sample(world.admit(0, prompt(20))))
    assert any(world.runner.is_ready() for _ in range(20_000))
    assert len(world.finish().token_ids) == 1


def test_a_step_is_collected_while_the_next_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    native = decoder_of()
    world = RunnerWorld(native=native, ahead=True)
    plain = world.admit(0, prompt(20))
    drawn = world.admit(1, prompt(9), SamplingParams(temperature=1.0), seed=3)
    world.begin(*sample(plain))
    forward = NativeDecoder.forward
    is_computing, is_collected = threading.Event(), threading.Event()

    def forward_once_collected(self: NativeDecoder, *args: Any) -> torch.Tensor:
        is_computing.set()
        assert is_collected.wait(30), "collecting waited for the next step"
        return forward(self, *args)

    monkeypatch.setattr(NativeDecoder, "forward", forward_once_collected)
    with ThreadPoolExecutor(1) as launching:
        begun = launching.submit(world.begin, *sample(drawn))
        assert is_computing.wait(30)
        assert len(world.finish().token_ids) == 1
        is_collected.set()
        begun.result()
    assert len(world.finish().token_ids) == 1


def test_a_result_goes_before_a_step_is_computed_that_had_to_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = RunnerWorld(native=decoder_of(), ahead=True)
    plain = world.admit(0, prompt(20))
    drawn = world.admit(1, prompt(9), SamplingParams(temperature=1.0), seed=3)
    runner, forward = world.runner, NativeDecoder.forward
    happened: list[str] = []

    def hand_over() -> None:
        assert runner.is_ready()
        happened.append(f"handed over {len(world.finish().token_ids)}")

    def told(self: NativeDecoder, *args: Any) -> torch.Tensor:
        happened.append("computed")
        return forward(self, *args)

    assert isinstance(runner, HandsOver)
    runner.hand_over = hand_over
    monkeypatch.setattr(NativeDecoder, "forward", told)
    world.begin(*sample(plain))
    world.begin(*sample(drawn))
    assert happened == ["handed over 1", "computed"]
    assert len(world.finish().token_ids) == 1


def test_a_row_without_finite_logits_fails_alone_and_later_steps_go_on() -> None:
    expected = RunnerWorld(native=decoder_of())
    alone = expected.admit(0, prompt(20))
    expected.step(*sample(alone))
    expected.decode(alone, num_tokens=3)
    world = RunnerWorld(native=decoder_of(poisoned=77), ahead=True)
    good, bad = world.admit(0, prompt(20)), world.admit(1, [5, 77, 6])
    world.begin(*sample(good, bad))
    for _ in range(3):
        world.begin((good, 1, Output.SAMPLE), (bad, 1, Output.SAMPLE))
        world.finish()
    world.finish()
    assert good.output == alone.output
    assert bad.errors == [NOT_FINITE.reason] * 4


def test_statistics_count_steps_that_were_collected() -> None:
    world = RunnerWorld(native=decoder_of(), ahead=True)
    running = world.admit(0, prompt(20))
    world.step(*sample(running))
    world.decode(running, num_tokens=4)
    counted = world.runner.statistics()
    assert (counted.num_steps, counted.num_query_tokens, counted.num_sampled_tokens) == (5, 24, 5)
    assert counted.forward_s > 0


def test_a_runner_closes_while_steps_are_under_way() -> None:
    world = RunnerWorld(native=decoder_of(), ahead=True)
    running = world.admit(0, prompt(200))
    world.begin(*sample(running))
    world.begin((running, 1, Output.SAMPLE))
    world.runner.close()
    world.runner.close()


def test_a_missing_block_is_noticed() -> None:
    world = RunnerWorld(native=decoder_of(), ahead=True)
    running = world.admit(0, prompt(13))
    world.step(*sample(running))
    world.decode(running, num_tokens=2)
    world.begin((running, 1, Output.SAMPLE))
    plan = world.plan((running, 1, Output.SAMPLE))
    assert plan.table_changes
    with pytest.raises(AssertionError, match="lacks a block"):
        world.runner.launch(msgspec.structs.replace(plan, table_changes=()))
