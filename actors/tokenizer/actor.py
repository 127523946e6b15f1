"""Consumes Submit. Produces Tokenized | Rejected, exactly one for each."""

from collections.abc import Awaitable, Callable
from typing import NoReturn

import msgspec
import trio

from triode.actors.channels import Inbox, Put
from triode.actors.messages import Rejected, Submit, Tokenized
from triode.models.conversation import Conversation
from triode.models.guide import Guide

LONG_PROMPT_BYTES = 16_000
"""Longer prompts are encoded in a worker thread: the loop must not stand still for more than a millisecond or two."""

Prepare = Callable[[Submit], Tokenized | Rejected]
CheckGuide = Callable[[Guide], Awaitable[str | None]]
"""`Executor.check_guide`: a guide must be compiled before its request can be queued."""


async def run_tokenizer(
    prepare: Prepare, check_guide: CheckGuide, inbox: Inbox[Submit], scheduler: Put[Tokenized | Rejected]
) -> NoReturn:
    """Encode prompts for ever. Long and guided ones may be overtaken here; the scheduler queues by arrival."""
    # One at a time: a thread that encodes uses every core it can get.
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        while True:
            for submit in await inbox.take():
                is_long = _size_bytes(submit) > LONG_PROMPT_BYTES
                if is_long:
                    nursery.start_soon(_prepare_in_thread, prepare, check_guide, submit, scheduler, limiter)
                elif submit.params.guide is not None:
                    nursery.start_soon(_queue, prepare(submit), check_guide, scheduler)
                else:
                    scheduler(prepare(submit))
    raise AssertionError("the tokenizer never stops by itself")


@trio.lowlevel.enable_ki_protection
async def _prepare_in_thread(
    prepare: Prepare,
    check_guide: CheckGuide,
    submit: Submit,
    scheduler: Put[Tokenized | Rejected],
    limiter: trio.CapacityLimiter,
) -> None:
    prepared = await trio.to_thread.run_sync(prepare, submit, limiter=limiter, abandon_on_cancel=True)
    await _queue(prepared, check_guide, scheduler)


@trio.lowlevel.enable_ki_protection
async def _queue(prepared: Tokenized | Rejected, check_guide: CheckGuide, scheduler: Put[Tokenized | Rejected]) -> None:
    """Send it on, once its guide is compiled; a prompt that is refused costs no compiling."""
    if isinstance(prepared, Tokenized) and (guide := prepared.params.guide) is not None:
        refusal = await check_guide(guide)
        if refusal is not None:
            prepared = Rejected(prepared.request_id, prepared.arrival, refusal)
    scheduler(prepared)


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
