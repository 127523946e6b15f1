"""Mailboxes: where the engine leaves what a request's caller will read.

What a sample says is in its transcript, anything else that a reader must know is an item of mail. The detokenizer writes
all that a step produced and then flushes once, so that a reader wakes at most once a step however much arrived. A mailbox
knows how to wake its reader through its *waker*; there is one kind for Trio tasks in the engine's own loop, one for asyncio
loops and one for blocking threads (`engine/`). It never refers to the reader's stream, so a dropped stream is collected and
can cancel its request.
"""

from collections import OrderedDict, deque
from collections.abc import Awaitable, Iterable
from typing import Protocol

import trio

from triode.actors.messages import Delta, Ended, Mail, Rejected, RequestStatus
from triode.actors.transcript import Transcript
from triode.errors import EngineFault
from triode.ids import RequestId

NUM_REMEMBERED = 4096
"""How many ended requests `MailboxRegistry.status` still knows."""


class Waker(Protocol):
    """Wakes the readers of one place: an event loop or the world of threads."""

    def notify(self, mailbox: "Mailbox") -> None:
        """Something was put into `mailbox`. Called in the engine's thread, at most once a mailbox and flush."""

    def flush(self) -> None:
        """All notifications of this step have been made."""

    def wait(self, mailbox: "Mailbox") -> Awaitable[None]:
        """Called and awaited by the reader: sleep until `mailbox` has news, or return at once if it has some."""


class Mailbox:
    """One request's transcripts and unread mail. Filled in the engine's thread, read in the caller's."""

    def __init__(self, request_id: RequestId, num_samples: int, waker: Waker) -> None:
        self.request_id = request_id
        self.arrival = -1
        """The request's number among the engine's submits; -1 until it is submitted."""
        self.waker = waker
        self.status = RequestStatus.QUEUED
        self.num_cached_tokens = 0
        self.error: Exception | None = None
        """What the reader must raise once it has read the items: the engine's fault, or why nothing was submitted."""
        self.reader: object | None = None
        """What the waker needs to wake the reader; None while nobody waits."""
        self.is_patient = False
        """Set by a reader who wants the whole: it is woken at the end."""
        self.transcripts = tuple([Transcript() for _ in range(num_samples)])
        """Of each sample."""
        self._items: deque[Mail] = deque()
        self._num_unfinished = num_samples
        # Counted by the writer alone, and looked at by the reader alone.
        self._num_puts = 0
        self._num_puts_seen = 0

    def put(self, item: Mail | Delta) -> None:
        """Add an item or write a delta down, and keep the request's status, which is final before its end can be read."""
        match item:
            case Delta():
                if item.finish_reason is not None:
                    self._num_unfinished -= 1
                    if self._num_unfinished == 0:
                        self.status = RequestStatus.FINISHED
                self.transcripts[item.index].add_delta(item)
            case Ended(status=status):
                self.status = status
                self._items.append(item)
            case Rejected():
                self.status = RequestStatus.FAILED
                self._items.append(item)
            case _:
                self._items.append(item)
        self._num_puts += 1

    def note(self) -> None:
        """Something has been written in a transcript."""
        self._num_puts += 1

    def refuse(self, error: Exception) -> None:
        """The request could not even be submitted; its reader raises `error`."""
        self.error = error
        self.status = RequestStatus.FAILED
        self.waker.notify(self)
        self.waker.flush()

    def leave(self, _: object) -> trio.lowlevel.Abort:
        """The Trio task that waits is cancelled."""
        self.reader = None
        return trio.lowlevel.Abort.SUCCEEDED

    def take(self) -> list[Mail]:
        """All unread items; what the transcripts have is to be read after that.

        Safe against a `put` in another thread: `popleft` and `append` are atomic, and what comes behind them is news again.
        """
        self._num_puts_seen = self._num_puts
        return [self._items.popleft() for _ in range(len(self._items))] if self._items else []

    @property
    def has_news(self) -> bool:
        """Whether a reader has no need to wait."""
        if self.is_patient and not self.status.is_final:
            return False
        return self._num_puts != self._num_puts_seen or self.error is not None


class TrioWaker:
    """Reschedules Trio tasks of the engine's own loop."""

    def notify(self, mailbox: Mailbox) -> None:
        """Wake the reading task."""
        if isinstance(task := mailbox.reader, trio.lowlevel.Task):
            mailbox.reader = None
            trio.lowlevel.reschedule(task)

    def flush(self) -> None:
        """Nothing is left to do: a Trio task is woken at once."""

    def wait(self, mailbox: Mailbox) -> Awaitable[None]:
        """Sleep until `mailbox` has news.

        Raises:
            BusyResourceError: if another task waits for it already.
        """
        # The caller awaits what is returned: a coroutine of this would be made and walked through for every token.
        if mailbox.has_news:
            return trio.lowlevel.checkpoint()  # noqa: ASYNC105
        if mailbox.reader is not None:
            raise trio.BusyResourceError("another task is already reading this stream")
        mailbox.reader = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(mailbox.leave)  # noqa: ASYNC105


