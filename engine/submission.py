"""Submission: a request on its way, of an engine or of a client."""

from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Generic, Protocol, TypeVar


class _Cancellable(Protocol):
    def cancel(self) -> None: ...


StreamT = TypeVar("StreamT", bound=_Cancellable)


class Submission(Generic[StreamT]):
    """What `submit` returns: await it for the stream, or enter it to have the request cancelled on leaving."""

    def __init__(self, opening: Coroutine[object, object, StreamT]) -> None:
        self._opening = opening
        self._stream: StreamT | None = None

    def __await__(self) -> Generator[object, object, StreamT]:
        return self._opening.__await__()

    async def __aenter__(self) -> StreamT:
        self._stream = await self._opening
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.cancel()
