"""The scheduler's counts."""

import msgspec


class SchedulerStatistics(msgspec.Struct, frozen=True):
    """Counts of the moment, and totals since the engine started."""

    num_running: int
    """Sequences in the runner's batch."""
    num_waiting: int
    """Sequences queued or preempted."""
    num_requests: int
    num_steps: int
    num_steps_in_flight: int
    num_preemptions: int
