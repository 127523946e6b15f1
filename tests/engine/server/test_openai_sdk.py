"""The real `openai` client, synchronous and asynchronous, over a real socket."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
import trio
from openai.types.chat import ChatCompletionMessageParam

from servers import SERVERS, Running, running

HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, served_name="tiny", api_keys=("secret",)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_the_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "triode"


def test_the_client_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, max_completion_tokens=8)
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 8
    assert reply.choices[0].finish_reason in ("stop", "length")
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        seed=3,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == reply.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == reply.usage.total_tokens
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_client_reads_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].logprobs is not None
    tokens = reply.choices[0].logprobs.content or []
    assert len(tokens) == 4
    assert b"".join(bytes(token.bytes or []) for token in tokens).decode() == reply.choices[0].message.content


def test_the_client_completes_texts(client: openai.OpenAI) -> None:
    body = {"top_k": 5, "min_p": 0.01, "ignore_eos": True}
    answer = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, n=2, seed=1, extra_body=body)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=3, n=2, seed=1, extra_body=body, stream=True
    )
    texts = [""] * 4
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_errors_arrive_as_the_clients_own_exceptions(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be <= ") as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100_000)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.request_id


def test_leaving_a_stream_early_cancels_the_request(server: Running, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Once", max_tokens=7000, stream=True, extra_body={"ignore_eos": True}
    )
    with stream:
        next(iter(stream))
        assert server.engine.statistics().num_unfinished == 1
    server.wait_until_idle()


def test_many_asynchronous_clients_are_served_at_once(server: Running) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, seed=seed % 4, max_tokens=8, stream=True, extra_body={"ignore_eos": True}
        )
        parts = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        return "".join(parts)

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(24)))

    texts = asyncio.run(ask_all())
    # Neighbours change nothing: equal seeds have equal replies.
    assert texts == texts[:4] * 6
    assert len(set(texts)) == 4


async def test_the_client_works_in_trio_and_a_cancelled_scope_cancels_the_request(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        with trio.move_on_after(30) as scope:
            stream = await client.completions.create(
                model="tiny", prompt="Once", max_tokens=7000, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                scope.cancel()
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(server.wait_until_idle)
        reply = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
        assert reply.choices[0].message.content
