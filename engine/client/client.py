"""Client and connect: requests over one WebSocket, which is opened again when it is lost."""

import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import msgspec

from triode.actors.messages import RequestStatus
from triode.engine.client.failures import error_of
from triode.engine.client.stream import ClientStream
from triode.engine.client.wire import Wire
from triode.engine.request import Prompt, check_cache_salt, check_deadline_s, check_priority
from triode.engine.server.bridge_messages import (
    Accepted,
    BridgePrompt,
    Failed,
    Finished,
    FromClient,
    FromServer,
    Status,
    StatusReply,
    StreamDelta,
    Submit,
)
from triode.engine.submission import Submission
from triode.errors import AccessDenied, EngineClosed, ProtocolError, ServerUnreachable
from triode.models.sampling import SamplingParams

WINDOW = 64
"""Deltas on their way at most; a request that is read slowly gets fewer, larger ones."""
PING_S = 15
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


@asynccontextmanager
async def connect(
    url: str,
    *,
    key: str | None = None,
    resume_grace_s: float = 0.0,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator["Client"]:
    """A client of the server at `url`. Leaving the block cancels what is unfinished; its exceptions leave it bare.

    Args:
        url: as http://localhost:8000 or https://example.com/llm.
        key: the API key.
        resume_grace_s: when the socket is lost, requests go on for so long and wait for a new one. At most what the
            server allows. With 0 they are cancelled.
        ssl_context: for https; the default trusts what the system trusts.

    Raises:
        ServerUnreachable: if nobody answers.
        AccessDenied: if the key is missing or wrong.
    """
    wire = await Wire.open(url, key, ssl_context)
    client = Client(url, key, resume_grace_s, ssl_context)
    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(client._run, wire)
        try:
            yield client
        except Exception as error:
            # The group would wrap it.
            failure = error
        finally:
            client._end(EngineClosed("the client's block has been left"))
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Client:
    """A connection to a served engine. Made by `connect`."""

    def __init__(self, url: str, key: str | None, resume_grace_s: float, ssl_context: ssl.SSLContext | None) -> None:
        self._address = (url, key, ssl_context)
        self._grace_s = resume_grace_s
        self._streams: dict[str, ClientStream] = {}
        self._questions: dict[str, list[_Question]] = {}
        self._outgoing: list[FromClient] = []
        self._has_outgoing = anyio.Event()
        self._names = itertools.count()
        self._ended: Exception | None = None

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        cache_salt: str | None = None,
        deadline_s: float | None = None,
    ) -> Submission[ClientStream]:
        """Queue a request, as `triode.Engine.submit`. Await the result for its stream, or enter it with `async with`.

        Raises (from the await):
            ValueError: if an argument is wrong or the request could never fit.
            EngineBusy: if the server takes no more of this key, or at all.
            EngineClosed: if the engine has ended, or is about to.
            ServerUnreachable: if the server was lost.
            ProtocolError: if it says what no server of this kind would.
        """
        check_priority(priority)
        check_cache_salt(cache_salt)
        check_deadline_s(deadline_s)
        submit = Submit(
            id=f"request-{next(self._names)}" if request_id is None else request_id,
            prompt=_plain(prompt),
            params=params or SamplingParams(),
            priority=priority,
            cache_salt=cache_salt,
            deadline_s=deadline_s,
            window=WINDOW,
            resume_grace_s=self._grace_s,
        )
        return Submission(self._open(submit))

    def cancel(self, request_id: str) -> None:
        """Cancel by id; a request that has ended, or is unknown, is left alone."""
        if stream := self._streams.get(request_id):
            stream.cancel()

    def set_priority(self, request_id: str, priority: int) -> None:
        """Move a request in the order of service. Lower goes first.

        Raises:
            KeyError: if no unfinished request of this client has the id.
        """
        check_priority(priority)
        self._stream(request_id).set_priority(priority)

    async def status(self, request_id: str) -> RequestStatus:
        """Where a request is, as the server says.

        Raises:
            KeyError: if no unfinished request of this client has the id.
            ServerUnreachable: if the server was lost.
        """
        stream = self._stream(request_id)
        question = _Question()
        self._questions.setdefault(request_id, []).append(question)
        self._post(Status(request_id))
        await question.answered.wait()
        if self._ended is not None:
            raise self._ended
        return question.status or stream.status

    async def _open(self, submit: Submit) -> ClientStream:
        if self._ended is not None:
            raise self._ended
        if submit.id in self._streams:
            raise ValueError(f"request_id must be unique among unfinished requests, got {submit.id!r}")
        self._streams[submit.id] = stream = ClientStream(submit, self._post)
        self._post(submit)
        return await stream.accepted()

    def _stream(self, request_id: str) -> ClientStream:
        if (stream := self._streams.get(request_id)) is None:
            raise KeyError(f"no unfinished request has the id {request_id!r}")
        return stream

    def _post(self, message: FromClient) -> None:
        """Send soon. Never waits, so that cancelling never does."""
        if self._ended is None:
            self._outgoing.append(message)
            self._has_outgoing.set()

    def _end(self, error: Exception) -> None:
        self._ended = self._ended or error
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for name in list(self._questions):
            self._answer(name, None)

    # In the background

    async def _run(self, wire: Wire) -> None:
        """Read and write, on one socket after another."""
        try:
            while True:
                loss = await self._use(wire)
                if not self._grace_s:
                    raise loss
                wire = await self._reconnect(loss)
                self._repeat()
        except (ServerUnreachable, AccessDenied, ProtocolError) as error:
            self._end(error)

    async def _use(self, wire: Wire) -> ServerUnreachable:
        """Until the socket is lost; returns how.

        Raises:
            ProtocolError: if the server is none.
        """
        losses: list[ServerUnreachable | ProtocolError] = []

        async def until_lost(work: Callable[[Wire], Awaitable[None]]) -> None:
            try:
                await work(wire)
            except (ServerUnreachable, ProtocolError) as loss:
                losses.append(loss)
                group.cancel_scope.cancel()

        async with wire, anyio.create_task_group() as group:
            group.start_soon(until_lost, self._read)
            group.start_soon(until_lost, self._write)
        if isinstance(loss := losses[0], ProtocolError):
            raise loss
        return loss

    async def _read(self, wire: Wire) -> None:
        while True:
            self._hear(await wire.receive())

    def _hear(self, message: FromServer) -> None:
        match message:
            case Accepted() | StreamDelta() if stream := self._streams.get(message.id):
                stream.heard(message)
            case Finished() | Failed() if stream := self._streams.pop(message.id or "", None):
                stream.heard(message)
                self._answer(stream.request_id, stream.status)
            case Failed(id=None):
                # No request of this client brings a frame that the server cannot read: it is older, or something else.
                self._end(error_of(message))
            case StatusReply(id=name, status=status):
                self._answer(name, status)
            case _:
                # `resumed`, and words of requests that were given up here while they were on their way.
                pass

    async def _write(self, wire: Wire) -> None:
        while True:
            while self._outgoing:
                await wire.send(self._outgoing.pop(0))
            self._has_outgoing = anyio.Event()
            with anyio.move_on_after(PING_S) as pause:
                await self._has_outgoing.wait()
            if pause.cancelled_caught:
                await wire.ping()

    async def _reconnect(self, loss: ServerUnreachable) -> Wire:
        pause_s = FIRST_PAUSE_S
        with anyio.move_on_after(self._grace_s):
            while True:
                try:
                    return await Wire.open(*self._address)
                except ServerUnreachable:
                    await anyio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise ServerUnreachable(f"{loss}, and no new one could be opened within {self._grace_s} s") from loss

    def _repeat(self) -> None:
        """Tell a new socket all that matters of what the old one was told."""
        self._outgoing = [message for stream in self._streams.values() for message in stream.repeat()]
        self._outgoing += [Status(name) for name in self._questions]
        self._has_outgoing.set()

    def _answer(self, name: str, status: RequestStatus | None) -> None:
        for question in self._questions.pop(name, ()):
            question.status = status
            question.answered.set()


def _plain(prompt: Prompt) -> BridgePrompt:
    """The prompt as JSON knows it.

    Raises:
        ValueError: if it is neither text, token ids nor chat messages.
    """
    try:
        plain: BridgePrompt = msgspec.convert(prompt, BridgePrompt)
    except msgspec.ValidationError as error:
        raise ValueError(f"prompt must be text, token ids or chat messages: {error}") from None
    return plain


class _Question:
    """Somebody waits for a status."""

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.status: RequestStatus | None = None
