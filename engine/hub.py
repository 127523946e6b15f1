"""The engine's middle: five inboxes, the mailboxes, and what a caller may ask of them.

Everything here happens in the engine's Trio thread, and every method but `run` is synchronous: submitting puts a message
into an inbox, cancelling puts another, and reading goes through a mailbox. Streams of other threads (asyncio, blocking)
reach these methods with one `run_sync_soon` each.
"""

import itertools
import secrets
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import trio

from triode.actors.cache.actor import run_cache
from triode.actors.channels import Inbox
from triode.actors.detokenizer.actor import run_detokenizer
from triode.actors.detokenizer.batch import Detokenizer
from triode.actors.detokenizer.incremental import DecoderFactory
from triode.actors.executor.actor import run_executor
from triode.actors.mailbox import Mailbox, MailboxRegistry
from triode.actors.messages import (
    CacheInbox,
    Cancel,
    Clear,
    DetokenizerInbox,
    ExecutorInbox,
    Pin,
    Pinned,
    RequestStatus,
    SchedulerInbox,
    SetPriority,
    Submit,
    TokenizerInbox,
    Unpin,
)
from triode.actors.scheduler.actor import run_scheduler
from triode.actors.scheduler.policy import Scheduler
from triode.actors.tokenizer.actor import run_tokenizer
from triode.actors.tokenizer.prepare import prepare
from triode.engine.parts import EngineParts
from triode.engine.request import Request, check_priority
from triode.engine.statistics import ActorStatistics, EngineStatistics
from triode.errors import EngineBusy, EngineClosed, EngineFault
from triode.ids import RequestId


