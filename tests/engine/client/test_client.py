"""`triode.engine.client` on Trio and on asyncio: the engine's own surface, over a network that may be cut."""

import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import pytest
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

import triode
from proxies import Proxy, proxied
from servers import Running, running
from triode.engine.client import client as client_module
from triode.engine.client import connect
from triode.engine.client.wire import socket_url
from triode.engine.server import session
from triode.errors import AccessDenied, EngineBusy, EngineClosed, ProtocolError, ServerUnreachable

SHORT = triode.SamplingParams(max_tokens=8, ignore_eos=True, seed=3)
LONG = triode.SamplingParams(max_tokens=150, ignore_eos=True, seed=3)
ENDLESS = triode.SamplingParams(max_tokens=7000, ignore_eos=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_keys=("secret",), max_concurrent_per_key=4) as server:
        yield server


@pytest.fixture
def proxy(server: Running) -> Iterator[Proxy]:
    with proxied(server.port) as proxy:
        yield proxy


@pytest.fixture(params=["trio", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], None]:
    return partial(anyio.run, backend=request.param)


Run = Callable[[Callable[[], Awaitable[Any]]], None]


async def expected_text(server: Running) -> str:
    async with connect(server.url, key="secret") as client:
        stream = await client.submit("Once", LONG)
        return (await stream.result()).completion.text


def test_a_request_streams_and_has_a_result(server: Running, run: Run) -> None:
    async def main() -> None:
        async with connect(server.url, key="secret") as client:
            async with client.submit("Once", SHORT) as stream:
                texts = [delta.text async for delta in stream]
                result = await stream.result()
            assert result.completion.text == stream.completion.text == "".join(texts)
            assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (1, 8)
            assert (result.seed, result.max_tokens, result.completion.finish_reason) == (3, 8, "length")
            assert stream.status == "finished"
            # A conversation, several samples, tokens, logprobs.
            params = triode.SamplingParams(max_tokens=3, ignore_eos=True, n=2, logprobs=1, seed=3)
            chat = await client.submit([{"role": "user", "content": "Hi"}], params)
            samples = (await chat.result()).completions
            assert [len(sample.logprobs or ()) for sample in samples] == [3, 3]
            tokens = await client.submit([1, 2, 3], triode.SamplingParams(max_tokens=1))
            assert (await tokens.result()).usage.prompt_tokens == 3

    run(main)


def test_a_block_that_is_left_cancels_its_request(server: Running, run: Run) -> None:
    async def main() -> None:
        async with connect(server.url, key="secret") as client:
            async with client.submit("Once", ENDLESS) as stream:
                assert await stream.batch()
                assert await client.status(stream.request_id) == "decode"
                client.set_priority(stream.request_id, 4)
            result = await stream.result()
            assert result.completion.finish_reason == "cancelled"
            assert result.completion.token_ids
            await anyio.to_thread.run_sync(server.wait_until_idle)
            with pytest.raises(KeyError):
                await client.status(stream.request_id)
            with anyio.move_on_after(0.05):
                async with client.submit("Once", ENDLESS) as cut:
                    await cut.result()
            await anyio.to_thread.run_sync(server.wait_until_idle)

    run(main)


def test_leaving_the_client_cancels_everything_and_the_blocks_errors_leave_bare(server: Running, run: Run) -> None:
    async def main() -> None:
        streams = []
        with pytest.raises(ZeroDivisionError):
            async with connect(server.url, key="secret", resume_grace_s=60) as client:
                streams = [await client.submit("Once", ENDLESS) for _ in range(3)]
                raise ZeroDivisionError
        # Though they could have been resumed: the client said goodbye.
        await anyio.to_thread.run_sync(server.wait_until_idle)
        for stream in streams:
            with pytest.raises(EngineClosed, match="block has been left"):
                await stream.result()

    run(main)


def test_errors_are_those_of_the_engine(server: Running, run: Run) -> None:
    async def main() -> None:
        async with connect(server.url, key="secret") as client:
            with pytest.raises(ValueError, match="prompt"):
                await client.submit([10**6], SHORT)
            with pytest.raises(ValueError, match="deadline_s must be > 0"):
                client.submit("Once", SHORT, deadline_s=-1)
            with pytest.raises(ValueError, match="prompt must"):
                client.submit([1, "mixed"], SHORT)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="prompt_logprobs must be None"):
                await client.submit("Once", triode.SamplingParams(prompt_logprobs=1))
            streams = [await client.submit("Once", ENDLESS) for _ in range(4)]
            with pytest.raises(EngineBusy, match="must be <= 4"):
                await client.submit("Once", SHORT)
            with pytest.raises(ValueError, match="request_id must be unique"):
                await client.submit("Once", SHORT, request_id=streams[0].request_id)
            for stream in streams:
                stream.cancel()
                await stream.result()

    run(main)


