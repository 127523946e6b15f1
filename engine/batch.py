"""Offline batches: many prompts through one engine, in order, with a bounded number under way."""

from collections.abc import Callable, Sequence

import trio

from triode.actors.scheduler.config import SchedulerConfig
from triode.engine.completion import Result
from triode.engine.request import Prompt
from triode.engine.stream import RequestStream, Submission
from triode.models.progress import NullProgress, Progress
from triode.models.sampling import SamplingParams

Submitter = Callable[[Prompt, SamplingParams], Submission]


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
    submit: Submitter,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    limits: SchedulerConfig,
    progress: Progress | None,
) -> list[Result]:
    """Results in the prompts' order. Twice as many requests as run are under way, so that a free slot never waits."""
    each = params_for_each(prompts, params)
    progress = progress or NullProgress()
    progress.stage("Generating", len(prompts), "prompts")
    room = trio.CapacityLimiter(min(2 * limits.max_running, limits.max_queued))
    results: dict[int, Result] = {}
    failures: list[Exception] = []

    async with trio.open_nursery() as nursery:

        def give_up(error: Exception) -> None:
            failures.append(error)
            nursery.cancel_scope.cancel()

        async def read(index: int, stream: RequestStream, ticket: object) -> None:
            try:
                async with stream:
                    results[index] = await stream.result()
                progress.advance(1)
            except Exception as error:
                give_up(error)
            room.release_on_behalf_of(ticket)

        for index, prompt in enumerate(prompts):
            ticket = object()
            await room.acquire_on_behalf_of(ticket)
            try:
                stream = await submit(prompt, each[index])
            except Exception as error:
                give_up(error)
                break
            nursery.start_soon(read, index, stream, ticket)
    if failures:
        # Every reader fails when the engine does; the first one speaks for all.
        raise failures[0]
    progress.done()
    return [results[index] for index in range(len(prompts))]
