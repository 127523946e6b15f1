"""Who is being served: counts and budgets by key, and the end of service."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import anyio

from triode.engine.server.budget import Budget
from triode.engine.server.config import ServerConfig
from triode.engine.server.errors import RETRY_AFTER, RequestError
from triode.engine.stream import RequestStream


class Gate:
    """Admits requests until `drain`, and each key's no more than its limits: so many at a time, and a minute."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.draining = anyio.Event()
        """Set when nothing more is admitted."""
        self._clock = clock
        self._max_concurrent = config.max_concurrent_per_key
        self._requests = _Budgets("requests", config.max_requests_per_minute)
        self._tokens = _Budgets("tokens", config.max_tokens_per_minute)
        self._entries: dict[str, dict[int, list[RequestStream]]] = {}
        self._left = anyio.Event()

    @property
    def is_draining(self) -> bool:
        """Whether `drain` has begun."""
        return self.draining.is_set()

    @contextmanager
    def admitted(self, key: str) -> Iterator[list[RequestStream]]:
        """A request's time of service. Its streams belong into the yielded list and are cancelled at the end.

        Raises:
            RequestError: 503 while draining, 429 above the key's limits.
        """
        self._check(key)
        streams: list[RequestStream] = []
        entries = self._entries.setdefault(key, {})
        entries[id(streams)] = streams
        try:
            yield streams
        finally:
            for stream in streams:
                stream.cancel()
            self._tokens.spend(key, sum(map(_num_tokens, streams)), self._clock())
            del entries[id(streams)]
            if not entries:
                del self._entries[key]
            self._left.set()

    def spend_tokens(self, key: str, num_tokens: int) -> None:
        """Count tokens that no stream has."""
        self._tokens.spend(key, num_tokens, self._clock())

    async def drain(self, deadline_s: float) -> None:
        """Admit nothing more, wait for what is being served, and cancel what is left at the deadline."""
        self.draining.set()
        with anyio.move_on_after(deadline_s):
            while self._entries:
                self._left = anyio.Event()
                await self._left.wait()
        for streams in chain.from_iterable(entries.values() for entries in self._entries.values()):
            for stream in streams:
                stream.cancel()

    def _num_unfinished(self, key: str) -> int:
        """A request whose last words are on their way counts no more: its client may have sent the next one already."""
        return sum(
            not streams or not all(stream.status.is_final for stream in streams)
            for streams in self._entries.get(key, {}).values()
        )

    def _check(self, key: str) -> None:
        if self.is_draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down", headers=RETRY_AFTER)
        if self._max_concurrent is not None and self._num_unfinished(key) >= self._max_concurrent:
            raise _too_many(f"unfinished requests of one key must be <= {self._max_concurrent}", 1)
        now_s = self._clock()
        # Tokens are not known before they are there: whoever has used up the minute's waits for the next ones. Those of
        # requests that have not left yet count: their clients may have their last words already.
        num_used = sum(map(_num_tokens, chain.from_iterable(self._entries.get(key, {}).values())))
        self._tokens.check(key, num_used + 1, now_s)
        self._requests.check(key, 1, now_s)
        self._requests.spend(key, 1, now_s)


class _Budgets:
    """One budget a key; the keys are known, so these are few."""

    def __init__(self, what: str, per_minute: int | None) -> None:
        self._what = what
        self._per_minute = per_minute
        self._by_key: dict[str, Budget] = {}

    def check(self, key: str, amount: float, now_s: float) -> None:
        """Whether so much is left.

        Raises:
            RequestError: 429.
        """
        if self._per_minute is not None and (wait_s := self._of(key, self._per_minute, now_s).wait_s(amount, now_s)):
            raise _too_many(f"{self._what} of one key must be <= {self._per_minute} a minute", math.ceil(wait_s))

    def spend(self, key: str, amount: float, now_s: float) -> None:
        """What was used."""
        if self._per_minute is not None:
            self._of(key, self._per_minute, now_s).spend(amount, now_s)

    def _of(self, key: str, per_minute: int, now_s: float) -> Budget:
        if key not in self._by_key:
            self._by_key[key] = Budget(per_minute, now_s)
        return self._by_key[key]


def _too_many(limit: str, wait_s: int) -> RequestError:
    return RequestError(
        429, f"{limit}; try again later", code="rate_limit_exceeded", headers={"Retry-After": str(wait_s)}
    )


def _num_tokens(stream: RequestStream) -> int:
    """Of the prompt and of what has been read of the output."""
    samples = stream.completions
    return samples[0].usage.prompt_tokens + samples[0].usage.completion_tokens if samples else 0
