"""Cancelling at any stage, in any way, at any time: nothing runs on, nothing is kept, nobody else notices."""

import random
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

import triode
from engines import LONG, LONG_TEXT, check_nothing_is_left, complete, drawn, greedy, open_gated, open_tiny
from triode.actors.messages import Cancel
from triode.engine.engine import Engine
from triode.engine.stream import RequestStream
from triode.engine.submission import Submission
from triode.errors import RequestFailed

PROMPT = list(range(100, 150))
"""Fifty tokens: more than one step may compute here, so its prefill takes two."""


def used_blocks(engine: Engine) -> int:
    return engine.statistics().cache.num_used_blocks


async def test_a_queued_request_leaves_at_once() -> None:
    async with open_gated(max_running=1) as (engine, gate):
        async with engine.submit([1, 2, 3], greedy(LONG)) as running:
            async with engine.submit(PROMPT, greedy(LONG)) as queued:
                await trio.testing.wait_all_tasks_blocked()
                before = used_blocks(engine)
            await trio.testing.wait_all_tasks_blocked()
            assert (queued.status, running.status) == ("cancelled", "prefill")
            assert engine.statistics().scheduler.num_waiting == 0
            assert used_blocks(engine) == before
        gate.open()
        await check_nothing_is_left(engine)


async def test_a_prompt_that_is_being_encoded_leaves_a_mark_until_it_is_done(encoding: threading.Event) -> None:
    async with open_tiny(executor="inline") as engine:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(complete, engine, LONG_TEXT, greedy(1))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().num_unfinished == 0
        encoding.set()
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_blocks_return_when_the_last_launched_step_retires(num_steps: int, max_in_flight: int) -> None:
    """From the first chunk of the prefill into the decoding."""
    async with open_gated(max_in_flight=max_in_flight, max_step_tokens=32) as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(LONG))
        await gate.step(num_steps)
        num_launched = gate.num_held
        assert 1 <= num_launched <= max_in_flight
        stream.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.status == "cancelled"
        for _ in range(num_launched):
            assert used_blocks(engine) > 0
            await gate.step()
        assert (used_blocks(engine), gate.num_held) == (0, 0)
        assert len(gate.plans) == num_steps + num_launched
        await check_nothing_is_left(engine)


async def test_a_cancelled_request_is_in_no_later_step() -> None:
    async with open_gated() as (engine, gate):
        cancelled = await engine.submit(PROMPT, greedy(LONG))
        neighbour = await engine.submit(PROMPT, greedy(20))
        await gate.step(3)
        num_plans = len(gate.plans)
        assert len(gate.plans[-1].slots) == 2
        cancelled.cancel()
        await gate.step(4)
        assert all(len(plan.slots) == 1 for plan in gate.plans[num_plans:])
        gate.open()
        await neighbour.result()
        await check_nothing_is_left(engine)


async def test_cancelling_what_has_ended_changes_nothing() -> None:
    async with open_tiny(executor="thread") as engine:
        stream = await engine.submit(PROMPT, greedy(3), request_id="mine")
        result = await stream.result()
        stream.cancel()
        engine.cancel("mine")
        await check_nothing_is_left(engine)
        assert (stream.status, engine.status("mine")) == ("finished", "finished")
        assert await stream.result() == result


async def test_cancelling_after_the_engine_does_nothing() -> None:
    async with open_tiny(executor="thread") as engine:
        finished = await engine.submit(PROMPT, greedy(3), request_id="finished")
        await finished.result()
        running = await engine.submit(PROMPT, greedy(LONG), request_id="running")
    for stream in (finished, running):
        stream.cancel()
        stream.cancel()
        engine.cancel(stream.request_id)
    assert (finished.status, running.status) == ("finished", "cancelled")


async def test_an_id_can_be_used_again_while_a_cancelled_step_still_runs() -> None:
    """The late retirement of the first request must not be taken for the second one's."""
    async with open_gated() as (engine, gate):
        first = await engine.submit(PROMPT, greedy(LONG), request_id="mine")
        await gate.step(3)
        first.cancel()
        await first.result()
        assert gate.num_held == 2
        second = await engine.submit(PROMPT, greedy(5), request_id="mine")
        await gate.step(2)
        second.cancel()
        await second.result()
        gate.open()
        await check_nothing_is_left(engine)


async def test_a_cancel_that_comes_late_spares_the_next_request_of_the_same_id() -> None:
    async with open_gated() as (engine, gate):
        gate.open()
        stop = (await complete(engine, PROMPT, greedy(4))).completion.token_ids[2]
        gate.shut()
        first = await engine.submit(PROMPT, greedy(LONG, stop_token_ids=(stop,)), request_id="mine")
        # Its last token is read while a step that was launched before it still runs.
        while first.status != "finished":
            await gate.step()
        assert gate.num_held == 1
        mailbox = first._mailbox
        second = await engine.submit(PROMPT, greedy(3), request_id="mine")
        engine._hub._to_scheduler.put(Cancel(mailbox.request_id, mailbox.arrival))
        gate.open()
        assert (await second.result()).completion.finish_reason == "length"
        await check_nothing_is_left(engine)


STAGES = 10
PROMPTS = [list(range(start, start + 7 + 9 * index)) for index, start in enumerate(range(200, 1000, 100))]
PARAMS = [
    drawn(6),
    greedy(9),
    drawn(5, n=3),
    drawn(12, stop=(" the", "e")),
    drawn(4, prompt_logprobs=1),
    greedy(10, repetition_penalty=1.2),
]


