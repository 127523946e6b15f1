"""When requests must have ended: the next deadline at once, and no memory for those that ended before theirs."""

import heapq
import math

from triode.actors.scheduler.request import Request

_MIN_STALE = 64
"""So many entries of ended requests are never worth a clean-up."""


class Deadlines:
    """The deadlines of unfinished requests.

    An ended request's entry stays in the heap until it comes to the top, or until most entries are such.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._requests: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_at_s: float, request: Request) -> None:
        """Watch a request."""
        self._requests[request.arrival] = request
        heapq.heappush(self._heap, (deadline_at_s, request.arrival))

    def discard(self, request: Request) -> None:
        """The request has ended; one without a deadline is left alone."""
        if self._requests.pop(request.arrival, None) is None:
            return
        if len(self._heap) > 2 * len(self._requests) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if entry[1] in self._requests]
            heapq.heapify(self._heap)

    def due(self, now_s: float) -> list[Request]:
        """The requests whose deadlines have passed, each once."""
        found: list[Request] = []
        while self._heap and self._heap[0][0] <= now_s:
            _, arrival = heapq.heappop(self._heap)
            if (request := self._requests.pop(arrival, None)) is not None:
                found.append(request)
        return found

    @property
    def next_s(self) -> float:
        """When `due` has to be asked again."""
        return self._heap[0][0] if self._heap else math.inf
