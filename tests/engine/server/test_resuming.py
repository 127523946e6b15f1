"""Requests that outlive their socket, and windows: nothing is lost, nothing comes twice, strangers get nothing."""

from collections.abc import Iterator
from contextlib import ExitStack
from socket import SHUT_RDWR
from typing import Any

import pytest
from websockets.sync.client import ClientConnection

from bridge_sockets import CODECS, Socket, open_socket, text_of
from servers import SERVERS, Running, running
from triode.engine.server import session

PARAMS = {"max_tokens": 200, "ignore_eos": True, "seed": 5}
KEPT = {"window": 4, "resume_grace_s": 30}


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with running(server=request.param, api_keys=("secret", "other")) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _frames_are_small() -> Iterator[None]:
    """However many tokens come together, a request has some 25 frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "MAX_TOKENS_IN_FRAME", 8)
        yield


def socket_of(connection: ClientConnection) -> Socket:
    return Socket(connection, *CODECS["triode.v1.json"])


def drop(connection: ClientConnection) -> None:
    connection.socket.shutdown(SHUT_RDWR)


def read_some(socket: Socket, number: int) -> list[dict[str, Any]]:
    """So many deltas, each acknowledged."""
    found: list[dict[str, Any]] = []
    while len(found) < number:
        message = socket.receive_kind("delta")
        socket.send("ack", id=message["id"], seq=message["seq"])
        found.append(message)
    return found


def read_all(socket: Socket) -> list[dict[str, Any]]:
    found = []
    while (message := socket.receive())["type"] != "finished":
        if message["type"] == "delta":
            socket.send("ack", id=message["id"], seq=message["seq"])
            found.append(message)
    socket.send("ack", id=message["id"], seq=message["seq"])
    return [*found, message]


def expected_text(server: Running) -> str:
    with server.client(headers={"Authorization": "Bearer secret"}) as client:
        answer: str = client.post("/v1/completions", json={"prompt": "Once", **PARAMS}).json()["choices"][0]["text"]
    return answer


def test_a_request_goes_on_after_its_socket_was_lost(server: Running) -> None:
    with open_socket(server) as first:
        socket = socket_of(first)
        socket.send("submit", id="a", prompt="Once", params=PARAMS, **KEPT)
        token = socket.receive_kind("accepted")["resume_token"]
        before = read_some(socket, 3)
        drop(first)
    with open_socket(server, "triode.v1.msgpack") as second:
        socket = Socket(second, *CODECS["triode.v1.msgpack"])
        socket.send("resume", id="b", token=token, seq=before[-1]["seq"])
        assert socket.receive()["type"] == "resumed"
        after = read_all(socket)
    assert {message["id"] for message in after} == {"b"}
    assert [message["seq"] for message in before + after] == list(range(1, len(before + after) + 1))
    assert text_of(before + after) == expected_text(server)
    server.wait_until_idle()


def test_deltas_that_were_lost_with_the_socket_come_again(server: Running) -> None:
    with open_socket(server) as first:
        socket = socket_of(first)
        socket.send("submit", id="a", prompt="Once", params=PARAMS, **KEPT)
        token = socket.receive_kind("accepted")["resume_token"]
        kept = read_some(socket, 2)
        # These are sent, but as far as the client can tell they never arrived.
        for _ in range(3):
            socket.receive_kind("delta")
        drop(first)
    with open_socket(server) as second:
        socket = socket_of(second)
        socket.send("resume", id="a", token=token, seq=2)
        assert text_of(kept + read_all(socket)) == expected_text(server)


def test_the_last_word_is_kept_until_it_is_acknowledged(server: Running) -> None:
    with open_socket(server) as first:
        socket = socket_of(first)
        socket.send("submit", id="a", prompt="Once", params={"max_tokens": 2, "ignore_eos": True}, **KEPT)
        token = socket.receive_kind("accepted")["resume_token"]
        last = socket.receive_kind("finished")
        drop(first)
    for _ in range(2):
        with open_socket(server) as again:
            socket = socket_of(again)
            socket.send("resume", id="b", token=token, seq=0)
            assert socket.receive_kind("finished") == {**last, "id": "b"}
            # Its id is not free before that.
            socket.send("submit", id="b", prompt="Once")
            assert "id must be unique" in socket.receive_kind("failed")["error"]["message"]
            drop(again)
    with open_socket(server) as again:
        socket = socket_of(again)
        socket.send("resume", id="b", token=token, seq=last["seq"])
        socket.receive_kind("resumed")
        while True:
            socket.send("status", id="b")
            if socket.receive_kind("status")["status"] is None:
                break
        socket.send("resume", id="b", token=token, seq=0)
        assert socket.receive()["error"]["code"] == "not_resumable"


def test_a_socket_that_is_dead_without_knowing_it_loses_its_request_to_the_next(server: Running) -> None:
    with open_socket(server) as first, open_socket(server) as second:
        socket = socket_of(first)
        socket.send("submit", id="a", prompt="Once", params=PARAMS, **KEPT)
        token = socket.receive_kind("accepted")["resume_token"]
        before = read_some(socket, 2)
        successor = socket_of(second)
        successor.send("resume", id="a", token=token, seq=before[-1]["seq"])
        assert text_of(before + read_all(successor)) == expected_text(server)
        # The first one has no such request any more, and works.
        socket.send("status", id="a")
        assert socket.receive_kind("status")["status"] is None
    server.wait_until_idle()


def test_neither_a_wrong_token_nor_another_key_resumes(server: Running) -> None:
    with open_socket(server) as first:
        socket = socket_of(first)
        socket.send("submit", id="a", prompt="Once", params={**PARAMS, "max_tokens": 7000}, **KEPT)
        token = socket.receive_kind("accepted")["resume_token"]
        assert len(token) == 32
        for key, shown in (("other", token), ("secret", token.swapcase())):
            with open_socket(server, headers={"Authorization": f"Bearer {key}"}) as stranger:
                strange = socket_of(stranger)
                strange.send("resume", id="a", token=shown, seq=0)
                refused = strange.receive()
                assert (refused["status"], refused["error"]["code"]) == (404, "not_resumable")
        read_some(socket, 3)
        with open_socket(server) as impossible:
            strange = socket_of(impossible)
            for seq in (1, 1000):
                strange.send("resume", id="a", token=token, seq=seq)
                assert "seq must be >= 3" in strange.receive()["error"]["message"]
        # It was none of their business, and goes on.
        read_some(socket, 3)
        drop(first)
    with open_socket(server) as last:
        socket = socket_of(last)
        socket.send("resume", id="a", token=token, seq=6)
        socket.receive_kind("resumed")
        socket.send("cancel", id="a")
        assert read_all(socket)[-1]["finish_reasons"] == ["cancelled"]
    server.wait_until_idle()


@pytest.mark.parametrize("grace", [{}, {"resume_grace_s": 0.2}])
def test_nobody_who_comes_back_ends_the_request(server: Running, grace: dict[str, float]) -> None:
    with open_socket(server) as connection:
        socket = socket_of(connection)
        socket.send("submit", id="a", prompt="Once", params={**PARAMS, "max_tokens": 7000}, window=4, **grace)
        read_some(socket, 1)
        drop(connection)
        server.wait_until_idle()


def test_a_client_that_says_goodbye_is_not_waited_for(server: Running) -> None:
    with open_socket(server) as connection:
        socket = socket_of(connection)
        socket.send("submit", id="a", prompt="Once", params={**PARAMS, "max_tokens": 7000}, **KEPT)
        read_some(socket, 1)
        socket.send("goodbye")
    server.wait_until_idle()


def test_a_drain_waits_for_nobody_to_come_back() -> None:
    with running() as server:
        with open_socket(server) as connection:
            socket = socket_of(connection)
            socket.send("submit", id="a", prompt="Once", params={**PARAMS, "max_tokens": 7000}, **KEPT)
            read_some(socket, 1)
            drop(connection)
        server.stop()
        assert server.ended.wait(10)


@pytest.mark.parametrize("num_rounds", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_storm_of_lost_sockets_leaves_nothing_behind(
    server: Running, num_rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    for round_ in range(num_rounds):
        with ExitStack() as stack:
            connections = [stack.enter_context(open_socket(server)) for _ in range(3)]
            for index, connection in enumerate(connections):
                socket = socket_of(connection)
                grace = {"window": 2, "resume_grace_s": 0.2} if index % 2 else {}
                for name in "abc":
                    socket.send("submit", id=name, prompt="Once", params={**PARAMS, "max_tokens": 7000}, **grace)
            if round_ % 2:
                server.wait_until_running(1)
            for connection in connections:
                drop(connection)
    server.wait_until_idle(60)
    # The clients' library complains that its socket was taken from it.
    of_server = [record for record in caplog.records if not record.name.startswith("websockets")]
    assert [record.getMessage() for record in of_server if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"resume_grace_s": 3}, "window must be given with resume_grace_s"),
        ({"resume_grace_s": 61, "window": 4}, "resume_grace_s must be >= 0 and <= 60, got 61"),
        ({"resume_grace_s": -1, "window": 4}, "resume_grace_s must be >= 0"),
        ({"window": 0}, "`int` >= 1"),
        ({"window": 257}, "`int` <= 256"),
    ],
)
def test_what_cannot_be_kept_is_refused(server: Running, fields: dict[str, Any], reason: str) -> None:
    with open_socket(server) as connection:
        socket = socket_of(connection)
        socket.send("submit", id="a", prompt="Once", **fields)
        assert reason in socket.receive_kind("failed")["error"]["message"]


def test_a_request_that_is_not_acknowledged_holds_no_other_one_up(server: Running) -> None:
    with open_socket(server) as connection:
        socket = socket_of(connection)
        socket.send("submit", id="slow", prompt="Once", params=PARAMS, window=2)
        socket.send("submit", id="quick", prompt="Once", params=PARAMS)
        found: dict[str, list[dict[str, Any]]] = {"slow": [], "quick": []}
        while (message := socket.receive())["type"] != "finished":
            if message["type"] == "delta":
                found[message["id"]].append(message)
        assert message["id"] == "quick"
        assert len(found["slow"]) == 2
        assert text_of(found["quick"]) == expected_text(server)
        socket.send("ack", id="slow", seq=9)
        assert "seq must be >= 0 and <= 2" in socket.receive_kind("failed")["error"]["message"]
        socket.send("ack", id="slow", seq=2)
        found["slow"] += read_all(socket)
        assert text_of(found["slow"]) == expected_text(server)
        # Most of it had waited.
        assert len(found["slow"]) < 100
