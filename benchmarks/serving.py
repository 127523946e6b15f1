"""What serving costs: streamed tokens a second through `create_app` and uvicorn, around a model that costs nothing.

    python benchmarks/serving.py [--connections 64] [--tokens 500] [--runs 3]

The engine is the real one around the null runner of `null_model.py`; the client is another process, which reads the sockets
and looks for nothing but the ends of the streams. Every token is detokenized, and crosses from the engine's thread to the
server's loop and from there, as JSON in a server-sent event, over a socket of its connection. Tokens that a busy loop finds
together share an event. The lag is how much later than asked a task of the server's loop wakes up. After that, how long it
takes from a client's leaving in the middle of its stream, by FIN or RST, until the engine has no request of it.
"""

import argparse
import asyncio
import json
import multiprocessing
import selectors
import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import uvloop
from null_model import TEXT, NullRunner, build_parts
from rich.console import Console
from rich.table import Table

import triode
from triode.actors.executor.thread import ThreadExecutor
from triode.engine import host
from triode.engine.aio import Engine
from triode.engine.cli.opening import settle
from triode.engine.config import EngineConfig
from triode.engine.parts import EngineParts
from triode.engine.server.config import ServerConfig
from triode.engine.server.running import Server, run_server
from triode.engine.server.starting import take_port
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.progress import Progress

LAG_PERIOD_S = 0.002
NUM_LEAVING = 100


def request_for(tokens: int) -> bytes:
    """A streamed completion, as it goes over the socket."""
    body = json.dumps({"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_streams(port: int, connections: int, tokens: int) -> tuple[float, int]:
    """Seconds until every stream has ended, and how many events came. Runs in a process of its own."""
    selector = selectors.DefaultSelector()
    began_at_s = time.perf_counter()
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request_for(tokens))
        selector.register(connection, selectors.EVENT_READ)
    num_events = 0
    while selector.get_map():
        for key, _ in selector.select():
            assert isinstance(key.fileobj, socket.socket)
            if data := key.fileobj.recv(2**16):
                num_events += data.count(b"data: ")
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    return time.perf_counter() - began_at_s, num_events


async def watch_lag(lags_s: list[float]) -> None:
    """How late the loop is, each period."""
    while True:
        asked_at_s = time.perf_counter() + LAG_PERIOD_S
        await asyncio.sleep(LAG_PERIOD_S)
        lags_s.append(time.perf_counter() - asked_at_s)


async def measure(connections: int, tokens: int, runs: int) -> list[Table]:
    """Serve, and have a client read; the first run warms up."""
    tokenizer = open_checkpoint(ModelOptions(model="random:tiny")).tokenizer
    text_ids = tokenizer.encode(TEXT, add_special_tokens=False)

    async def load_null(config: EngineConfig, _: Progress | None) -> EngineParts:
        return build_parts(
            ThreadExecutor(NullRunner(connections, text_ids)),
            tokenizer,
            config,
            max(2 + connections * (tokens // 16 + 3), 4000),
        )

    settings: dict[str, Any] = {"max_running": connections, "max_step_tokens": connections + 512, "executor": "thread"}
    with (
        patch.object(host, "load", load_null),
        take_port(ServerConfig(port=0)) as bound,
        multiprocessing.get_context("spawn").Pool(1) as clients,
    ):
        async with triode.aio.open_engine("null", **settings) as engine:
            # As `triode serve` does.
            settle()
            server = Server(engine, ServerConfig(log_requests=False), lambda _: None)
            serving = asyncio.create_task(run_server(server, bound))
            port = bound.getsockname()[1]
            read = partial(clients.apply, read_streams, (port, connections, tokens))
            rows = [await measure_run(read, connections * tokens) for _ in range(runs + 1)][1:]
            leaving = await measure_leaving(engine, port)
            server.should_exit = True
            await serving
    table = Table("tokens/s", "tokens an event", "CPU us a token", "lag p50, ms", "lag p99, ms")
    table.add_row(*(f"{median(column):.1f}" for column in zip(*rows, strict=True)))
    return [table, leaving]


async def measure_leaving(engine: Engine, port: int) -> Table:
    """What a client's leaving takes to end its request, while nobody else is served."""
    table = Table("left by", "p50, ms", "p99, ms", "longest, ms")
    for name, linger in (("FIN", None), ("RST", struct.pack("ii", 1, 0))):
        took_ms = [1e3 * await asyncio.to_thread(leave, engine, port, linger) for _ in range(NUM_LEAVING)]
        percentiles = quantiles(took_ms, n=100)
        table.add_row(name, *(f"{value:.1f}" for value in (percentiles[49], percentiles[98], max(took_ms))))
    return table


def leave(engine: Engine, port: int, linger: bytes | None) -> float:
    """Seconds from closing a stream's connection until the engine has nothing unfinished."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request_for(50_000))
        connection.recv(2**16)
        if linger is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    left_at_s = time.perf_counter()
    while engine.statistics().num_unfinished:
        time.sleep(0.0002)
    return time.perf_counter() - left_at_s


async def measure_run(read: Callable[[], tuple[float, int]], num_tokens: int) -> tuple[float, ...]:
    """One row of figures."""
    lags_s: list[float] = []
    lag = asyncio.create_task(watch_lag(lags_s))
    cpu_s = time.process_time()
    took_s, num_events = await asyncio.to_thread(read)
    cpu_s = time.process_time() - cpu_s
    lag.cancel()
    percentiles_s = quantiles(lags_s, n=100)
    return (
        num_tokens / took_s,
        num_tokens / num_events,
        cpu_s / num_tokens * 1e6,
        percentiles_s[49] * 1e3,
        percentiles_s[98] * 1e3,
    )


def main() -> None:
    """Print one row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for table in uvloop.run(measure(arguments.connections, arguments.tokens, arguments.runs)):
        Console().print(table)


if __name__ == "__main__":
    main()