class Hub:
    """Joins the parts of one engine. `run` must be running for anything to happen."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.mailboxes = MailboxRegistry()
        self.fault: EngineFault | None = None
        self._is_closed = False
        self._token = trio.lowlevel.current_trio_token()
        # Held, because `statistics` may be asked for when no loop runs any more.
        self._clock = trio.lowlevel.current_clock()
        self._scope = trio.CancelScope()
        self._scheduler = Scheduler(parts.config.scheduler, max_in_flight=parts.executor.max_in_flight)
        self._detokenizer = Detokenizer(DecoderFactory(parts.tokenizer.backend))
        self._to_tokenizer: Inbox[TokenizerInbox] = Inbox()
        self._to_scheduler: Inbox[SchedulerInbox] = Inbox()
        self._to_cache: Inbox[CacheInbox] = Inbox()
        self._to_executor: Inbox[ExecutorInbox | BaseException] = Inbox()
        self._to_detokenizer: Inbox[DetokenizerInbox] = Inbox()
        self._answers: dict[RequestId, Callable[[int | Exception], None]] = {}
        self.num_released_guides = 0
        """How often the guide of an ended request was let go of."""
        self._waiting_for_guide = trio.lowlevel.ParkingLot()
        self._ids = itertools.count()
        self._num_submitted = 0
        self._is_woken = False
        self._max_queued = parts.config.scheduler.max_queued

    # What a caller may ask

    def new_request_id(self) -> RequestId:
        """An id that this engine has not made before. May be called from any thread."""
        return RequestId(f"request-{next(self._ids)}")

    @trio.lowlevel.enable_ki_protection
    def wake(self) -> None:
        """A request is on its way. If nobody waits for a step the executor sleeps: let it get ready while the prompt is read
        and the step is planned, once for all requests until one has been submitted."""
        if not self._is_woken and not len(self.mailboxes) and self.ended_by is None:
            self._is_woken = True
            self.parts.executor.wake()

    @trio.lowlevel.enable_ki_protection
    def submit(self, mailbox: Mailbox, request: Request) -> None:
        """Send a request on its way; everything else about it arrives in the mailbox.

        Raises:
            EngineBusy: if as many requests as the engine takes are unfinished.
            EngineClosed: if the engine has ended.
            ValueError: if an unfinished request has the same id.
        """
        self._check_open()
        if self.is_full:
            raise EngineBusy(f"unfinished requests must be <= max_queued = {self._max_queued}; try again later")
        self.wake()
        self.mailboxes.add(mailbox)
        self._is_woken = False
        mailbox.arrival = self._num_submitted
        self._num_submitted += 1
        seed = request.params.seed
        deadline_s = request.deadline_s
        self._to_tokenizer.put(
            Submit(
                request_id=mailbox.request_id,
                arrival=mailbox.arrival,
                prompt=request.prompt,
                params=request.params,
                seed=secrets.randbits(64) if seed is None else seed,
                priority=request.priority,
                cache_salt=request.cache_salt,
                deadline_at_s=None if deadline_s is None else trio.current_time() + deadline_s,
                pooling=request.pooling,
            )
        )

    @property
    def is_full(self) -> bool:
        """Whether as many requests as the engine takes are unfinished."""
        return len(self.mailboxes) >= self._max_queued

    async def wait_for_place(self) -> None:
        """Return when `submit` finds a place in the queue, or the engine has ended; in the order of calling.

        No checkpoint lies between the look and the return: who submits at once does find it.
        """
        await self.mailboxes.wait_for_fewer(self._max_queued)

    async def wait_for_guide(self, num_released: int) -> None:
        """Return when more guides than `num_released` have been let go of, or the engine has ended."""
        while self.num_released_guides == num_released and self.ended_by is None:
            await self._waiting_for_guide.park()

    def submit_from_thread(self, mailbox: Mailbox, request: Request) -> None:
        """The same for a mailbox whose reader lives in another thread: errors arrive in the mailbox, too."""
        try:
            self.submit(mailbox, request)
        except (EngineBusy, EngineClosed, EngineFault, ValueError) as error:
            mailbox.refuse(error)

    @trio.lowlevel.enable_ki_protection
    def cancel(self, mailbox: Mailbox) -> None:
        """End a request. Idempotent; neither waits nor raises, before, during and after the engine's life."""
        if not self._is_closed and not mailbox.status.is_final and mailbox.arrival >= 0:
            cancel = Cancel(mailbox.request_id, mailbox.arrival)
            self._to_scheduler.put(cancel)
            if mailbox.status is RequestStatus.QUEUED:
                self._to_tokenizer.put(cancel)

    def cancel_soon(self, mailbox: Mailbox) -> None:
        """`cancel` from any thread, or from within a garbage collection."""
        self.call_soon(partial(self.cancel, mailbox))

    def call_soon(self, call: Callable[[], None], otherwise: Callable[[Exception], None] | None = None) -> None:
        """Have something done in the engine's thread; if that has ended, `otherwise` is told here and now."""
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            if otherwise is not None:
                otherwise(self.ended())

    @property
    def ended_by(self) -> Exception | None:
        """Why the engine takes no more requests; None while it does."""
        return self.ended() if self._is_closed or self.fault is not None else None

    def ended(self) -> Exception:
        """Why the engine takes no more calls."""
        if self.fault is not None:
            return fresh(self.fault)
        return EngineClosed("the engine has been closed; open another")

    def set_priority(self, request_id: RequestId, priority: int) -> None:
        """Move a request in the order of service. Lower goes first.

        Raises:
            KeyError: if no unfinished request has this id.
            ValueError: if the priority is no integer.
        """
        self._check_open()
        check_priority(priority)
        if (mailbox := self.mailboxes.get(request_id)) is None:
            raise KeyError(f"no unfinished request has the id {request_id!r}")
        self._to_scheduler.put(SetPriority(request_id, mailbox.arrival, priority))

    def ask_cache(
        self, question: Callable[[RequestId], Pin | Unpin | Clear], answer: Callable[[int | Exception], None]
    ) -> None:
        """Send a control message to the cache. `answer` gets the number of tokens concerned, or why there is none."""
        self._check_open()
        request_id = self.new_request_id()
        self._answers[request_id] = answer
        self._to_cache.put(question(request_id))

    def status(self, request_id: RequestId) -> RequestStatus:
        """Where a request is.

        Raises:
            KeyError: if the id is unknown, or ended so long ago that it has been forgotten.
        """
        return self.mailboxes.status(request_id)

    def statistics(self) -> EngineStatistics:
        """The load at this moment."""
        return EngineStatistics(
            num_unfinished=len(self.mailboxes),
            num_submitted=self._num_submitted,
            actors=ActorStatistics(
                tokenizer=self._to_tokenizer.statistics(),
                scheduler=self._to_scheduler.statistics(),
                cache=self._to_cache.statistics(),
                executor=self._to_executor.statistics(),
                detokenizer=self._to_detokenizer.statistics(),
            ),
            scheduler=self._scheduler.statistics(),
            cache=self.parts.cache.statistics(self._clock.current_time()),
            runner=self.parts.executor.statistics(),
        )

    # The engine's life

    async def run(self) -> None:
        """Run the five actors until `close`, or until one of them fails; then `fault` tells why."""
        parts = self.parts
        parts.executor.start(self._to_scheduler.put, self._to_executor.put)
        actors: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "tokenizer": partial(
                run_tokenizer,
                partial(prepare, tokenizer=parts.tokenizer, limits=parts.limits),
                parts.executor.check_guide,
                self._to_tokenizer,
                self._to_scheduler.put,
            ),
            "scheduler": partial(
                run_scheduler,
                self._scheduler,
                self._to_scheduler,
                self._to_cache.put,
                self._to_executor.put,
                self._to_detokenizer.put,
            ),
            "cache": partial(run_cache, parts.cache, self._to_cache, self._to_scheduler.put, self._answer),
            "executor": partial(run_executor, parts.executor, self._to_executor, self._guide_released),
            "detokenizer": partial(
                run_detokenizer, self._detokenizer, self._to_detokenizer, self._to_scheduler.put, self.mailboxes
            ),
        }
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for name, actor in actors.items():
                        nursery.start_soon(self._guard, name, actor, name=f"triode {name}")
        finally:
            self.close()
            await self._close_executor()

    def close(self) -> None:
        """Take no more requests, cancel those that are unfinished, and stop the actors. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self.mailboxes.end_all("the engine was closed")
            self._refuse_waiting(self.fault or EngineClosed("the engine was closed before it answered"))
            self._scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def _guard(self, name: str, actor: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """A fault of one actor ends the engine. Every waiting caller learns it before anything is torn down.

        Ctrl-C is no actor's fault: under protection Trio raises it in the caller's code instead.
        """
        try:
            await actor()
        except BaseException as error:
            cause = without_cancelled(error)
            if cause is None:
                raise
            if self.fault is None:
                self.fault = EngineFault(f"the {name} failed: {type(cause).__name__}: {cause}")
                self.fault.__cause__ = cause
                self.mailboxes.fail_all(self.fault)
                self._refuse_waiting(self.fault)
            self._scope.cancel()

    async def _close_executor(self) -> None:
        try:
            await self.parts.executor.close()
        except EngineFault as fault:
            # What failed first is the cause to report.
            self.fault = self.fault or fault

    def _answer(self, pinned: Pinned) -> None:
        self._answers.pop(pinned.request_id)(pinned.num_tokens)

    def _guide_released(self) -> None:
        self.num_released_guides += 1
        # All: the next one in order may need more than this one held.
        self._waiting_for_guide.unpark_all()

    def _refuse_waiting(self, error: Exception) -> None:
        """Tell those who wait for something else than mail."""
        self._waiting_for_guide.unpark_all()
        answers, self._answers = self._answers, {}
        for answer in answers.values():
            answer(fresh(error))

    def _check_open(self) -> None:
        if self._is_closed or self.fault is not None:
            raise self.ended()


def without_cancelled(error: BaseException) -> BaseException | None:
    """What went wrong; None if it was only cancelled. A nursery raises groups."""
    if isinstance(error, trio.Cancelled):
        return None
    if not isinstance(error, BaseExceptionGroup):
        return error
    _, rest = error.split(trio.Cancelled)
    return rest.exceptions[0] if rest is not None and len(rest.exceptions) == 1 else rest


def fresh(error: Exception) -> Exception:
    """A new exception that says the same, so that several readers do not share one traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
