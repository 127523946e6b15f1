"""An engine whose model is computed by two processes: the tokens of one process, the same bits always, and nobody left."""

import os
import select
import signal
import sys

import pytest
import trio

import triode
from engines import LONG, complete, drawn, greedy, open_tiny
from native_steps import native_library
from triode.engine.completion import Result
from triode.engine.engine import Engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share a file in memory")
PROMPTS = ("Why is the sky blue?", "Once upon a time", "Sum 1, 2 and 3:", "The")
PARAMS = greedy(24, logprobs=2)


def facts(result: Result) -> object:
    samples = [(sample.text, sample.token_ids, sample.logprobs) for sample in result.completions]
    return samples, result.prompt_logprobs


def logprobs(result: Result) -> list[float]:
    return [each.logprob for sample in result.completions for each in sample.logprobs or ()]


async def complete_together(engine: Engine) -> list[Result]:
    results: dict[str, Result] = {}

    async def run(prompt: str) -> None:
        results[prompt] = await complete(engine, prompt, PARAMS)

    async with trio.open_nursery() as nursery:
        for prompt in PROMPTS:
            nursery.start_soon(run, prompt)
    return [results[prompt] for prompt in PROMPTS]


async def test_two_ranks_give_the_tokens_of_one_and_the_same_bits_in_any_company() -> None:
    native_library()
    async with open_tiny(executor="thread") as one, open_tiny(tensor_parallel=2) as two:
        assert two.report.executor == "process"
        assert "2 ranks" in two.report.kernels
        assert two.report.num_blocks == one.report.num_blocks
        if len(os.sched_getaffinity(0)) > 1:
            assert os.sched_getaffinity(two.report.worker_pids[0]).isdisjoint(
                os.sched_getaffinity(two.report.worker_pids[1])
            )
        together = await complete_together(two)
        for prompt, result in zip(PROMPTS, together, strict=True):
            alone = await complete(two, prompt, PARAMS)
            assert facts(alone) == facts(result)
            expected = await complete(one, prompt, PARAMS)
            assert alone.completions[0].token_ids == expected.completions[0].token_ids
            assert logprobs(alone) == pytest.approx(logprobs(expected), abs=2e-5)
        # Several samples share their prompt's blocks, which are copied in both ranks when they part.
        several = [await complete(engine, "The", drawn(12, n=3, prompt_logprobs=1)) for engine in (one, two)]
        tokens = [[sample.token_ids for sample in result.completions] for result in several]
        assert tokens[0] == tokens[1]
        await cancel(two)
        await stand_still(two)


async def cancel(engine: Engine) -> None:
    """All blocks are free again soon after."""

    def num_free() -> int:
        cache = engine.statistics().cache
        return cache.num_free_blocks + cache.num_evictable_blocks

    before = num_free()
    async with engine.submit("Once", greedy(LONG)) as stream:
        async for _ in stream:
            break
        assert num_free() < before
    await complete(engine, "The", greedy(2))
    assert num_free() == before


async def stand_still(engine: Engine) -> None:
    """Deadlines hold while a rank does nothing, and the engine goes on when it does."""
    rank = engine.report.worker_pids[1]
    os.kill(rank, signal.SIGSTOP)
    try:
        with trio.fail_after(30):
            stopped = await complete(engine, "Once", greedy(LONG), deadline_s=0.1)
    finally:
        os.kill(rank, signal.SIGCONT)
    assert stopped.completion.finish_reason == "cancelled"
    assert len((await complete(engine, "Once", greedy(2))).completion.token_ids) == 2


async def kill_while_read(rank: int, ends: list[int]) -> None:
    async with open_tiny(tensor_parallel=2) as engine:
        ends += map(os.pidfd_open, engine.report.worker_pids)
        async with engine.submit("Once", greedy(LONG)) as stream:
            async for _ in stream:
                break
            os.kill(engine.report.worker_pids[rank], signal.SIGKILL)
            with trio.fail_after(30):
                await trio.sleep_forever()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_a_rank_that_is_killed_is_a_fault_and_leaves_nobody(rank: int) -> None:
    native_library()
    ends: list[int] = []
    with pytest.raises(triode.EngineFault, match=rf"\(rank {rank} of 2\) was killed by SIGKILL"):
        await kill_while_read(rank, ends)
    for end in ends:
        assert select.select([end], [], [], 0)[0], "a rank is still there"
        os.close(end)


@pytest.mark.slow
async def test_a_model_that_cannot_be_divided_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="tensor_parallel must divide num_kv_heads = 2 of this model, got 3"):
        async with open_tiny(tensor_parallel=3):
            pytest.fail("it has been opened")
