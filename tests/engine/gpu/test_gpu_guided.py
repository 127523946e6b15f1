"""Guided requests: the same tokens in every way there is to compute them, and neighbours that do not notice. On a GPU with
half a billion weights, on the CPU in small."""

import json
from typing import Any

import pytest
import trio

import triode
from engines import complete, drawn
from gpu_proofs import HALF_BILLION, SMALL_ON_CPU, Record, Scale, bits, new_salt, on_gpu
from triode.engine.completion import Result
from triode.engine.engine import Engine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "the colour of the house": {"enum": ["red", "green"]},
        "tags": {"type": "array", "items": {"enum": ["new", "old"]}, "maxItems": 3},
        "is it paid for": {"type": "boolean"},
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])
GUIDE = triode.JsonSchema(SCHEMA, compact=True)
scales = pytest.mark.parametrize(
    "scale",
    [
        pytest.param(SMALL_ON_CPU, id="in small on the CPU"),
        pytest.param(on_gpu(HALF_BILLION), id=HALF_BILLION, marks=pytest.mark.gpu),
    ],
)


def guided(seed: int, **fields: Any) -> triode.SamplingParams:
    return triode.SamplingParams(guide=GUIDE, max_tokens=120, seed=seed, n=1 + seed % 2, **fields)


async def each(engine: Engine, scale: Scale, num_requests: int) -> list[Result]:
    """So many guided requests at once."""
    results: dict[int, Result] = {}

    async def run(seed: int) -> None:
        results[seed] = await complete(engine, scale.prompt[:60], guided(seed), cache_salt=new_salt())

    async with trio.open_nursery() as nursery:
        for seed in range(num_requests):
            nursery.start_soon(run, seed)
    return [results[seed] for seed in range(num_requests)]


def check(value: Any) -> None:
    """It validates."""
    assert list(value) == list(SCHEMA["properties"])
    name, age, colour, tags, is_paid_for = value.values()
    assert len(name) <= 8
    assert age in range(121)
    assert colour in ("red", "green")
    assert len(tags) <= 3
    assert set(tags) <= {"new", "old"}
    assert isinstance(is_paid_for, bool)


def text(result: Result) -> object:
    return [(completion.token_ids, completion.finish_reason) for completion in result.completions]


@scales
async def test_guided_tokens_are_the_same_in_every_way_and_validate(scale: Scale, record_property: Record) -> None:
    num_requests = min(24, scale.max_running // 2)
    async with scale.open(executor="thread") as engine:
        before = engine.statistics().runner
        alone = [(await each(engine, scale, seed + 1))[seed] for seed in range(2)]
        together = await each(engine, scale, num_requests)
        after = engine.statistics().runner
    want = list(map(text, together))
    assert list(map(text, alone)) == want[:2]
    for result in together:
        for completion in result.completions:
            assert completion.finish_reason == "stop"
            check(json.loads(completion.text))
    for changes in ({"executor": executor} for executor in scale.executors):
        async with scale.open(**changes) as engine:
            assert list(map(text, await each(engine, scale, num_requests))) == want
    async with scale.open(max_running=4, max_step_tokens=16) as engine:
        assert list(map(text, await each(engine, scale, num_requests))) == want
    num_rows = after.num_rows - before.num_rows
    record_property("guided tokens a row of a step", (after.num_sampled_tokens - before.num_sampled_tokens) / num_rows)


@scales
async def test_neighbours_of_guided_requests_keep_their_bits(scale: Scale, record_property: Record) -> None:
    watched = [drawn(40, logprobs=5, seed=seed) for seed in range(min(8, scale.max_running // 4))]

    async def read(engine: Engine, results: list[object]) -> None:
        for index, params in enumerate(watched):
            results.append(
                bits(await complete(engine, scale.prompt[index : index + 50], params, cache_salt=new_salt()))
            )

    async def keep_busy(engine: Engine, seed: int) -> None:
        while True:
            with trio.move_on_after(0.05 + 0.1 * (seed % 3)) if seed % 4 == 0 else trio.CancelScope():
                await complete(engine, scale.prompt[:60], guided(seed), cache_salt=new_salt())

    alone: list[object] = []
    among: list[object] = []
    async with scale.open(executor="thread") as engine:
        await read(engine, alone)
        async with trio.open_nursery() as nursery:
            for seed in range(scale.max_running // 2):
                nursery.start_soon(keep_busy, engine, seed)
            await read(engine, among)
            nursery.cancel_scope.cancel()
    assert among == alone
    record_property("neighbours of guided requests with the same bits", len(among))