def test_who_is_not_let_in_learns_why(server: Running, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]

    async def main() -> None:
        with pytest.raises(AccessDenied, match="401"):
            async with connect(server.url, key="wrong"):
                pass
        with pytest.raises(ServerUnreachable, match="404"):
            async with connect(server.url + "/elsewhere", key="secret"):
                pass
        with pytest.raises(ServerUnreachable, match="cannot be reached"):
            async with connect(f"http://127.0.0.1:{port}"):
                pass

    run(main)


def test_a_lost_socket_is_opened_again_and_no_token_is_missing(
    server: Running, proxy: Proxy, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However many tokens come together, those of three reads are not all.
    monkeypatch.setattr(session, "MAX_TOKENS_IN_FRAME", 8)
    monkeypatch.setattr(client_module, "WINDOW", 4)

    async def main() -> None:
        expected = await expected_text(server)
        async with connect(proxy.url, key="secret", resume_grace_s=60) as client:
            first = await client.submit("Once", LONG)
            second = await client.submit("Once", LONG)
            text = ""
            for number in range(3):
                text += (await anext(first)).text
                if number == 2:
                    proxy.is_down = True
                proxy.cut()
            num_connections = proxy.num_connections
            while proxy.num_connections < num_connections + 2:  # noqa: ASYNC110 - the proxy lives in threads
                await anyio.sleep(0.01)
            proxy.is_down = False
            async for delta in first:
                text += delta.text
            assert text == expected
            assert (await second.result()).completion.text == expected
        assert proxy.num_connections >= 4

    run(main)


def test_without_grace_a_lost_socket_is_an_error(server: Running, proxy: Proxy, run: Run) -> None:
    async def main() -> None:
        async with connect(proxy.url, key="secret") as client:
            stream = await client.submit("Once", ENDLESS)
            await anext(stream)
            proxy.cut()
            with pytest.raises(ServerUnreachable, match="lost"):
                await stream.result()
            with pytest.raises(ServerUnreachable, match="lost"):
                await client.submit("Once", SHORT)
        await anyio.to_thread.run_sync(server.wait_until_idle)

    run(main)


def test_a_frame_that_is_no_message_ends_the_client_with_a_clear_error(run: Run) -> None:
    def answer(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(b"\xc1 is no msgpack")
        connection.recv()

    async def main(port: int) -> None:
        async with connect(f"http://127.0.0.1:{port}", resume_grace_s=30) as client:
            with pytest.raises(ProtocolError, match="no message of the bridge"):
                await client.submit("Once", SHORT)

    with serve(answer, "127.0.0.1", 0, subprotocols=[Subprotocol("triode.v1.msgpack")]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        run(partial(main, server.socket.getsockname()[1]))
        server.shutdown()
        thread.join()


def test_a_conversation_with_tools_goes_through_the_template(server: Running, run: Run) -> None:
    async def main() -> None:
        messages: tuple[dict[str, object], ...] = ({"role": "user", "content": "Hi"},)
        async with connect(server.url, key="secret") as client:
            stream = await client.submit(triode.Conversation(messages), SHORT)
            same = await client.submit(list(messages), SHORT)
            assert (await stream.result()).completion.text == (await same.result()).completion.text

    run(main)


def test_a_server_that_does_not_come_back_is_given_up(server: Running, proxy: Proxy, run: Run) -> None:
    async def main() -> None:
        async with connect(proxy.url, key="secret", resume_grace_s=0.3) as client:
            stream = await client.submit("Once", ENDLESS)
            await anext(stream)
            proxy.is_down = True
            proxy.cut()
            with pytest.raises(ServerUnreachable, match="no new one could be opened"):
                await stream.result()
        await anyio.to_thread.run_sync(server.wait_until_idle)

    run(main)


def test_a_stream_that_is_not_read_holds_no_other_one_up(server: Running, run: Run) -> None:
    async def main() -> None:
        async with connect(server.url, key="secret") as client:
            unread = await client.submit("Once", LONG)
            expected = (await (await client.submit("Once", LONG)).result()).completion.text
            assert (await unread.result()).completion.text == expected

    run(main)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000", "ws://localhost:8000/v1/stream"),
        ("https://a.example/llm/", "wss://a.example/llm/v1/stream"),
        ("http://localhost:8000/v1", "ws://localhost:8000/v1/stream"),
        ("ws://localhost:8000/v1/stream", "ws://localhost:8000/v1/stream"),
    ],
)
def test_addresses_are_found_from_what_other_clients_take(url: str, expected: str) -> None:
    assert socket_url(url) == expected


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="url must be as http://host:port, got 'localhost:8000'"):
        socket_url("localhost:8000")


def test_a_missing_extra_is_named() -> None:
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "websockets" else find_spec(name, *rest)
import triode.engine.client
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MissingExtra: the client needs websockets: pip install 'triode[client]'" in done.stderr


def test_the_client_imports_no_torch() -> None:
    code = "import sys, triode.engine.client; print({'torch', 'triton', 'starlette', 'uvicorn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
