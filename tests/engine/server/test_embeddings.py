"""/v1/embeddings, through the real `openai` client."""

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import trio

from servers import SERVERS, Running, running


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, served_name="tiny", max_prompts=4) as server:
        yield server


def tokens_of(server: Running, text: str) -> list[int]:
    with server.client() as client:
        found: list[int] = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def vectors(client: openai.OpenAI, inputs: Any, **options: Any) -> list[list[float]]:
    answer = client.embeddings.create(model="tiny", input=inputs, **options)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [item.embedding for item in answer.data]


def test_both_encodings_have_the_same_numbers(client: openai.OpenAI) -> None:
    # Without an encoding the client asks for base64 and decodes it.
    (packed,) = vectors(client, "Once upon a time")
    (plain,) = vectors(client, "Once upon a time", encoding_format="float")
    assert packed == pytest.approx(plain, rel=1e-6)
    assert len(plain) == 64


def test_inputs_are_texts_or_tokens_alone_or_several(server: Running, client: openai.OpenAI) -> None:
    texts = ["Once upon a time", "Hello"]
    token_ids = [tokens_of(server, text) for text in texts]
    both = vectors(client, texts)
    assert both[0] != both[1]
    assert vectors(client, token_ids) == both
    assert vectors(client, token_ids[0]) == vectors(client, texts[0]) == both[:1]


def test_usage_counts_the_tokens_of_all_inputs(server: Running, client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["Once upon a time", "Hello"])
    num_tokens = sum(len(tokens_of(server, text)) for text in ("Once upon a time", "Hello"))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    assert answer.model == "tiny"


def test_vectors_have_length_1_unless_the_models_own_are_wanted(client: openai.OpenAI) -> None:
    (unit,) = vectors(client, "Once", encoding_format="float")
    (own,) = vectors(client, "Once", encoding_format="float", extra_body={"normalize": False})
    assert math.hypot(*unit) == pytest.approx(1)
    assert [value / math.hypot(*own) for value in own] == pytest.approx(unit)


def test_pooling_may_be_chosen(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"encoding_format": "float"}
    mean, last = (
        vectors(client, "Once upon", **options, extra_body={"pooling": pooling}) for pooling in ("mean", "last")
    )
    assert mean != last
    assert mean == vectors(client, "Once upon", **options)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"input": []}, "input", "input must be a text, token ids, or"),
        ({"input": ""}, "input", "prompt must have at least one token"),
        ({"input": ["a"] * 5}, "input", "input must be <= 4 prompts, got 5"),
        ({"input": [2**40]}, "input", "prompt must"),
        ({"input": "a", "dimensions": 3}, "dimensions", "dimensions must be 64"),
        ({"input": "a", "extra_body": {"pooling": "max"}}, "pooling", "Invalid enum value"),
        ({"input": "a", "extra_body": {"truncate": 1}}, "truncate", "unknown field `truncate`"),
    ],
)
def test_wrong_inputs_are_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.embeddings.create(model="tiny", **options)
    assert caught.value.param == param


async def test_the_client_embeds_in_trio_and_a_cancelled_scope_cancels_the_work(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with trio.move_on_after(0.02) as scope:
            await client.embeddings.create(model="tiny", input=["word " * 7000] * 4)
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(server.wait_until_idle)
        answer = await client.embeddings.create(model="tiny", input="Once")
        assert len(answer.data) == 1
