"""Engines for tests: a tiny random model that opens in a moment, and steps that run only when a test says so."""

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import trio
import trio.testing

import triode
from triode.actors.channels import Put
from triode.actors.executor.actor import Executor
from triode.engine.completion import Result
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine, serve
from triode.engine.loading import load
from triode.engine.request import Prompt
from triode.models.guide import Guide, Refusal
from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult

TINY = "random:tiny"
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_context_tokens": 4096,
    "max_running": 16,
    "max_step_tokens": 64,
    "kv_cache_bytes": 2**21,
}
"""Settings of an engine for tests: 255 blocks of 16 tokens."""

LONG = 3000
"""Tokens of an output that no test waits for."""
LONG_TEXT = "word " * 4000
"""A prompt so long that a worker thread encodes it."""


def open_tiny(**overrides: Any) -> AbstractAsyncContextManager[Engine]:
    """`triode.open_engine` of the tiny model, small."""
    return triode.open_engine(TINY, **{**SMALL, **overrides})


def greedy(max_tokens: int, **fields: Any) -> triode.SamplingParams:
    """The most probable tokens, and exactly so many of them unless `fields` say otherwise."""
    return triode.SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


def drawn(max_tokens: int, **fields: Any) -> triode.SamplingParams:
    """Random tokens of a fixed seed, and exactly so many of them unless `fields` say otherwise."""
    return triode.SamplingParams(**{"seed": 7, "max_tokens": max_tokens, "ignore_eos": True, **fields})


async def complete(engine: Engine, prompt: Prompt, params: triode.SamplingParams, **options: Any) -> Result:
    """Submit and read to the end."""
    async with engine.submit(prompt, params, **options) as stream:
        return await stream.result()


_STRANGERS: WeakSet[threading.Thread] = WeakSet()


def note_strangers() -> None:
    """Threads of today are not those of engines that begin later: test files before this one keep compilers of guides."""
    _STRANGERS.update(thread for thread in threading.enumerate() if thread.name.startswith("triode"))


def threads_of_ours() -> list[threading.Thread]:
    """Our threads that go on although their engines have said that they ended."""
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("triode") and thread not in _STRANGERS]
    for thread in ours:
        # Its last word is not quite its last instruction.
        thread.join(1)
    return [thread for thread in ours if thread.is_alive()]


class Gate:
    """An executor whose steps wait until the test opens it."""

    def __init__(self, executor: Executor, *, max_in_flight: int = 2) -> None:
        self.max_in_flight = max_in_flight
        self.plans: list[StepPlan] = []
        """All plans so far."""
        self.num_woken = 0
        self._executor = executor
        self._held: deque[StepPlan] = deque()
        self._is_open = False

    @property
    def num_held(self) -> int:
        """Steps that are launched and wait."""
        return len(self._held)

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        self._executor.start(results, fault)

    async def check_guide(self, guide: Guide) -> Refusal | None:
        return await self._executor.check_guide(guide)

    def release_guide(self, guide: Guide) -> None:
        self._executor.release_guide(guide)

    def wake(self) -> None:
        self.num_woken += 1

    def launch(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._held.append(plan)
        if self._is_open:
            self._run()

    def statistics(self) -> RunnerStatistics:
        return self._executor.statistics()

    async def close(self) -> None:
        await self._executor.close()

    def open(self) -> None:
        """Run what waits, and from now on every step at once."""
        self._is_open = True
        while self._held:
            self._run()

    def shut(self) -> None:
        """Hold steps back again."""
        self._is_open = False

    async def step(self, num_steps: int = 1) -> None:
        """Run so many steps, and let the engine come to rest after each."""
        for _ in range(num_steps):
            await trio.testing.wait_all_tasks_blocked()
            self._run()
        await trio.testing.wait_all_tasks_blocked()

    def _run(self) -> None:
        self._executor.launch(self._held.popleft())


@asynccontextmanager
async def open_gated(*, max_in_flight: int = 2, **overrides: Any) -> AsyncIterator[tuple[Engine, Gate]]:
    """A tiny engine whose steps the test releases."""
    config = EngineConfig().override({**SMALL, "model": TINY, "executor": "inline", **overrides})
    parts = await load(config, None)
    gate = Gate(parts.executor, max_in_flight=max_in_flight)
    async with serve(replace(parts, executor=gate)) as engine:
        yield engine, gate


async def rested(engine: Engine) -> None:
    """Wait until the last launched step has retired and nobody has anything left to do."""
    with trio.fail_after(20):
        while not _is_at_rest(engine):  # noqa: ASYNC110 - rest is no event of the engine's
            await trio.sleep(0.002)
        await trio.testing.wait_all_tasks_blocked()


def _is_at_rest(engine: Engine) -> bool:
    now = engine.statistics()
    queues = (getattr(now.actors, name).queue_depth for name in now.actors.__struct_fields__)
    num_untold = len(engine._hub._scheduler._arrivals)
    return not any(
        (now.num_unfinished, now.scheduler.num_requests, now.scheduler.num_steps_in_flight, num_untold, *queues)
    )


async def check_nothing_is_left(engine: Engine) -> None:
    """What requests held has been given back: blocks at once, and all of them after `clear`."""
    await rested(engine)
    now, hub = engine.statistics(), engine._hub
    assert (now.scheduler.num_running, now.scheduler.num_waiting) == (0, 0)
    assert (now.cache.num_used_blocks, now.cache.num_sequences) == (0, 0)
    assert now.cache.num_free_blocks + now.cache.num_evictable_blocks == now.cache.num_blocks
    hub.parts.cache.check_integrity()
    await engine.cache.clear()
    assert engine.statistics().cache.num_free_blocks == now.cache.num_blocks
    scheduler = hub._scheduler
    leftovers: dict[str, Sized] = {
        "answers": hub._answers,
        "detokenizer": hub._detokenizer,
        "arrivals": scheduler._arrivals,
        "deadlines": scheduler._deadlines._requests,
        "requests": scheduler._registry,
        "sequences": scheduler._registry.sequences,
    }
    assert {name: len(left) for name, left in leftovers.items() if len(left)} == {}
    assert scheduler._lines.num_free_slots == hub.parts.config.scheduler.max_running
