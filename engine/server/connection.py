"""One client's connection: reading a body within limits, noticing that the client has left, writing with a deadline."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import anyio
import msgspec
from starlette.requests import Request
from starlette.types import Message, Receive, Send

from triode.engine.server.errors import RequestError, wrong_value

T = TypeVar("T")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        RequestError: 413 as soon as it is too large, 415 if it is said to be something else than JSON.
    """
    # A page of another origin may post other types without asking first; this one it may not.
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, f"content-type must be application/json, got {kind!r}")
    chunks, size = [], 0
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large(max_bytes)
    # Trio wants a generator that is left early to be closed.
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise too_large(max_bytes)
    return b"".join(chunks)


def too_large(max_bytes: int) -> RequestError:
    """413."""
    # Whatever else the client is still sending is not read.
    return RequestError(413, f"the body must have <= {max_bytes} bytes", headers={"Connection": "close"})


def decode(body: bytes | str, decoder: msgspec.json.Decoder[T]) -> T:
    """A body as its struct.

    Raises:
        RequestError: 400 for what is not JSON, or is not this struct.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise wrong_value(error) from None
    except UnicodeDecodeError:
        raise RequestError(400, "the body must be UTF-8") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(400, f"the body must be JSON: {error}") from None


async def until_left(receive: Receive) -> None:
    """Wait until the client leaves. The request has been read, so nothing else comes from it."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def first_of(*calls: Callable[[], Awaitable[None]]) -> None:
    """Run all calls until one ends, and cancel the others."""
    await _run(calls, until_first=True)


async def together(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all calls to their ends."""
    if len(calls) == 1:
        await calls[0]()
    else:
        await _run(calls, until_first=False)


async def _run(calls: Sequence[Callable[[], Awaitable[None]]], *, until_first: bool) -> None:
    """The first exception cancels the other calls, and leaves bare: not in a group, which no handler expects."""
    failures: list[Exception] = []

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as error:
            failures.append(error)
        if until_first or failures:
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(run, call)
    if failures:
        raise failures[0]


class PacedSend:
    """Sends ASGI messages in turn. `until_stuck` notices a client that takes nothing.

    The deadline costs a message nothing: a task looks, once a timeout, whether the message that waits is still the one it
    saw before.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._lock = anyio.Lock(fast_acquire=True)
        self._num_begun = 0
        self._is_sending = False

    async def __call__(self, message: Message) -> None:
        """Send one message; waits until the client has taken enough of the earlier ones."""
        async with self._lock:
            self._num_begun += 1
            self._is_sending = True
            await self._send(message)
            self._is_sending = False

    async def until_stuck(self) -> None:
        """Wait until one message has taken the timeout, or up to twice as long."""
        num_seen = -1
        while not (self._is_sending and self._num_begun == num_seen):
            num_seen = self._num_begun if self._is_sending else -1
            await anyio.sleep(self._timeout_s)


class Writer(PacedSend):
    """The same for one HTTP response."""

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Status and headers."""
        await self({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """One part of the body."""
        await self({"type": "http.response.body", "body": body, "more_body": more})
