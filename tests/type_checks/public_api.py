"""What type checkers must make of the public surface. Nothing here runs: `mypy` is the test."""

from typing import assert_type

import triode


async def one_request() -> None:
    async with triode.open_engine("smollm2-135m", triode.EngineConfig(), max_running=8) as engine:
        assert_type(engine, triode.Engine)
        stream = await engine.submit("text", triode.SamplingParams(max_tokens=8))
        assert_type(stream, triode.RequestStream)
        async for delta in stream:
            assert_type(delta, triode.Delta)
            assert_type(delta.text, str)
        assert_type(stream.status, triode.RequestStatus)
        assert_type(stream.completion, triode.Completion)
        assert_type(stream.completion.finish_reason, triode.FinishReason | None)
        assert_type(stream.completion.usage, triode.Usage)
        stream.cancel()


async def every_kind_of_prompt(engine: triode.Engine) -> None:
    async with engine.submit([1, 2, 3]) as stream:
        assert_type(stream, triode.RequestStream)
    await engine.submit([{"role": "user", "content": "text"}], priority=-1, cache_salt="tenant", deadline_s=2.5)
    await engine.submit({1, 2})  # type: ignore[arg-type]


def every_kind_of_guide() -> None:
    triode.SamplingParams(guide=triode.JsonSchema({"type": "object"}, compact=True))
    triode.SamplingParams(guide=triode.JsonObject())
    triode.SamplingParams(guide=triode.Regex("a+"))
    triode.SamplingParams(guide=triode.Choices(("yes", "no")))
    triode.SamplingParams(guide=triode.Grammar('start: "a"'))
    triode.SamplingParams(guide="a+")  # type: ignore[arg-type]


def misspelt() -> None:
    triode.SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    triode.Enginee  # type: ignore[attr-defined]  # noqa: B018


async def in_asyncio() -> None:
    async with triode.aio.open_engine("smollm2-135m") as engine:
        stream = await engine.submit("text")
        async for delta in stream:
            assert_type(delta, triode.Delta)


def blocking() -> None:
    with triode.LLM("smollm2-135m") as llm:
        assert_type(llm, triode.LLM)
