from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_world import MAX_SAMPLES, World
from triode.cache.config import CacheConfig


class ManagerMachine(RuleBasedStateMachine):
    """The manager among random requests. Hypothesis decides what happens when, the world what it is about."""

    @initialize(
        seed=st.integers(0, 2**32),
        capacity_blocks=st.integers(5, 14),
        ttl_s=st.sampled_from([None, 2.0]),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, seed: int, capacity_blocks: int, ttl_s: float | None, prefix_cache: bool) -> None:
        self.world = World(
            capacity_blocks, CacheConfig(prefix_cache_ttl_s=ttl_s, prefix_cache=prefix_cache), Random(seed)
        )

    @precondition(lambda self: len(self.world.samples) < MAX_SAMPLES)
    @rule(times=st.integers(1, 3))
    def submit(self, times: int) -> None:
        for _ in range(times):
            self.world.submit()

    @rule(times=st.integers(1, 12))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.world.step()
            self.world.manager.check_integrity()

    @rule(action=st.sampled_from(["match_in_vain", "finish", "retire", "pin", "unpin", "clear", "wait"]))
    def other(self, action: str) -> None:
        getattr(self.world, action)()

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "world"):
            self.world.manager.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def storm(seed: int, num_actions: int) -> None:
    """A long run in one small pool, with everything that can happen."""
    rng = Random(seed)
    config = CacheConfig(prefix_cache_ttl_s=rng.choice([None, 4.0]), prefix_cache=seed % 5 != 0)
    world = World(rng.choice([6, 12, 24, 48]), config, rng)
    others = [world.match_in_vain, world.finish, world.retire, world.pin, world.unpin, world.clear, world.wait]
    weights = [4, 20, 10, 3, 3, 1, 4]
    for _ in range(num_actions):
        if len(world.samples) < MAX_SAMPLES and rng.random() < 0.3:
            world.submit()
        world.step()
        if rng.random() < 0.6:
            rng.choices(others, weights)[0]()
        world.manager.check_integrity()
    world.end()


@pytest.mark.parametrize("seed", range(10))
def test_in_a_storm_every_table_reads_back_its_own_sequence_and_all_blocks_return(seed: int) -> None:
    storm(seed, num_actions=250)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_in_a_long_storm_every_table_reads_back_its_own_sequence_and_all_blocks_return(seed: int) -> None:
    storm(seed, num_actions=1000)
