"""The places of the runner's batch, and the epoch that tells one occupant of a place from the next."""

import heapq

from triode.ids import SlotId


class SlotPool:
    """Hands out the lowest free slot, so that a small batch stays at the front of the device's arrays."""

    def __init__(self, num_slots: int) -> None:
        self._free = [SlotId(index) for index in range(num_slots)]
        self._epochs = [0] * num_slots

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self) -> tuple[SlotId, int]:
        """A free slot and the epoch of its new occupant."""
        slot = heapq.heappop(self._free)
        self._epochs[slot] += 1
        return slot, self._epochs[slot]

    def give_back(self, slot: SlotId) -> None:
        """The occupant leaves; what launched steps still return for it carries its epoch."""
        heapq.heappush(self._free, slot)
