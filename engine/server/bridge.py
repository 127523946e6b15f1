"""`/v1/stream`: one WebSocket that carries many requests.

A task a request reads its stream and sends what it finds. While a frame waits for a slow socket the others wait for
their turn, and what their requests generate meanwhile arrives in one frame: nothing is buffered without bound. When the
socket closes, every request of it is cancelled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import cast

import anyio
import anyio.abc
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message
from starlette.websockets import WebSocket

from triode.actors.messages import Delta, RequestStatus
from triode.engine.request import Prompt
from triode.engine.server.bridge_messages import (
    Accepted,
    Cancel,
    Failed,
    Finished,
    FromClient,
    FromServer,
    Ping,
    Pong,
    Priority,
    SampleDelta,
    Status,
    StatusReply,
    StreamDelta,
    Submit,
)
from triode.engine.server.connection import PacedSend, first_of
from triode.engine.server.errors import RequestError, engine_error, wrong_value
from triode.engine.server.guard import caller_of
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream
from triode.errors import TriodeError


@dataclass(frozen=True, slots=True)
class Codec:
    """How one subprotocol writes messages."""

    frame: str
    """The key of ASGI's message: text or bytes."""
    encode: Callable[[FromServer], bytes]
    decode: Callable[[bytes], FromClient]

    def to_frame(self, message: FromServer) -> Message:
        """A message as ASGI sends it."""
        data = self.encode(message)
        return {"type": "websocket.send", self.frame: data.decode() if self.frame == "text" else data}


_JSON = Codec("text", msgspec.json.Encoder().encode, msgspec.json.Decoder(FromClient).decode)
_MSGPACK = Codec("bytes", msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FromClient).decode)
SUBPROTOCOLS = {"triode.v1.json": _JSON, "triode.v1.msgpack": _MSGPACK}
"""The first of the client's that is among these is taken; a client that names none gets JSON."""

MAX_TOKENS_IN_FRAME = 128
"""With 64 logprobs for each token a frame stays below 1 MiB, the most that many clients take."""


class BridgeEndpoint:
    """The socket and its documentation."""

    def __init__(self, service: Service) -> None:
        self._service = service

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
            await Bridge(self._service, socket, SUBPROTOCOLS.get(chosen or "", _JSON)).run()

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


@dataclass(slots=True)
class _Open:
    """A request of this socket that has not ended."""

    stream: RequestStream | None = None
    """None until the request is accepted."""
    is_cancelled: bool = False
    priority: int | None = None
    """Given since the submit."""

    @property
    def status(self) -> RequestStatus:
        return RequestStatus.QUEUED if self.stream is None else self.stream.status

    def cancel(self) -> None:
        self.is_cancelled = True
        if self.stream is not None:
            self.stream.cancel()


class Bridge:
    """One accepted socket."""

    def __init__(self, service: Service, socket: WebSocket, codec: Codec) -> None:
        self._service = service
        self._socket = socket
        self._codec = codec
        self._key = caller_of(socket.scope).key
        self._paced = PacedSend(socket.send, service.config.write_timeout_s)
        self._open: dict[str, _Open] = {}

    async def run(self) -> None:
        """Until the socket closes, or is so slow that it is given up."""
        await first_of(self._receive, self._paced.until_stuck)

    async def _receive(self) -> None:
        async with anyio.create_task_group() as requests:
            while (frame := await self._socket.receive())["type"] == "websocket.receive":
                try:
                    await self._handle(self._decode(frame), requests)
                except RequestError as error:
                    await self._send(Failed(None, error.status, error.detail))
            requests.cancel_scope.cancel()

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

    async def _handle(self, message: FromClient, requests: anyio.abc.TaskGroup) -> None:
        match message:
            case Submit(id=name):
                if name in self._open:
                    raise RequestError(400, f"id must be unique among the socket's unfinished requests, got {name!r}")
                self._open[name] = request = _Open()
                requests.start_soon(self._serve, message, request)
            case Cancel(id=name):
                if found := self._open.get(name):
                    found.cancel()
            case Priority(id=name, priority=priority):
                await self._set_priority(name, priority)
            case Status(id=name):
                await self._tell_status(name)
            case Ping():
                await self._send(Pong())

    async def _serve(self, submit: Submit, request: _Open) -> None:
        """One request, from submit to its last word."""
        try:
            with self._service.gate.admitted(self._key) as admitted:
                await self._end(submit.id, await self._outcome(submit, request, admitted))
        except RequestError as error:
            await self._end(submit.id, Failed(submit.id, error.status, error.detail))

    async def _outcome(self, submit: Submit, request: _Open, admitted: list[RequestStream]) -> FromServer:
        try:
            stream = await self._submit(submit)
            admitted.append(stream)
            return await self._follow(submit.id, stream, request)
        except (RequestError, TriodeError) as error:
            failure = error if isinstance(error, RequestError) else engine_error(error)
            return Failed(submit.id, failure.status, failure.detail)

    async def _end(self, name: str, last_word: FromServer) -> None:
        # Free before the last word: the client may use the id again as soon as it has read it.
        del self._open[name]
        await self._send(last_word)

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

    async def _follow(self, name: str, stream: RequestStream, request: _Open) -> Finished:
        timing = self._service.metrics.timing()
        try:
            request.stream = stream
            # What the client asked for meanwhile.
            if request.is_cancelled:
                stream.cancel()
            elif request.priority is not None:
                self._move(stream, request.priority)
            sample = stream.completions[0]
            await self._send(Accepted(name, stream.request_id, sample.usage.prompt_tokens, sample.seed))
            while deltas := await stream.batch():
                timing.saw(deltas)
                for samples in cut(deltas, MAX_TOKENS_IN_FRAME):
                    await self._send(StreamDelta(name, samples))
            result = await stream.result()
            timing.ended(result)
        finally:
            timing.close()
        reasons = [sample.finish_reason for sample in result.completions]
        return Finished(name, reasons, result.usage, result.seed, result.max_tokens, result.reason)

    async def _set_priority(self, name: str, priority: int) -> None:
        if (request := self._open.get(name)) is not None:
            request.priority = priority
            if request.stream is not None:
                self._move(request.stream, priority)
        await self._tell_status(name)

    def _move(self, stream: RequestStream, priority: int) -> None:
        # It may end at any moment, and then there is nothing to move.
        with suppress(KeyError):
            self._service.engine.set_priority(stream.request_id, priority)

    async def _tell_status(self, name: str) -> None:
        request = self._open.get(name)
        await self._send(StatusReply(name, None if request is None else request.status))

    async def _send(self, message: FromServer) -> None:
        await self._paced(self._codec.to_frame(message))


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
