"""What a request yields is a function of the request: bit for bit the same, whatever else the engine does meanwhile."""

from collections.abc import Sequence
from typing import Any

import pytest
import trio
import trio.testing

import triode
from engines import SMALL, complete, drawn, greedy, open_gated
from triode.engine.completion import Completion, Result
from triode.engine.engine import Engine

PROMPT = list(range(500, 543))
PARAMS = drawn(14, logprobs=3, top_p=0.95, repetition_penalty=1.1)
NEIGHBOURS = [[1000 + 7 * index + step for step in range(1 + (13 * index) % 60)] for index in range(32)]

TINY_MODELS = [
    ("random:tiny", "float32", "auto"),
    ("random:tiny", "bfloat16", "auto"),
    ("random:tiny-mistral", "float32", "reference"),
]
OTHER_MODELS = [
    ("smollm2-135m", "float32", "auto"),
    ("smollm2-135m", "bfloat16", "auto"),
    ("smollm2-135m", "float32", "reference"),
    ("random:tiny-qwen2", "bfloat16", "reference"),
    ("random:tiny-qwen3", "float32", "auto"),
]
NAMES = ("model", "dtype", "kernels")
tiny_models = pytest.mark.parametrize(NAMES, TINY_MODELS)
every_model = pytest.mark.parametrize(
    NAMES, [*TINY_MODELS, *(pytest.param(*names, marks=pytest.mark.slow) for names in OTHER_MODELS)]
)


def settings(model: str, dtype: str, kernels: str, **others: Any) -> dict[str, Any]:
    memory = {"kv_cache_bytes": 2**27} if model == "smollm2-135m" else {}
    return {**SMALL, **memory, "model": model, "dtype": dtype, "kernels": kernels, "executor": "thread", **others}


def same(first: Sequence[Completion], second: Sequence[Completion]) -> bool:
    """Tokens and the very floats of their logprobs."""
    return [(one.token_ids, one.logprobs) for one in first] == [(one.token_ids, one.logprobs) for one in second]


async def alone(**others: Any) -> Result:
    """The request in an engine of its own."""
    async with triode.open_engine(**others) as engine:
        return await complete(engine, PROMPT, PARAMS)


async def keep_busy(engine: Engine, prompt: list[int]) -> None:
    while True:
        await complete(engine, prompt, drawn(9, temperature=0.7))


@every_model
async def test_neighbours_change_nothing(model: str, dtype: str, kernels: str) -> None:
    expected = await alone(**settings(model, dtype, kernels))
    async with triode.open_engine(**settings(model, dtype, kernels, max_running=33)) as engine:
        async with trio.open_nursery() as nursery:
            for prompt in NEIGHBOURS:
                nursery.start_soon(keep_busy, engine, prompt)
            while engine.statistics().scheduler.num_running < 20:
                await trio.lowlevel.checkpoint()
            together = await complete(engine, PROMPT, PARAMS, priority=-1)
            nursery.cancel_scope.cancel()
        assert same(together.completions, expected.completions)


@every_model
async def test_a_prefix_hit_changes_nothing(model: str, dtype: str, kernels: str) -> None:
    async with triode.open_engine(**settings(model, dtype, kernels)) as engine:
        cold = await complete(engine, PROMPT, PARAMS)
        warm = await complete(engine, PROMPT, PARAMS)
        assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 32)
        assert same(warm.completions, cold.completions)
        # A prefix that was generated, not read.
        half = cold.completion.token_ids[:7]
        turn = await complete(engine, [*PROMPT, *half], greedy(4, logprobs=3))
        assert turn.usage.cached_tokens == 48
    async with triode.open_engine(**settings(model, dtype, kernels, prefix_cache=False)) as engine:
        fresh = await complete(engine, [*PROMPT, *half], greedy(4, logprobs=3))
        assert fresh.usage.cached_tokens == 0
        assert same(fresh.completions, turn.completions)


@every_model
async def test_how_the_prompt_is_cut_changes_nothing(model: str, dtype: str, kernels: str) -> None:
    scored = drawn(14, logprobs=3, prompt_logprobs=2, top_p=0.95, repetition_penalty=1.1)
    results, embeddings = [], []
    for max_step_tokens, block_size_tokens in ((512, 16), (64, 32), (17, 16), (9, 64), (7, 16)):
        cut = {"max_step_tokens": max_step_tokens, "max_running": 6, "block_size_tokens": block_size_tokens}
        async with triode.open_engine(**settings(model, dtype, kernels, **cut)) as engine:
            results.append(await complete(engine, PROMPT, scored))
            embeddings += await engine.embed([PROMPT])
    assert results[0].prompt_logprobs is not None
    for result in results[1:]:
        assert same(result.completions, results[0].completions)
        assert result.prompt_logprobs == results[0].prompt_logprobs
    assert len(set(embeddings)) == 1


@every_model
async def test_siblings_change_nothing(model: str, dtype: str, kernels: str) -> None:
    async with triode.open_engine(**settings(model, dtype, kernels)) as engine:
        expected = await complete(engine, PROMPT, PARAMS)
        fields = {"logprobs": 3, "top_p": 0.95, "repetition_penalty": 1.1}
        four = await complete(engine, PROMPT, drawn(14, n=4, **fields))
        two = await complete(engine, PROMPT, drawn(14, n=2, **fields))
        assert same(four.completions[:1], expected.completions)
        assert same(four.completions[:2], two.completions)


@tiny_models
async def test_a_preemption_changes_nothing(model: str, dtype: str, kernels: str) -> None:
    expected = await alone(**settings(model, dtype, kernels))
    probe = settings(model, dtype, kernels)
    async with triode.open_engine(**probe) as engine:
        bytes_per_block = engine.report.kv_cache_bytes // engine.report.num_blocks
    scarce = settings(model, dtype, kernels, executor="inline", kv_cache_bytes=8 * bytes_per_block)
    async with open_gated(**scarce) as (engine, gate):
        stream = await engine.submit(PROMPT, PARAMS)
        await gate.step(6)
        async with engine.submit(list(range(60)), greedy(20), priority=-1) as urgent:
            await gate.step(3)
            assert stream.status == "preempted"
            gate.open()
            await urgent.result()
        assert same((await stream.result()).completions, expected.completions)
        assert engine.statistics().scheduler.num_preemptions > 0


@tiny_models
async def test_the_number_of_threads_changes_nothing(model: str, dtype: str, kernels: str) -> None:
    one, two = [await alone(**settings(model, dtype, kernels, num_threads=number)) for number in (1, 2)]
    assert same(one.completions, two.completions)


async def test_inline_and_thread_are_the_same() -> None:
    inline, thread = [await alone(**settings(*TINY_MODELS[0], executor=mode)) for mode in ("inline", "thread")]
    assert same(inline.completions, thread.completions)
