"""ClientStream: one request's output, as it comes over the bridge."""

import warnings
from collections import deque
from collections.abc import Callable
from types import TracebackType

import anyio
import msgspec

from triode.actors.messages import Delta, Ended, FinishReason, Opened, RequestStatus
from triode.actors.transcript import Transcript
from triode.engine.client.failures import error_of
from triode.engine.completion import Completion, Reply, Result, coalesce, only
from triode.engine.server.bridge_messages import (
    Accepted,
    Ack,
    Cancel,
    Failed,
    Finished,
    FromClient,
    Priority,
    Resume,
    SampleDelta,
    StreamDelta,
    Submit,
)
from triode.ids import RequestId


class ClientStream:
    """An async iterator of `Delta`s. Made by `Client.submit`; read by one task at a time.

    Leaving the `async with` cancels the request.
    """

    def __init__(self, submit: Submit, post: Callable[[FromClient], None]) -> None:
        self._submit = submit
        self._post = post
        self._transcripts = [Transcript() for _ in range(submit.params.n)]
        self._reply = Reply(RequestId(submit.id), self._transcripts)
        self._reply.counts_all = True
        self._deltas: deque[Delta] = deque()
        self._news = anyio.Event()
        self._error: Exception | None = None
        self._status = RequestStatus.QUEUED
        self._num_cached_tokens = 0
        self._is_cancelled = False
        self._priority: int | None = None
        self._token: str | None = None
        self._seq_received = 0
        self._seq_acknowledged = 0

    @property
    def request_id(self) -> str:
        """The request's name on its client."""
        return self._submit.id

    @property
    def status(self) -> RequestStatus:
        """Where the request is, by what has come from it; `Client.status` asks the server."""
        return self._status

    @property
    def completion(self) -> Completion:
        """The only sample, as far as it has arrived.

        Raises:
            ValueError: if the request asked for several.
        """
        return only(self.completions)

    @property
    def completions(self) -> tuple[Completion, ...]:
        """All samples, as far as they have arrived."""
        return self._reply.completions(self._num_cached_tokens)

    def cancel(self) -> None:
        """End the request. Idempotent; never waits, never raises."""
        if not self._is_cancelled and not self._is_over:
            self._is_cancelled = True
            self._post(Cancel(self._submit.id))

    def __aiter__(self) -> "ClientStream":
        return self

    async def __anext__(self) -> Delta:
        await self._wait()
        if not self._deltas:
            raise StopAsyncIteration
        delta = self._deltas.popleft()
        self._acknowledge()
        return delta

    async def batch(self) -> list[Delta]:
        """Everything since the last call, at most one delta a sample; empty when the request has ended."""
        await self._wait()
        deltas = coalesce(list(self._deltas))
        self._deltas.clear()
        self._acknowledge()
        return deltas

    async def result(self) -> Result:
        """Read to the end. A cancelled request has a result too, its finish reason says so.

        Raises:
            RequestFailed: if the request failed while it ran.
            EngineFault: if the engine did.
            ServerUnreachable: if the server was lost.
        """
        while not self._is_over:
            self._acknowledge(all_of_it=True)
            await self._next_news()
        if self._error is not None:
            raise self._error
        return self._reply.result(self._num_cached_tokens)

    async def accepted(self) -> "ClientStream":
        """Wait until the request is queued."""
        try:
            while self._reply.opened is None and self._error is None:
                await self._next_news()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self

    async def __aenter__(self) -> "ClientStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not self._is_cancelled and not self._is_over:
            warnings.warn(
                f"request {self.request_id} was dropped unfinished: read its stream to the end, or use async with",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )

    # What the client tells

    def heard(self, message: Accepted | StreamDelta | Finished | Failed) -> None:
        """Something has come."""
        match message:
            case Accepted():
                self._open(message)
            case StreamDelta():
                self._status = RequestStatus.DECODE
                self._seq_received = message.seq
                deltas = [self._delta(sample) for sample in message.samples]
                for delta in deltas:
                    self._transcripts[delta.index].add_delta(delta)
                if not self._is_cancelled:
                    self._deltas.extend(deltas)
            case Finished():
                self._finish(message)
            case Failed():
                self.fail(error_of(message))
        if isinstance(message, Finished | Failed) and message.seq and self._token is not None:
            self._post(Ack(self._submit.id, message.seq))
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._error, self._status = error, RequestStatus.FAILED
        self._news.set()

    def set_priority(self, priority: int) -> None:
        """Lower goes first."""
        self._priority = priority
        self._post(Priority(self._submit.id, priority))

    def repeat(self) -> list[FromClient]:
        """What to say to the server after the socket was lost."""
        if self._token is None:
            messages: list[FromClient] = [self._submit]
        else:
            # Acknowledges, too.
            self._seq_acknowledged = self._seq_received
            messages = [Resume(self._submit.id, self._token, self._seq_received)]
        if self._priority is not None:
            messages.append(Priority(self._submit.id, self._priority))
        if self._is_cancelled:
            messages.append(Cancel(self._submit.id))
        return messages

    @property
    def _is_over(self) -> bool:
        return self._error is not None or self._status.is_final

    def _open(self, accepted: Accepted) -> None:
        self._token = accepted.resume_token
        opened = Opened(
            RequestId(self._submit.id), accepted.prompt_tokens, accepted.seed, self._submit.params, prompt_token_ids=()
        )
        self._reply.read([opened])

    def _delta(self, sample: SampleDelta) -> Delta:
        return Delta(
            RequestId(self._submit.id),
            sample.index,
            sample.text,
            sample.token_ids,
            sample.logprobs,
            sample.finish_reason,
            sample.stop_reason,
        )

    def _finish(self, finished: Finished) -> None:
        is_cancelled = FinishReason.CANCELLED in finished.finish_reasons
        self._status = RequestStatus.CANCELLED if is_cancelled else RequestStatus.FINISHED
        self._num_cached_tokens = finished.usage.cached_tokens
        if self._reply.opened is not None:
            # The server knows what an open limit came to.
            params = msgspec.structs.replace(self._submit.params, max_tokens=finished.max_tokens)
            self._reply.opened = msgspec.structs.replace(self._reply.opened, params=params)
        if is_cancelled:
            self._reply.read([Ended(RequestId(self._submit.id), self._status, finished.reason or "")])

    async def _wait(self) -> None:
        """Until there are deltas, or there will be no more."""
        while not self._deltas and not self._is_over:
            await self._next_news()
        if not self._deltas and self._error is not None:
            raise self._error

    async def _next_news(self) -> None:
        self._news = anyio.Event()
        await self._news.wait()

    def _acknowledge(self, *, all_of_it: bool = False) -> None:
        """Let the server go on, when a quarter of the window has been read since the last time."""
        window = self._submit.window or 0
        has_read = all_of_it or not self._deltas
        num_new = self._seq_received - self._seq_acknowledged
        if has_read and not self._is_over and num_new >= max(window // 4, 1):
            self._seq_acknowledged = self._seq_received
            self._post(Ack(self._submit.id, self._seq_received))
