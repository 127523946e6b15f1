"""Asking a runner about guides, in whichever thread or process it lives."""

from dataclasses import dataclass

from triode.errors import EngineBusy
from triode.models.guide import Guide, Refusal
from triode.models.runner import Runner


def refusal(runner: Runner, guide: Guide, num_requests: int = 1) -> Refusal | None:
    """Why a guide cannot be followed; None if it can, and is compiled and kept for so many requests."""
    try:
        runner.check_guide(guide, num_requests)
    except ValueError as error:
        return Refusal(str(error))
    except EngineBusy as error:
        return Refusal(str(error), is_busy=True)
    except Exception as error:  # whatever a compiler makes of one caller's guide, the others' engine goes on
        return Refusal(f"guide cannot be compiled: {error!r}")
    return None


MAX_UNASKED = 15
"""Requests with a guide that the worker keeps already, for each one about which it is asked, which may bring another
prototype of it (`models/prototypes.py`)."""
REQUESTS_PER_CHECK = 1 + MAX_UNASKED
"""For which the worker is asked at once."""


@dataclass(slots=True)
class _Kept:
    num_requests: int = 0
    num_asked: int = 0
    """Checks that the worker has seen, and of which it was not told that the guide is released."""
    num_unasked: int = 0
    """Requests since the last of them."""


class KeptGuides:
    """Guides that a worker keeps for unfinished requests. It is far away while it launches steps, and most requests have a
    guide that others have."""

    def __init__(self) -> None:
        self._kept: dict[Guide, _Kept] = {}

    def share(self, guide: Guide) -> bool:
        """Whether one more request may have the guide without the worker being asked. It has it then."""
        kept = self._kept.get(guide)
        if kept is None or kept.num_unasked == MAX_UNASKED or kept.num_requests >= kept.num_asked * REQUESTS_PER_CHECK:
            return False
        kept.num_requests += 1
        kept.num_unasked += 1
        return True

    def keep(self, guide: Guide) -> None:
        """The worker was asked, and keeps it for one more request."""
        kept = self._kept.setdefault(guide, _Kept())
        kept.num_requests += 1
        kept.num_asked += 1
        kept.num_unasked = 0

    def release(self, guide: Guide) -> int:
        """A request has ended. Returns how often the worker must be told: of all checks when it was the last one, and before
        of those that the others do not need, but for one that the next requests may."""
        kept = self._kept[guide]
        kept.num_requests -= 1
        if not kept.num_requests:
            del self._kept[guide]
            return kept.num_asked
        num_needed = -(-kept.num_requests // REQUESTS_PER_CHECK) + 1
        num_told = max(0, kept.num_asked - num_needed)
        kept.num_asked -= num_told
        return num_told
