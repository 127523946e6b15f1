"""Lines: the sequences that wait and those that run, each in the order of service, and the slots of the latter."""

from bisect import insort
from operator import attrgetter

from triode.actors.messages import RequestStatus
from triode.actors.scheduler.request import Sequence
from triode.actors.scheduler.slots import SlotPool

_BY_RANK = attrgetter("rank")


class Lines:
    """A sequence stands in one of them, or in none once it has ended."""

    def __init__(self, num_slots: int) -> None:
        self.waiting: list[Sequence] = []
        """To read."""
        self.running: list[Sequence] = []
        """To read."""
        self._slots = SlotPool(num_slots)

    @property
    def num_free_slots(self) -> int:
        """How many more sequences could run."""
        return self._slots.num_free

    def enqueue(self, sequence: Sequence) -> None:
        """Let it wait at the place that its rank gives it."""
        insort(self.waiting, sequence, key=_BY_RANK)

    def admit(self, sequence: Sequence) -> None:
        """From the waiting to the running, into a slot and an epoch of its own."""
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_BY_RANK)
        sequence.slot, sequence.epoch = self._slots.take()
        sequence.advance(RequestStatus.PREFILL)

    def leave(self, sequence: Sequence, status: RequestStatus) -> None:
        """Out of whichever line it stands in. What launched steps still return for the sequence is stale."""
        if sequence.slot is not None:
            self.running.remove(sequence)
            self._slots.give_back(sequence.slot)
            sequence.slot = None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if status is RequestStatus.PREEMPTED:
            sequence.num_computed = 0
        sequence.num_pending = 0
        sequence.advance(status)

    def reorder(self) -> None:
        """Ranks have changed."""
        self.waiting.sort(key=_BY_RANK)
        self.running.sort(key=_BY_RANK)
