"""Consumes Submit and Cancel. Produces Tokenized | Rejected, exactly one for each Submit.

What a prompt or a guide may wait for ends with its request: a cancelled one leaves the queue at once, so that these are
never longer than there are unfinished requests.
"""

from collections.abc import Awaitable, Callable
from typing import NoReturn

import msgspec
import trio

from triode.actors.channels import MAX_CHECKING, Inbox, Put
from triode.actors.messages import Rejected, Submit, Tokenized, TokenizerInbox
from triode.models.conversation import Conversation
from triode.models.guide import Guide, Refusal

LONG_PROMPT_BYTES = 16_000
"""Longer prompts are encoded in a worker thread: the loop must not stand still for more than a millisecond or two."""

Prepare = Callable[[Submit], Tokenized | Rejected]
CheckGuide = Callable[[Guide], Awaitable[Refusal | None]]
"""`Executor.check_guide`: a guide must be compiled before its request can be queued."""


async def run_tokenizer(
    prepare: Prepare, check_guide: CheckGuide, inbox: Inbox[TokenizerInbox], scheduler: Put[Tokenized | Rejected]
) -> NoReturn:
    """Encode prompts for ever. Long and guided ones may be overtaken here; the scheduler queues by arrival."""
    async with trio.open_nursery() as nursery:
        slow = _Slow(prepare, check_guide, scheduler)
        while True:
            for message in await inbox.take():
                if not isinstance(message, Submit):
                    slow.cancel(message.arrival)
                elif message.params.guide is not None or _size_bytes(message) > LONG_PROMPT_BYTES:
                    nursery.start_soon(slow.answer, message, slow.begin(message))
                else:
                    scheduler(prepare(message))
    raise AssertionError("the tokenizer never stops by itself")


class _Slow:
    """Requests that take more than a moment."""

    def __init__(self, prepare: Prepare, check_guide: CheckGuide, scheduler: Put[Tokenized | Rejected]) -> None:
        self._prepare = prepare
        self._check_guide = check_guide
        self._scheduler = scheduler
        # One at a time: a thread that encodes uses every core it can get.
        self._encoding = trio.CapacityLimiter(1)
        self._checking = trio.CapacityLimiter(MAX_CHECKING)
        self._waiting: dict[int, trio.CancelScope] = {}

    def begin(self, submit: Submit) -> trio.CancelScope:
        """From here on the request can be cancelled."""
        scope = self._waiting[submit.arrival] = trio.CancelScope()
        return scope

    def cancel(self, arrival: int) -> None:
        """What the request waits for is not wanted any more. One that waits for nothing is left alone."""
        if scope := self._waiting.get(arrival):
            scope.cancel()

    @trio.lowlevel.enable_ki_protection
    async def answer(self, submit: Submit, waiting: trio.CancelScope) -> None:
        """Encode, and have the guide compiled; a prompt that is refused costs no compiling."""
        prepared: Tokenized | Rejected | None = None
        guide: Guide | None = None
        with waiting:
            try:
                prepared = await self._encoded(submit)
                guide = prepared.params.guide if isinstance(prepared, Tokenized) else None
                if guide is not None:
                    await self._checking.acquire()
            finally:
                del self._waiting[submit.arrival]
        if waiting.cancelled_caught or prepared is None:
            prepared = Rejected(submit.request_id, submit.arrival, "it was cancelled")
        elif guide is not None:
            try:
                refusal = await self._check_guide(guide)
            finally:
                self._checking.release()
            if refusal is not None:
                prepared = Rejected(submit.request_id, submit.arrival, refusal.reason, refusal.is_busy)
        self._scheduler(prepared)

    async def _encoded(self, submit: Submit) -> Tokenized | Rejected:
        if _size_bytes(submit) <= LONG_PROMPT_BYTES:
            return self._prepare(submit)
        return await trio.to_thread.run_sync(self._prepare, submit, limiter=self._encoding, abandon_on_cancel=True)


def _size_bytes(submit: Submit) -> int:
    """About how much text there is to encode: a character takes a byte or a few."""
    if isinstance(submit.prompt, str):
        return len(submit.prompt)
    if not isinstance(submit.prompt, Conversation):
        return 0
    tools_bytes = len(msgspec.json.encode(submit.prompt.tools)) if submit.prompt.tools else 0
    return tools_bytes + sum(_content_size(message.get("content")) for message in submit.prompt.messages)


def _content_size(content: object) -> int:
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    return sum(len(text) for part in parts if isinstance(part, dict) and isinstance(text := part.get("text"), str))
