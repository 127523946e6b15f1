"""Answers that are made while their client waits: its leaving ends the making, as does its taking nothing.

Whatever ends the answer early leaves the gate's block, and that cancels the streams in it.
"""

from abc import ABC, abstractmethod
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from triode.engine.server.connection import Writer, first_of, until_left
from triode.engine.server.guard import caller_of
from triode.engine.server.service import Service
from triode.engine.stream import RequestStream

_ENCODER = msgspec.json.Encoder()
_JSON = (b"content-type", b"application/json")
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of nginx's kind would hold the events back.
    (b"x-accel-buffering", b"no"),
]


class Attended(Response, ABC):
    """Base of such answers."""

    def __init__(self, service: Service, request: Request) -> None:
        # A Response only by type: nothing of it is known before the engine has begun.
        self.background = None
        self._service = service
        self._key = caller_of(request.scope).key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the answer.

        Raises:
            RequestError: as long as nothing has been sent.
        """
        writer = Writer(send, self._service.config.write_timeout_s)
        with self._service.gate.admitted(self._key) as streams:
            await first_of(
                partial(until_left, receive),
                partial(_until_given_up, writer, streams),
                partial(self._answer, writer, streams),
            )

    @abstractmethod
    async def _answer(self, writer: Writer, streams: list[RequestStream]) -> None:
        """Write everything. Streams that are opened belong into the list."""


async def _until_given_up(writer: Writer, streams: list[RequestStream]) -> None:
    await writer.until_stuck()
    # Some servers' writes cannot be cancelled; the requests can.
    for stream in streams:
        stream.cancel()


async def write_json(writer: Writer, body: msgspec.Struct) -> None:
    """A whole answer."""
    data = _ENCODER.encode(body)
    await writer.start(200, [_JSON, (b"content-length", str(len(data)).encode())])
    await writer.write(data, more=False)
