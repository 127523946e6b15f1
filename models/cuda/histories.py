"""Histories: how the host's copies of what guided rows generate follow the device.

What such a row may get next follows from its tokens. They are learned by the thread that launches the row's next step, or
by the one that reads their result, because a result says what a guide forces behind its token. Whichever comes first does
it for both.
"""

from collections import deque

from triode.models.cuda.batch import HostBatch
from triode.models.cuda.flight import Flight


class Histories:
    """Launched steps whose tokens the host has yet to learn."""

    def __init__(self, host: HostBatch) -> None:
        self._host = host
        self._unlearned: deque[Flight] = deque()

    def add(self, flight: Flight) -> None:
        """A step with guided rows was launched."""
        with self._host.lock:
            self._unlearned.append(flight)

    def learn(self) -> None:
        """Bring them up to the step that is being launched. Waits for those before it."""
        with self._host.lock:
            while self._unlearned:
                self._learn(self._unlearned.popleft())

    def learn_until(self, flight: Flight) -> None:
        """Bring them up to a step that has ended."""
        with self._host.lock:
            while flight in self._unlearned:
                self._learn(self._unlearned.popleft())

    def forget(self) -> None:
        """No step will follow."""
        with self._host.lock:
            self._unlearned.clear()

    def _learn(self, flight: Flight) -> None:
        tokens = flight.tokens()
        for index, slot, state in flight.learners:
            if forced := self._host.learn(state, slot, tokens[index]):
                flight.forced[index] = forced
