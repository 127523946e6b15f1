"""What one key gets a minute, and how long a client may take to say what it wants."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import LONG, greedy, open_tiny
from servers import SERVERS, Running, running
from triode.actors.messages import FinishReason
from triode.engine.server import completions
from triode.engine.server.budget import Budget
from triode.engine.server.config import ServerConfig
from triode.engine.server.errors import RequestError
from triode.engine.server.gate import Gate
from triode.engine.server.metrics import Metrics, Timing

TEXT = "/v1/completions"
SHORT = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True}


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 120), st.integers(1, 50)), max_size=60))
def test_no_minute_has_more_than_two_minutes_worth(per_minute: int, steps: list[tuple[float, int]]) -> None:
    budget, now_s = Budget(per_minute, 0.0), 0.0
    spent: list[tuple[float, int]] = []
    for pause_s, amount in steps:
        now_s += pause_s
        if amount <= per_minute and budget.wait_s(amount, now_s) == 0:
            budget.spend(amount, now_s)
            spent.append((now_s, amount))
    for end_s, _ in spent:
        # What was saved up, and what came meanwhile.
        assert sum(amount for at_s, amount in spent if end_s - 60 <= at_s <= end_s) <= 2 * per_minute + 1e-6


def test_after_the_wait_that_was_told_there_is_enough() -> None:
    budget = Budget(60, 0.0)
    budget.spend(200, 0.0)
    wait_s = budget.wait_s(1, 0.0)
    assert wait_s == pytest.approx(141)
    assert budget.wait_s(1, wait_s - 1) > 0
    assert budget.wait_s(1, wait_s) == pytest.approx(0)


def test_requests_a_minute_are_counted_by_key() -> None:
    now_s = 0.0
    gate = Gate(ServerConfig(max_requests_per_minute=2), clock=lambda: now_s)
    for _ in range(2):
        with gate.admitted("first"):
            pass
    with pytest.raises(RequestError) as refused, gate.admitted("first"):
        pass
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "30"})
    with gate.admitted("second"):
        pass
    now_s = 30.0
    with gate.admitted("first"):
        pass


async def test_a_request_that_has_ended_leaves_its_place_before_its_last_byte() -> None:
    gate = Gate(ServerConfig(max_concurrent_per_key=1))
    async with open_tiny(executor="inline") as engine:
        with gate.admitted("key") as streams:
            streams.append(await engine.submit([1, 2, 3], greedy(LONG)))
            with pytest.raises(RequestError, match="unfinished requests of one key must be <= 1"):
                gate.admitted("key").__enter__()
            streams[0].cancel()
            await streams[0].result()
            with gate.admitted("key"), pytest.raises(RequestError, match="unfinished requests of one key must be <= 1"):
                gate.admitted("key").__enter__()


async def test_tokens_count_as_soon_as_they_are_read() -> None:
    now_s = 0.0
    gate = Gate(ServerConfig(max_tokens_per_minute=10), clock=lambda: now_s)
    async with open_tiny(executor="inline") as engine:
        for num_spent in (0, 8):
            with gate.admitted("key") as streams:
                streams.append(await engine.submit([1, 2, 3], greedy(5)))
                await streams[0].result()
                if num_spent:
                    with pytest.raises(RequestError, match="tokens of one key must be <= 10 a minute") as refused:
                        gate.admitted("key").__enter__()
                    # 16 were used of 10, and one more is wanted.
                    assert refused.value.headers == {"Retry-After": "42"}
                else:
                    with gate.admitted("key"):
                        pass


def test_tokens_a_minute_are_those_that_were_used() -> None:
    with running(max_tokens_per_minute=10) as server, server.client() as client:
        # One in, three out.
        for _ in range(3):
            assert client.post(TEXT, json=SHORT).status_code == 200
        refused = client.post(TEXT, json=SHORT)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 18
        assert "tokens of one key must be <= 10 a minute" in refused.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 200


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, body_timeout_s=0.3, header_timeout_s=0.3) as server:
        yield server


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(2**16):
        received += part
    return received


def test_a_body_that_does_not_come_is_not_waited_for(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"prompt"')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body must arrive within 0.3 s" in answer


def test_headers_that_do_not_come_are_not_waited_for() -> None:
    with running(header_timeout_s=0.2) as server, server.connect() as slow, server.connect() as silent:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost:")
        assert read_all(slow) == b""
        # A connection that has said nothing yet is no burden, and is served.
        silent.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(silent).startswith(b"HTTP/1.1 200 ")
        with server.client() as client:
            for _ in range(3):
                assert client.get("/health").status_code == 200


def test_headers_that_do_not_come_are_not_waited_for_by_hypercorn() -> None:
    with running(server="hypercorn", header_timeout_s=0.2) as server, server.connect() as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost:")
        assert b"HTTP/1.1 200" not in read_all(slow)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_counting_tokens_is_a_request_as_every_other(path: str) -> None:
    body = {"prompt": "Once"} if path == "/tokenize" else {"tokens": [1, 2]}
    with running(max_requests_per_minute=2) as server, server.client() as client:
        assert [client.post(path, json=body).status_code for _ in range(3)] == [200, 200, 429]


def test_an_echoed_prompt_is_not_encoded_for_who_has_used_up_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(max_requests_per_minute=1) as server, server.client() as client:
        echoed = {**SHORT, "echo": True}
        assert client.post(TEXT, json=echoed).json()["choices"][0]["text"].startswith("Once")
        monkeypatch.setattr(completions, "echo_of", None)
        assert client.post(TEXT, json=echoed).status_code == 429


def test_a_refused_request_leaves_no_timing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    open_timings: list[object] = []
    close = Timing.close

    def timing(self: Metrics) -> Timing:
        open_timings.append(made := Timing(self, None))
        return made

    def closed(self: Timing, *reason: FinishReason | None) -> None:
        if self in open_timings:
            open_timings.remove(self)
        close(self, *reason)

    monkeypatch.setattr(Metrics, "timing", timing)
    monkeypatch.setattr(Timing, "close", closed)
    with running(max_requests_per_minute=4) as server, server.client() as client:
        statuses = [
            client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": tokens}).status_code
            for tokens in (3, 10**6)
        ]
        statuses += [
            client.post(TEXT, json=body).status_code for body in (SHORT, {**SHORT, "max_tokens": 10**6}, SHORT)
        ]
    assert statuses == [200, 400, 200, 400, 429]
    assert open_timings == []


def test_a_stream_outlasts_the_time_for_headers_and_body(server: Running) -> None:
    with server.connect() as connection:
        body = b'{"prompt": "Once", "max_tokens": 300, "ignore_eos": true, "stream": true, "logprobs": 20}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        received = connection.recv(2**16)
        # A part of the next request must not end this one.
        connection.sendall(b"GET /hea")
        while b"[DONE]" not in received[-100:]:
            received += (part := connection.recv(2**16))
            assert part
    assert b'"finish_reason":"length"' in received


def test_headers_without_end_are_refused() -> None:
    with running() as server, server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Filler: " + b"a" * 70_000)
        assert read_all(connection).startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