@dataclass
class Storm:
    """Random lives of requests; whatever is read must be what the request yields when it is alone."""

    engine: Engine
    alone: Mapping[tuple[int, int], tuple[tuple[int, ...], ...]]
    random: random.Random
    streams: list[triode.RequestStream] = field(default_factory=list)
    num_by_end: dict[str, int] = field(default_factory=dict)

    async def live(self) -> None:
        which = self.random.randrange(len(PROMPTS)), self.random.randrange(len(PARAMS))
        ways = (self.leave, self.give_up, self.by_id, self.past_deadline, self.finish, self.embed, self.encode)
        (way,) = self.random.choices(ways, (6, 4, 4, 2, 3, 1, 0.2))
        try:
            end = await way(which)
        except triode.EngineBusy:
            end = "busy"
            await trio.sleep(0.005)
        except RequestFailed as error:
            assert "cancelled by the caller" in str(error)  # noqa: PT017 - one of many good ends
            end = "early"
        except ValueError as error:
            assert "unique" in str(error)  # noqa: PT017
            end = "named twice"
        self.num_by_end[end] = self.num_by_end.get(end, 0) + 1
        if self.random.random() < 0.03:
            await self.touch_cache()

    def submit(self, which: tuple[int, int], deadline_s: float | None = None) -> Submission[RequestStream]:
        prompt, params = which
        name = self.random.choice("abcdefgh") if self.random.random() < 0.2 else None
        priority = self.random.randrange(3)
        return self.engine.submit(
            PROMPTS[prompt], PARAMS[params], priority=priority, request_id=name, deadline_s=deadline_s
        )

    async def read_some(self, stream: triode.RequestStream) -> None:
        for _ in range(self.random.randrange(STAGES)):
            if not await stream.batch():
                break

    def check(self, which: tuple[int, int], stream: triode.RequestStream) -> None:
        self.streams.append(stream)
        for completion, expected in zip(stream.completions, self.alone[which], strict=True):
            assert completion.token_ids == expected[: len(completion.token_ids)]
            if completion.finish_reason in ("stop", "length"):
                assert completion.token_ids == expected

    async def leave(self, which: tuple[int, int]) -> str:
        async with self.submit(which) as stream:
            await self.read_some(stream)
        if self.random.random() < 0.3:
            stream.cancel()
            await stream.result()
        self.check(which, stream)
        return "left"

    async def give_up(self, which: tuple[int, int]) -> str:
        """The scope is cancelled wherever the submit, or the reading, has got to."""
        with trio.move_on_after(self.random.random() * 0.02):
            async with self.submit(which) as stream:
                await stream.result()
                self.check(which, stream)
        return "given up"

    async def by_id(self, which: tuple[int, int]) -> str:
        async with self.submit(which) as stream:
            await self.read_some(stream)
            self.engine.cancel(stream.request_id)
            self.engine.cancel(stream.request_id)
            await stream.result()
        self.check(which, stream)
        return "by id"

    async def past_deadline(self, which: tuple[int, int]) -> str:
        async with self.submit(which, deadline_s=self.random.uniform(1e-6, 0.02)) as stream:
            await stream.result()
        self.check(which, stream)
        return "past deadline"

    async def finish(self, which: tuple[int, int]) -> str:
        async with self.submit(which) as stream:
            await stream.result()
        self.check(which, stream)
        return stream.status.value

    async def embed(self, which: tuple[int, int]) -> str:
        with trio.move_on_after(self.random.random() * 0.01):
            await self.engine.embed([PROMPTS[which[0]]])
        return "embedded"

    async def encode(self, which: tuple[int, int]) -> str:
        with trio.move_on_after(self.random.random() * 0.02), suppress(ValueError):
            # Too long for this cache, which only its encoding shows.
            await self.engine.submit(LONG_TEXT)
        return "encoded"

    async def touch_cache(self) -> None:
        cache, prompt = self.engine.cache, self.random.choice(PROMPTS)
        with trio.move_on_after(0.001):
            await cache.pin(prompt)
        await cache.clear()
        while await cache.unpin(prompt):
            pass


async def storm(num_lives: int, seed: int) -> Storm:
    # So little memory that requests preempt one another.
    async with open_tiny(executor="thread", kv_cache_bytes=20 * 2**13, max_running=8, max_queued=24) as engine:
        alone = {}
        for prompt in range(len(PROMPTS)):
            for params in range(len(PARAMS)):
                result = await complete(engine, PROMPTS[prompt], PARAMS[params])
                alone[prompt, params] = tuple(completion.token_ids for completion in result.completions)
        world = Storm(engine, alone, random.Random(seed))
        lives = iter(range(num_lives))

        async def caller() -> None:
            for _ in lives:
                await world.live()

        async with trio.open_nursery() as nursery:
            for _ in range(25):
                nursery.start_soon(caller)
        await check_nothing_is_left(engine)
        assert engine.statistics().scheduler.num_preemptions > 0
    for stream in world.streams:
        stream.cancel()
        assert stream.status.is_final
    return world


async def test_random_cancellations_leave_nothing_behind() -> None:
    world = await storm(1000, seed=0)
    assert min(world.num_by_end.values()) > 0
    assert {"left", "given up", "by id", "past deadline", "finished", "busy"} <= set(world.num_by_end)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
async def test_ten_thousand_random_cancellations_leave_nothing_behind(seed: int) -> None:
    await storm(10_000, seed=1 + seed)
