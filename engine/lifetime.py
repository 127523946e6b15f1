"""From entering the engine's block to leaving it: who ends whom, and which exception gets out."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from triode.engine.hub import Hub, fresh, without_cancelled
from triode.engine.parts import EngineParts
from triode.errors import EngineFault


@asynccontextmanager
async def run_hub(parts: EngineParts) -> AsyncIterator[Hub]:
    """Run the actors while the block lasts.

    An exception of the block leaves it bare, not wrapped in a group. On a fault every reader has learned it before the
    block is cancelled.

    Raises:
        EngineFault: if an actor failed.
    """
    hub = Hub(parts)
    escaped: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, hub, nursery.cancel_scope, name="triode engine")
        try:
            yield hub
        except BaseException as error:  # raised again below, where no nursery wraps it
            escaped = error
        finally:
            hub.close()
    if hub.fault is not None:
        cause = hub.fault.__cause__
        if isinstance(cause, (KeyboardInterrupt, SystemExit)):
            raise cause
        fault = fresh(hub.fault)
        own = None if escaped is None else without_cancelled(escaped)
        if own is not None and not isinstance(own, EngineFault):
            fault.add_note(f"The engine's block had raised {own!r}")
        raise fault
    if escaped is not None:
        raise escaped


@trio.lowlevel.enable_ki_protection
async def _run(hub: Hub, body: trio.CancelScope) -> None:
    """Run the actors; a fault of theirs ends the caller's block."""
    await hub.run()
    if hub.fault is not None:
        body.cancel()
