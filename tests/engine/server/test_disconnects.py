"""A client that leaves, however it leaves, has its request cancelled at once; one that reads nothing is given up."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from servers import ENDLESS, SERVERS, WIDE, Running, running

CANCEL_S = 0.1
NUM_TRIES = 20


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, write_timeout_s=1.0) as server:
        yield server


def finish(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("leave", [finish, reset, half_close])
def test_leaving_frees_everything_within_a_tenth_of_a_second(
    server: Running, leave: Callable[[socket.socket], None], is_streamed: bool
) -> None:
    waits_s: list[float] = []
    # A busy machine may hold one of them up.
    while len(waits_s) < NUM_TRIES and min(waits_s, default=1) > CANCEL_S:
        with server.send({**ENDLESS, "stream": is_streamed}) as connection:
            server.wait_until_running(1)
            leave(connection)
            waits_s.append(server.wait_until_idle())
    assert min(waits_s) <= CANCEL_S


def test_leaving_before_the_prompt_is_read_cancels_it_too(server: Running) -> None:
    for _ in range(20):
        reset(server.send({**ENDLESS, "prompt": "word " * 6000, "max_tokens": 100}))
    server.wait_until_idle()


def test_half_a_request_is_no_request(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt": ')
    with server.client() as client:
        assert client.get("/health").status_code == 200
    server.wait_until_idle()


@pytest.mark.parametrize("num_rounds", [10, pytest.param(420, marks=pytest.mark.slow)])
def test_a_storm_of_clients_that_leave_leaves_nothing_behind(server: Running, num_rounds: int) -> None:
    with ExitStack() as stuck:
        for round_ in range(num_rounds):
            connections = [server.send({**ENDLESS, "stream": index % 2 == 0}) for index in range(12)]
            if round_ % 60 == 0:
                # Stays, and reads nothing.
                stuck.enter_context(server.send(WIDE, receive_bytes=4096))
            if round_ % 2:
                server.wait_until_running(1)
            for index, connection in enumerate(connections):
                (finish, reset, half_close)[index % 3](connection)
            for connection in connections:
                connection.close()
        server.wait_until_idle(300)


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize(("num_idle", "num_streaming"), [(100, 25), pytest.param(1000, 256, marks=pytest.mark.slow)])
def test_a_thousand_idle_and_256_streaming_connections_are_served(kind: str, num_idle: int, num_streaming: int) -> None:
    settings = {"max_running": num_streaming, "max_step_tokens": 512, "kv_cache_bytes": 2**26}
    with running(server=kind, overrides=settings) as server, ExitStack() as stack:
        for _ in range(num_idle):
            stack.enter_context(server.connect())
        body = {"prompt": "Once", "max_tokens": 40, "ignore_eos": True, "stream": True}
        streams = [stack.enter_context(server.send(body)) for _ in range(num_streaming)]
        for stream in streams:
            received = b""
            while b"data: [DONE]" not in received:
                received += (part := stream.recv(2**16))
                assert part
            assert b'"finish_reason":"length"' in received
        server.wait_until_idle()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_client_that_reads_nothing_is_dropped_and_slows_nobody(kind: str) -> None:
    with (
        running(server=kind, write_timeout_s=1.0) as server,
        server.send(WIDE, receive_bytes=4096),
        server.client() as client,
    ):
        server.wait_until_running(4)
        answer = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 20, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 20
        server.wait_until_idle()
