"""WebSocket mode of /v1/responses: the same requests as messages, the same events as frames, many in turn.

    client ─response.create→ server ─response.created, ..., response.completed→ client          or ─error→
    client ─response.cancel→ server                        (the response that it ends says so in its last event)

Responses of one `stream_id`, or of none, run in turn; those of different ones side by side, and their events carry it.
`previous_response_id` may name a stored response, or with `store: false` one of this socket's latest.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import anyio
import anyio.abc
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.types import Message
from starlette.websockets import WebSocket

from triode.engine.server.connection import PacedSend, first_of
from triode.engine.server.errors import ErrorDetail, RequestError, wrong_value
from triode.engine.server.guard import caller_of
from triode.engine.server.responses.events import Event
from triode.engine.server.responses.prepare import prepare
from triode.engine.server.responses.requests import Cancel, Create, FromClient
from triode.engine.server.responses.run import ResponseRun
from triode.engine.server.responses.store import ResponseStore, not_found, previous_not_found
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream

MAX_WAITING = 16
"""Responses of one stream that may wait for their turn."""
MAX_WAITING_BYTES = 16 * 2**20
"""Of all messages of a socket that wait; a single one may be larger."""
MAX_STREAMS = 64
"""Streams of one socket."""
MAX_REMEMBERED = 32
"""Responses that a socket keeps for `store: false`, with what was said before them."""
MAX_REMEMBERED_BYTES = 8 * 2**20

_DECODER: msgspec.json.Decoder[Create | Cancel] = msgspec.json.Decoder(FromClient)
_ENCODER = msgspec.json.Encoder()


class SocketError(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error", omit_defaults=True):
    """A message was refused."""

    status: int
    """As HTTP would say it."""
    error: ErrorDetail
    stream_id: str | None = None


class _Waiting(NamedTuple):
    """A response whose turn has not come."""

    message: Create
    num_bytes: int


class _Lane(NamedTuple):
    """The responses of one stream that wait for their turn."""

    waiting: MemoryObjectSendStream[_Waiting]
    taken: MemoryObjectReceiveStream[_Waiting]


class ResponseSocket:
    """One accepted socket."""

    def __init__(self, service: Service, store: ResponseStore, socket: WebSocket) -> None:
        self._service = service
        self._store = store
        self._own = ResponseStore(MAX_REMEMBERED, MAX_REMEMBERED_BYTES)
        self._socket = socket
        self._key = caller_of(socket.scope).key
        self._paced = PacedSend(socket.send, service.config.write_timeout_s)
        self._lanes: dict[str | None, _Lane] = {}
        self._waiting_bytes = 0
        self._running: dict[str, RequestStream] = {}

    async def run(self) -> None:
        """Until the socket closes, or is so slow that it is given up."""
        try:
            await first_of(self._receive, self._paced.until_stuck)
        finally:
            for lane in self._lanes.values():
                lane.waiting.close()
                lane.taken.close()

    async def _receive(self) -> None:
        async with anyio.create_task_group() as lanes:
            while (frame := await self._socket.receive())["type"] == "websocket.receive":
                message: FromClient | None = None
                try:
                    data = self._data(frame)
                    message = _decode(data)
                    if isinstance(message, Create):
                        self._line_up(_Waiting(message, len(data)), lanes)
                    else:
                        self._cancel(message.response_id)
                except RequestError as error:
                    await self._refuse(error, message.stream_id if isinstance(message, Create) else None)
            lanes.cancel_scope.cancel()

    def _data(self, frame: Message) -> bytes:
        """What a frame holds.

        Raises:
            RequestError: 413.
        """
        text = frame.get("text")
        data: bytes = frame.get("bytes") or b"" if text is None else text.encode()
        if len(data) > (limit := self._service.config.max_body_bytes):
            raise RequestError(413, f"a frame must have <= {limit} bytes, got {len(data)}")
        return data

    def _line_up(self, asked: _Waiting, lanes: anyio.abc.TaskGroup) -> None:
        stream_id = asked.message.stream_id
        if (lane := self._lanes.get(stream_id)) is None:
            if len(self._lanes) >= MAX_STREAMS:
                raise RequestError(400, f"stream_id must be one of <= {MAX_STREAMS} of a socket", param="stream_id")
            self._lanes[stream_id] = lane = _Lane(*anyio.create_memory_object_stream[_Waiting](MAX_WAITING))
            lanes.start_soon(self._serve_lane, lane.taken)
        if self._waiting_bytes and self._waiting_bytes + asked.num_bytes > MAX_WAITING_BYTES:
            raise _too_many(f"messages that wait must have <= {MAX_WAITING_BYTES} bytes in one socket")
        try:
            lane.waiting.send_nowait(asked)
        except anyio.WouldBlock:
            raise _too_many(f"responses that wait must be <= {MAX_WAITING} in one stream") from None
        self._waiting_bytes += asked.num_bytes

    def _cancel(self, response_id: str | None) -> None:
        if response_id is not None and response_id not in self._running:
            raise not_found(response_id)
        for name, stream in self._running.items():
            if response_id in (None, name):
                stream.cancel()

    async def _serve_lane(self, taken: MemoryObjectReceiveStream[_Waiting]) -> None:
        async for message, num_bytes in taken:
            self._waiting_bytes -= num_bytes
            try:
                with self._service.gate.admitted(self._key) as streams:
                    await self._serve(message, streams)
            except RequestError as error:
                await self._refuse(error, message.stream_id)

    async def _serve(self, message: Create, streams: list[RequestStream]) -> None:
        prepared = prepare(self._service, message, self._before(message.previous_response_id))
        name = prepared.response.id
        store = self._store if prepared.response.store else self._own
        run = ResponseRun(self._service, self._key, prepared, store)
        send = partial(self._send, message.stream_id)
        if not message.generate:
            await run.keep_input(send)
            return
        self._running[name] = stream = await run.open(streams)
        try:
            await run.follow(stream, send)
        finally:
            del self._running[name]

    def _before(self, previous: str | None) -> tuple[dict[str, object], ...]:
        if previous is None:
            return ()
        for store in (self._own, self._store):
            if (conversation := store.conversation(self._key, previous)) is not None:
                return conversation
        raise previous_not_found(previous)

    async def _send(self, stream_id: str | None, events: Sequence[Event]) -> None:
        for event in events:
            text = _ENCODER.encode(event).decode()
            if stream_id is not None:
                text = f'{text[:-1]},"stream_id":{_ENCODER.encode(stream_id).decode()}}}'
            await self._paced({"type": "websocket.send", "text": text})

    async def _refuse(self, error: RequestError, stream_id: str | None) -> None:
        refused = SocketError(status=error.status, error=error.detail, stream_id=stream_id)
        await self._paced({"type": "websocket.send", "text": _ENCODER.encode(refused).decode()})


def _decode(data: bytes) -> FromClient:
    """The message in a frame.

    Raises:
        RequestError: 400.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong_value(error) from None


def _too_many(limit: str) -> RequestError:
    return RequestError(429, limit, code="rate_limit_exceeded")
