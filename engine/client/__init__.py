"""A client of a served engine, for Trio and asyncio, in the shape of the engine itself.

    async with connect("http://localhost:8000", key="secret") as client:
        async with client.submit("Why is the sky blue?") as stream:
            async for delta in stream:
                print(delta.text, end="")

Needs `triode[client]`: anyio and websockets, but neither a model nor its kernels.
"""

from importlib.util import find_spec

from triode.errors import MissingExtra

if _missing := [name for name in ("anyio", "websockets") if find_spec(name) is None]:
    raise MissingExtra(f"the client needs {', '.join(_missing)}: pip install 'triode[client]'")

from triode.engine.client.client import Client, connect
from triode.engine.client.stream import ClientStream

__all__ = ["Client", "ClientStream", "connect"]
