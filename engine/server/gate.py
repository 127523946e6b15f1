"""Who is being served: counts by key, and the end of service."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from triode.engine.server.errors import RETRY_AFTER, RequestError
from triode.engine.stream import RequestStream


class Gate:
    """Admits requests until `drain`, and each key's no more than its limit at a time."""

    def __init__(self, max_concurrent_per_key: int | None) -> None:
        self.draining = anyio.Event()
        """Set when nothing more is admitted."""
        self._max_concurrent = max_concurrent_per_key
        self._num_by_key: Counter[str] = Counter()
        self._entries: dict[int, list[RequestStream]] = {}
        self._left = anyio.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `drain` has begun."""
        return self.draining.is_set()

    @property
    def num_admitted(self) -> int:
        """Requests that are being served."""
        return len(self._entries)

    @contextmanager
    def admitted(self, key: str) -> Iterator[list[RequestStream]]:
        """A request's time of service. Its streams belong into the yielded list and are cancelled at the end.

        Raises:
            RequestError: 503 while draining, 429 above the key's limit.
        """
        if self.is_draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down", headers=RETRY_AFTER)
        if self._max_concurrent is not None and self._num_by_key[key] >= self._max_concurrent:
            raise RequestError(
                429,
                f"unfinished requests of one key must be <= {self._max_concurrent}; try again later",
                code="rate_limit_exceeded",
                headers=RETRY_AFTER,
            )
        streams: list[RequestStream] = []
        self._num_by_key[key] += 1
        self._entries[id(streams)] = streams
        try:
            yield streams
        finally:
            for stream in streams:
                stream.cancel()
            del self._entries[id(streams)]
            self._num_by_key[key] -= 1
            if not self._num_by_key[key]:
                del self._num_by_key[key]
            self._left.set()

    async def drain(self, deadline_s: float) -> None:
        """Admit nothing more, wait for what is being served, and cancel what is left at the deadline."""
        self.draining.set()
        with anyio.move_on_after(deadline_s):
            while self._entries:
                self._left = anyio.Event()
                await self._left.wait()
        for streams in self._entries.values():
            for stream in streams:
                stream.cancel()
