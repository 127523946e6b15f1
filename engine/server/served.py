"""What an app may serve."""

from typing import TypeAlias

from triode.engine import aio, engine

ServedEngine: TypeAlias = aio.Engine | engine.Engine
"""An engine of asyncio or of Trio. The app runs on either, and waits for both in the same way."""
