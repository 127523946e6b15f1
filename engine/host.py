"""An engine in a Trio thread of its own, for callers in other worlds: asyncio loops and blocking code.

A call crosses into the thread by one `run_sync_soon`, and its answer comes back through a future or a mailbox. Whatever
one step brings to the streams of one asyncio loop crosses back in a single `call_soon_threadsafe`.
"""

import atexit
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

import trio

from triode.engine.config import EngineConfig
from triode.engine.engine import Engine
from triode.engine.hub import Hub, fresh
from triode.engine.lifetime import run_hub
from triode.engine.loading import load
from triode.errors import EngineClosed
from triode.models.progress import Progress

T = TypeVar("T")


class EngineThread:
    """Opens an engine in a new thread and keeps it open until `stop`."""

    def __init__(self, config: EngineConfig, progress: Progress | None) -> None:
        self.opened: Future[Hub] = _promise()
        """Done when the engine is open, or could not be opened."""
        self.ended: Future[None] = _promise()
        """Done when the thread has left the engine; holds the engine's fault, if it had one."""
        self._config = config
        self._progress = progress
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="triode-engine", daemon=True)

    def start(self) -> None:
        """Begin to open the engine; wait for `opened`."""
        # At exit the interpreter freezes daemon threads wherever they are, and what they had locked stays locked.
        atexit.register(self._close)
        self._thread.start()

    def stop(self) -> None:
        """Begin to close the engine; wait for `ended`. Idempotent, from any thread."""
        # In this order, so that a thread which has no loop yet finds the flag when it has one.
        self._is_stopping = True
        if self._token is not None:
            self._post(self._scope.cancel)

    def _close(self) -> None:
        self.stop()
        self._thread.join()

    @property
    def hub(self) -> Hub:
        """The open engine's hub; other threads reach it through `Hub.call_soon`."""
        return self.opened.result(timeout=0)

    def call(
        self, call: Callable[[Engine], Awaitable[T]]
    ) -> "tuple[Future[T], Callable[[], None], Callable[[], None]]":
        """What the engine's loop is to await: its future, a function that has it begin, and one that cancels it.

        Whoever may be interrupted is ready to cancel before it begins.
        """
        future: Future[T] = _promise()
        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    future.set_result(await call(Engine(self.hub)))
            except Exception as error:
                future.set_exception(error)
            finally:
                if not future.done():
                    future.set_exception(self.hub.ended())

        def start() -> None:
            if self._nursery is None:
                future.set_exception(self.hub.ended())
            else:
                self._nursery.start_soon(run)

        return future, lambda: self._post(start, otherwise=start), lambda: self._post(scope.cancel)

    def do(self, call: Callable[[Engine], T]) -> "Future[T]":
        """Have a synchronous call made in the engine's thread, or here once that has ended."""
        future: Future[T] = _promise()

        def run() -> None:
            try:
                future.set_result(call(Engine(self.hub)))
            except Exception as error:
                future.set_exception(error)

        self._post(run, otherwise=run)
        return future

    def _post(self, call: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        try:
            assert self._token is not None, "the engine is open"
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            if otherwise is not None:
                otherwise()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            if not self.opened.done():
                self.opened.set_exception(error)
            self.ended.set_exception(error)
        else:
            if not self.opened.done():
                self.opened.set_exception(EngineClosed("opening was cancelled"))
            self.ended.set_result(None)
        finally:
            atexit.unregister(self._close)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._is_stopping:
            self._scope.cancel()
        opened: Hub | None = None
        with self._scope:
            parts = await load(self._config, self._progress)
            async with run_hub(parts) as hub, trio.open_nursery() as self._nursery:
                opened = hub
                self.opened.set_result(hub)
                try:
                    await trio.sleep_forever()
                finally:
                    self._nursery = None
        # `stop` may come while a fault is on its way out, and cancelling would swallow it.
        if opened is not None and opened.fault is not None:
            raise fresh(opened.fault)


def _promise() -> "Future[T]":
    """A future that those who wait for it cannot cancel: its maker may keep the promise at any moment."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future
