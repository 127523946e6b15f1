"""`/v1/stream` with the real `websockets` client: many requests on one socket, in JSON and in msgpack."""

import json
from collections.abc import Iterator
from socket import SHUT_RDWR
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from bridge_sockets import CODECS, Socket, open_socket, text_of
from servers import SERVERS, Running, running

LONG = {"max_tokens": 7000, "ignore_eos": True}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, api_keys=("secret",), max_concurrent_per_key=12, max_body_bytes=2**20) as server:
        yield server


@pytest.fixture(params=CODECS)
def socket(server: Running, request: pytest.FixtureRequest) -> Iterator[Socket]:
    with open_socket(server, request.param) as connection:
        assert connection.subprotocol == request.param
        yield Socket(connection, *CODECS[request.param])


def test_a_request_is_accepted_streamed_and_finished(server: Running, socket: Socket) -> None:
    socket.send("submit", id="a", prompt="Once", params={"max_tokens": 6, "n": 2, "seed": 3, "ignore_eos": True})
    messages = socket.follow("a")["a"]
    kinds = [message["type"] for message in messages]
    assert kinds == ["accepted", *["delta"] * (len(kinds) - 2), "finished"]
    assert messages[0]["seed"] == 3
    assert messages[0]["prompt_tokens"] == 1
    assert messages[-1]["finish_reasons"] == ["length", "length"]
    assert messages[-1]["usage"]["completion_tokens"] == 12
    body = {"prompt": "Once", "max_tokens": 6, "n": 2, "seed": 3, "ignore_eos": True}
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        choices = client.post("/v1/completions", json=body).json()["choices"]
    assert [text_of(messages, index) for index in (0, 1)] == [choice["text"] for choice in choices]


def test_prompts_are_texts_tokens_and_conversations(socket: Socket) -> None:
    params = {"max_tokens": 2, "ignore_eos": True, "logprobs": 1}
    prompts = {"text": "Hi", "tokens": [5, 6, 7], "chat": [{"role": "user", "content": "Hi"}]}
    for name, prompt in prompts.items():
        socket.send("submit", id=name, prompt=prompt, params=params)
    found = socket.follow(*prompts)
    assert found["tokens"][0]["prompt_tokens"] == 3
    assert found["chat"][0]["prompt_tokens"] > 10
    (sample,) = found["text"][1]["samples"]
    assert len(sample["logprobs"]) == len(sample["token_ids"])
    assert sample["logprobs"][0]["token_id"] == sample["token_ids"][0]


def test_a_conversation_may_bring_tools_and_options(socket: Socket) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "now"}}]
    params = {"max_tokens": 3, "ignore_eos": True, "seed": 1}
    socket.send("submit", id="bare", prompt=messages, params=params)
    socket.send("submit", id="same", prompt={"messages": messages}, params=params)
    socket.send("submit", id="tools", prompt={"messages": messages, "tools": tools}, params=params)
    found = socket.follow("bare", "same", "tools")
    assert text_of(found["bare"], 0) == text_of(found["same"], 0)
    assert found["bare"][0]["prompt_tokens"] == found["same"][0]["prompt_tokens"]
    # This model's template has no tools; what it does not use it does not refuse.
    assert found["tools"][-1]["type"] == "finished"


def test_many_requests_share_a_socket(socket: Socket) -> None:
    names = [f"request {index}" for index in range(12)]
    for index, name in enumerate(names):
        socket.send("submit", id=name, prompt="Once", params={"max_tokens": 10, "seed": index % 3, "ignore_eos": True})
    found = socket.follow(*names)
    texts = [text_of(found[name]) for name in names]
    assert texts == texts[:3] * 4
    assert len(set(texts)) == 3


