"""The asyncio surface under its public name: `import triode.aio`, or `from triode.aio import open_engine`."""

from triode.engine.aio import Engine, open_engine

__all__ = ["Engine", "open_engine"]
