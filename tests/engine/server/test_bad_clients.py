"""Clients that send anything but requests: each gets an error or is cut off, and the server goes on."""

import json
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, open_websocket_url
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection

from bridge_sockets import CODECS, Socket, open_socket
from servers import SERVERS, Running, running

TEXT = "/v1/completions"


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, api_keys=("secret",), max_body_bytes=2**16) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(server: Running) -> Iterator[None]:
    """Whatever a test did, the next client is served and nothing is left behind."""
    yield
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        assert client.post(TEXT, json={"prompt": "Once", "max_tokens": 1}).status_code == 200
    server.wait_until_idle()


def send_frame(connection: ClientConnection, frame: Frame) -> None:
    """A frame that the client library would not send."""
    connection.socket.sendall(frame.serialize(mask=True))


def assert_closed(connection: ClientConnection, *codes: int) -> None:
    with pytest.raises(ConnectionClosedError) as closed:
        while True:
            connection.recv(timeout=30)
    assert closed.value.rcvd is None or closed.value.rcvd.code in codes


def test_a_frame_above_the_limit_closes_the_socket(server: Running) -> None:
    with open_socket(server) as connection:
        connection.send(json.dumps({"type": "submit", "id": "a", "prompt": "x" * 2**17}))
        assert_closed(connection, 1009)


def test_fragments_that_add_up_above_the_limit_close_it_too(server: Running) -> None:
    with open_socket(server) as connection:
        send_frame(connection, Frame(Opcode.TEXT, b"x" * 40_000, fin=False))
        send_frame(connection, Frame(Opcode.CONT, b"x" * 40_000, fin=True))
        assert_closed(connection, 1009)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Opcode.CONT, b"x", fin=True),
        Frame(Opcode.TEXT, b"\xff\xfe{", fin=True),
        Frame(Opcode.PING, b"x", fin=False),
        Frame(Opcode.TEXT, b"{}", fin=True, rsv1=True),
    ],
    ids=["continuation of nothing", "invalid UTF-8", "fragmented ping", "reserved bit"],
)
def test_frames_that_break_the_protocol_close_the_socket(server: Running, frame: Frame) -> None:
    with open_socket(server) as connection:
        connection.socket.sendall(raw(frame))
        assert_closed(connection, 1002, 1007)


def raw(frame: Frame) -> bytes:
    """Serialized without the checks of the library."""
    first = (0x80 if frame.fin else 0) | (0x40 if frame.rsv1 else 0) | frame.opcode.value
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(frame.data))
    return bytes([first, 0x80 | len(frame.data)]) + mask + masked


@pytest.mark.parametrize("protocol", ["triode.v1.json", "triode.v1.msgpack"])
def test_random_frames_are_answered_one_by_one(server: Running, protocol: str) -> None:
    rng = Random(0)
    with open_socket(server, protocol) as connection:
        socket = Socket(connection, *CODECS[protocol])
        for _ in range(50):
            noise = rng.randbytes(rng.randint(0, 60))
            connection.send(noise if protocol.endswith("msgpack") else noise.decode("latin-1"))
            refused = socket.receive()
            assert (refused["type"], refused["id"], refused["status"]) == ("failed", None, 400)
        socket.send("ping")
        assert socket.receive() == {"type": "pong"}


OUT_OF_ORDER: list[list[dict[str, Any]]] = [
    [{"type": "ack", "id": "a", "seq": 3}],
    [{"type": "cancel", "id": "a"}, {"type": "cancel", "id": "a"}],
    [{"type": "goodbye"}, {"type": "goodbye"}],
    [{"type": "ack", "id": "a", "seq": -1}],
    [{"type": "resume", "id": "a", "token": "", "seq": 0}],
    [{"type": "resume", "id": "a", "token": "x" * 1000, "seq": 10**30}],
    [{"type": "priority", "id": "a", "priority": 10**30}],
    [{"type": "submit", "id": "a", "prompt": [], "params": {}}, {"type": "ack", "id": "a", "seq": 1}],
    [{"type": "submit", "id": "a", "prompt": "x", "priority": 10**30}],
    [{"type": "submit", "id": "a", "prompt": "x", "deadline_s": -1}],
    [{"type": "submit", "id": "a", "prompt": [{"role": "nobody"}]}],
    [{"type": "accepted", "id": "a"}],
]


@pytest.mark.parametrize("messages", OUT_OF_ORDER)
def test_messages_out_of_order_do_no_harm(server: Running, messages: list[dict[str, Any]]) -> None:
    with open_socket(server) as connection:
        socket = Socket(connection, *CODECS["triode.v1.json"])
        for message in messages:
            connection.send(json.dumps(message))
        socket.send("ping")
        while (answer := socket.receive())["type"] != "pong":
            assert answer["type"] in ("failed", "status", "accepted", "delta")
            if answer["type"] == "failed":
                assert answer["status"] in (400, 404)


@pytest.mark.parametrize(
    "request_line",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / FTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_cut_off(server: Running, request_line: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(request_line)
        received = b""
        while part := connection.recv(2**16):
            received += part
        assert received == b"" or b" 400 " in received or b" 505 " in received


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"prompt": "x"', 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": 5}', 400),
        (b"[" * 30_000, 400),
        (b'{"prompt": "' + b"x" * 2**17 + b'"}', 413),
        (b'{"prompt": "x", "max_tokens": 1e400}', 400),
    ],
)
def test_bodies_that_are_no_requests_are_refused(server: Running, content: bytes, status: int) -> None:
    with server.client(headers={"Authorization": "Bearer secret", "Content-Type": "application/json"}) as client:
        answer = client.post(TEXT, content=content)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("key", ["", "Bearer", "Basic c2VjcmV0", "Bearer secret2", "Bearer " + "x" * 5000])
def test_no_wrong_key_opens_a_socket(server: Running, key: str) -> None:
    with server.client() as client:
        headers = {
            "Authorization": key,
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
        }
        assert client.get("/v1/stream", headers=headers).status_code == 401


async def test_a_trio_client_streams_and_leaves(server: Running) -> None:
    url = server.url.replace("http", "ws") + "/v1/stream"
    headers = [(b"Authorization", b"Bearer secret")]
    async with open_websocket_url(url, subprotocols=["triode.v1.json"], extra_headers=headers) as socket:
        submit = {"type": "submit", "id": "a", "prompt": "Once", "params": {"max_tokens": 5, "ignore_eos": True}}
        await socket.send_message(json.dumps(submit))
        kinds: list[str] = []
        while not kinds or kinds[-1] != "finished":
            kinds.append(json.loads(await socket.get_message())["type"])
        assert kinds[0] == "accepted"
        assert "delta" in kinds
        await socket.send_message(json.dumps({**submit, "params": {"max_tokens": 7000, "ignore_eos": True}}))
        await socket.get_message()
    with pytest.raises(ConnectionClosed):
        await socket.get_message()
    await trio.to_thread.run_sync(server.wait_until_idle)