def test_a_cancel_ends_one_request_and_no_other(server: Running, socket: Socket) -> None:
    socket.send("submit", id="long", prompt="Once", params=LONG)
    socket.send("submit", id="short", prompt="Once", params={"max_tokens": 5, "ignore_eos": True})
    socket.send("submit", id="early", prompt="Once", params=LONG)
    socket.send("cancel", id="early")
    ended: dict[str, list[str]] = {}
    while len(ended) < 2:
        message = socket.receive()
        if message["type"] == "finished":
            ended[message["id"]] = message["finish_reasons"]
    assert ended == {"short": ["length"], "early": ["cancelled"]}
    socket.send("cancel", id="long")
    socket.send("cancel", id="never was")
    assert socket.receive_kind("finished")["finish_reasons"] == ["cancelled"]
    server.wait_until_idle()
    socket.send("submit", id="long", prompt="Once", params={"max_tokens": 1})
    assert socket.receive_kind("finished")["id"] == "long"


def test_status_priority_and_ping_are_answered(socket: Socket) -> None:
    socket.send("submit", id="a", prompt="Once", params=LONG)
    assert socket.receive_kind("delta")["id"] == "a"
    socket.send("status", id="a")
    assert socket.receive_kind("status") == {"type": "status", "id": "a", "status": "decode"}
    socket.send("priority", id="a", priority=5)
    assert socket.receive_kind("status")["status"] == "decode"
    socket.send("ping")
    assert socket.receive_kind("pong") == {"type": "pong"}
    socket.send("cancel", id="a")
    socket.receive_kind("finished")
    for kind, fields in (("status", {}), ("priority", {"priority": 1})):
        socket.send(kind, id="a", **fields)
        assert socket.receive_kind("status")["status"] is None


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({"type": "submit", "id": "a", "prompt": "x", "params": {"top_p": 3}}, "a", "top_p must be a number > 0 and <= 1"),
    ({"type": "submit", "id": "a", "prompt": "x", "params": {"topp": 3}}, "a", "unknown field `topp`"),
    ({"type": "submit", "id": "a"}, "a", "missing required field `prompt`"),
    ({"type": "resume", "id": "a", "token": "x", "seq": 0}, "a", "no request waits to be resumed"),
    ({"type": "submit", "id": "", "prompt": "x"}, None, "Expected `str` of length >= 1"),
    ({"type": "cancel", "id": "a", "now": True}, None, "unknown field `now`"),
    ({"type": "sumbit", "id": "a"}, None, "Invalid value 'sumbit'"),
    ({"id": "a"}, None, "missing required field `type`"),
]


@pytest.mark.parametrize(("message", "name", "reason"), REFUSED)
def test_a_frame_that_is_no_message_is_refused_and_the_socket_goes_on(
    server: Running, message: dict[str, Any], name: str | None, reason: str
) -> None:
    with open_socket(server) as connection:
        connection.send(json.dumps(message))
        answer = json.loads(connection.recv(timeout=30))
        assert (answer["type"], answer["id"]) == ("failed", name)
        assert answer["status"] in (400, 404)
        assert reason in answer["error"]["message"]
        connection.send(b"\x00")
        assert "must be text" in json.loads(connection.recv(timeout=30))["error"]["message"]
        connection.send("{")
        assert json.loads(connection.recv(timeout=30))["type"] == "failed"
        connection.send('{"type": "ping"}')
        assert json.loads(connection.recv(timeout=30)) == {"type": "pong"}


def test_a_wrong_request_fails_alone(socket: Socket) -> None:
    socket.send("submit", id="good", prompt="Once", params=LONG)
    socket.send("submit", id="good", prompt="Once")
    assert "id must be unique" in socket.receive_kind("failed")["error"]["message"]
    socket.send("submit", id="bad", prompt=[10**6], params={"max_tokens": 1})
    failed = socket.receive_kind("failed")
    assert (failed["id"], failed["status"]) == ("bad", 400)
    assert failed["error"]["param"] == "prompt"
    assert socket.receive_kind("delta")["id"] == "good"
    socket.send("cancel", id="good")
    finished = socket.receive_kind("finished")
    assert (finished["id"], finished["finish_reasons"]) == ("good", ["cancelled"])


