"""Servers for tests: the product's own, on a free port, in a thread of their own."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import trio
import uvloop

import triode
from triode.engine.engine import Engine as TrioEngine
from triode.engine.server.config import ServerConfig
from triode.engine.server.running import Server, run_server
from triode.engine.server.starting import take_port
from triode.engine.server.trio_running import TrioServer
from triode.engine.statistics import EngineStatistics

SERVERS = ("uvicorn", "hypercorn")
"""What may run the app."""

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_running": 16, "max_step_tokens": 64, "kv_cache_bytes": 2**24}
"""The tiny model's whole context of 8,192 tokens fits four times."""

ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 7000, "ignore_eos": True, "stream": True}
"""A completion that no test waits for."""

WIDE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "logprobs": True,
    "top_logprobs": 64,
    "n": 4,
    "max_tokens": 7000,
    "ignore_eos": True,
    "stream": True,
}
"""An endless chat of such large chunks that they soon fill the buffers between server and client."""


class Running:
    """A server that listens."""

    def __init__(self, port: int, engine: Any, stop: Callable[[], object]) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.engine = engine
        """An asyncio engine, which answers any thread; or what passes calls on to a Trio engine."""
        self.stop = stop
        """As a first signal: drain, then end."""
        self.ended = threading.Event()

    def client(self, **options: Any) -> httpx.Client:
        """A client of this server."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """A bare connection, which may take little at a time."""
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, body: dict[str, Any], *, receive_bytes: int | None = None) -> socket.socket:
        """A completion request on a connection of its own, as bytes."""
        connection = self.connect(receive_bytes=receive_bytes)
        content = json.dumps(body).encode()
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        return connection

    def wait_until_running(self, number: int, timeout_s: float = 60) -> None:
        """Until so many sequences are in the batch."""
        deadline_s = time.perf_counter() + timeout_s
        while self.engine.statistics().scheduler.num_running < number:
            if time.perf_counter() > deadline_s:
                raise TimeoutError(f"there are never {number} sequences in the batch")
            time.sleep(0.002)

    def wait_until_idle(self, timeout_s: float = 60) -> float:
        """Seconds until the engine has no unfinished request and uses no block."""
        began_at_s = time.perf_counter()
        while (waited_s := time.perf_counter() - began_at_s) < timeout_s:
            statistics = self.engine.statistics()
            if statistics.num_unfinished == 0 and statistics.cache.num_used_blocks == 0:
                return waited_s
            time.sleep(0.002)
        raise TimeoutError(f"{statistics.num_unfinished} requests are left")


class _FromThread:
    """What tests ask an engine of another thread's Trio loop."""

    def __init__(self, engine: TrioEngine, token: trio.lowlevel.TrioToken) -> None:
        self._engine = engine
        self._token = token

    def statistics(self) -> EngineStatistics:
        return trio.from_thread.run_sync(self._engine.statistics, trio_token=self._token)


@contextmanager
def running(model: str = "random:tiny", overrides: dict[str, Any] | None = None, **config: Any) -> Iterator[Running]:
    """A server with an engine of its own."""
    server_config = ServerConfig(port=0, **config)
    started: list[Running] = []
    is_started = threading.Event()
    failures: list[BaseException] = []

    settings = SETTINGS | (overrides or {})

    async def serve_on_asyncio() -> None:
        with take_port(server_config) as bound:
            async with triode.aio.open_engine(model, **settings) as engine:
                server = Server(engine, server_config, lambda _: is_started.set())
                started.append(Running(bound.getsockname()[1], engine, lambda: setattr(server, "should_exit", True)))
                await run_server(server, bound)

    async def serve_on_trio() -> None:
        with take_port(server_config) as bound:
            async with triode.open_engine(model, **settings) as engine:
                trio_server = TrioServer(engine, server_config, lambda _: is_started.set())
                token = trio.lowlevel.current_trio_token()
                started.append(
                    Running(
                        bound.getsockname()[1],
                        _FromThread(engine, token),
                        lambda: token.run_sync_soon(trio_server.stop),
                    )
                )
                await trio_server.run(bound)

    def run() -> None:
        try:
            if server_config.server == "uvicorn":
                uvloop.run(serve_on_asyncio())
            else:
                trio.run(serve_on_trio)
        except BaseException as error:
            failures.append(error)
        finally:
            is_started.set()
            for server in started:
                server.ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    is_started.wait(120)
    try:
        if failures:
            raise failures[0]
        yield started[0]
    finally:
        if started and not started[0].ended.is_set():
            started[0].stop()
        thread.join(60)
    if failures:
        raise failures[0]
