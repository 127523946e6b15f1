"""uvicorn's HTTP parser, with the limits that it lacks: how long headers may take, and how large they may be."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 2**16
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def punctual_http(header_timeout_s: float) -> type[HttpToolsProtocol]:
    """The protocol for one server."""

    class PunctualHttp(HttpToolsProtocol):
        """Closes a connection whose headers do not come to an end. One that is silent costs nothing, and may be."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            self._is_in_headers = True
            self._num_header_bytes = 0
            self._deadline: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            if self._is_in_headers:
                self._num_header_bytes += len(data)
                if self._deadline is None:
                    self._deadline = self.loop.call_later(header_timeout_s, self._give_up)
            super().data_received(data)
            # What came with the end of the headers was body.
            if self._is_in_headers and self._num_header_bytes > MAX_HEADER_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()

        def on_headers_complete(self) -> None:
            self._is_in_headers = False
            self._stop_waiting()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._is_in_headers = True
            self._num_header_bytes = 0
            super().on_message_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _give_up(self) -> None:
            self._deadline = None
            # A client that sends a part of its next request too early still gets its answer.
            if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]  # None at first
                self.transport.close()

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return PunctualHttp
