"""One request, computed in every way there is: the same bits. On a GPU with 7 billion weights, on the CPU in small."""

from typing import Any

import pytest
import trio

from engines import complete, drawn, greedy
from gpu_proofs import HALF_BILLION, Record, Scale, bits, new_salt, on_gpu, scales, scored
from triode.engine.completion import Result
from triode.engine.engine import Engine

NEIGHBOURS = [
    greedy(40),
    drawn(30, temperature=0.7),
    drawn(50, temperature=1.2, top_k=20),
    drawn(20, top_p=0.8, min_p=0.01),
    drawn(25, temperature=0.5, repetition_penalty=1.2, presence_penalty=0.3),
]


async def once(engine: Engine, scale: Scale, salt: str | None = None) -> Result:
    params = scored(scale.new_tokens)
    return await complete(engine, scale.prompt, params, priority=-1, cache_salt=salt or new_salt())


async def repeated(engine: Engine, scale: Scale) -> list[Result]:
    return [await once(engine, scale) for _ in range(scale.num_repeats)]


async def elsewhere(scale: Scale, **changes: Any) -> list[Result]:
    async with scale.open(**changes) as engine:
        return await repeated(engine, scale)


async def from_the_prefix_cache(engine: Engine, scale: Scale) -> list[Result]:
    salt = new_salt()
    await once(engine, scale, salt)
    results = [await once(engine, scale, salt) for _ in range(scale.num_repeats)]
    assert all(result.usage.cached_tokens >= scale.prompt_tokens - 16 for result in results)
    return results


async def among(engine: Engine, scale: Scale, num_neighbours: int) -> list[Result]:
    """In steps with others, some of which are still reading their prompts."""

    async def keep_busy(index: int) -> None:
        prompt = [(31 * index + step) % 40_000 for step in range(1 + (13 * index) % 60)]
        while True:
            await complete(engine, prompt, NEIGHBOURS[index % len(NEIGHBOURS)])

    async with trio.open_nursery() as nursery:
        for index in range(num_neighbours):
            nursery.start_soon(keep_busy, index)
        while engine.statistics().scheduler.num_running < 0.9 * num_neighbours:
            await trio.lowlevel.checkpoint()
        before = engine.statistics().runner
        results = await repeated(engine, scale)
        after = engine.statistics().runner
        nursery.cancel_scope.cancel()
    assert after.num_rows - before.num_rows > 0.5 * num_neighbours * (after.num_steps - before.num_steps)
    return results


async def preempted(scale: Scale, bytes_per_block: int) -> list[Result]:
    """More urgent requests take its blocks while it is being generated."""
    num_blocks = -(-(scale.prompt_tokens + scale.new_tokens) // 16)
    results = []
    async with scale.open(max_running=4, kv_cache_bytes=bytes_per_block * (num_blocks + 2)) as engine:
        for number in range(1, scale.num_repeats + 1):
            stream = await engine.submit(scale.prompt, scored(scale.new_tokens), cache_salt=new_salt())
            await stream.batch()
            await complete(
                engine, scale.prompt[: scale.prompt_tokens // 2], greedy(1), priority=-1, cache_salt=new_salt()
            )
            results.append(await stream.result())
            assert engine.statistics().scheduler.num_preemptions >= number
    return results


@scales
async def test_a_request_yields_the_same_bits_however_it_is_computed(scale: Scale, record_property: Record) -> None:
    ways: dict[str, list[Result]] = {}
    async with scale.open() as engine:
        expected = bits(await once(engine, scale))
        bytes_per_block = engine.report.kv_cache_bytes // engine.report.num_blocks
        ways["alone"] = await repeated(engine, scale)
        ways["prefix hit"] = await from_the_prefix_cache(engine, scale)
        for number in scale.neighbours:
            ways[f"among {number} others"] = await among(engine, scale, number)
    for chunk in scale.chunks:
        ways[f"chunks of {chunk}"] = await elsewhere(scale, max_step_tokens=chunk, max_running=16)
    for executor in scale.executors:
        ways[f"{executor} mode"] = await elsewhere(scale, executor=executor)
    ways["preempted"] = await preempted(scale, bytes_per_block)
    num_equal = {way: sum(bits(result) == expected for result in results) for way, results in ways.items()}
    for way, number in num_equal.items():
        record_property(way, f"{number} of {scale.num_repeats} equal")
    assert num_equal == dict.fromkeys(ways, scale.num_repeats)


@pytest.mark.gpu
async def test_with_split_k_allowed_the_bits_depend_on_how_the_prompt_is_cut(
    monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """The comparison above can fail."""
    import torch

    from triode.kernels.linear.blas import blas_of, linear_torch
    from triode.kernels.linear.cublaslt import CublasLt
    from triode.models.cuda import linears

    if not isinstance(blas := blas_of(torch.device("cuda")), CublasLt):
        pytest.skip(f"{blas}: torch's products are kept in order by its switches")
    monkeypatch.setattr(linears, "linear_blas", linear_torch)
    scale = on_gpu(HALF_BILLION)
    found = []
    for chunk in (64, 96, 160, 512, 4096):
        async with scale.open(max_step_tokens=chunk, max_running=16) as engine:
            found.append(bits(await once(engine, scale)))
    num_differing = sum(bits_of_chunk != found[-1] for bits_of_chunk in found)
    record_property("differing from one piece", f"{num_differing} of {len(found) - 1} chunk sizes")
    assert num_differing > 0
