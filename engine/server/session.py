"""A request of the bridge: it may outlive the socket that brought it, and go on at another one.

At any moment one task serves a session: one that sends at a socket, or one that waits for another socket. Whoever
`claim`s the session ends the work of the one before by cancelling its scope; that one sees that the scope is not the
session's any more, and leaves everything as it is. So nothing needs to be handed over, and a socket that is dead without
knowing it holds nothing up.
"""

import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack

import anyio
import anyio.lowlevel
import msgspec

from triode.actors.messages import Delta, FinishReason, RequestStatus
from triode.engine.server.bridge_messages import Failed, Finished, FromServer, SampleDelta, StreamDelta, Submit
from triode.engine.server.errors import RequestError, engine_error
from triode.engine.server.outbox import Outbox
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream
from triode.errors import TriodeError
from triode.models.guide import Grammar

MAX_TOKENS_IN_FRAME = 128
"""With 64 logprobs for each token a frame stays below 1 MiB, the most that many clients take."""

SendMessage = Callable[[FromServer], Awaitable[None]]


class Session:
    """One accepted request. `admission` is left when it ends."""

    def __init__(
        self,
        service: Service,
        sessions: "Sessions",
        submit: Submit,
        stream: RequestStream,
        key: str,
        admission: ExitStack,
    ) -> None:
        self.stream = stream
        self.key = key
        self.token = secrets.token_urlsafe(24) if submit.resume_grace_s else None
        self._service = service
        self._sessions = sessions
        self._grace_s = submit.resume_grace_s
        self._guide_field = None if submit.params.guide is None else "guide"
        self._admission = admission
        self._outbox = Outbox(submit.window)
        self._timing = service.metrics.timing()
        self._holder: anyio.CancelScope | None = None
        self._news = anyio.Event()
        # Whoever is cancelled lets go of the stream a moment after the next one has claimed the session.
        self._reading = anyio.Lock()
        self._is_finished = False
        self._is_left = False
        admission.callback(self._timing.close)
        if self.token is not None:
            sessions[self.token] = self

    @property
    def status(self) -> RequestStatus:
        """Where the request is."""
        return self.stream.status

    def cancel(self) -> None:
        """End the request; its last word comes without waiting for acknowledgements."""
        self.stream.cancel()
        self._outbox.open_wide()
        self._news.set()

    def acknowledge(self, seq: int) -> None:
        """The client has read so far.

        Raises:
            ValueError: for what was not sent.
        """
        self._outbox.acknowledge(seq)
        self._news.set()

    def rewind(self, seq: int) -> None:
        """What the next socket begins after.

        Raises:
            ValueError: for what was not sent, or is not kept any more.
        """
        self._outbox.rewind(seq)

    async def serve(self, name: str, send: SendMessage, forget: Callable[[], None], opening: FromServer) -> None:
        """Send until the last word; if the socket is left before that, wait for another one.

        `forget` is called when the id is free again: before the last word, or when it has been acknowledged.
        """
        mine = self._claim()
        try:
            with mine:
                await self._send_all(mine, name, send, forget, opening)
                return
            if self._holder is mine and self.token is not None and not self._is_left:
                mine = self._claim()
                # A server that drains takes no new sockets.
                with mine, anyio.move_on_after(self._grace_s):
                    await self._service.gate.draining.wait()
        finally:
            forget()
            if self._holder is mine:
                self.end()

    def leave(self, *, for_good: bool) -> None:
        """The socket is lost, or closed by a client that will not come back."""
        self._is_left = for_good
        if self.token is None:
            # Some servers' writes cannot be cancelled; the request can.
            self.stream.cancel()
        if self._holder is not None:
            self._holder.cancel()

    def _claim(self) -> anyio.CancelScope:
        if self._holder is not None:
            self._holder.cancel()
        self._holder = anyio.CancelScope()
        return self._holder

    async def _send_all(
        self,
        mine: anyio.CancelScope,
        name: str,
        send: SendMessage,
        forget: Callable[[], None],
        opening: FromServer,
    ) -> None:
        await send(opening)
        while not self._is_finished or self._outbox.has_unsent:
            if mine.cancel_called:
                # A task that was about to go on does so once more, and would take a word that another socket waits for.
                await anyio.lowlevel.checkpoint()
            elif word := self._outbox.next():
                if self.token is None and not isinstance(word, StreamDelta):
                    forget()
                await send(word if word.id == name else msgspec.structs.replace(word, id=name))
            elif self._outbox.is_full:
                await self._wait_for_news()
            else:
                await self._read(name)
        if self.token is not None:
            # Until it is acknowledged, the last word may have been lost with its socket.
            with anyio.move_on_after(self._grace_s):
                while not self._outbox.is_empty:
                    await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        self._news = anyio.Event()
        await self._news.wait()

    async def _read(self, name: str) -> None:
        """Put what the request has generated into the outbox."""
        async with self._reading:
            try:
                if deltas := await self.stream.batch():
                    self._timing.saw(deltas)
                    for samples in cut(deltas, MAX_TOKENS_IN_FRAME):
                        self._outbox.put(StreamDelta(name, samples))
                    return
                self._finish(await self._last_word(name))
            except TriodeError as error:
                self._timing.close(FinishReason.ERROR)
                failure = engine_error(error, self._guide_field)
                self._finish(Failed(name, failure.status, failure.detail))

    async def _last_word(self, name: str) -> Finished:
        result = await self.stream.result()
        self._timing.ended(result)
        reasons = [sample.finish_reason for sample in result.completions]
        return Finished(name, reasons, result.usage, result.seed, result.max_tokens, result.reason)

    def _finish(self, last_word: Finished | Failed) -> None:
        self._outbox.put(last_word)
        self._is_finished = True

    def end(self) -> None:
        """Nobody serves it any more: its request is cancelled, if it has not ended."""
        if self.token is not None:
            del self._sessions[self.token]
        self._admission.close()


