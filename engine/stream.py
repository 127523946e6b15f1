"""RequestStream: one request's output, read under Trio or asyncio alike: only the mailbox's waker knows how to wait."""

import warnings
from collections.abc import Awaitable, Callable
from types import TracebackType

from triode.actors.mailbox import Mailbox
from triode.actors.messages import Delta, RequestStatus
from triode.engine.completion import Completion, Reply, Result, only
from triode.engine.hub import fresh
from triode.errors import RequestFailed
from triode.ids import RequestId


class RequestStream:
    """An async iterator of `Delta`s. Made by `Engine.submit`; read by one task at a time.

    Leaving the `async with` cancels the request. A stream that is dropped unfinished is cancelled when it is collected,
    with a ResourceWarning.
    """

    def __init__(
        self, mailbox: Mailbox, cancel: Callable[[Mailbox], None], cancel_soon: Callable[[Mailbox], None]
    ) -> None:
        """`cancel` is called where the stream is read, `cancel_soon` wherever it is collected."""
        self._mailbox = mailbox
        self._cancel = cancel
        self._cancel_soon = cancel_soon
        self._reply = Reply(mailbox.request_id, mailbox.transcripts)
        self._is_cancelled = False

    @property
    def request_id(self) -> RequestId:
        """The request's id, given or made at submit."""
        return self._mailbox.request_id

    @property
    def status(self) -> RequestStatus:
        """Where the request is, whatever of its output has been read."""
        return self._mailbox.status

    @property
    def completion(self) -> Completion:
        """The only sample, as far as it has been read.

        Raises:
            ValueError: if the request asked for several.
        """
        return only(self.completions)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """All samples, as far as they have been read."""
        return self._reply.completions(self._mailbox.num_cached_tokens)

    def cancel(self) -> None:
        """End the request: no step launched from now on includes it. Idempotent; never waits, never raises."""
        if not self._is_cancelled:
            self._is_cancelled = True
            self._cancel(self._mailbox)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> Delta:
        reply, mailbox = self._reply, self._mailbox
        while (delta := reply.next_delta()) is None:
            if reply.is_complete:
                self._check_well()
                raise StopAsyncIteration
            await self._news()
            if items := mailbox.take():
                reply.read(items)
        return delta

    async def batch(self) -> list[Delta]:
        """Everything since the last call, at most one delta a sample; empty when the request has ended."""
        while not (deltas := self._reply.deltas()):
            if self._reply.is_complete:
                self._check_well()
                break
            await self._receive()
        return deltas

    async def result(self) -> Result:
        """Read to the end. A cancelled request has a result too, its finish reason says so.

        Raises:
            RequestFailed: if the request failed while it ran.
            EngineFault: if the engine did.
        """
        self._mailbox.is_patient = True
        try:
            while not self._reply.is_written:
                await self._receive()
        finally:
            self._mailbox.is_patient = False
        self._reply.counts_all = True
        # The transcripts may have ended while nobody waited, and mail came before that.
        self._reply.read(self._mailbox.take())
        self._check_well()
        return self._reply.result(self._mailbox.num_cached_tokens)

    async def embedding(self) -> tuple[float, ...]:
        """The vector of an embedding request.

        Raises:
            RequestFailed: if the request failed or was cancelled.
        """
        while self._reply.embedding is None:
            self._check_goes_on("it was computed")
            await self._receive()
        return self._reply.embedding

    async def accepted(self) -> "RequestStream":
        """Wait until the request is queued.

        Raises:
            ValueError: if it can not run as asked.
            EngineBusy: if there is no room for it now.
            RequestFailed: if it was cancelled, or the engine was closed, before it was queued.
        """
        try:
            while self._reply.opened is None:
                self._check_goes_on("it was queued")
                await self._receive()
        except BaseException:
            self.cancel()
            raise
        return self

    async def _receive(self) -> None:
        await self._news()
        self._reply.read(self._mailbox.take())

    def _news(self) -> Awaitable[None]:
        """Wait for more than what has been read. The engine's fault comes after everything before it."""
        if self._mailbox.error is not None:
            self._is_cancelled = True
            raise fresh(self._mailbox.error)
        return self._mailbox.waker.wait(self._mailbox)

    def _check_well(self) -> None:
        """A failure comes after the deltas before it, and again whenever somebody asks."""
        if self._reply.failure is not None:
            raise fresh(self._reply.failure)

    def _check_goes_on(self, awaited: str) -> None:
        self._check_well()
        if (ended := self._reply.ended) is not None:
            raise RequestFailed(f"request {self.request_id} ended before {awaited}: {ended.reason}")

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        # May run in any thread, at any point of another function: only a thread-safe post is allowed here.
        if not self._is_cancelled and not self._mailbox.status.is_final:
            self._cancel_soon(self._mailbox)
            warnings.warn(
                f"request {self.request_id} was dropped unfinished: read its stream to the end, or use async with",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
