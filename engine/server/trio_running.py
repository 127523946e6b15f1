"""The app under Hypercorn's trio worker: engine and server in one Trio loop.

A signal means the same as under uvicorn. Two things are Hypercorn's own (0.18): connections that are idle are closed
when the drain begins, and a write to a client that reads nothing cannot be cancelled. Such a client's requests are
cancelled by the write timeout all the same, and at the end of a drain the process ends without waiting for it.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

from triode.engine.engine import Engine
from triode.engine.server import create_app
from triode.engine.server.config import ServerConfig
from triode.engine.server.gate import Gate
from triode.engine.server.metrics import Metrics
from triode.engine.server.starting import CLOSE_S, end_at_once, start_up_report, warm_up

CUT_S = 0.5
"""Of the time to close: what connections get to end in after they were cancelled."""


class TrioServer:
    """Serves until `stop`, or until the engine fails, which cancels its block."""

    def __init__(
        self,
        engine: Engine,
        config: ServerConfig,
        report: Callable[[str], None],
        at_worst: Callable[[], object] = lambda: None,
    ) -> None:
        """`report` is told where requests are taken; `at_worst` is called when connections cannot even be cut."""
        self.engine = engine
        self._config = config
        self._report = report
        self._at_worst = at_worst
        self._app = create_app(engine, config)
        self._gate: Gate = self._app.state.gate
        self._metrics: Metrics = self._app.state.metrics
        self._stopping = trio.Event()

    def stop(self) -> None:
        """Drain, then end. From the server's own loop."""
        self._stopping.set()

    async def run(self, bound: socket.socket) -> None:
        """Serve at a socket."""
        await warm_up(self.engine)
        served = trio.Event()
        async with trio.open_nursery() as nursery:

            async def run_hypercorn(task_status: trio.TaskStatus[list[str]]) -> None:
                settings = hypercorn_config(self._config, bound)
                try:
                    await serve(
                        self._app,  # type: ignore[arg-type]  # it has ASGI types of its own
                        settings,
                        shutdown_trigger=self._stopping.wait,
                        task_status=task_status,
                        mode="asgi",
                    )
                finally:
                    served.set()

            nursery.start_soon(self._metrics.watch_lag)
            await nursery.start(run_hypercorn)
            self._report(start_up_report(self.engine.report, self._config, bound))
            await self._stopping.wait()
            await self._gate.drain(self._config.drain_s)
            with trio.move_on_after(CLOSE_S - CUT_S):
                await served.wait()
            nursery.cancel_scope.cancel()
            with trio.move_on_after(CUT_S, shield=True):
                await served.wait()
            if not served.is_set():
                self._at_worst()

    async def stop_by_signals(self) -> None:
        """The first signal drains, the second ends."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._stopping.is_set():
                    end_at_once(128 + number, "ended by a second signal")
                self.stop()


async def run_until_signal(
    engine: Engine, config: ServerConfig, bound: socket.socket, report: Callable[[str], None]
) -> None:
    """Serve until a signal."""
    server = TrioServer(engine, config, report, lambda: end_at_once(0, "ended with connections that could not be cut"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.stop_by_signals)
        await server.run(bound)
        nursery.cancel_scope.cancel()


def hypercorn_config(config: ServerConfig, bound: socket.socket) -> Config:
    """Our settings as Hypercorn knows them."""
    settings = Config()
    # Hypercorn closes what it is given.
    settings.bind = [f"fd://{os.dup(bound.fileno())}"]
    settings.certfile, settings.keyfile = config.tls_certificate, config.tls_key
    settings.alpn_protocols = ["http/1.1"]
    settings.errorlog = logging.getLogger("hypercorn")
    settings.loglevel = "WARNING"
    settings.include_server_header = False
    # It has one timeout for a connection without a request, whether headers are on their way or not.
    settings.keep_alive_timeout = config.header_timeout_s
    settings.websocket_max_message_size = config.max_body_bytes
    settings.websocket_ping_interval = 20
    # `TrioServer.run` has deadlines of its own.
    settings.graceful_timeout = config.drain_s + 2 * CLOSE_S
    return settings
