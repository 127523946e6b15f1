"""The WebSocket mode of /v1/responses, through the real `openai` client."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import openai
import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

import triode.engine.server.responses.socket
from scripted_models import HERMES, LONG_TOKENS, SETTINGS, saying, write_model
from servers import SERVERS, Running, running

LONG: dict[str, Any] = {"max_output_tokens": LONG_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = write_model(tmp_path_factory.mktemp("hermes"), HERMES)
    with running(model, SETTINGS, server=request.param, served_name="tiny", api_keys=("secret",)) as server:
        yield server


@pytest.fixture
def socket(server: Running) -> Iterator[ClientConnection]:
    headers = {"Authorization": "Bearer secret"}
    with connect(f"ws://127.0.0.1:{server.port}/v1/responses", additional_headers=headers) as socket:
        yield socket


def create(socket: ClientConnection, text: str | None = None, **fields: Any) -> None:
    body = {"type": "response.create", "input": "Hi", **({} if text is None else saying(text)), **fields}
    socket.send(json.dumps(body))


def receive(socket: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(socket.recv(timeout=30))
    return message


def last_of(socket: ClientConnection, *kinds: str) -> dict[str, Any]:
    """The next event of these kinds; by default, the next response's end."""
    kinds = kinds or ("response.completed", "response.incomplete", "response.failed", "error")
    while (event := receive(socket))["type"] not in kinds:
        pass
    return event


def text_of(event: dict[str, Any]) -> str:
    return "".join(part["text"] for item in event["response"]["output"] for part in item["content"])


# The client opens its socket in a way that the newest websockets would have otherwise.
@pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")
def test_the_client_has_turn_after_turn_on_one_socket(server: Running) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client,
        client.responses.connect() as connection,
    ):
        previous: str | None = None
        for turn in range(3):
            event: Any = {
                "type": "response.create",
                "model": "tiny",
                "input": f"Turn {turn}",
                "store": False,
                "previous_response_id": previous,
                **saying(f"Answer {turn}"),
            }
            connection.send(event)
            text = ""
            for received in connection:
                assert received.type != "error", received
                if received.type == "response.output_text.delta":
                    text += received.delta
                if received.type == "response.completed":
                    previous = received.response.id
                    break
            assert text == f"Answer {turn}"
        # Nothing of it is stored for others.
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(str(previous))


def test_the_asynchronous_client_works_too(server: Running) -> None:
    async def ask() -> str:
        async with (
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client,
            client.responses.connect() as connection,
        ):
            event: Any = {"type": "response.create", "model": "tiny", "input": "Hi", **saying("Yes.")}
            await connection.send(event)
            async for received in connection:
                if received.type == "response.completed":
                    return received.response.output_text
        return ""

    assert asyncio.run(ask()) == "Yes."


def test_responses_of_one_stream_run_in_turn_and_those_of_others_beside_them(socket: ClientConnection) -> None:
    create(socket, stream_id="slow", **LONG)
    create(socket, "first", stream_id="quick")
    create(socket, "second", stream_id="quick")
    ends: list[tuple[str, str]] = []
    while len(ends) < 2:
        event = last_of(socket)
        ends.append((event["stream_id"], text_of(event)))
    assert ends == [("quick", "first"), ("quick", "second")]
    socket.send(json.dumps({"type": "response.cancel"}))
    event = last_of(socket)
    assert (event["stream_id"], event["response"]["status"]) == ("slow", "cancelled")


def test_one_response_is_cancelled_by_its_id(server: Running, socket: ClientConnection) -> None:
    create(socket, **LONG)
    response = last_of(socket, "response.created")["response"]
    socket.send(json.dumps({"type": "response.cancel", "response_id": "resp_0"}))
    assert last_of(socket, "error")["error"]["code"] == "response_not_found"
    socket.send(json.dumps({"type": "response.cancel", "response_id": response["id"]}))
    assert last_of(socket)["response"]["status"] == "cancelled"
    create(socket, "The socket goes on.")
    assert text_of(last_of(socket)) == "The socket goes on."
    server.wait_until_idle()


