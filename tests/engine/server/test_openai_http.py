"""The OpenAI surface as plain HTTP clients see it: shapes, numbers, refusals."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import triode
from servers import SERVERS, Running, running

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, max_body_bytes=2**20, max_prompts=4) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def post(client: httpx.Client, path: str, *, status: int = 200, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_a_chat_completion_says_everything_that_openai_says(client: httpx.Client) -> None:
    answer = post(client, CHAT, messages=HELLO, **GREEDY)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "random:tiny"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {"messages": HELLO}), (TEXT, {"prompt": "Once"})])
def test_streamed_and_whole_answers_have_the_same_text(client: httpx.Client, path: str, prompt: dict[str, Any]) -> None:
    body: dict[str, Any] = {**prompt, "n": 3, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    whole = {choice["index"]: choice for choice in post(client, path, **body)["choices"]}
    texts = dict.fromkeys(range(3), "")
    reasons: dict[int, str] = {}
    for chunk in events(client, path, **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if path == CHAT else choice["text"]
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    assert reasons == dict.fromkeys(range(3), "length")
    for index, choice in whole.items():
        assert texts[index] == (choice["message"]["content"] if path == CHAT else choice["text"])
    assert len(set(texts.values())) == 3


def test_a_streams_last_chunk_has_the_usage_when_asked_for(client: httpx.Client) -> None:
    *_, last = events(client, CHAT, messages=HELLO, **GREEDY, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert all("usage" not in chunk for chunk in events(client, CHAT, messages=HELLO, **GREEDY))


def test_a_reported_seed_draws_the_same_reply_again(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "Once", "max_tokens": 8}
    (first,) = post(client, TEXT, **body)["choices"]
    (again,) = post(client, TEXT, **body, seed=first["seed"])["choices"]
    assert again["text"] == first["text"]


def test_prompts_are_texts_or_tokens_alone_or_several(client: httpx.Client) -> None:
    token_ids = post(client, "/tokenize", prompt="Once upon")["tokens"]
    (alone,) = post(client, TEXT, prompt="Once upon", **GREEDY)["choices"]
    for prompt in (token_ids, ["Once upon"], [token_ids]):
        (choice,) = post(client, TEXT, prompt=prompt, **GREEDY)["choices"]
        assert choice["text"] == alone["text"]
    answer = post(client, TEXT, prompt=["Hello there", "Once upon"], **{**GREEDY, "max_tokens": 3})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert alone["text"].startswith(answer["choices"][1]["text"])
    assert answer["usage"]["completion_tokens"] == 6


def test_several_streamed_prompts_keep_their_places(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": ["Hello", "Once", "Why"], "n": 2, "seed": 3, "max_tokens": 4, "ignore_eos": True}
    texts = [""] * 6
    for chunk in events(client, TEXT, **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in post(client, TEXT, **body)["choices"]]


def test_logprobs_come_with_every_token(client: httpx.Client) -> None:
    chat = post(client, CHAT, messages=HELLO, **GREEDY, logprobs=True, top_logprobs=2)["choices"][0]
    tokens = chat["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == chat["message"]["content"]
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] < 0 for token in tokens)
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    text = post(client, TEXT, prompt="Once", **GREEDY, logprobs=1, prompt_logprobs=0)["choices"][0]
    assert "".join(text["logprobs"]["tokens"]) == text["text"]
    pairs = zip(text["logprobs"]["text_offset"], text["logprobs"]["tokens"], strict=True)
    ends = [offset + len(token) for offset, token in pairs]
    assert ends[:-1] == text["logprobs"]["text_offset"][1:]
    assert text["prompt_logprobs"] == [None]
    streamed = events(client, TEXT, prompt="Once", **GREEDY, logprobs=1)
    offsets = [offset for chunk in streamed for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == text["logprobs"]["text_offset"]


def test_outputs_have_the_form_that_is_asked_for(client: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 200, "seed": 1}
    (choice,) = post(client, CHAT, **body, response_format=form)["choices"]
    assert choice["finish_reason"] == "stop"
    assert isinstance(json.loads(choice["message"]["content"])["ok"], bool)
    assert post(client, CHAT, **body, response_format={"type": "text"})["choices"][0]["finish_reason"] == "length"
    guides: list[tuple[dict[str, Any], str]] = [
        ({"json": schema}, r'\s*\{\s*"ok"\s*:\s*(true|false)\s*\}'),
        ({"json": json.dumps(schema)}, r'\s*\{\s*"ok"\s*:\s*(true|false)\s*\}'),
        ({"regex": "[ab]{3}"}, "[ab]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ]
    for outputs, pattern in guides:
        (choice,) = post(client, TEXT, prompt="x", seed=1, max_tokens=200, structured_outputs=outputs)["choices"]
        assert re.fullmatch(pattern, choice["text"])


def test_an_echo_has_the_prompt_before_the_output(client: httpx.Client) -> None:
    token_ids = post(client, "/tokenize", prompt="Once upon")["tokens"]
    (plain,) = post(client, TEXT, prompt="Once upon", **GREEDY, logprobs=1)["choices"]
    for prompt in ("Once upon", token_ids):
        (echoed,) = post(client, TEXT, prompt=prompt, **GREEDY, logprobs=1, echo=True)["choices"]
        assert echoed["text"] == "Once upon" + plain["text"]
        tokens = echoed["logprobs"]
        assert "".join(tokens["tokens"]) == echoed["text"]
        assert tokens["token_logprobs"][0] is tokens["top_logprobs"][0] is None
        assert all(value < 0 for value in tokens["token_logprobs"][1:])
        assert all(len(top) == 1 for top in tokens["top_logprobs"][1:])
        ends = [start + len(text) for start, text in zip(tokens["text_offset"], tokens["tokens"], strict=True)]
        assert ends[:-1] == tokens["text_offset"][1:]
        assert tokens["token_logprobs"][len(token_ids) :] == pytest.approx(plain["logprobs"]["token_logprobs"])
    body: dict[str, Any] = {"prompt": ["Once", "Hello"], "n": 2, "seed": 1, "max_tokens": 3, "echo": True}
    texts = [""] * 4
    for chunk in events(client, TEXT, **body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in post(client, TEXT, **body)["choices"]]
    assert all(text.startswith(("Once", "Hello")) for text in texts)


def test_an_echo_may_be_of_the_prompt_alone(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "Once upon", "max_tokens": 0, "echo": True}
    answer = post(client, TEXT, **body, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], answer["usage"]["completion_tokens"]) == ("Once upon", 0)
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    *chunks, last = events(client, TEXT, **body, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Once upon"
    assert last["usage"] == answer["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert post(client, TEXT, prompt="a", max_tokens=0, status=400)["error"]["param"] == "max_tokens"


def test_stops_end_the_text_and_say_which(client: httpx.Client) -> None:
    (choice,) = post(client, TEXT, prompt="Once", **GREEDY)["choices"]
    word = choice["text"].split()[1]
    body: dict[str, Any] = {"prompt": "Once", **GREEDY, "stop": word}
    (stopped,) = post(client, TEXT, **body)["choices"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["stop_reason"] == word
    assert word not in stopped["text"]
    (kept,) = post(client, TEXT, **body, include_stop_str_in_output=True)["choices"]
    assert kept["text"] == stopped["text"] + word
    assert "".join(chunk["choices"][0]["text"] for chunk in events(client, TEXT, **body)) == stopped["text"]


def test_parameters_of_openai_and_vllm_reach_the_sampler(client: httpx.Client) -> None:
    forced = post(client, TEXT, prompt="Once", **GREEDY, logit_bias={"504": 100})["choices"][0]["text"]
    assert forced == forced[: len(forced) // 6] * 6
    extras: dict[str, Any] = {
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words": ["x"],
    }
    others: dict[str, Any] = {
        "priority": 3,
        "cache_salt": "me",
        "deadline_s": 60,
        "min_tokens": 2,
        "stop_token_ids": [7],
    }
    post(client, TEXT, prompt="Once", max_tokens=4, **extras, **others)


def test_nulls_and_openais_account_fields_change_nothing(client: httpx.Client) -> None:
    plain = post(client, CHAT, messages=HELLO, **GREEDY)["choices"][0]["message"]
    nulls: dict[str, Any] = {
        "stop": None,
        "top_p": None,
        "logit_bias": None,
        "stream": None,
        "tools": None,
        "response_format": None,
    }
    ignored: dict[str, Any] = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
    }
    assert post(client, CHAT, messages=HELLO, **GREEDY, **nulls, **ignored)["choices"][0]["message"] == plain


def test_text_completions_have_openais_default_length(client: httpx.Client) -> None:
    answer = post(client, TEXT, prompt="Once", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


def test_a_repeated_prompt_is_reported_as_cached(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "some words " * 40, "max_tokens": 1, "cache_salt": "repeated"}
    assert post(client, TEXT, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    usage = post(client, TEXT, **body)["usage"]
    assert usage["prompt_tokens"] - 17 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_a_deadline_ends_a_reply_and_keeps_its_beginning(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "Once", "max_tokens": 7000, "ignore_eos": True, "deadline_s": 0.3}
    (choice,) = post(client, TEXT, **body)["choices"]
    assert choice["finish_reason"] == "cancelled"
    *_, last = events(client, TEXT, **body)
    assert last["choices"][0]["finish_reason"] == "cancelled"


def test_tokens_and_texts_are_inverse(client: httpx.Client) -> None:
    asked = post(client, "/tokenize", prompt="Hello there, Wörld", return_token_strs=True)
    assert asked["count"] == len(asked["tokens"]) == len(asked["token_strs"])
    assert asked["max_model_len"] == 8192
    assert post(client, "/detokenize", tokens=asked["tokens"])["prompt"] == "Hello there, Wörld"
    chat = post(client, "/tokenize", messages=HELLO)
    assert chat["count"] == post(client, CHAT, messages=HELLO, max_tokens=1)["usage"]["prompt_tokens"]


def test_the_server_says_what_it_serves(client: httpx.Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "random:tiny"
    assert model["max_model_len"] == 8192
    assert client.get("/v1/models/random:tiny").json() == model
    assert client.get("/version").json() == {"version": triode.__version__}
    assert client.get("/health").status_code == client.get("/ready").status_code == 200


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    (TEXT, {"prompt": "x", "temperature": -1}, "temperature", "temperature must be 0, or a number"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature", "Expected `float | null`, got `str`"),
    (TEXT, {"prompt": "x", "tempreature": 1}, "tempreature", "unknown field `tempreature`"),
    (TEXT, {}, "prompt", "missing required field `prompt`"),
    (TEXT, {"prompt": ""}, "prompt", "prompt must have at least one token"),
    (TEXT, {"prompt": []}, "prompt", "prompt must be a text, token ids"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "prompt must be a text, token ids"),
    (TEXT, {"prompt": ["a"] * 5}, "prompt", "prompt must be <= 4 prompts, got 5"),
    (TEXT, {"prompt": [10**6]}, "prompt", "prompt must hold token ids >= 0 and < 49152, got 1000000"),
    (TEXT, {"prompt": "word " * 10_000}, "prompt", "prompt must have fewer than 8192 tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 10**6}, "max_tokens", "max_tokens must be <= 8191"),
    (
        TEXT,
        {"prompt": "x", "echo": True, "stream": True, "logprobs": 1},
        "echo",
        "must be false with logprobs and stream",
    ),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported yet"),
    (TEXT, {"prompt": "x", "best_of": 2}, "best_of", "best_of must be n = 1"),
    (TEXT, {"prompt": "x", "n": 2, "temperature": 0}, "n", "n must be 1 when temperature is 0"),
    (TEXT, {"prompt": "x", "stop": [""]}, "stop", "stop must hold non-empty strings"),
    (TEXT, {"prompt": "x", "logprobs": 65}, "logprobs", "logprobs must be an integer"),
    (TEXT, {"prompt": "x", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "must not be given with stream"),
    (TEXT, {"prompt": "x", "stream_options": {}}, "stream_options", "must be given with stream = true"),
    (CHAT, {"messages": []}, "messages", "Expected `array` of length >= 1"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages[0].role must be one of"),
    (CHAT, {"messages": HELLO, "top_logprobs": 1}, "top_logprobs", "must be given with logprobs = true"),
    (CHAT, {"messages": HELLO, "tools": [{}]}, "tools", "missing required field `type`"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice", "must be none or auto without tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format", "Invalid enum value 'xml'"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
        "response_format",
        "must be given with type",
    ),
    (TEXT, {"prompt": "a", "structured_outputs": {}}, "structured_outputs", "must have exactly one of json, regex"),
    (TEXT, {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    (TEXT, {"prompt": "a", "structured_outputs": {"json": "{"}}, "structured_outputs", "schema must be valid JSON"),
    (TEXT, {"prompt": "a", "structured_outputs": {"regex": "("}}, "structured_outputs", "outputs cannot be compiled"),
    (
        TEXT,
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "ignore_eos": True},
        "ignore_eos",
        "must be False with",
    ),
    (
        TEXT,
        {"prompt": "a", "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "must not be given with response_format",
    ),
    (
        CHAT,
        {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 1},
        "max_completion_tokens",
        "must not be given with",
    ),
    ("/tokenize", {}, "prompt", "prompt or messages must be given"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "tokens must hold token ids >= 0"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), REFUSED)
def test_a_wrong_request_is_refused_by_name(
    client: httpx.Client, path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    error = post(client, path, status=400, **body)["error"]
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "the body must be JSON"),
        (b"", 400, "the body must be JSON"),
        (b'{"metadata":' + b"[" * 100_000, 400, "the body must be JSON"),
        (b'{"prompt": "\xff"}', 400, "the body must be UTF-8"),
        (b"[]", 400, "Expected `object`, got `array`"),
        (b" " * (2**20 + 1), 413, "the body must have <= 1048576 bytes"),
    ],
)
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, content: bytes, status: int, message: str) -> None:
    response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_body_without_a_length_is_limited_too(server: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * 2**16

    with server.client() as client:
        response = client.post(TEXT, content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_another_model_another_path_and_another_method_are_told_apart(client: httpx.Client) -> None:
    assert post(client, TEXT, status=404, model="gpt-4", prompt="x")["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/gpt-4").status_code == 404
    missing = client.post("/v1/images/generations", json={})
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "POST /v1/images/generations: not found"
    assert client.get(CHAT).status_code == 405
    forms = client.post(TEXT, content=b"{}", headers={"content-type": "text/plain"})
    assert forms.status_code == 415


def test_after_all_that_the_engine_holds_nothing(server: Running) -> None:
    server.wait_until_idle()
