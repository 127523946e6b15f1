"""Offline batches: many prompts through one engine, in order, with a bounded number under way."""

import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from triode.engine.request import Prompt, Request
from triode.engine.stream import RequestStream
from triode.errors import EngineBusy
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

    Whoever else uses the engine may fill its queue: then the batch waits for a request of its own to end.

    Raises:
        EngineBusy: if the queue is full and none of the batch's own requests is under way.
        Exception: what the first failing request raised; the others are cancelled.
    """
    progress.stage("Generating", len(requests), "prompts")
    results: dict[int, T] = {}
    failures: list[Exception] = []
    ended, wait_for_end = trio.open_memory_channel[None](math.inf)
    num_under_way = 0

    async with trio.open_nursery() as nursery:

        async def finish(index: int, stream: RequestStream) -> None:
            try:
                async with stream:
                    results[index] = await read(stream)
                progress.advance(1)
            except Exception as error:
                failures.append(error)
                nursery.cancel_scope.cancel()
            ended.send_nowait(None)

        async def start(index: int, request: Request) -> None:
            nonlocal num_under_way
            while True:
                if num_under_way < max_under_way:
                    try:
                        stream = await open_stream(request)
                    except EngineBusy:
                        if num_under_way == 0:
                            raise
                    else:
                        num_under_way += 1
                        nursery.start_soon(finish, index, stream)
                        return
                await wait_for_end.receive()
                num_under_way -= 1

        try:
            for index, request in enumerate(requests):
                await start(index, request)
        except Exception as error:
            failures.append(error)
            nursery.cancel_scope.cancel()
    if failures:
        # Every reader fails when the engine does; the first one speaks for all.
        raise failures[0]
    progress.done()
    return [results[index] for index in range(len(requests))]
