"""The inboxes between actors: one per actor, the only way in.

Every inbox is unbounded on purpose, so that sending never waits, cannot fail for want of room, and may happen in a
`finally` or a `__del__`. What bounds each of them is the admission at `submit`:

    tokenizer      one Submit and one Cancel per unfinished request           <= 2 * max_queued
    scheduler      one answer per Submit, a Cancel per request, one StepResult
                   per launched step, one cache reply, a Stopped per sample   <= ~(3 + n) * max_queued
    cache          one question, one Launched, one Release at a time, pins     <= 3 + pins in flight
    executor       the steps planned ahead, a ReleaseGuide per request        <= max_in_flight + max_queued
    detokenizer    per step one Sampled, one StatusChanged, prompt scores     <= 3 * steps not yet read + max_queued

A step is launched only after an earlier one has retired, so none of these grows with time. `InboxStatistics` reports the
peak, which tests hold against the bounds.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Generic, TypeVar

import trio

from triode.actors.statistics import InboxStatistics

T = TypeVar("T")

MAX_CHECKING = 8
"""Guides that the executor is asked about at a time: a worker process reads its messages between steps."""
MAX_COMPILING = 2
"""Guides that are compiled at a time, in threads: each takes a core for milliseconds, at worst for a tenth of a second."""

Put = Callable[[T], None]
"""The sending side of an inbox: synchronous, never waits."""


class Inbox(Generic[T]):
    """Where an actor's messages wait for it. Must be read by one task only.

    A memory channel would do, at twice the cost: the first token of a lone request waits for ten of these.
    """

    def __init__(self) -> None:
        self._messages: list[T] = []
        # The task that waits for the first message.
        self._reader: trio.lowlevel.Task | None = None
        self._peak = 0
        self._num_messages = 0
        self._num_wakeups = 0
        self._busy_s = 0.0
        self._taken_at_s: float | None = None

    # Control-C must not fall between taking the reader and waking it: nobody else would.
    @trio.lowlevel.enable_ki_protection
    def put(self, message: T) -> None:
        """Send a message. From another thread, go through `TrioToken.run_sync_soon`."""
        self._messages.append(message)
        if self._reader is not None:
            reader, self._reader = self._reader, None
            trio.lowlevel.reschedule(reader)

    async def take(self) -> list[T]:
        """Wait for a message; return it with all that wait behind it, oldest first."""
        if self._taken_at_s is not None:
            self._busy_s += perf_counter() - self._taken_at_s
            self._taken_at_s = None
        if self._messages:
            await trio.lowlevel.checkpoint()
        else:
            await self._wait()
        self._taken_at_s = perf_counter()
        messages, self._messages = self._messages, []
        self._peak = max(self._peak, len(messages))
        self._num_messages += len(messages)
        self._num_wakeups += 1
        return messages

    def statistics(self) -> InboxStatistics:
        """Load so far."""
        return InboxStatistics(
            queue_depth=len(self._messages),
            peak_queue_depth=self._peak,
            num_messages=self._num_messages,
            num_wakeups=self._num_wakeups,
            busy_s=self._busy_s,
        )

    async def _wait(self) -> None:
        assert self._reader is None, "an inbox is read by one task"
        self._reader = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._reader = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
