"""A guide that takes more work than one may fails its request, as the request's own error, on every way in."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import trio
from websockets.sync.client import connect

import triode
from bridge_sockets import CODECS, Socket, open_socket
from servers import SERVERS, Running, running
from triode.engine import client as triode_client

AMBIGUOUS = 'start: s\ns: s s | "x"'
# The special tokens, the end among them, are forbidden, so that it runs out of fuel.
BIAS = {str(token_id): -100 for token_id in range(17)}
FAILING: dict[str, Any] = {"structured_outputs": {"grammar": AMBIGUOUS}, "logit_bias": BIAS, "seed": 1}
REASON = "the guide cannot be followed any further: .*max is 200"


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, api_keys=("secret",)) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def check(error: Any, param: str | None = "structured_outputs") -> None:
    """It is OpenAI's shape, and says whose fault it is."""
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "request_unsatisfiable", param)
    assert "the guide cannot be followed any further" in error["message"]
    assert "max is 200" in error["message"]


def test_whole_replies_are_refused(client: openai.OpenAI) -> None:
    asked: list[Any] = [
        lambda: client.completions.create(model="random:tiny", prompt="x", max_tokens=400, extra_body=FAILING),
        lambda: client.chat.completions.create(
            model="random:tiny", messages=[{"role": "user", "content": "x"}], max_tokens=400, extra_body=FAILING
        ),
        lambda: client.responses.create(model="random:tiny", input="x", max_output_tokens=400, extra_body=FAILING),
    ]
    for ask in asked:
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        check(caught.value.body)


def test_streams_end_with_the_error_and_say_nothing_of_success(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="random:tiny", prompt="x", max_tokens=400, stream=True, extra_body=FAILING)
    reasons: list[object] = []
    with pytest.raises(openai.APIError) as caught:
        reasons.extend(chunk.choices[0].finish_reason for chunk in stream)
    check(caught.value.body)
    assert set(reasons) <= {None}


def test_a_streamed_response_has_failed(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model="random:tiny", input="x", max_output_tokens=400, stream=True, extra_body=FAILING
    )
    last = list(stream)[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    check(last.response.error.model_dump())
    assert client.responses.retrieve(last.response.id).status == "failed"


def test_on_the_responses_socket_too(server: Running) -> None:
    url, headers = server.url.replace("http", "ws") + "/v1/responses", {"Authorization": "Bearer secret"}
    with connect(url, additional_headers=headers, proxy=None) as socket:
        socket.send(json.dumps({"type": "response.create", "input": "x", "max_output_tokens": 400, **FAILING}))
        while not (event := json.loads(socket.recv(timeout=30)))["type"].startswith("response.failed"):
            pass
    check(event["response"]["error"])


def test_on_the_bridge_and_through_its_client(server: Running) -> None:
    guide = {"type": "Grammar", "lark": AMBIGUOUS}
    params = {"guide": guide, "max_tokens": 400, "logit_bias": BIAS, "seed": 1}
    with open_socket(server) as connection:
        socket = Socket(connection, *CODECS["triode.v1.json"])
        socket.send("submit", id="a", prompt="x", params=params)
        failed = socket.receive_kind("failed")
    assert failed["status"] == 400
    check(failed["error"], "guide")

    async def run() -> None:
        async with triode_client.connect(server.url, key="secret") as remote:
            hostile = triode.SamplingParams(
                guide=triode.Grammar(AMBIGUOUS), max_tokens=400, logit_bias={int(key): -100.0 for key in BIAS}, seed=1
            )
            async with remote.submit("x", hostile) as stream:
                with pytest.raises(triode.RequestUnsatisfiable, match=REASON):
                    await stream.result()

    trio.run(run)


def test_parameters_that_leave_no_token_are_the_requests_own_error(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 9, "bad_words": ["é"], "structured_outputs": {"choice": ["é"]}}
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "request_unsatisfiable"
