"""/v1/responses through the real `openai` client: whole, streamed, continued, stored, cancelled."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import trio

from scripted_models import HERMES, LONG_TOKENS, SETTINGS, call_of, saying, write_model
from servers import Running, running

TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": None,
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
WRONG = {"type": "json_schema", "name": "x", "schema": {"type": "whatever"}}
LONG: dict[str, Any] = {"max_output_tokens": LONG_TOKENS, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = write_model(tmp_path_factory.mktemp("hermes"), HERMES + "{# <think> #}")
    with running(model, SETTINGS, served_name="tiny", api_keys=("secret", "other"), max_stored_responses=50) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, text: str | None = None, **options: Any) -> Any:
    body = {**options.pop("extra_body", {}), **({} if text is None else saying(text))}
    defaults: dict[str, Any] = {"model": "tiny", "input": "Hi", "max_output_tokens": 300}
    return client.responses.create(**(defaults | options), extra_body=body)


def test_a_response_says_everything_that_openai_says(client: openai.OpenAI) -> None:
    response = ask(client, "Good day.", metadata={"a": "b"}, temperature=0.5)
    assert (response.status, response.output_text) == ("completed", "Good day.")
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (response.metadata, response.temperature, response.object) == ({"a": "b"}, 0.5, "response")
    usage = response.usage
    assert usage.output_tokens == len("Good day.") + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    required = {"completed_at", "error", "instructions", "previous_response_id", "text", "tool_choice", "truncation"}
    assert required <= response.to_dict().keys()


def test_events_are_the_sdks_and_end_with_the_response(client: openai.OpenAI) -> None:
    events = list(ask(client, "<think>Now.</think>Yes.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert list(dict.fromkeys(kinds[2:])) == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_text.delta",
        "response.output_text.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Yes."
    response = events[-1].response
    reasoning, message = response.output
    assert (reasoning.type, reasoning.content[0].text, message.content[0].text) == ("reasoning", "Now.", "Yes.")
    assert response.usage.output_tokens_details.reasoning_tokens == len("Now.")
    assert response.id == events[0].response.id


def test_the_sdks_own_accumulator_understands_the_events(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="tiny", input="Hi", tools=[TOOL], extra_body=saying(f"I look. {call_of('get_weather', {'city': 'Rome'})}")
    ) as stream:
        kinds = {event.type for event in stream}
        response = stream.get_final_response()
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    message, call = response.output
    assert response.output_text == "I look."
    assert (call.type, message.type) == ("function_call", "message")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_calls_can_be_asked_for_and_answered(client: openai.OpenAI, choice: Any) -> None:
    first = ask(client, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    # The client sends everything again, or only what is new.
    items: Any = [{"role": "user", "content": "Hi"}, call.to_dict(), answer]
    again = ask(client, "Sunny.", input=items, tools=[TOOL], store=False)
    assert again.output_text == "Sunny."
    next_one = ask(client, "Sunny.", input=[answer], tools=[TOOL], previous_response_id=first.id)
    assert next_one.usage.input_tokens == again.usage.input_tokens
    assert next_one.previous_response_id == first.id


def test_the_answer_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    schema = {**TOOL["parameters"], "title": "City"}
    form: Any = {"type": "json_schema", "name": "city", "schema": schema, "strict": True}
    response = client.responses.create(model="tiny", input="Hi", text={"format": form}, max_output_tokens=300)
    assert json.loads(response.output_text)["city"] in ("Paris", "Rome")
    assert response.to_dict()["text"]["format"]["name"] == "city"  # type: ignore[index]


def test_a_cut_response_is_incomplete_and_says_why(client: openai.OpenAI) -> None:
    response = ask(client, "A long story.", max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.output_text, response.output[0].status) == ("A lon", "incomplete")
    *_, last = ask(client, "A long story.", max_output_tokens=5, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_instructions_are_not_carried_over(server: Running, client: openai.OpenAI) -> None:
    first = ask(client, "Yes.", instructions="Be brief.")
    second = ask(client, "No.", input="Sure?", previous_response_id=first.id)
    text = "[user]Hi[assistant]Yes.[user]Sure?[assistant]"
    assert second.usage.input_tokens == len(server.engine.tokenizer.encode(text, add_special_tokens=False))
    assert (first.instructions, second.instructions) == ("Be brief.", None)


def test_stored_responses_are_fetched_by_their_owner_until_deleted(server: Running, client: openai.OpenAI) -> None:
    response = ask(client, "Kept.")
    assert client.responses.retrieve(response.id).output_text == "Kept."
    (item,) = client.responses.input_items.list(response.id)
    assert item.to_dict()["content"] == [{"text": "Hi", "type": "input_text"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0) as stranger:
        with pytest.raises(openai.NotFoundError):
            stranger.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError) as caught:
            ask(stranger, previous_response_id=response.id)
        assert caught.value.code == "previous_response_not_found"
    with pytest.raises(openai.BadRequestError, match="must be in progress to be cancelled, it is completed"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    unkept = ask(client, "Not kept.", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_running_response_is_cancelled_by_its_id(server: Running, client: openai.OpenAI) -> None:
    events = iter(ask(client, **LONG, stream=True))
    response = next(events).response
    assert client.responses.retrieve(response.id).status == "in_progress"
    assert client.responses.cancel(response.id).status == "cancelled"
    *_, last = events
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    assert client.responses.retrieve(response.id).status == "cancelled"
    server.wait_until_idle()


def test_leaving_the_stream_cancels_the_response(server: Running, client: openai.OpenAI) -> None:
    with ask(client, **LONG, stream=True) as stream:
        response = next(iter(stream)).response
    server.wait_until_idle()
    assert client.responses.retrieve(response.id).status == "cancelled"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"input": []}, "input", "input must be a text or have items"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input", "must be one of message, reasoning"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "type must be text"),
        ({"background": True}, "background", "background must be false: a response is made while"),
        ({"tools": [{"type": "web_search"}]}, "tools", "Invalid enum value 'web_search'"),
        ({"truncation": "auto"}, "truncation", "Invalid enum value 'auto'"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens must be <="),
        ({"previous_response_id": "resp_0"}, "previous_response_id", "must be of a stored response"),
        ({"model": "gpt-4"}, "model", "model must be 'tiny'"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options", "must be given with stream"),
        ({"extra_body": {"text": {"format": WRONG}}}, "text", "text cannot be compiled"),
        ({"extra_body": {"conversation": "x"}}, "conversation", "unknown field `conversation`"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        ask(client, **options)
    assert caught.value.status_code == (404 if param == "model" else 400)
    assert caught.value.body["param"] == param  # type: ignore[index]


async def test_the_client_works_in_trio(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        with trio.move_on_after(30) as scope:
            async for _ in await client.responses.create(model="tiny", input="Hi", **LONG, stream=True):
                scope.cancel()
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(server.wait_until_idle)
        response = await client.responses.create(model="tiny", input="Hi", extra_body=saying("Yes."))
        assert response.output_text == "Yes."


def test_many_asynchronous_clients_are_served_at_once(server: Running) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
            asked = (client.responses.create(model="tiny", input="Hi", extra_body=saying(f"{n}.")) for n in range(8))
            return [response.output_text for response in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [f"{n}." for n in range(8)]


def test_the_stream_is_of_named_events(server: Running) -> None:
    headers = {"Authorization": "Bearer secret"}
    body = {"input": "Hi", "stream": True, **saying("a")}
    text = httpx.post(f"{server.url}/v1/responses", json=body, headers=headers, timeout=30).text
    *found, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in found:
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_logprobs_of_the_answer_come_where_nothing_else_is_in_the_output(
    tmp_path_factory: pytest.TempPathFactory, client: openai.OpenAI
) -> None:
    wanted: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with pytest.raises(openai.BadRequestError, match=r"include must be without message\.output_text\.logprobs"):
        ask(client, **wanted)
    plain = write_model(tmp_path_factory.mktemp("plain"), "{{ messages[0].content }}")
    with (
        running(plain, SETTINGS, served_name="tiny") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as own,
    ):
        (part,) = ask(own, "Good.", **wanted).output[0].content
        assert "".join(token.token for token in part.logprobs[: len("Good.")]) == part.text == "Good."
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in part.logprobs)
        events = [*ask(own, "Good.", **wanted, stream=True)]
        streamed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
        (done,) = [event for event in events if event.type == "response.output_text.done"]
        assert [token.token for token in streamed] == [token.token for token in done.logprobs]
        assert len(streamed) == len(part.logprobs)
        with pytest.raises(openai.BadRequestError, match="top_logprobs must be given with include"):
            ask(own, top_logprobs=2)


def test_a_response_that_runs_cannot_be_continued_yet(client: openai.OpenAI) -> None:
    with ask(client, stream=True, **LONG) as events:
        first = next(iter(events)).response
        with pytest.raises(openai.BadRequestError, match=f"{first.id}' is in progress") as refused:
            ask(client, previous_response_id=first.id)
        assert refused.value.code == "response_in_progress"


def test_a_response_calls_only_what_is_allowed(client: openai.OpenAI) -> None:
    other = {**TOOL, "name": "other"}
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    response = ask(client, tools=[other, TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert [call.name for call in response.output] == ["get_weather"]
    assert response.tool_choice.mode == "required"
