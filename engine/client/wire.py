"""One WebSocket, over the anyio stream of whatever event loop runs."""

import ssl
from collections import deque
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit

import anyio
import msgspec
from anyio.abc import ByteStream
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from triode.engine.server.bridge_messages import FromClient, FromServer, Goodbye
from triode.errors import AccessDenied, ProtocolError, ServerUnreachable

CONNECT_S = 10
"""For the connection and its handshake."""
CLOSE_S = 1
"""For the close of a socket whose other side may be gone."""
SILENCE_S = 45
"""Both sides ping more often than that; a socket that is silent for so long is dead."""
_PROTOCOL = Subprotocol("triode.v1.msgpack")
_ENCODE = msgspec.msgpack.Encoder().encode
_DECODER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


class Wire:
    """An open socket. One task may send while another one receives."""

    def __init__(self, stream: ByteStream, protocol: ClientProtocol) -> None:
        self._stream = stream
        self._protocol = protocol
        self._sending = anyio.Lock()
        self._arrived: deque[FromServer] = deque()
        self._parts: list[bytes] = []
        self._is_lost = False

    @classmethod
    async def open(cls, url: str, key: str | None, ssl_context: ssl.SSLContext | None) -> "Wire":
        """A socket at `/v1/stream` below `url`.

        Raises:
            ServerUnreachable: if nobody answers there, or not as a bridge does.
            AccessDenied: if the key is missing or wrong.
        """
        uri = parse_uri(socket_url(url))
        protocol = ClientProtocol(uri, subprotocols=[_PROTOCOL], max_size=2**24)
        try:
            with anyio.fail_after(CONNECT_S):
                stream = await _connect(
                    uri.host, uri.port, (ssl_context or ssl.create_default_context()) if uri.secure else None
                )
                wire = cls(stream, protocol)
                try:
                    await wire._shake_hands(key)
                except BaseException:
                    await anyio.aclose_forcefully(stream)
                    raise
        except (OSError, TimeoutError, anyio.EndOfStream, anyio.BrokenResourceError) as error:
            raise ServerUnreachable(f"{url} cannot be reached: {_reason(error)}") from error
        return wire

    async def __aenter__(self) -> "Wire":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.move_on_after(CLOSE_S, shield=True):
            try:
                # A socket that only seems to be lost must not tell the server that nobody comes back.
                if not self._is_lost and self._protocol.state is State.OPEN:
                    self._protocol.send_binary(_ENCODE(Goodbye()))
                    self._protocol.send_close(1000)
                    await self._flush()
            except ServerUnreachable:
                # The other side has gone first.
                return
            finally:
                await anyio.aclose_forcefully(self._stream)

    async def send(self, message: FromClient) -> None:
        """Send one message.

        Raises:
            ServerUnreachable: if the socket is lost.
        """
        self._check_open()
        self._protocol.send_binary(_ENCODE(message))
        await self._flush()

    async def ping(self) -> None:
        """Show that somebody is here.

        Raises:
            ServerUnreachable: if the socket is lost.
        """
        self._check_open()
        self._protocol.send_ping(b"")
        await self._flush()

    async def receive(self) -> FromServer:
        """The next message.

        Raises:
            ServerUnreachable: if the socket is lost, or closed by the server.
            ProtocolError: if a frame is no message.
        """
        while not self._arrived:
            await self._read()
            for event in self._protocol.events_received():
                if isinstance(event, Frame) and event.opcode in (Opcode.BINARY, Opcode.CONT):
                    self._parts.append(bytes(event.data))
                    if event.fin:
                        self._arrived.append(_decoded(b"".join(self._parts)))
                        self._parts.clear()
            if self._protocol.close_rcvd is not None and not self._arrived:
                raise self._lost(f"the server closed it with code {self._protocol.close_rcvd.code}")
        return self._arrived.popleft()

    def _check_open(self) -> None:
        if self._protocol.state is not State.OPEN:
            raise self._lost("it is closing")

    def _lost(self, reason: str) -> ServerUnreachable:
        self._is_lost = True
        return ServerUnreachable(f"the socket was lost: {reason}")

    async def _shake_hands(self, key: str | None) -> None:
        request = self._protocol.connect()
        if key is not None:
            request.headers["Authorization"] = f"Bearer {key}"
        self._protocol.send_request(request)
        await self._flush()
        while not self._protocol.events_received() and self._protocol.handshake_exc is None:
            await self._read()
        try:
            if (failure := self._protocol.handshake_exc) is not None:
                raise failure
        except InvalidStatus as error:
            body = bytes(error.response.body or b"").decode(errors="replace")
            refusal = AccessDenied if error.response.status_code in (401, 403) else ServerUnreachable
            raise refusal(f"the server answered {error.response.status_code}: {body}") from error
        except InvalidHandshake as error:
            raise ServerUnreachable(f"the server does not speak the bridge's protocol: {error}") from error

    async def _read(self) -> None:
        try:
            with anyio.fail_after(SILENCE_S):
                data = await self._stream.receive()
        except anyio.EndOfStream:
            self._protocol.receive_eof()
            raise self._lost("it ended") from None
        except (OSError, TimeoutError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise self._lost(_reason(error)) from error
        self._protocol.receive_data(data)
        # Pongs, and the answer to a close.
        await self._flush()

    async def _flush(self) -> None:
        async with self._sending:
            if data := b"".join(self._protocol.data_to_send()):
                try:
                    await self._stream.send(data)
                except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                    raise self._lost(_reason(error)) from error


def _decoded(frame: bytes) -> FromServer:
    try:
        return _DECODER.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the server sent a frame that is no message of the bridge: {error}") from error


async def _connect(host: str, port: int, ssl_context: ssl.SSLContext | None) -> ByteStream:
    if ssl_context is None:
        return await anyio.connect_tcp(host, port)
    return await anyio.connect_tcp(
        host, port, ssl_context=ssl_context, tls_hostname=host, tls_standard_compatible=False
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def socket_url(url: str) -> str:
    """The bridge's address on the server at `url`.

    Raises:
        ValueError: if it is no such address.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise ValueError(f"url must be as http://host:port, got {url!r}")
    path = parts.path.rstrip("/").removesuffix("/v1").removesuffix("/v1/stream") + "/v1/stream"
    return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, "", ""))
