"""LLM: Triode for scripts and notebooks, without an event loop.

with triode.LLM("smollm2-135m") as llm:
    print(llm.generate(["The capital of France is"])[0].completion.text)
    for delta in llm.stream("Once upon a time"):
        print(delta.text, end="")
"""

import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from triode.actors.mailbox import Mailbox
from triode.actors.messages import Delta
from triode.engine.completion import Result
from triode.engine.config import EngineConfig
from triode.engine.host import EngineThread
from triode.engine.parts import Report
from triode.engine.request import Prompt, Request, freeze_prompt
from triode.engine.statistics import EngineStatistics
from triode.engine.stream import RequestStream
from triode.ids import TokenId
from triode.models.progress import Progress
from triode.models.sampling import SamplingParams

T = TypeVar("T")


class BlockingWaker:
    """Wakes threads that block."""

    def notify(self, mailbox: Mailbox) -> None:
        """Called in the engine's thread."""
        if isinstance(woken := mailbox.reader, threading.Event):
            woken.set()

    def flush(self) -> None:
        """Nothing is left to do: a thread is woken at once."""

    async def wait(self, mailbox: Mailbox) -> None:
        """Blocks instead of awaiting, so that a coroutine over it runs to its end in one go."""
        woken = threading.Event()
        mailbox.reader = woken
        # Looked at only now: mail that comes later finds `woken` and sets it.
        if not mailbox.has_news:
            woken.wait()


class LLM:
    """An engine that a thread runs in the background until `close`.

    Args:
        model: as in `triode.open_engine`.
        config: settings; the defaults fit the machine.
        progress: is told about long steps of loading and generating.
        overrides: single settings by name, e.g. `max_running=8`.

    Raises:
        As `triode.open_engine`.
    """

    def __init__(
        self, model: str, config: EngineConfig | None = None, *, progress: Progress | None = None, **overrides: object
    ) -> None:
        self._progress = progress
        self._waker = BlockingWaker()
        self._thread = EngineThread((config or EngineConfig()).override({**overrides, "model": model}), progress)
        try:
            self._thread.start()
            self._hub = self._thread.opened.result()
        except BaseException:
            self._thread.stop()
            raise

    @property
    def report(self) -> Report:
        """What was loaded, and how large it is."""
        return self._hub.parts.report

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Result]:
        """As `triode.Engine.generate`. Ctrl-C cancels the prompts under way and keeps the engine."""
        return _result(*self._thread.call(lambda engine: engine.generate(prompts, params, progress=self._progress)))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """One prompt, delta by delta. Leaving the loop early cancels the request when the iterator is closed."""
        request = Request(prompt=freeze_prompt(prompt), params=params or SamplingParams())
        mailbox = Mailbox(self._hub.new_request_id(), request.params.n, self._waker)
        stream = RequestStream(mailbox, self._hub.cancel_soon, self._hub.cancel_soon)
        self._hub.call_soon(partial(self._hub.submit_from_thread, mailbox, request), otherwise=mailbox.refuse)
        _run(stream.accepted())
        return _iterate(stream)

    def embed(self, prompts: Sequence[Prompt], *, pooling: str = "mean") -> list[tuple[float, ...]]:
        """As `triode.Engine.embed`."""
        return _result(*self._thread.call(lambda engine: engine.embed(prompts, pooling=pooling)))

    def encode(self, prompt: Prompt) -> tuple[TokenId, ...]:
        """As `triode.Engine.encode`."""
        return _result(*self._thread.call(lambda engine: engine.encode(prompt)))

    def statistics(self) -> EngineStatistics:
        """As `triode.Engine.statistics`."""
        return self._thread.do(lambda engine: engine.statistics()).result()

    def close(self) -> None:
        """Cancel what is under way and free the engine's memory. Idempotent.

        Raises:
            EngineFault: if the engine had ended with a fault.
        """
        self._thread.stop()
        self._thread.ended.result()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _iterate(stream: RequestStream) -> Iterator[Delta]:
    try:
        while True:
            try:
                yield _run(stream.__anext__())
            except StopAsyncIteration:
                return
    finally:
        stream.cancel()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that blocks where others await."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("a coroutine over BlockingWaker never suspends")


def _result(future: "Future[T]", begin: Callable[[], None], cancel: Callable[[], None]) -> T:
    try:
        begin()
        return future.result()
    except BaseException:
        cancel()
        raise
