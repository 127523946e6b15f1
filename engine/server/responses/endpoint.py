"""POST /v1/responses, and GET, DELETE and cancel of stored ones."""

from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.websockets import WebSocket

from triode.engine.server.attended import EVENT_HEADERS, Attended, write_json
from triode.engine.server.connection import Writer, decode, read_body
from triode.engine.server.errors import RequestError
from triode.engine.server.guard import caller_of
from triode.engine.server.responses.events import Event
from triode.engine.server.responses.history import shown_items
from triode.engine.server.responses.objects import DeletedResponse, InputItems
from triode.engine.server.responses.prepare import Prepared, prepare
from triode.engine.server.responses.requests import ResponseRequest
from triode.engine.server.responses.run import ResponseRun
from triode.engine.server.responses.socket import ResponseSocket
from triode.engine.server.responses.store import ResponseStore, Stored, not_found, previous_not_found
from triode.engine.server.service import Service
from triode.engine.server.tokens import json_response
from triode.engine.stream import RequestStream

_DECODER = msgspec.json.Decoder(ResponseRequest)
_ENCODER = msgspec.json.Encoder()
_NOT_KEPT = ResponseStore(0)


class ResponseEndpoint:
    """Responses, and what is kept of them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = ResponseStore(service.config.max_stored_responses)

    async def create(self, request: Request) -> HttpResponse:
        """One response, whole or as events."""
        asked = decode(await read_body(request, self._service.config.max_body_bytes), _DECODER)
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options must be given with stream = true", param="stream_options")
        key, previous = caller_of(request.scope).key, asked.previous_response_id
        before = () if previous is None else self._store.conversation(key, previous)
        if before is None:
            raise previous_not_found(str(previous))
        prepared = prepare(self._service, asked, before)
        return ResponseAnswer(self._service, prepared, self._store, request)

    async def connect(self, socket: WebSocket) -> None:
        """The same on a WebSocket."""
        await socket.accept()
        with self._service.metrics.sockets.track_inprogress():
            await ResponseSocket(self._service, self._store, socket).run()

    async def get(self, request: Request) -> HttpResponse:
        """A stored response, as far as it is known."""
        return json_response(self._stored(request).response)

    async def input_items(self, request: Request) -> HttpResponse:
        """What it answered."""
        items = shown_items(self._stored(request).items)
        first, last = (str(items[place]["id"]) if items else None for place in (0, -1))
        return json_response(InputItems(data=items, first_id=first, last_id=last))

    async def delete(self, request: Request) -> HttpResponse:
        """Forget it. One that runs goes on for whoever reads it."""
        stored = self._stored(request)
        self._store.delete(caller_of(request.scope).key, stored.response.id)
        return json_response(DeletedResponse(id=stored.response.id))

    async def cancel(self, request: Request) -> HttpResponse:
        """End it, if it runs; its reader learns it as the stream's end."""
        stored = self._stored(request)
        if stored.stream is None:
            message = (
                f"response {stored.response.id!r} must be in progress to be cancelled, it is {stored.response.status}"
            )
            raise RequestError(400, message, code="response_not_in_progress", param="response_id")
        stored.stream.cancel()
        return json_response(msgspec.structs.replace(stored.response, status="cancelled"))

    def _stored(self, request: Request) -> Stored:
        name = request.path_params["response_id"]
        if (stored := self._store.get(caller_of(request.scope).key, name)) is None:
            raise not_found(name)
        return stored


class ResponseAnswer(Attended):
    """The answer to a POST."""

    def __init__(self, service: Service, prepared: Prepared, store: ResponseStore, request: Request) -> None:
        super().__init__(service, request)
        self._is_streamed = bool(prepared.asked.stream)
        self._run = ResponseRun(service, self._key, prepared, store if prepared.response.store else _NOT_KEPT)

    async def _answer(self, writer: Writer, streams: list[RequestStream]) -> None:
        async def write(events: Sequence[Event]) -> None:
            await writer.write(b"".join(map(server_sent, events)))

        async def write_nothing(events: Sequence[Event]) -> None:
            pass

        stream = await self._run.open(streams)
        if not self._is_streamed:
            response = await self._run.follow(stream, write_nothing)
            if self._run.failure is not None:
                raise self._run.failure
            await write_json(writer, response)
            return
        await writer.start(200, EVENT_HEADERS)
        await self._run.follow(stream, write)
        await writer.write(b"data: [DONE]\n\n", more=False)


def server_sent(event: Event) -> bytes:
    """An event as OpenAI sends it: by its name, too."""
    return b"event: " + event.kind().encode() + b"\ndata: " + _ENCODER.encode(event) + b"\n\n"
