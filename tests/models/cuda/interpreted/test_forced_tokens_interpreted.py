"""Guided requests through a whole engine whose steps the GPU's runner computes, interpreted: what a guide leaves no choice
about comes at once, and every output is that of the CPU's runner."""

import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import trio

import triode
from cuda_world import interpreted_runner
from engines import SMALL, check_nothing_is_left, complete, drawn
from model_files import write_tiny_gguf
from triode.actors.executor import opening
from triode.engine.completion import Result
from triode.engine.engine import Engine
from triode.models.cuda.runner import CudaRunner
from triode.models.step import StepPlan

# Its keys and punctuation are forced.
FORCING = triode.Grammar(
    'start: "{\\"the name\\": \\"" /[a-z]{1,6}/ "\\", \\"the colour\\": \\"" ("red" | "blue") "\\"}"'
)
PROMPT = list(range(70, 90))

SETTINGS: dict[str, Any] = {**SMALL, "max_context_tokens": 128, "max_running": 8, "kernels": "reference"}


def forcing(seed: int, **fields: Any) -> triode.SamplingParams:
    fields = {"guide": FORCING, "seed": seed, "max_tokens": 60, "temperature": 20.0, **fields}
    return triode.SamplingParams(**fields)


KINDS = [
    forcing(0),
    forcing(1, n=2),
    forcing(2, max_tokens=9),
    forcing(4, stop=("colour",)),
    forcing(6, temperature=0, repetition_penalty=1.1, frequency_penalty=0.5),
    drawn(10, logprobs=2, temperature=20.0),
]


def content(result: Result) -> list[tuple[object, ...]]:
    """What must not depend on who computes it. Of logprobs the last digits do, from CPU to GPU."""
    return [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in result.completions]


async def run_all(engine: Engine) -> list[Result]:
    """All of them at once."""
    results: dict[int, Result] = {}

    async def run(index: int) -> None:
        results[index] = await complete(engine, PROMPT[index:], KINDS[index])

    async with trio.open_nursery() as nursery:
        for index in range(len(KINDS)):
            nursery.start_soon(run, index)
    return [results[index] for index in range(len(KINDS))]


Open: TypeAlias = Callable[..., AbstractAsyncContextManager[Engine]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Result]:
    """From the CPU's runner, one step at a time."""

    async def run() -> list[Result]:
        async with triode.open_engine(str(model), **{**SETTINGS, "executor": "inline"}) as engine:
            return await run_all(engine)

    return trio.run(run)


@pytest.fixture
def open_on_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setattr(opening, "build_runner", interpreted_runner)
    return lambda **settings: triode.open_engine(str(model), **{**SETTINGS, **settings})


async def test_forced_tokens_are_those_of_the_cpu_and_take_one_step_together(
    open_on_gpu: Open, expected: list[Result]
) -> None:
    async with open_on_gpu(executor="inline") as engine:
        results = await run_all(engine)
        assert list(map(content, results)) == list(map(content, expected))
        longest = max(len(one.token_ids) for result in results for one in result.completions)
        assert longest > engine.statistics().runner.num_steps
        await check_nothing_is_left(engine)


async def test_ahead_and_in_chunks_and_after_preemption_they_are_the_same(
    open_on_gpu: Open, expected: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    are_queued, launch = threading.Event(), CudaRunner.launch

    def launch_then(runner: CudaRunner, plan: StepPlan) -> None:
        are_queued.wait()
        launch(runner, plan)

    monkeypatch.setattr(CudaRunner, "launch", launch_then)
    # 11 blocks for seven samples that take up to five each.
    memory = 12 * SMALL["kv_cache_bytes"] // 256
    settings = {"executor": "thread", "max_step_tokens": 14, "kv_cache_bytes": memory, "prefix_cache": False}
    async with open_on_gpu(**settings) as engine:
        streams = [await engine.submit(PROMPT[index:], params) for index, params in enumerate(KINDS)]
        are_queued.set()
        assert [content(await stream.result()) for stream in streams] == list(map(content, expected))
        assert engine.statistics().scheduler.num_preemptions > 0
        await check_nothing_is_left(engine)


async def test_a_neighbour_notices_nothing(open_on_gpu: Open) -> None:
    async with open_on_gpu(executor="thread") as engine, trio.open_nursery() as nursery:
        alone = (await complete(engine, PROMPT, KINDS[-1])).completion
        nursery.start_soon(complete, engine, PROMPT, KINDS[0])
        among = (await complete(engine, PROMPT, KINDS[-1])).completion
    assert alone.logprobs is not None
    assert among.logprobs is not None
    assert among.token_ids == alone.token_ids
    for one, other in zip(alone.logprobs, among.logprobs, strict=True):
        # The same bits on a GPU; the interpreter multiplies matrices of different sizes in different orders.
        assert (one.token_id, one.rank, one.top_ids) == (other.token_id, other.rank, other.top_ids)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


async def test_cancelled_while_tokens_are_forced_it_leaves_nothing_and_the_next_one_in_its_slot_is_right(
    open_on_gpu: Open, expected: list[Result]
) -> None:
    async with open_on_gpu(executor="thread") as engine:
        for num_tokens in (1, 2, 14):
            async with engine.submit(PROMPT, forcing(0)) as stream:
                num_seen = 0
                async for delta in stream:
                    num_seen += len(delta.token_ids)
                    if num_seen >= num_tokens:
                        break
            assert content(await complete(engine, PROMPT, KINDS[0])) == content(expected[0])
        await check_nothing_is_left(engine)