@pytest.mark.parametrize("kind", SERVERS)
def test_open_sockets_do_not_hold_up_the_end_of_service(kind: str) -> None:
    with running(server=kind, drain_s=0.2) as server, connect(f"ws://127.0.0.1:{server.port}/v1/responses") as idle:
        with connect(f"ws://127.0.0.1:{server.port}/v1/responses") as busy:
            create(idle, input="Hi", max_output_tokens=2)
            assert last_of(idle)["type"] in ("response.completed", "response.incomplete")
            create(busy, **LONG | {"max_output_tokens": 7000})
            last_of(busy, "response.created")
            server.stop()
            # uvicorn may close the socket before the last word is out.
            with suppress(ConnectionClosedError):
                assert last_of(busy)["response"]["status"] == "cancelled"
        assert server.ended.wait(30)


def test_a_response_may_only_keep_its_input(server: Running, socket: ClientConnection) -> None:
    create(socket, input="Remember.", generate=False, store=False)
    kept = last_of(socket)["response"]
    assert (kept["status"], kept["output"]) == ("completed", [])
    create(socket, "Yes.", input="What?", previous_response_id=kept["id"])
    # A token a byte.
    assert last_of(socket)["response"]["usage"]["input_tokens"] == len("[user]Remember.[user]What?[assistant]")


def test_closing_the_socket_cancels_all_of_its_own(server: Running, socket: ClientConnection) -> None:
    for name in ("a", "b"):
        create(socket, stream_id=name, **LONG)
    server.wait_until_running(2)
    socket.close()
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("frame", "status", "message"),
    [
        ("{", 400, "truncated"),
        ("[]", 400, "Expected `object`"),
        ('{"type": "response.steer"}', 400, "Invalid value 'response.steer'"),
        ('{"type": "response.create", "typo": 1}', 400, "unknown field `typo`"),
        ('{"type": "response.create"}', 400, "input must be a text or have items"),
        ('{"type": "response.create", "input": "a", "model": "gpt"}', 404, "model must be 'tiny'"),
        ('{"type": "response.create", "input": "a", "max_output_tokens": 0}', 400, "max_output_tokens must be"),
        ('{"type": "response.create", "input": "a", "previous_response_id": "x"}', 400, "must be of a stored response"),
        (b"\xff", 400, "JSON is malformed"),
    ],
)
def test_a_wrong_frame_is_refused_and_the_socket_goes_on(
    socket: ClientConnection, frame: str | bytes, status: int, message: str
) -> None:
    socket.send(frame)
    error = receive(socket)
    assert (error["type"], error["status"]) == ("error", status)
    assert message in error["error"]["message"]
    create(socket, "ok", max_output_tokens=5)
    assert text_of(last_of(socket)) == "ok"


def test_a_stream_has_a_limited_number_of_waiting_responses(socket: ClientConnection) -> None:
    create(socket, **LONG)
    for _ in range(20):
        create(socket, "x")
    assert last_of(socket, "error")["status"] == 429
    socket.send(json.dumps({"type": "response.cancel"}))


def test_what_waits_is_limited_in_bytes_too(socket: ClientConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triode.engine.server.responses.socket, "MAX_WAITING_BYTES", 3000)
    create(socket, **LONG)
    receive(socket)
    # One may be larger than all together, and none may wait beside it.
    create(socket, instructions="x" * 4000, max_output_tokens=1)
    create(socket, "x", stream_id="other")
    error = last_of(socket, "error")
    assert (error["status"], error["stream_id"]) == (429, "other")
    assert "must have <= 3000 bytes in one socket" in error["error"]["message"]
    # What has had its turn makes room.
    socket.send(json.dumps({"type": "response.cancel"}))
    for _ in range(2):
        last_of(socket)
    create(socket, "ok", max_output_tokens=5)
    assert text_of(last_of(socket)) == "ok"
