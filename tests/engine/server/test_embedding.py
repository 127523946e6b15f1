"""`create_app` in a program of one's own, a real model, and an engine that dies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import triode
from servers import SETTINGS, running
from triode.engine.server import ServerConfig, create_app

TEXT = "/v1/completions"


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


def test_the_app_mounts_into_another_with_paths_and_keys_of_its_own() -> None:
    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def main() -> None:
        async with triode.aio.open_engine("random:tiny", **SETTINGS) as engine:
            mounted = Mount("/llm", create_app(engine, ServerConfig(api_keys=("secret",))))
            async with client_of(Starlette(routes=[mounted, Route("/", hello)])) as client:
                assert (await client.get("/")).text == "hello"
                assert (await client.get("/llm/health")).status_code == 200
                assert (await client.get("/llm/v1/models")).status_code == 401
                client.headers["Authorization"] = "Bearer secret"
                answer = await client.post(f"/llm{TEXT}", json={"prompt": "Once", "max_tokens": 3, "ignore_eos": True})
                assert answer.json()["usage"]["completion_tokens"] == 3
                # The same engine serves its own program's code.
                async with engine.submit("Once", triode.SamplingParams(max_tokens=3, ignore_eos=True)) as stream:
                    assert (await stream.result()).usage.completion_tokens == 3

    asyncio.run(main())


async def test_the_app_serves_a_trio_engine_in_a_trio_program() -> None:
    async with triode.open_engine("random:tiny", **SETTINGS) as engine, client_of(create_app(engine)) as client:
        body = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True, "seed": 1}
        answer = await client.post(TEXT, json=body)
        streamed = await client.post(TEXT, json={**body, "stream": True})
        assert answer.json()["usage"]["completion_tokens"] == 5
        assert streamed.text.count("data: ") >= 2
        with trio.move_on_after(0.05):
            await client.post(TEXT, json={**body, "max_tokens": 7000})
        async with engine.submit("Once", triode.SamplingParams(max_tokens=1)) as stream:
            await stream.result()
        assert engine.statistics().num_unfinished == 0


def test_the_app_mounts_into_fastapi() -> None:
    async def main() -> None:
        async with triode.aio.open_engine("random:tiny", **SETTINGS) as engine:
            app = FastAPI()
            app.mount("/llm", create_app(engine))
            async with client_of(app) as client:
                answer = await client.post(f"/llm{TEXT}", json={"prompt": "Once", "max_tokens": 3, "ignore_eos": True})
                assert answer.json()["usage"]["completion_tokens"] == 3
                assert (await client.get("/llm/")).text.startswith("<!doctype html>")

    asyncio.run(main())


def test_a_closed_engine_is_said_to_be_gone() -> None:
    async def main() -> None:
        async with triode.aio.open_engine("random:tiny", **SETTINGS) as engine:
            app = create_app(engine)
        async with client_of(app) as client:
            for path in ("/health", "/ready", "/metrics"):
                response = await client.get(path)
                assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_closed")
            response = await client.post(TEXT, json={"prompt": "Once"})
            assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")

    asyncio.run(main())


def test_a_full_queue_is_answered_with_503_and_when_to_come_again() -> None:
    async def main() -> None:
        settings = {**SETTINGS, "max_queued": 1}
        async with (
            triode.aio.open_engine("random:tiny", **settings) as engine,
            client_of(create_app(engine)) as client,
            engine.submit("Once", triode.SamplingParams(max_tokens=5000, ignore_eos=True)),
        ):
            responses = [
                await client.post(TEXT, json={"prompt": "Once"}),
                await client.post("/v1/embeddings", json={"input": "Once"}),
            ]
        for response in responses:
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "engine_busy"

    asyncio.run(main())


def test_an_engine_that_fails_ends_its_server_and_says_so_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(triode.EngineFault, match="broken on purpose"), running() as server, server.client() as client:
        hub = server.engine._hub

        def broken(*_: object) -> None:
            raise RuntimeError("broken on purpose")

        with client.stream(
            "POST", TEXT, json={"prompt": "x", "max_tokens": 5000, "ignore_eos": True, "stream": True}
        ) as s:
            parts = s.iter_text()
            text = next(parts)
            monkeypatch.setattr(hub._detokenizer, "read", broken)
            text += "".join(parts)
        assert '"code":"engine_fault"' in text
        assert "[DONE]" not in text
        assert server.ended.wait(20)


def test_a_real_model_answers() -> None:
    question = [
        {"role": "system", "content": "Answer in English."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    with running("smollm2-135m", {"kv_cache_bytes": 2**27, "dtype": "auto"}) as server, server.client() as client:
        body = {"messages": question, "temperature": 0, "max_tokens": 12}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
