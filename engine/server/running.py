"""The app under uvicorn, on asyncio: from a warm engine to a server that listens, and from a signal to its end.

The first SIGTERM or Ctrl-C drains: no new connections or requests, the unfinished ones go on until the deadline. The
second one ends the process where it stands.
"""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from triode.engine.aio import Engine
from triode.engine.server import create_app
from triode.engine.server.config import ServerConfig
from triode.engine.server.gate import Gate
from triode.engine.server.http_protocol import punctual_http
from triode.engine.server.metrics import Metrics
from triode.engine.server.starting import CLOSE_S, KEEP_ALIVE_S, end_at_once, start_up_report, warm_up


async def run_server(server: "Server", bound: socket.socket) -> None:
    """Serve until a signal, or until the engine fails.

    Raises:
        EngineFault: if the engine failed.
    """
    await warm_up(server.engine)
    watches = [
        asyncio.create_task(_exit_with(server.engine, server)),
        asyncio.create_task(server.metrics.watch_lag()),
    ]
    try:
        await server.serve([bound])
    finally:
        for watch in watches:
            watch.cancel()


async def _exit_with(engine: Engine, server: "Server") -> None:
    """An engine that has failed answers nobody: end, so that whoever watches over the process starts another."""
    try:
        await engine.ended()
    except Exception:  # leaving the engine's block raises it
        server.should_exit = True


class Server(uvicorn.Server):
    """uvicorn, which by itself closes WebSockets at once and waits for streams without end."""

    def __init__(self, engine: Engine, config: ServerConfig, report: Callable[[str], None]) -> None:
        """`report` is told where requests are taken, once they are."""
        app = create_app(engine, config)
        super().__init__(
            uvicorn.Config(
                app,
                http=punctual_http(config.header_timeout_s),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="websockets-sansio",
                ws_max_size=config.max_body_bytes,
                ws_per_message_deflate=False,
                ssl_certfile=config.tls_certificate,
                ssl_keyfile=config.tls_key,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self.engine = engine
        self._settings = config
        self._report = report
        self._gate: Gate = app.state.gate
        self.metrics: Metrics = app.state.metrics

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        assert sockets is not None, "the port was taken before the model was loaded"
        self._report(start_up_report(self.engine.report, self._settings, sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        if self.should_exit:
            end_at_once(128 + sig, "ended by a second signal")
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close every connection."""
        for server in self.servers:
            server.close()
        await self._gate.drain(self._settings.drain_s)
        await super().shutdown(sockets)
