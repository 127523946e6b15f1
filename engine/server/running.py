"""From settings to a server that listens, and from a signal to one that has ended.

The port is taken before the model is loaded, so that a port in use is known at once, but nothing listens on it until
the model has answered its first request. The first SIGTERM or Ctrl-C drains: no new connections or requests, the
unfinished ones go on until the deadline. The second one ends the process where it stands.
"""

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import uvicorn

from triode.engine.aio import Engine
from triode.engine.parts import Report
from triode.engine.server import create_app
from triode.engine.server.config import ServerConfig
from triode.engine.server.gate import Gate
from triode.errors import TriodeError
from triode.ids import TokenId
from triode.models.sampling import SamplingParams

CLOSE_S = 2
"""Connections that are still open so long after the drain, stuck readers for instance, are cut."""
KEEP_ALIVE_S = 65
"""Longer than clients and proxies keep idle connections, so that none sends into one that is just being closed."""


def take_port(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address.

    Raises:
        TriodeError: if it is in use, or not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as on_failure:
            bound = on_failure.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            on_failure.pop_all()
    except OSError as error:
        reason = error.strerror or str(error)
        raise TriodeError(f"cannot listen at {config.host} port {config.port}: {reason}") from error
    return bound


def check_tls(config: ServerConfig) -> None:
    """Read the certificate and its key, so that wrong ones are known before the model is loaded.

    Raises:
        ValueError: if they cannot be read, or do not belong together.
    """
    if config.tls_certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_certificate, config.tls_key)
    except OSError as error:  # which an SSLError is, too
        raise ValueError(
            f"tls_certificate and tls_key must be PEM files that belong together, got {config.tls_certificate} and "
            f"{config.tls_key}: {error.strerror}"
        ) from None


async def warm_up(engine: Engine) -> None:
    """One short request through every part of the engine."""
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)
    async with engine.submit([TokenId(0)] * 8, params) as stream:
        await stream.result()


async def run_server(server: "Server", bound: socket.socket) -> None:
    """Serve until a signal, or until the engine fails.

    Raises:
        EngineFault: if the engine failed.
    """
    await warm_up(server.engine)
    watch = asyncio.create_task(_exit_with(server.engine, server))
    try:
        await server.serve([bound])
    finally:
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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        assert sockets is not None, "the port was taken before the model was loaded"
        self._report(_start_up_report(self.engine.report, self._settings, sockets[0]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second ends."""
        if self.should_exit:
            sys.stderr.write("triode: ended by a second signal\n")
            os._exit(128 + sig)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close every connection."""
        for server in self.servers:
            server.close()
        await self._gate.drain(self._settings.drain_s)
        await super().shutdown(sockets)


def _start_up_report(report: Report, config: ServerConfig, bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    scheme = "http" if config.tls_certificate is None else "https"
    keys = f"{len(config.api_keys)} API keys" if config.api_keys else "no API key is asked for"
    name = config.served_name or report.model
    return f'{report}\nserving "{name}" at {scheme}://{f"[{host}]" if ":" in host else host}:{port} ({keys})'