Sessions = dict[str, Session]
"""Those that can be resumed, by token."""


def find_session(sessions: Sessions, token: str, key: str) -> Session:
    """The session that a client may resume.

    Raises:
        RequestError: 404, which does not tell whether there was ever one.
    """
    session = sessions.get(token)
    if session is None or session.key != key:
        raise RequestError(404, "no request waits to be resumed with this token and key", code="not_resumable")
    return session


def check_submit(submit: Submit, max_grace_s: float) -> None:
    """What the bridge asks beyond what the engine does.

    Raises:
        RequestError: 400.
    """
    if not 0 <= submit.resume_grace_s <= max_grace_s:
        message = f"resume_grace_s must be >= 0 and <= {max_grace_s:g}, got {submit.resume_grace_s}"
        raise RequestError(400, message, param="resume_grace_s")
    if submit.resume_grace_s and submit.window is None:
        raise RequestError(400, "window must be given with resume_grace_s: it bounds what is kept", param="window")
    guide = submit.params.guide
    if isinstance(guide, Grammar) and guide.of_schemas:
        raise RequestError(400, "guide.of_schemas must be false on a bridge", param="guide")
    if submit.params.prompt_logprobs is not None:
        raise RequestError(400, "prompt_logprobs must be None on a bridge", param="prompt_logprobs")


def cut(deltas: Sequence[Delta], max_tokens: int) -> Iterator[list[SampleDelta]]:
    """What one frame each brings. A delta too long for a frame is cut: its text comes first, its end last."""
    if sum(len(delta.token_ids) for delta in deltas) <= max_tokens:
        yield [_sample_delta(delta) for delta in deltas]
        return
    for delta in deltas:
        num_tokens = len(delta.token_ids)
        for start in range(0, max(num_tokens, 1), max_tokens):
            is_first, is_last = start == 0, start + max_tokens >= num_tokens
            piece = msgspec.structs.replace(
                delta,
                text=delta.text if is_first else "",
                token_ids=delta.token_ids[start : start + max_tokens],
                logprobs=None if delta.logprobs is None else delta.logprobs[start : start + max_tokens],
                finish_reason=delta.finish_reason if is_last else None,
                stop_reason=delta.stop_reason if is_last else None,
            )
            yield [_sample_delta(piece)]


def _sample_delta(delta: Delta) -> SampleDelta:
    return SampleDelta(delta.index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason)
