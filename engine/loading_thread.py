"""A thread for loading that ends with it.

Trio keeps its worker threads for ten seconds, and GCC's OpenMP keeps the threads that torch has used in one for as long as
that lives. While there are more of them than cores, they sleep after every operation instead of looking for the next one:
for an engine's first seconds, steps that torch computes took a fifth longer.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import trio

from triode.models.progress import Progress

T = TypeVar("T")


async def load_in_a_thread(load: Callable[[Progress], T], progress: Progress) -> T:
    """Run `load` with a progress that ends it, between two tensors, once the caller is cancelled.

    What is loaded all the same is returned: the caller has to close it, and learns at its next checkpoint.
    """
    token, has_ended = trio.lowlevel.current_trio_token(), trio.Event()
    give_up = threading.Event()
    loaded: Future[T] = Future()

    def run() -> None:
        try:
            loaded.set_result(load(_Interruptible(progress, give_up)))
        except BaseException as error:  # for the caller, whatever it is
            loaded.set_exception(error)
        token.run_sync_soon(has_ended.set)

    thread = threading.Thread(target=run, name="triode-loading", daemon=True)
    thread.start()
    try:
        await has_ended.wait()
    except BaseException as interruption:
        give_up.set()
        with trio.CancelScope(shield=True):
            await has_ended.wait()
        if loaded.exception() is not None or not isinstance(interruption, trio.Cancelled):
            raise
    thread.join()
    return loaded.result()


class _GivenUpError(BaseException):
    """Nobody waits for what is being loaded."""


class _Interruptible:
    """Passes progress on until loading is given up."""

    def __init__(self, progress: Progress, give_up: threading.Event) -> None:
        self._progress = progress
        self._give_up = give_up

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self._check()
        self._progress.stage(name, total, unit)

    def advance(self, amount: int) -> None:
        self._check()
        self._progress.advance(amount)

    def done(self) -> None:
        self._progress.done()

    def _check(self) -> None:
        if self._give_up.is_set():
            raise _GivenUpError
