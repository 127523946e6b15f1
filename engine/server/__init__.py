"""Triode over HTTP and WebSocket: one ASGI app in OpenAI's shape.

    async with triode.aio.open_engine("smollm2-135m") as engine:
        app.mount("/llm", create_app(engine))

Needs `triode[serve]`. Nothing of it is imported before `create_app` is called.
"""

from typing import TYPE_CHECKING

from triode.engine.server.config import ServerConfig
from triode.engine.server.extra import require_extra

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from triode.engine.server.served import ServedEngine


def create_app(engine: "ServedEngine", config: ServerConfig | None = None) -> "Starlette":
    """An ASGI app that serves a running engine; run it in the engine's loop, asyncio or Trio, alone or mounted into
    another app.

    Raises:
        MissingExtra: if `triode[serve]` is not installed.
    """
    require_extra()
    from triode.engine.server.app import build_app
    from triode.engine.server.service import Service

    return build_app(Service(engine, config or ServerConfig()))


__all__ = ["ServerConfig", "create_app"]
