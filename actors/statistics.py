"""What an actor says of its own load."""

import msgspec


class InboxStatistics(msgspec.Struct, frozen=True):
    """One actor's load since the engine started."""

    queue_depth: int
    """Messages that wait now."""
    peak_queue_depth: int
    num_messages: int
    num_wakeups: int
    busy_s: float
    """Time between taking messages and asking for the next, waits within a turn included."""
