"""What the executor knows of a runner: plans go in, results come out in the same order.

This file imports no torch, so that actors and statistics can name a runner without starting one.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from triode.models.guide import Guide
from triode.models.step import StepPlan, StepResult


class RunnerStatistics(msgspec.Struct, frozen=True):
    """What a runner has done since it was made; all but the first are sums over steps."""

    num_steps: int = 0
    num_rows: int = 0
    num_query_tokens: int = 0
    num_sampled_tokens: int = 0
    prepare_s: float = 0.0
    """Applying plans and packing batches."""
    forward_s: float = 0.0
    """Decoder and head."""
    sample_s: float = 0.0
    """From logits to results."""


class Runner(Protocol):
    """Computes steps. `launch` and `collect` belong to one thread each; the other methods may be called from any."""

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """Compile a guide before the first plan that has it, and keep it until `release_guide`, for at most so many requests.

        Raises:
            ValueError: with the reason why it cannot be followed.
            EngineBusy: if other requests' guides leave no room for it.
        """

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        """No later plan admits the requests whose guide was checked. Called once for each check that went well, with its number."""

    def launch(self, plan: StepPlan) -> None:
        """Start a step; it may run on while the caller goes on."""

    def is_ready(self) -> bool:
        """Whether `collect` would return at once. Asked while a step is running, by whoever can launch the next one."""

    def collect(self) -> StepResult:
        """The result of the oldest step not collected yet; blocks until it is there."""

    def statistics(self) -> RunnerStatistics:
        """A snapshot."""

    def close(self) -> None:
        """Give back weights and cache. Idempotent; no launch may follow."""


@runtime_checkable
class Wakes(Protocol):
    """A runner that launches sooner when it has heard of the plan beforehand."""

    def wake(self, has_come: Callable[[], bool]) -> None:
        """A plan will follow, or not; nothing is running. Called by the thread that launches.

        Args:
            has_come: asked between pieces of the work; what is left of it is left undone once a plan is there.
        """


@runtime_checkable
class HandsOver(Protocol):
    """A runner whose `launch` waits for the step before, if the new one depends on what that found, and then has work of
    its own to do."""

    hand_over: Callable[[], None]
    """Called by `launch` in between: that step's result is there, and need not wait for the work."""


def nobody_waits() -> None:
    """What `hand_over` is by default: another thread collects, or the caller does when `launch` returns."""
