"""Whatever happens in whatever order: every request gets exactly its tokens, and everything comes back.

The world's runner reads every token back through the block tables, and its samples depend on all of them, so a scheduling
error that corrupts a sequence shows in its output.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from scheduler_world import Meanwhile, World
from triode.actors.scheduler.config import SchedulerConfig
from triode.ids import RequestId
from triode.models.guide import Regex
from triode.models.sampling import SamplingParams
from triode.models.step import Pooling

BLOCK = 16


class SchedulerMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        max_running=st.integers(1, 5),
        spare=st.integers(1, 20),
        num_blocks=st.integers(6, 14),
        max_in_flight=st.integers(1, 4),
        prefix_cache=st.booleans(),
    )
    def start(self, max_running: int, spare: int, num_blocks: int, max_in_flight: int, prefix_cache: bool) -> None:
        config = SchedulerConfig(max_running=max_running, max_step_tokens=max_running + spare)
        self.world = World(
            config, num_blocks=num_blocks, block_size=BLOCK, max_in_flight=max_in_flight, prefix_cache=prefix_cache
        )

    @rule(
        target=requests,
        family=st.integers(0, 2),
        num_tokens=st.integers(1, 50),
        max_tokens=st.integers(1, 25),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        stop_token=st.sampled_from([(), (3, 7, 11)]),
        stop_after=st.sampled_from([None, None, 1, 5]),
        pooling=st.sampled_from([None, None, None, Pooling.LAST]),
        guide=st.sampled_from([None, Regex("a")]),
    )
    def submit(
        self,
        family: int,
        num_tokens: int,
        max_tokens: int,
        n: int,
        priority: int,
        prompt_logprobs: int | None,
        stop_token: tuple[int, ...],
        stop_after: int | None,
        pooling: Pooling | None,
        guide: Regex | None,
    ) -> RequestId | object:
        blocks_each = -(-(num_tokens + max_tokens) // BLOCK)
        if n * blocks_each * BLOCK > self.world.capacity:
            n = 1
        if blocks_each * BLOCK > self.world.capacity:
            return multiple()
        params = SamplingParams(
            max_tokens=max_tokens,
            n=1 if pooling else n,
            prompt_logprobs=None if pooling else prompt_logprobs,
            stop=() if stop_after is None or pooling else ("stop",),
            guide=guide,
        )
        return self.world.submit(
            [family * 1_000 + index for index in range(num_tokens)],
            params,
            priority=priority,
            stop_token_ids=() if stop_after is not None else stop_token,
            stop_after=None if pooling else stop_after,
            pooling=pooling,
        )

    @rule(count=st.integers(1, 12))
    def retire(self, count: int) -> None:
        for _ in range(count):
            self.world.retire()

    @rule(
        spoken=st.lists(
            st.builds(Meanwhile, st.integers(0, 3), st.integers(0, 1), returns_blocks=st.booleans()),
            min_size=1,
            max_size=8,
        )
    )
    def read_while_answers_are_on_their_way(self, spoken: list[Meanwhile]) -> None:
        self.world.meanwhile.extend(spoken)
        self.world.retire()

    @rule()
    def settle_stop(self) -> None:
        self.world.settle_stop()

    @rule(request=consumes(requests))
    def cancel(self, request: RequestId) -> None:
        if not self.world.seen[request].is_over:
            self.world.cancel(request)

    @rule(request=consumes(requests))
    def cancel_when_granted(self, request: RequestId) -> None:
        self.world.cancel_when_granted(request)

    @rule(request=requests, priority=st.integers(-2, 2))
    def set_priority(self, request: RequestId, priority: int) -> None:
        self.world.set_priority(request, priority)
        self.world.settle()

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if not hasattr(self, "world"):
            return
        statistics = self.world.scheduler.statistics()
        if statistics.num_running + statistics.num_waiting and not self.world.in_flight:
            assert self.world.stops, "unfinished requests, and no step under way that could move them"

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.run_to_the_end()
            self.world.check_at_rest()
            assert self.world.returned_blocks == self.world.cache.statistics().num_blocks


TestSchedulerStorm = SchedulerMachine.TestCase
TestSchedulerStorm.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12),
    budget=st.integers(5, 40),
)
@settings(max_examples=60, deadline=None)
def test_nobody_starves_under_an_endless_stream_of_equals(lengths: list[tuple[int, int]], budget: int) -> None:
    world = World(SchedulerConfig(max_running=4, max_step_tokens=budget), num_blocks=8, block_size=BLOCK)
    victim = world.submit(range(70), SamplingParams(max_tokens=10))
    for _ in range(40):
        for num_tokens, max_tokens in lengths:
            world.submit(range(100, 100 + num_tokens), SamplingParams(max_tokens=max_tokens))
        for _ in range(10):
            world.retire()
        if world.seen[victim].is_over:
            break
    assert world.seen[victim].is_over


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind() -> None:
    world = World(SchedulerConfig(max_running=16, max_step_tokens=64), num_blocks=40, block_size=BLOCK)
    for index in range(10_000):
        request = world.submit(
            range(index % 7, index % 7 + 1 + index % 90), SamplingParams(max_tokens=1 + index % 30, n=1 + index % 2)
        )
        if index % 3 == 0:
            world.cancel(request)
        if index % 5 == 0:
            world.retire()
        while world.scheduler.statistics().num_requests > 200:
            world.retire()
    world.run_to_the_end(max_steps=200_000)
    world.check_at_rest()
    assert world.returned_blocks == 39
