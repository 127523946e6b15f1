"""ResponseStore: responses that can be fetched and continued, the newest in memory. A restart forgets them."""

from collections import OrderedDict
from dataclasses import dataclass

import msgspec

from triode.engine.server.errors import RequestError
from triode.engine.server.responses.objects import Response
from triode.engine.stream import RequestStream

MAX_BYTES = 64 * 2**20
"""Of the stored responses and inputs together, as JSON."""


@dataclass(slots=True)
class Stored:
    """One response."""

    response: Response
    items: tuple[dict[str, object], ...]
    """Everything said before it."""
    num_bytes: int
    stream: RequestStream | None = None
    """While it runs."""

    @property
    def conversation(self) -> tuple[dict[str, object], ...]:
        """Everything said up to its end."""
        return (*self.items, *(msgspec.to_builtins(item) for item in self.response.output))


class ResponseStore:
    """Responses by the key of who asked for them and their id; the longest unused one is forgotten first."""

    def __init__(self, max_responses: int, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._num_bytes = 0
        self._unwanted: set[tuple[str, str]] = set()
        """Those that were deleted while they ran."""

    def put(
        self,
        key: str,
        response: Response,
        items: tuple[dict[str, object], ...],
        stream: RequestStream | None = None,
    ) -> None:
        """Keep a response, in place of what has its id: as it begins, with its stream, and as it has ended.

        One that was deleted in between is not kept again.
        """
        if self._max_responses == 0:
            return
        if (key, response.id) in self._unwanted:
            self._unwanted.remove((key, response.id))
            return
        self._drop((key, response.id))
        stored = Stored(response, items, len(msgspec.json.encode((response, items))), stream)
        self._by_id[key, response.id] = stored
        self._num_bytes += stored.num_bytes
        while len(self._by_id) > self._max_responses or self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._by_id)))

    def get(self, key: str, response_id: str) -> Stored | None:
        """A response of this key."""
        if (stored := self._by_id.get((key, response_id))) is not None:
            self._by_id.move_to_end((key, response_id))
        return stored

    def conversation(self, key: str, response_id: str) -> tuple[dict[str, object], ...] | None:
        """What a response that follows this one answers; None if this one is not kept.

        Raises:
            RequestError: 400 if it has not ended.
        """
        if (stored := self.get(key, response_id)) is None:
            return None
        if stored.stream is not None:
            message = f"previous_response_id must be of a response that has ended, {response_id!r} is in progress"
            raise RequestError(400, message, code="response_in_progress", param="previous_response_id")
        return stored.conversation

    def delete(self, key: str, response_id: str) -> None:
        """Forget a response."""
        if (stored := self._by_id.get((key, response_id))) is not None and stored.stream is not None:
            self._unwanted.add((key, response_id))
        self._drop((key, response_id))

    def _drop(self, name: tuple[str, str]) -> None:
        if (stored := self._by_id.pop(name, None)) is not None:
            self._num_bytes -= stored.num_bytes


def not_found(response_id: str) -> RequestError:
    """404 for an id that is not, or no longer, known."""
    return RequestError(404, f"response {response_id!r} is not stored", code="response_not_found", param="response_id")


def previous_not_found(response_id: str) -> RequestError:
    """400, with the code by which clients know to send the whole conversation again."""
    message = f"previous_response_id must be of a stored response, got {response_id!r}"
    return RequestError(400, message, code="previous_response_not_found", param="previous_response_id")