class MailboxRegistry:
    """The mailboxes of all unfinished requests, and the last words of the ended ones."""

    def __init__(self) -> None:
        self._open: dict[RequestId, Mailbox] = {}
        self._ended: OrderedDict[RequestId, RequestStatus] = OrderedDict()
        self._dirty: dict[RequestId, Mailbox] = {}
        self._line = trio.StrictFIFOLock()
        self._first_in_line = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, mailbox: Mailbox) -> None:
        """Open a mailbox.

        Raises:
            ValueError: if an unfinished request has the same id.
        """
        if mailbox.request_id in self._open:
            raise ValueError(f"request_id must be unique among unfinished requests, got {mailbox.request_id!r}")
        self._ended.pop(mailbox.request_id, None)
        self._open[mailbox.request_id] = mailbox

    async def wait_for_fewer(self, num_open: int) -> None:
        """Return when fewer than `num_open` are open; first come, first served.

        No checkpoint lies between the last look and the return, so that the caller may `add` one at once.
        """
        if len(self._open) < num_open and not self._line.locked():
            return
        async with self._line:
            while len(self._open) >= num_open:
                await self._first_in_line.park()

    def transcripts(self, request_id: RequestId) -> tuple[Transcript, ...]:
        """Where an unfinished request's samples are to be written down; nowhere if there is no such request."""
        mailbox = self._open.get(request_id)
        return () if mailbox is None else mailbox.transcripts

    def note(self, request_ids: Iterable[RequestId]) -> None:
        """Something has been written in transcripts of these requests."""
        mailboxes, dirty = self._open, self._dirty
        for request_id in request_ids:
            mailbox = mailboxes.get(request_id)
            if mailbox is not None:
                mailbox.note()
                if not mailbox.is_patient:
                    dirty[request_id] = mailbox

    def deliver(self, item: Mail | Delta) -> None:
        """Put an item into its request's mailbox; mail for a request that has ended is dropped."""
        mailbox = self._open.get(item.request_id)
        if mailbox is None:
            return
        mailbox.put(item)
        if mailbox.has_news:
            self._dirty[mailbox.request_id] = mailbox
        if mailbox.status.is_final:
            self._close(mailbox)

    def set_status(self, request_id: RequestId, status: RequestStatus, num_cached_tokens: int) -> None:
        """Note a change of status that brings no mail."""
        if mailbox := self._open.get(request_id):
            mailbox.status = status
            mailbox.num_cached_tokens = num_cached_tokens

    def finish(self, request_id: RequestId) -> None:
        """An embedding request has its answer."""
        if mailbox := self._open.get(request_id):
            mailbox.status = RequestStatus.FINISHED
            self._dirty[request_id] = mailbox
            self._close(mailbox)

    def flush(self) -> None:
        """Wake every reader that has new mail, once."""
        dirty, self._dirty = self._dirty, {}
        wakers: dict[Waker, None] = {}
        for mailbox in dirty.values():
            waker = mailbox.waker
            wakers[waker] = None
            waker.notify(mailbox)
        for waker in wakers:
            waker.flush()

    def end_all(self, reason: str) -> None:
        """The engine closes: cancel whatever is unfinished."""
        for request_id in list(self._open):
            self.deliver(Ended(request_id, RequestStatus.CANCELLED, reason))
        self.flush()

    def fail_all(self, fault: EngineFault) -> None:
        """The engine has a fault: every reader learns it."""
        for mailbox in list(self._open.values()):
            mailbox.error = fault
            mailbox.status = RequestStatus.FAILED
            self._dirty[mailbox.request_id] = mailbox
            self._close(mailbox)
        self.flush()

    def status(self, request_id: RequestId) -> RequestStatus:
        """Where a request is.

        Raises:
            KeyError: if the id is unknown, or ended so long ago that it has been forgotten.
        """
        if mailbox := self._open.get(request_id):
            return mailbox.status
        if (status := self._ended.get(request_id)) is None:
            raise KeyError(f"no request has the id {request_id!r}, or it ended more than {NUM_REMEMBERED} requests ago")
        return status

    def get(self, request_id: RequestId) -> Mailbox | None:
        """The mailbox of an unfinished request."""
        return self._open.get(request_id)

    def _close(self, mailbox: Mailbox) -> None:
        del self._open[mailbox.request_id]
        self._first_in_line.unpark()
        self._ended[mailbox.request_id] = mailbox.status
        while len(self._ended) > NUM_REMEMBERED:
            self._ended.popitem(last=False)
