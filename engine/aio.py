"""Triode inside an asyncio program: the surface of `triode.engine.engine`, over an engine in a Trio thread.

async with triode.aio.open_engine("smollm2-135m") as engine:
    stream = await engine.submit("Why is the sky blue?")
    async for delta in stream:
        print(delta.text, end="")
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from triode.actors.mailbox import Mailbox
from triode.actors.messages import RequestStatus
from triode.engine.completion import Result
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine as TrioEngine
from triode.engine.host import EngineThread
from triode.engine.parts import Report
from triode.engine.request import Prompt, Request, build_request, check_request_id
from triode.engine.statistics import EngineStatistics
from triode.engine.stream import RequestStream
from triode.engine.submission import Submission
from triode.ids import TokenId
from triode.models.progress import Progress
from triode.models.sampling import SamplingParams
from triode.models.tokenizer import Tokenizer

T = TypeVar("T")


class AsyncioWaker:
    """Wakes readers in one asyncio loop, all those of a step by a single call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._notified: list[Mailbox] = []

    def notify(self, mailbox: Mailbox) -> None:
        """Called in the engine's thread."""
        self._notified.append(mailbox)

    def flush(self) -> None:
        """Called in the engine's thread: one crossing for the whole step."""
        notified, self._notified = self._notified, []
        try:
            self._loop.call_soon_threadsafe(self._wake, notified)
        except RuntimeError:
            # The loop is closed: nobody is left to read, and collecting the streams cancels their requests.
            return

    async def wait(self, mailbox: Mailbox) -> None:
        """Called in the loop. Mail that comes after this look brings a wake-up that comes after `reader` is set."""
        if mailbox.has_news:
            return
        if mailbox.reader is not None:
            raise RuntimeError("another task is already reading this stream")
        woken: asyncio.Future[None] = self._loop.create_future()
        mailbox.reader = woken
        try:
            await woken
        finally:
            mailbox.reader = None

    @staticmethod
    def _wake(mailboxes: list[Mailbox]) -> None:
        for mailbox in mailboxes:
            if isinstance(woken := mailbox.reader, asyncio.Future) and not woken.done():
                woken.set_result(None)


@asynccontextmanager
async def open_engine(
    model: str, config: EngineConfig | None = None, *, progress: Progress | None = None, **overrides: object
) -> AsyncIterator["Engine"]:
    """As `triode.open_engine`, for asyncio. On a fault the streams raise EngineFault, and so does leaving the block."""
    resolved = (config or EngineConfig()).override({**overrides, "model": model})
    thread = EngineThread(resolved, progress)
    thread.start()
    try:
        await asyncio.wrap_future(thread.opened)
        yield Engine(thread)
    finally:
        thread.stop()
        await _joined(thread)


async def _joined(thread: EngineThread) -> None:
    """Wait for the thread, which ends by a deadline of its own: nothing of it outlives the block.

    A cancellation that comes meanwhile takes effect afterwards.

    Raises:
        EngineFault: if a fault ended the engine.
    """
    ended, cancelled = asyncio.wrap_future(thread.ended), None
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # Looked at, so that asyncio does not report it as forgotten.
        ended.exception()
        raise cancelled
    ended.result()


class Engine:
    """A running engine, as asyncio tasks see it. Made by `triode.aio.open_engine`."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._hub = thread.hub
        self._waker = AsyncioWaker(asyncio.get_running_loop())
        self.cache = CacheControl(self._ask)
        """Pin, unpin and clear cached prefixes."""

    @property
    def report(self) -> Report:
        """What was loaded, and how large it is."""
        return self._hub.parts.report

    @property
    def ended_by(self) -> Exception | None:
        """Why the engine takes no more requests: EngineClosed, or the EngineFault it had; None while it runs."""
        return self._hub.ended_by

    @property
    def is_full(self) -> bool:
        """Whether as many requests are unfinished as the engine takes: `submit` would raise EngineBusy now."""
        return self._hub.is_full

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which may be used from any thread."""
        return self._hub.parts.tokenizer

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        adapter: str | None = None,
        cache_salt: str | None = None,
        deadline_s: float | None = None,
    ) -> Submission[RequestStream]:
        """As `triode.Engine.submit`."""
        request = build_request(
            prompt, params, priority=priority, adapter=adapter, cache_salt=cache_salt, deadline_s=deadline_s
        )
        return Submission(self._open(request, request_id))

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Result]:
        """As `triode.Engine.generate`."""
        return await self._ask(lambda engine: engine.generate(prompts, params, progress=progress))

    async def embed(self, prompts: Sequence[Prompt], *, pooling: str = "mean") -> list[tuple[float, ...]]:
        """As `triode.Engine.embed`."""
        return await self._ask(lambda engine: engine.embed(prompts, pooling=pooling))

    async def encode(self, prompt: Prompt) -> tuple[TokenId, ...]:
        """As `triode.Engine.encode`."""
        return await self._ask(lambda engine: engine.encode(prompt))

    def status(self, request_id: str) -> RequestStatus:
        """As `triode.Engine.status`. Waits for the engine's thread, about a tenth of a millisecond."""
        return self._thread.do(lambda engine: engine.status(request_id)).result()

    def cancel(self, request_id: str) -> None:
        """As `triode.Engine.cancel`."""
        self._thread.do(lambda engine: engine.cancel(request_id))

    def set_priority(self, request_id: str, priority: int) -> None:
        """As `triode.Engine.set_priority`."""
        self._thread.do(lambda engine: engine.set_priority(request_id, priority)).result()

    def statistics(self) -> EngineStatistics:
        """As `triode.Engine.statistics`. Waits for the engine's thread, about a tenth of a millisecond."""
        return self._thread.do(lambda engine: engine.statistics()).result()

    async def ended(self) -> None:
        """Wait until the engine has ended.

        Raises:
            EngineFault: if a fault ended it.
        """
        await asyncio.shield(asyncio.wrap_future(self._thread.ended))

    async def _open(self, request: Request, request_id: str | None) -> RequestStream:
        name = self._hub.new_request_id() if request_id is None else check_request_id(request_id)
        mailbox = Mailbox(name, request.params.n, self._waker)
        self._hub.call_soon(partial(self._hub.submit_from_thread, mailbox, request), otherwise=mailbox.refuse)
        return await RequestStream(mailbox, self._hub.cancel_soon, self._hub.cancel_soon).accepted()

    async def _ask(self, call: Callable[[TrioEngine], Awaitable[T]]) -> T:
        future, begin, cancel = self._thread.call(call)
        begin()
        return await _awaited(future, cancel)


async def _awaited(future: "Future[T]", cancel: Callable[[], None]) -> T:
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        cancel()
        raise


class CacheControl:
    """As `triode.engine.engine.CacheControl`."""

    def __init__(self, ask: Callable[[Callable[[TrioEngine], Awaitable[int]]], Awaitable[int]]) -> None:
        self._ask = ask

    async def pin(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """Keep the cached full blocks of a prompt until `unpin`. Returns how many tokens they hold."""
        return await self._ask(lambda engine: engine.cache.pin(prompt, cache_salt=cache_salt))

    async def unpin(self, prompt: Prompt, *, cache_salt: str | None = None) -> int:
        """Undo one `pin` of the same prompt. Returns how many tokens it held."""
        return await self._ask(lambda engine: engine.cache.unpin(prompt, cache_salt=cache_salt))

    async def clear(self) -> int:
        """Forget what is cached, but for what is pinned or in use. Returns how many tokens that were."""
        return await self._ask(lambda engine: engine.cache.clear())
