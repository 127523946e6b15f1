"""What comes before and after serving, whichever server runs the app.

The port is taken before the model is loaded, so that a port in use is known at once, but nothing listens on it until
the model has answered its first request.
"""

import os
import socket
import ssl
import sys
from contextlib import ExitStack
from typing import NoReturn

from triode.engine.parts import Report
from triode.engine.server.config import ServerConfig
from triode.engine.server.served import ServedEngine
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


async def warm_up(engine: ServedEngine) -> None:
    """One short request through every part of the engine."""
    params = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0)
    async with engine.submit([TokenId(0)] * 8, params) as stream:
        await stream.result()


def end_at_once(status: int, reason: str) -> NoReturn:
    """End the process where it stands; its worker notices, and ends too."""
    sys.stderr.write(f"triode: {reason}\n")
    sys.stderr.flush()
    os._exit(status)


def start_up_report(report: Report, config: ServerConfig, bound: socket.socket) -> str:
    """What is served, where, to whom; how it runs is in the log since the engine opened."""
    host, port = bound.getsockname()[:2]
    scheme = "http" if config.tls_certificate is None else "https"
    keys = f"{len(config.api_keys)} API keys" if config.api_keys else "no API key is asked for"
    name = config.served_name or report.model
    return f'serving "{name}" at {scheme}://{f"[{host}]" if ":" in host else host}:{port} ({keys})'
