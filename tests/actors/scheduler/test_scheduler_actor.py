"""The scheduler's shell: in which order it speaks to the others."""

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from scheduler_world import CheckingRunner
from triode.actors.cache.actor import run_cache
from triode.actors.channels import Inbox
from triode.actors.messages import (
    CacheInbox,
    Cancel,
    DetokenizerInbox,
    ExecutorInbox,
    Match,
    Opened,
    Release,
    ReleaseGuide,
    Reserve,
    Sampled,
    SchedulerInbox,
    StepResult,
    Tokenized,
)
from triode.actors.scheduler.actor import run_scheduler
from triode.actors.scheduler.config import SchedulerConfig
from triode.actors.scheduler.policy import Scheduler
from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.ids import RequestId, TokenId, pack_tokens
from triode.models.guide import Guide, Regex
from triode.models.sampling import SamplingParams
from triode.models.step import StepPlan


class LoggingManager(CacheManager):
    """Logs when it takes in what launches and releases have left to do."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        super().__init__(64, CacheConfig())
        self._log = log

    def settle(self) -> None:
        if self.is_unsettled:
            self._log.append(("settled", len(self._unsettled)))
        super().settle()


class Actors:
    """A scheduler and a cache that run, and a log of what reaches the executor and the detokenizer."""

    def __init__(self, max_in_flight: int, *, is_instant: bool = False) -> None:
        """With `is_instant` a step has its result as soon as it is launched, else when it is retired."""
        self._is_instant = is_instant
        self.log: list[tuple[str, int]] = []
        self._inbox: Inbox[SchedulerInbox] = Inbox()
        self._results: deque[StepResult] = deque()
        self._runner = CheckingRunner(16, max_running=4)
        self._plans: Inbox[ExecutorInbox] = Inbox()
        self._news: Inbox[DetokenizerInbox] = Inbox()
        to_cache: Inbox[CacheInbox] = Inbox()
        cache = LoggingManager(self.log)
        config = SchedulerConfig(max_running=4, max_step_tokens=64)
        self.tasks: list[Callable[[], Awaitable[object]]] = [
            partial(run_cache, cache, to_cache, self._inbox.put, lambda _: None),
            partial(
                run_scheduler,
                Scheduler(config, max_in_flight=max_in_flight),
                self._inbox,
                to_cache.put,
                self._plans.put,
                self._news.put,
            ),
            self._launch,
            self._read,
        ]

    def submit(self, arrival: int, max_tokens: int, guide: Guide | None = None) -> None:
        params = SamplingParams(max_tokens=max_tokens, guide=guide)
        tokens = tuple(map(TokenId, range(1, 6)))
        name = RequestId(f"r{arrival}")
        self._inbox.put(Tokenized(name, arrival, tokens, pack_tokens(tokens), params, seed=arrival, stop_token_ids=()))

    def cancel(self, arrival: int) -> None:
        self._inbox.put(Cancel(RequestId(f"r{arrival}"), arrival))

    async def run_to_the_end(self) -> None:
        """Retire the oldest step whenever nobody has anything to do."""
        await trio.testing.wait_all_tasks_blocked()
        while self._results:
            self._inbox.put(self._results.popleft())
            await trio.testing.wait_all_tasks_blocked()

    async def _launch(self) -> None:
        while True:
            for plan in await self._plans.take():
                if isinstance(plan, ReleaseGuide):
                    self.log.append(("released", len(self._results)))
                    continue
                self.log.append(("launched", plan.step_id))
                result = self._runner.run(plan)
                if self._is_instant:
                    self._inbox.put(result)
                else:
                    self._results.append(result)

    async def _read(self) -> None:
        while True:
            for message in await self._news.take():
                match message:
                    case Sampled(step_id=step_id):
                        self.log.append(("read", step_id))
                    case Opened():
                        self.log.append(("opened", 0))


async def play_alone(actors: Actors, max_tokens: int) -> None:
    """One request, from its coming to its end."""
    async with trio.open_nursery() as nursery:
        for task in actors.tasks:
            nursery.start_soon(task)
        actors.submit(0, max_tokens=max_tokens)
        await actors.run_to_the_end()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_the_executor_has_its_plan_before_the_cache_takes_the_prompt_in(max_in_flight: int) -> None:
    for _ in range(20):
        actors = Actors(max_in_flight)
        async with trio.open_nursery() as nursery:
            for task in actors.tasks:
                nursery.start_soon(task)
            await trio.testing.wait_all_tasks_blocked()
            actors.submit(0, max_tokens=2)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        told = [what for what, _ in actors.log if what in ("launched", "settled")]
        assert told[:2] == ["launched", "settled"]


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_a_steps_tokens_are_passed_on_when_its_successor_has_been_launched(max_in_flight: int) -> None:
    actors = Actors(max_in_flight)
    async with trio.open_nursery() as nursery:
        for task in actors.tasks:
            nursery.start_soon(task)
        for arrival in range(4):
            actors.submit(arrival, max_tokens=6 + arrival)
        await actors.run_to_the_end()
        nursery.cancel_scope.cancel()
    num_steps = sum(what == "launched" for what, _ in actors.log)
    assert num_steps >= 9
    assert [step for what, step in actors.log if what == "read"] == list(range(num_steps)), "all are read, in order"
    for step in range(num_steps - max_in_flight):
        assert actors.log.index(("launched", step + max_in_flight)) < actors.log.index(("read", step))


async def test_what_a_result_frees_counts_for_the_prompt_that_was_matched_meanwhile() -> None:
    """Both arrive in one turn, and nothing else runs: a refusal would be the last word on a prompt that has room."""
    cache, runner = CacheManager(4, CacheConfig()), CheckingRunner(16, max_running=2)
    inbox: Inbox[SchedulerInbox] = Inbox()
    asked: list[CacheInbox] = []
    plans: list[ExecutorInbox] = []
    core = Scheduler(SchedulerConfig(max_running=2, max_step_tokens=64), max_in_flight=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_scheduler, core, inbox, asked.append, plans.append, lambda _: None)
        for arrival in range(2):
            tokens = tuple(map(TokenId, range(arrival, arrival + 40)))
            name, params = RequestId(f"r{arrival}"), SamplingParams(max_tokens=1)
            inbox.put(Tokenized(name, arrival, tokens, pack_tokens(tokens), params, seed=0, stop_token_ids=()))
            await trio.testing.wait_all_tasks_blocked()
            match = asked.pop()
            assert isinstance(match, Match)
            if arrival == 0:
                inbox.put(cache.match(match))
                await trio.testing.wait_all_tasks_blocked()
                reserve = asked.pop()
                assert isinstance(reserve, Reserve)
                inbox.put(cache.reserve(reserve))
                await trio.testing.wait_all_tasks_blocked()
                asked.clear()
        plan = plans.pop()
        assert isinstance(plan, StepPlan)
        inbox.put(runner.run(plan))
        assert isinstance(match, Match)
        inbox.put(cache.match(match))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    released, reserve = asked
    assert isinstance(released, Release)
    assert isinstance(reserve, Reserve)
    cache.release(released)
    assert cache.reserve(reserve).granted == (True,)


async def test_tokens_wait_for_one_plan_only_however_fast_the_device_is() -> None:
    actors = Actors(2, is_instant=True)
    await play_alone(actors, max_tokens=40)
    num_steps = sum(what == "launched" for what, _ in actors.log)
    assert num_steps == 40
    for step in range(num_steps - 4):
        assert actors.log.index(("read", step)) < actors.log.index(("launched", step + 4))


async def test_a_request_is_opened_before_its_first_step_ends() -> None:
    actors = Actors(2)
    await play_alone(actors, max_tokens=3)
    assert actors.log.index(("opened", 0)) < actors.log.index(("read", 0))


async def test_a_first_plan_is_on_its_way_before_anybody_hears_of_its_request() -> None:
    actors = Actors(2)
    await play_alone(actors, max_tokens=1)
    told = [entry for entry in actors.log if entry[0] != "settled"]
    assert told == [("launched", 0), ("opened", 0), ("read", 0)]


async def test_a_request_that_must_wait_is_opened_all_the_same() -> None:
    actors = Actors(1)
    async with trio.open_nursery() as nursery:
        for task in actors.tasks:
            nursery.start_soon(task)
        for arrival in range(5):
            actors.submit(arrival, max_tokens=9)
        await trio.testing.wait_all_tasks_blocked()
        assert [what for what, _ in actors.log].count("opened") == 5, "of which four run"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_cancelled_first", [False, True])
async def test_a_guide_is_released_once_when_no_step_of_its_request_is_left(is_cancelled_first: bool) -> None:
    actors = Actors(2)
    async with trio.open_nursery() as nursery:
        for task in actors.tasks:
            nursery.start_soon(task)
        if is_cancelled_first:
            actors.cancel(0)
        actors.submit(0, max_tokens=3, guide=Regex("a"))
        actors.submit(1, max_tokens=9)
        await actors.run_to_the_end()
        nursery.cancel_scope.cancel()
    told = [what for what, _ in actors.log]
    assert told.count("released") == 1
    num_steps = told[: told.index("released")].count("launched")
    assert is_cancelled_first or num_steps >= 3, "its three tokens took as many steps"
