"""What every request passes first: an id, the key check and, when it is over, a line in the log."""

import hashlib
import hmac
import logging
import secrets
import time
from base64 import urlsafe_b64decode
from collections.abc import MutableMapping
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import anyio
import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from triode.engine.server.config import ServerConfig
from triode.engine.server.errors import RequestError
from triode.engine.server.tracing import Tracing

_LOG = logging.getLogger("triode.server")
_SCOPE_KEY = "triode.caller"
_OPEN = ("/", "/health", "/ready", "/version", "/metrics")
"""Paths without texts: probes and scrapers have no key, and the playground asks for one."""
_KEY_PROTOCOL = "triode.bearer."
"""Begins a subprotocol that is none: browsers can send a socket's key, in URL-safe base64, in no other way."""


class Caller(msgspec.Struct, frozen=True):
    """Who sent a request."""

    request_id: str
    """The client's own X-Request-Id, or a new one; it is in the answer's headers and in the log."""
    key: str
    """Names the API key without telling it; empty where none is asked for."""


def caller_of(scope: MutableMapping[str, Any]) -> Caller:
    """Who sent the request of this scope."""
    caller = scope[_SCOPE_KEY]
    assert isinstance(caller, Caller)
    return caller


def error_response(error: RequestError) -> Response:
    """An error as a whole response."""
    return Response(error.encode(), error.status, error.headers, "application/json")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, config: ServerConfig, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing
        self._body_timeout_s = config.body_timeout_s
        self._digests = [_digest(key) for key in config.api_keys]
        self._origins = config.allowed_origins
        self._log_requests = config.log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer why not."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began_at_s, statuses = time.perf_counter(), [101]
        headers = Headers(scope=scope)
        request_id = _request_id(headers)

        async def send_marked(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
                statuses.append(message.get("status", 101))
            await send(message)

        method = scope.get("method", "WEBSOCKET")
        if scope["type"] == "http":
            receive = _Punctual(receive, self._body_timeout_s)
        with (
            nullcontext()
            if self._tracing is None
            else self._tracing.request(method, scope["path"], request_id, headers) as span
        ):
            try:
                await self._admit(scope, headers, request_id, receive, send_marked)
            finally:
                if span is not None:
                    span.set_attribute("http.response.status_code", statuses[-1])
                if self._log_requests:
                    _log(request_id, method, scope["path"], statuses[-1], time.perf_counter() - began_at_s)

    async def _admit(self, scope: Scope, headers: Headers, request_id: str, receive: Receive, send: Send) -> None:
        try:
            key = "" if _path(scope) in _OPEN else self._check_key(headers)
            if scope["type"] == "websocket":
                self._check_origin(headers)
        except RequestError as error:
            await refuse(error, scope, receive, send)
            return
        await self._app({**scope, _SCOPE_KEY: Caller(request_id, key)}, receive, send)

    def _check_key(self, headers: Headers) -> str:
        """The digest of the request's key.

        Raises:
            RequestError: 401.
        """
        if not self._digests:
            return ""
        scheme, _, key = _authorization(headers).partition(" ")
        shown = _digest(key.strip())
        # Every key is compared, each in constant time: the answer's time tells nothing about the keys.
        matches = [hmac.compare_digest(shown, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            header = {"WWW-Authenticate": "Bearer"}
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key", headers=header)
        return shown.hex()

    def _check_origin(self, headers: Headers) -> None:
        """Browsers let any page open a socket to anywhere; they say which page it is.

        Raises:
            RequestError: 403.
        """
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        if urlsplit(origin).netloc != headers.get("host"):
            raise RequestError(
                403, f"the origin must be among allowed_origins, got {origin!r}", code="forbidden_origin"
            )


class _Punctual:
    """Receives a request's body in time, and then whatever comes."""

    def __init__(self, receive: Receive, timeout_s: float) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._deadline_s: float | None = None
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        if self._deadline_s is None:
            self._deadline_s = anyio.current_time() + self._timeout_s
        try:
            with anyio.fail_after(self._deadline_s - anyio.current_time()):
                message = await self._receive()
        except TimeoutError:
            reason = f"the body must arrive within {self._timeout_s:g} s"
            raise RequestError(408, reason, headers={"Connection": "close"}) from None
        self._is_complete = not message.get("more_body", False)
        return message


def _log(request_id: str, method: str, path: str, status: int, lasted_s: float) -> None:
    fields = {"request_id": request_id, "method": method, "path": path, "status": status, "duration_s": lasted_s}
    # The path is the client's text: repr keeps it on the line.
    _LOG.info("%s %s %r %d %.0f ms", request_id, method, path, status, lasted_s * 1e3, extra={"fields": fields})


async def refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a socket that is not open yet, with an error."""
    response = error_response(error)
    if scope["type"] == "http":
        await response(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await send({"type": "websocket.close", "code": 1008})


def _path(scope: Scope) -> str:
    """The path below the place where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _authorization(headers: Headers) -> str:
    """The Authorization header, or what takes its place for a browser's socket."""
    for offered in headers.get("sec-websocket-protocol", "").split(","):
        name = offered.strip()
        if name.startswith(_KEY_PROTOCOL):
            encoded = name.removeprefix(_KEY_PROTOCOL)
            try:
                return f"Bearer {urlsafe_b64decode(encoded + '=' * (-len(encoded) % 4)).decode()}"
            except ValueError:
                return ""
    return headers.get("authorization", "")


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= 128 and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(8)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