def test_a_keys_limit_counts_the_requests_of_its_sockets(server: Running, socket: Socket) -> None:
    for index in range(13):
        socket.send("submit", id=str(index), prompt="Once", params=LONG)
    failed = socket.receive_kind("failed")
    assert (failed["id"], failed["status"]) == ("12", 429)
    for index in range(12):
        socket.send("cancel", id=str(index))
    for _ in range(12):
        socket.receive_kind("finished")
    server.wait_until_idle()


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_closing_the_socket_cancels_its_requests(server: Running, leave: str) -> None:
    waits_s: list[float] = []
    while len(waits_s) < 20 and min(waits_s, default=1) > 0.1:
        with open_socket(server) as connection:
            socket = Socket(connection, *CODECS["triode.v1.json"])
            for index in range(4):
                socket.send("submit", id=str(index), prompt="Once", params=LONG)
            server.wait_until_running(4)
            # The client's own close() first waits for frames under way; what counts begins when the server is told.
            if leave == "close":
                connection.protocol.send_close()
                connection.socket.sendall(b"".join(connection.protocol.data_to_send()))
            else:
                connection.socket.shutdown(SHUT_RDWR)
            waits_s.append(server.wait_until_idle())
    assert min(waits_s) <= 0.1


def test_a_slow_socket_gets_fewer_and_larger_frames(server: Running) -> None:
    narrow = server.connect(receive_bytes=4096)
    with open_socket(server, max_queue=1, sock=narrow) as connection:
        socket = Socket(connection, *CODECS["triode.v1.json"])
        params = {"max_tokens": 600, "n": 4, "ignore_eos": True, "logprobs": 64}
        socket.send("submit", id="a", prompt="Once", params=params)
        server.wait_until_running(4)
        # Nothing is read before all has been generated.
        server.wait_until_idle()
        messages = socket.follow("a")["a"]
    assert messages[-1]["finish_reasons"] == ["length"] * 4
    deltas = [message for message in messages if message["type"] == "delta"]
    sizes = [len(sample["token_ids"]) for message in deltas for sample in message["samples"]]
    assert sum(sizes) == 2400
    assert max(sizes) == 128


def test_strangers_are_refused_before_the_handshake(server: Running) -> None:
    with pytest.raises(InvalidStatus) as unknown, open_socket(server, headers={"Authorization": "Bearer no"}):
        pass
    assert unknown.value.response.status_code == 401
    assert b"invalid_api_key" in unknown.value.response.body
    with pytest.raises(InvalidStatus) as foreign, open_socket(server, origin="https://evil.example"):
        pass
    assert foreign.value.response.status_code == 403
    with pytest.raises(InvalidStatus) as unspoken, open_socket(server, "triode.v9"):
        pass
    assert unspoken.value.response.status_code == 400
    own_origin = server.url
    with open_socket(server, origin=own_origin) as connection:
        connection.send('{"type": "ping"}')
        assert connection.recv(timeout=30) == '{"type":"pong"}'


def test_the_schema_describes_every_message(server: Running) -> None:
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        schema = client.get("/v1/stream/schema").json()
    assert {"Submit", "Cancel", "Accepted", "StreamDelta", "Finished", "Failed", "SamplingParams"} <= set(
        schema["$defs"]
    )
    assert schema["$defs"]["StreamDelta"]["properties"]["type"] == {"enum": ["delta"]}
    assert len(schema["client"]["anyOf"]) == 8


def test_a_drain_lets_requests_finish_before_the_socket_closes() -> None:
    with running() as server, open_socket(server) as connection:
        socket = Socket(connection, *CODECS["triode.v1.json"])
        socket.send("submit", id="a", prompt="Once", params={"max_tokens": 400, "ignore_eos": True})
        socket.receive_kind("delta")
        server.stop()
        assert socket.receive_kind("finished")["finish_reasons"] == ["length"]
        assert server.ended.wait(20)
