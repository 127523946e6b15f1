"""Offline batches: many prompts through one engine, in order, with a bounded number under way."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

import trio

from triode.engine.request import Prompt, Request
from triode.engine.stream import RequestStream
from triode.models.progress import Progress
from triode.models.sampling import SamplingParams

T = TypeVar("T")


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for one text, which is a sequence too: of its characters."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of prompts, got one text: {prompts[:40]!r}")


def params_for_each(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    """One SamplingParams a prompt.

    Raises:
        ValueError: if the prompts are no list, or the params no match for it.
    """
    check_prompts(prompts)
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"params must be one, or one for each of the {len(prompts)} prompts, got {len(params)}")
    return params


async def run_batch(
    open_stream: Callable[[Request], Awaitable[RequestStream]],
    read: Callable[[RequestStream], Awaitable[T]],
    requests: Sequence[Request],
    max_under_way: int,
    progress: Progress,
) -> list[T]:
    """What `read` makes of each request's stream, in the requests' order.

    Raises:
        Exception: what the first failing request raised; the others are cancelled.
    """
    batch = _Batch(open_stream, read, max_under_way, progress)
    return await batch.run(requests)


class _Batch(Generic[T]):
    def __init__(
        self,
        open_stream: Callable[[Request], Awaitable[RequestStream]],
        read: Callable[[RequestStream], Awaitable[T]],
        max_under_way: int,
        progress: Progress,
    ) -> None:
        self._open_stream = open_stream
        self._read = read
        self._places = trio.Semaphore(max_under_way)
        self._progress = progress
        self._results: dict[int, T] = {}

    async def run(self, requests: Sequence[Request]) -> list[T]:
        self._progress.stage("Generating", len(requests), "prompts")
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:

            async def unless_failed(call: Callable[[], Awaitable[None]]) -> None:
                try:
                    await call()
                except Exception as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

            async def start_all() -> None:
                for index, request in enumerate(requests):
                    await self._places.acquire()
                    stream = await self._open_stream(request)
                    nursery.start_soon(unless_failed, partial(self._finish, index, stream))

            await unless_failed(start_all)
        if failures:
            # Every reader fails when the engine does; the first one speaks for all.
            raise failures[0]
        self._progress.done()
        return [self._results[index] for index in range(len(requests))]

    async def _finish(self, index: int, stream: RequestStream) -> None:
        async with stream:
            self._results[index] = await self._read(stream)
        self._progress.advance(1)
        self._places.release()
