"""Ctrl-C as a call in the event loop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


@contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Within the block Ctrl-C calls `act` in the event loop.

    Trio's default would raise KeyboardInterrupt in whichever of the caller's tasks runs or waits first.
    """
    token = trio.lowlevel.current_trio_token()
    previous = signal.signal(signal.SIGINT, lambda *_: token.run_sync_soon(act))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
