"""`/v1/stream`: one WebSocket that carries many requests.

A task a request reads its stream and sends what it finds. While a frame waits for a slow socket the others wait for
their turn, and what their requests generate meanwhile arrives in one frame: nothing is buffered without bound. When the
socket closes, every request of it is cancelled, but for those whose clients asked for time to come back.
"""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from typing import cast

import anyio
import anyio.abc
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from triode.actors.messages import RequestStatus
from triode.engine.request import Prompt
from triode.engine.server.bridge_messages import (
    Accepted,
    Ack,
    Cancel,
    Failed,
    FromClient,
    FromServer,
    Goodbye,
    Ping,
    Pong,
    Priority,
    Resume,
    Resumed,
    Status,
    StatusReply,
    Submit,
)
from triode.engine.server.codec import JSON, SUBPROTOCOLS, Codec
from triode.engine.server.connection import PacedSend, first_of
from triode.engine.server.errors import RequestError, engine_error, wrong_value
from triode.engine.server.guard import caller_of
from triode.engine.server.service import Service
from triode.engine.server.session import Session, Sessions, check_submit, find_session
from triode.engine.stream import RequestStream
from triode.errors import TriodeError

CLOSE_S = 1
"""For the close of a socket that is stuck; most are beyond it."""


class BridgeEndpoint:
    """The socket and its documentation."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._sessions: Sessions = {}

    async def connect(self, socket: WebSocket) -> None:
        """One socket, until either side closes it."""
        offered = socket.scope["subprotocols"]
        chosen = next((name for name in offered if name in SUBPROTOCOLS), None)
        if offered and chosen is None:
            # Browsers close a socket that accepts none of what they offer; this says why.
            error = RequestError(400, f"the subprotocol must be one of {', '.join(SUBPROTOCOLS)}")
            await socket.send_denial_response(Response(error.encode(), 400, media_type="application/json"))
            return
        await socket.accept(chosen)
        with self._service.metrics.sockets.track_inprogress():
            await Bridge(self._service, self._sessions, socket, SUBPROTOCOLS.get(chosen or "", JSON)).run()

    async def schema(self, request: Request) -> Response:
        """The messages of both directions, as JSON Schema."""
        return Response(_schema(), media_type="application/json")


@cache
def _schema() -> bytes:
    # The only custom type is `object`: any value.
    (client, server), components = msgspec.json.schema_components(
        (FromClient, FromServer), schema_hook=lambda _: {"description": "any value"}, ref_template="#/$defs/{name}"
    )
    return msgspec.json.encode({"$defs": components, "client": client, "server": server})


class _Open:
    """A request of this socket that has not had its last word."""

    def __init__(self) -> None:
        self.session: Session | None = None
        """None until the request is accepted."""
        self.is_cancelled = False
        self.priority: int | None = None
        """Given since the submit."""
        self._opening = anyio.CancelScope()

    @property
    def is_left(self) -> bool:
        """Whether the socket is lost."""
        return self._opening.cancel_called

    @property
    def status(self) -> RequestStatus:
        return RequestStatus.QUEUED if self.session is None else self.session.status

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.session is not None:
            self.session.cancel()

    def leave(self, *, for_good: bool) -> None:
        """The socket is closed, or lost."""
        self._opening.cancel()
        if self.session is not None:
            self.session.leave(for_good=for_good)

    async def open(self, opening: Callable[[], Awaitable[Session]]) -> Session | None:
        """The accepted request; None if the socket was lost before."""
        with self._opening:
            session = await opening()
            if self.is_left:
                # Accepted in the moment in which the socket was lost: nobody knows its token.
                session.end()
            else:
                self.session = session
        return self.session


class Bridge:
    """One accepted socket."""

    def __init__(self, service: Service, sessions: Sessions, socket: WebSocket, codec: Codec) -> None:
        self._service = service
        self._sessions = sessions
        self._socket = socket
        self._codec = codec
        self._key = caller_of(socket.scope).key
        self._paced = PacedSend(socket.send, service.config.write_timeout_s)
        self._open: dict[str, _Open] = {}
        self._said_goodbye = False

    async def run(self) -> None:
        """Until the socket closes, or is so slow that it is given up, and no request waits for another socket."""
        async with anyio.create_task_group() as requests:
            await first_of(partial(self._receive, requests), self._until_stuck)
            for request in list(self._open.values()):
                request.leave(for_good=self._said_goodbye)

    async def _receive(self, requests: anyio.abc.TaskGroup) -> None:
        while (frame := await self._socket.receive())["type"] == "websocket.receive":
            try:
                await self._handle(self._decode(frame), requests)
            except RequestError as error:
                await self._send(Failed(self._refused(frame), error.status, error.detail))

    async def _until_stuck(self) -> None:
        await self._paced.until_stuck()
        # Its requests may outlive it, but it is of no use any more.
        with anyio.move_on_after(CLOSE_S):
            await self._socket.close(1013)

    def _decode(self, frame: Message) -> FromClient:
        """The message in a frame.

        Raises:
            RequestError: 400 or 413.
        """
        if (content := frame.get(self._codec.frame)) is None:
            raise RequestError(400, f"frames of this subprotocol must be {self._codec.frame}")
        data = content.encode() if isinstance(content, str) else content
        if len(data) > (limit := self._service.config.max_body_bytes):
            raise RequestError(413, f"a frame must have <= {limit} bytes, got {len(data)}")
        try:
            return self._codec.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise wrong_value(error) from None

    def _refused(self, frame: Message) -> str | None:
        """Whose request has come to nothing with a frame, if it would have begun, or gone on, with it."""
        content = frame.get(self._codec.frame) or b""
        try:
            named = self._codec.decode_name(content.encode() if isinstance(content, str) else content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return named.id if named.type in ("submit", "resume") and named.id not in self._open else None

    async def _handle(self, message: FromClient, requests: anyio.abc.TaskGroup) -> None:
        match message:
            case Submit(id=name):
                requests.start_soon(self._begin, message, self._new(name))
            case Resume(id=name):
                session = find_session(self._sessions, message.token, self._key)
                request = self._new(name)
                requests.start_soon(self._resume, message, request, session)
            case Ack(id=name, seq=seq):
                self._acknowledge(name, seq)
            case Cancel(id=name):
                if found := self._open.get(name):
                    found.cancel()
            case Priority(id=name, priority=priority):
                await self._set_priority(name, priority)
            case Status(id=name):
                await self._tell_status(name)
            case Goodbye():
                self._said_goodbye = True
            case Ping():
                await self._send(Pong())

    def _new(self, name: str) -> _Open:
        if name in self._open:
            raise RequestError(400, f"id must be unique among the socket's unfinished requests, got {name!r}")
        self._open[name] = request = _Open()
        return request

    async def _begin(self, submit: Submit, request: _Open) -> None:
        """One request, from submit to its last word."""
        try:
            session = await request.open(partial(self._accept, submit))
        except RequestError as error:
            del self._open[submit.id]
            await self._send(Failed(submit.id, error.status, error.detail))
            return
        if session is None:
            return
        # What the client asked for meanwhile.
        if request.is_cancelled:
            session.cancel()
        elif request.priority is not None:
            self._move(session, request.priority)
        sample = session.stream.completions[0]
        opening = Accepted(submit.id, session.stream.request_id, sample.usage.prompt_tokens, sample.seed, session.token)
        await self._serve(submit.id, request, session, opening)

    async def _accept(self, submit: Submit) -> Session:
        check_submit(submit, self._service.config.max_resume_grace_s)
        with ExitStack() as admission:
            admitted = admission.enter_context(self._service.gate.admitted(self._key))
            stream = await self._submit(submit)
            admitted.append(stream)
            return Session(self._service, self._sessions, submit, stream, self._key, admission.pop_all())

    async def _submit(self, submit: Submit) -> RequestStream:
        try:
            return await self._service.engine.submit(
                cast(Prompt, submit.prompt),
                submit.params,
                priority=submit.priority,
                cache_salt=submit.cache_salt,
                deadline_s=submit.deadline_s,
            )
        except ValueError as error:
            raise wrong_value(error) from None
        except TriodeError as error:
            raise engine_error(error) from error

    async def _resume(self, resume: Resume, request: _Open, session: Session) -> None:
        if request.is_left:
            # The session waits for another socket, as before.
            return
        try:
            session.rewind(resume.seq)
        except ValueError as error:
            del self._open[resume.id]
            failure = wrong_value(error)
            await self._send(Failed(resume.id, failure.status, failure.detail))
            return
        request.session = session
        await self._serve(resume.id, request, session, Resumed(resume.id, session.stream.request_id))

    async def _serve(self, name: str, request: _Open, session: Session, opening: FromServer) -> None:
        await session.serve(name, self._send, partial(self._forget, name, request), opening)

    def _forget(self, name: str, request: _Open) -> None:
        """The id is free."""
        if self._open.get(name) is request:
            del self._open[name]

    def _acknowledge(self, name: str, seq: int) -> None:
        # Acknowledgements of a request's last words may come after its end.
        request = self._open.get(name)
        if request is not None and request.session is not None:
            try:
                request.session.acknowledge(seq)
            except ValueError as error:
                raise wrong_value(error) from None

    async def _set_priority(self, name: str, priority: int) -> None:
        if (request := self._open.get(name)) is not None:
            request.priority = priority
            if request.session is not None:
                self._move(request.session, priority)
        await self._tell_status(name)

    def _move(self, session: Session, priority: int) -> None:
        # It may end at any moment, and then there is nothing to move.
        with suppress(KeyError):
            self._service.engine.set_priority(session.stream.request_id, priority)

    async def _tell_status(self, name: str) -> None:
        request = self._open.get(name)
        await self._send(StatusReply(name, None if request is None else request.status))

    async def _send(self, message: FromServer) -> None:
        # A socket that is lost says so to `_receive`, too, which lets all of its requests know.
        with suppress(WebSocketDisconnect, WebSocketDisconnected):
            await self._paced(self._codec.to_frame(message))
