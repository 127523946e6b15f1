"""Tools through the real `openai` client: what is called, streamed and whole, chosen and forced."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from scripted_models import HERMES, LLAMA3, SETTINGS, call_of, saying, write_model
from servers import Running, running

WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Tells it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": "Weather?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = write_model(tmp_path_factory.mktemp("hermes"), HERMES)
    with running(model, SETTINGS, served_name="tiny") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    defaults: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 300, "seed": 1}
    reply = client.chat.completions.create(**(defaults | options))
    assert isinstance(reply, ChatCompletion)
    return reply


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, list[tuple[str, str]], str | None, int]:
    """Content, calls, finish reason, and in how many pieces the arguments came."""
    defaults: dict[str, Any] = {"model": "tiny", "messages": ASK, "tools": TOOLS, "max_tokens": 300, "seed": 1}
    content, reason, num_pieces = "", None, 0
    calls: list[tuple[str, str]] = []
    for chunk in client.chat.completions.create(**(defaults | options), stream=True):
        assert isinstance(chunk, ChatCompletionChunk)
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert call.type == "function"
                calls.append((call.function.name or "", call.function.arguments or ""))
                assert call.index == len(calls) - 1
            else:
                name, arguments = calls[call.index]
                calls[call.index] = (name, arguments + (call.function.arguments or ""))
                num_pieces += 1
    return content, calls, reason, num_pieces


def calls_in(reply: ChatCompletion) -> list[tuple[str, str]]:
    calls: list[Any] = reply.choices[0].message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls]


def test_calls_in_a_reply_are_found_whole_and_streamed(client: openai.OpenAI) -> None:
    paris = {"city": "Paris", "days": 2}
    text = f"I look.\n{call_of('get_weather', paris)}\n{call_of('now', {})}"
    reply = ask(client, extra_body=saying(text))
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content == "I look."
    assert calls_in(reply) == [("get_weather", json.dumps(paris)), ("now", "{}")]
    content, calls, reason, num_pieces = streamed(client, extra_body=saying(text))
    assert (content, calls, reason) == ("I look.", calls_in(reply), "tool_calls")
    assert num_pieces >= 2


def test_a_reply_without_calls_is_content_and_tools_that_are_not_wanted_are_not_looked_for(
    client: openai.OpenAI,
) -> None:
    reply = ask(client, extra_body=saying("No <tool_call>none</tool_call>."))
    assert reply.choices[0].message.content == "No <tool_call>none</tool_call>."
    assert (reply.choices[0].message.tool_calls, reply.choices[0].finish_reason) == (None, "stop")
    text = call_of("now", {})
    unread = ask(client, tool_choice="none", extra_body=saying(text))
    assert (unread.choices[0].message.content, unread.choices[0].finish_reason) == (text, "stop")


@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_valid_whatever_the_model_would_say(client: openai.OpenAI, parallel: bool) -> None:
    reply = ask(
        client, tool_choice="required", parallel_tool_calls=parallel, stop=["</tool_call>\n<tool_call>"] * parallel
    )
    calls = calls_in(reply)
    assert len(calls) == 1
    for name, arguments in calls:
        check(name, json.loads(arguments))
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None


def check(name: str, arguments: dict[str, Any]) -> None:
    if name == "now":
        assert arguments == {}
        return
    assert name == "get_weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize("name", ["get_weather", "now"])
def test_a_named_function_is_called_once(client: openai.OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    for seed in range(3):
        (call,) = calls_in(ask(client, tool_choice=choice, seed=seed))
        assert call[0] == name
        check(name, json.loads(call[1]))
        assert streamed(client, tool_choice=choice, seed=seed)[1:3] == ([call], "tool_calls")


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_shown_and_called(client: openai.OpenAI, mode: Any) -> None:
    allowed: Any = {"mode": mode, "tools": [{"type": "function", "function": {"name": "now"}}]}
    options: dict[str, Any] = {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    stop: Any = {"stop": ["</tool_call>\n<tool_call>"]}
    reply = ask(client, **options, **({"extra_body": saying("Hm.")} if mode == "auto" else stop))
    assert calls_in(reply) == ([] if mode == "auto" else [("now", "{}")])
    alone = ask(client, tools=TOOLS[1:], extra_body=saying("Hm."))
    assert reply.usage is not None
    assert alone.usage is not None
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens
    allowed["tools"][0]["function"]["name"] = "later"
    with pytest.raises(openai.BadRequestError, match="tool_choice must name one of the tools, got 'later'"):
        ask(client, **options)


def test_strict_arguments_are_valid_where_a_call_is_the_models_own_choice(client: openai.OpenAI) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    bias = {"29": 100}  # "<": the model would begin a tag again and again
    reply = ask(client, tools=strict, logit_bias=bias, parallel_tool_calls=False, max_tokens=150)
    for name, arguments in calls_in(reply):
        check(name, json.loads(arguments))
    assert reply.choices[0].finish_reason in ("tool_calls", "length", "stop")


def test_an_answer_or_a_call_has_its_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(4):
        reply = ask(client, response_format=form, seed=seed, parallel_tool_calls=False)
        if reply.choices[0].message.tool_calls:
            ((name, arguments),) = calls_in(reply)
            check(name, json.loads(arguments))
        else:
            assert set(json.loads(reply.choices[0].message.content or "")) == {"ok"}


def test_the_template_gets_tools_calls_and_answers(server: Running, client: openai.OpenAI) -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    history: list[Any] = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    reply = ask(client, messages=history, max_tokens=1)
    text = (
        f"[tools]{json.dumps([TOOLS[0], TOOLS[1]])} Call in <tool_call> tags.[user]Weather?"
        '[assistant]<tool_call>{"name": "now", "arguments": {}}</tool_call>[tool]noon[assistant]'
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(server.engine.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "tools must have names that differ"),
        ({"tools": [{"type": "web_search"}]}, "tools", "Invalid enum value 'web_search'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "tool_choice must be none or auto without tools"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "tool_choice must name one of the tools, got 'f'",
        ),
        (
            {"tool_choice": "required", "extra_body": saying("x")},
            "structured_outputs",
            "must not be given where a call is asked for",
        ),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "Expected `str` matching regex"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "whatever"}}}],
                "tool_choice": "required",
            },
            "tools",
            "tools cannot be compiled",
        ),
    ],
)
def test_wrong_tools_are_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, **options)
    assert caught.value.param == param


def test_tokens_of_a_prompt_with_tools_can_be_counted(client: openai.OpenAI, server: Running) -> None:
    with server.client() as plain:
        body = {"messages": ASK, "tools": TOOLS}
        count = plain.post("/tokenize", json=body).json()["count"]
    reply = ask(client, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == count


def with_optional(number: int) -> list[Any]:
    """A strict tool whose parameters may all be left out."""
    properties: dict[str, Any] = {f"p{index}": {} for index in range(number)}
    parameters = {"type": "object", "properties": properties, "additionalProperties": False}
    return [{"type": "function", "function": {"name": "set", "strict": True, "parameters": parameters}}]


@pytest.mark.parametrize("tool_choice", ["required", "auto"])
def test_a_strict_tool_may_have_many_optional_parameters_and_too_many_are_refused_at_once(
    client: openai.OpenAI, tool_choice: str
) -> None:
    reply = ask(client, tools=with_optional(100), tool_choice=tool_choice, max_tokens=150, seed=1)
    assert reply.choices[0].finish_reason in ("tool_calls", "length", "stop")
    with pytest.raises(openai.BadRequestError, match=r"<= 240 optional properties .* got 250") as caught:
        ask(client, tools=with_optional(250), tool_choice=tool_choice)
    assert caught.value.param == "tools"


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("levels", [99, 500, 900])
def test_nested_values_are_refused_or_served_but_break_nothing(server: Running, levels: int) -> None:
    deep = nested(levels)
    function = {"name": "f", "parameters": {"type": "object", "properties": deep}}
    ask = {"messages": ASK, "max_tokens": 1}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {**ask, "tools": [{"type": "function", "function": function}]}),
        ("chat/completions", {**ask, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}),
        ("chat/completions", {**ask, "response_format": form}),
        ("chat/completions", {**ask, "structured_outputs": {"json": deep}}),
        ("chat/completions", {**ask, "chat_template_kwargs": deep}),
        ("chat/completions", {**ask, "messages": [{"role": "user", "content": "Hi", "more": deep}]}),
        ("chat/completions", {**ask, "metadata": deep}),
        ("responses", {"input": [{"role": "user", "content": "Hi", "more": deep}], "max_output_tokens": 1}),
        ("responses", {"input": "Hi", "tools": [{"type": "function", **function}], "max_output_tokens": 1}),
        ("responses", {"input": "Hi", "text": {"format": {"type": "json_schema", "schema": deep}}}),
        ("embeddings", {"input": "Hi", "user": deep}),
    ]
    with server.client() as client:
        for path, body in bodies:
            response = client.post(f"/v1/{path}", json=body)
            assert response.status_code in (200, 400), (path, response.text)


def test_llama_3s_calls_are_found_and_forced(tmp_path: Any) -> None:
    with (
        running(write_model(tmp_path, LLAMA3), SETTINGS, served_name="tiny") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        text = '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Rome"}}'
        said = [("now", "{}"), ("get_weather", '{"city": "Rome"}')]
        assert calls_in(ask(client, extra_body=saying(text))) == said
        assert streamed(client, extra_body=saying(text))[:3] == ("", said, "tool_calls")
        json_answer = '{"name": "Bob", "age": 3}'
        assert ask(client, extra_body=saying(json_answer)).choices[0].message.content == json_answer
        (call,) = calls_in(ask(client, tool_choice="required", parallel_tool_calls=False))
        check(call[0], json.loads(call[1]))
        assert calls_in(ask(client, parallel_tool_calls=False, max_tokens=20)) in ([], [call])


def test_a_model_without_tools_in_its_template_refuses_them_unless_told_the_format(tmp_path: Any) -> None:
    model = write_model(tmp_path, "{{ messages[0].content }}")
    with running(model, SETTINGS) as server, server.client() as client:
        body: dict[str, Any] = {"messages": ASK, "tools": TOOLS}
        error = client.post("/v1/chat/completions", json=body).json()["error"]
        assert error["message"].startswith("tools must be empty: the model's chat template has none")
    with running(model, SETTINGS, tool_parser="hermes") as server, server.client() as client:
        body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
        (choice,) = client.post("/v1/chat/completions", json=body).json()["choices"]
        assert choice["finish_reason"] == "tool_calls"
