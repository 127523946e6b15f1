"""Mailboxes: where the engine leaves what a request's caller will read.

The detokenizer puts everything a step produced into the mailboxes and then flushes once, so that a reader wakes at most
once a step however much arrived. A mailbox knows how to wake its reader through its *waker*; there is one kind for Trio
tasks in the engine's own loop, one for asyncio loops and one for blocking threads (`engine/`). It never refers to the
reader's stream, so a dropped stream is collected and can cancel its request.
"""

from collections import OrderedDict, deque
from typing import Protocol

import trio

from triode.actors.messages import Delta, Ended, Mail, Rejected, RequestStatus
from triode.errors import EngineFault
from triode.ids import RequestId

NUM_REMEMBERED = 4096
"""How many ended requests `MailboxRegistry.status` still knows."""
NUM_PATIENT = 64
"""A reader who waits for the end is woken by so many items all the same: kept unread, each takes some 250 bytes."""


class Waker(Protocol):
    """Wakes the readers of one place: an event loop or the world of threads."""

    def notify(self, mailbox: "Mailbox") -> None:
        """Something was put into `mailbox`. Called in the engine's thread, at most once a mailbox and flush."""

    def flush(self) -> None:
        """All notifications of this step have been made."""

    async def wait(self, mailbox: "Mailbox") -> None:
        """Called by the reader: sleep until something is in `mailbox`, or return at once if something is."""


class Mailbox:
    """One request's unread mail. Filled in the engine's thread, read in the caller's."""

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
        """Set by a reader who wants the whole: it is woken at the end, and now and then to make room."""
        self._items: deque[Mail] = deque()
        self._num_unfinished = num_samples

    def put(self, item: Mail) -> None:
        """Add an item and keep the request's status."""
        self._items.append(item)
        match item:
            case Delta(finish_reason=reason):
                if reason is not None:
                    self._num_unfinished -= 1
                    if self._num_unfinished == 0:
                        self.status = RequestStatus.FINISHED
            case Ended(status=status):
                self.status = status
            case Rejected():
                self.status = RequestStatus.FAILED
            case _:
                pass

    def refuse(self, error: Exception) -> None:
        """The request could not even be submitted; its reader raises `error`."""
        self.error = error
        self.status = RequestStatus.FAILED
        self.waker.notify(self)
        self.waker.flush()

    def take(self) -> list[Mail]:
        """All unread items. Safe against a `put` in another thread: `popleft` and `append` are atomic."""
        return [self._items.popleft() for _ in range(len(self._items))]

    @property
    def has_news(self) -> bool:
        """Whether a reader has no need to wait."""
        if self.is_patient and not self.status.is_final:
            return len(self._items) >= NUM_PATIENT
        return bool(self._items) or self.error is not None


class TrioWaker:
    """Reschedules Trio tasks of the engine's own loop."""

    def notify(self, mailbox: Mailbox) -> None:
        """Wake the reading task."""
        if isinstance(task := mailbox.reader, trio.lowlevel.Task):
            mailbox.reader = None
            trio.lowlevel.reschedule(task)

    def flush(self) -> None:
        """Nothing is left to do: a Trio task is woken at once."""

    async def wait(self, mailbox: Mailbox) -> None:
        """Sleep until something is in `mailbox`.

        Raises:
            BusyResourceError: if another task waits for it already.
        """
        if mailbox.has_news:
            await trio.lowlevel.checkpoint()
            return
        if mailbox.reader is not None:
            raise trio.BusyResourceError("another task is already reading this stream")
        mailbox.reader = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            mailbox.reader = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)


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

    def deliver(self, item: Mail) -> None:
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
        for mailbox in dirty.values():
            mailbox.waker.notify(mailbox)
        for waker in {mailbox.waker for mailbox in dirty.values()}:
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
