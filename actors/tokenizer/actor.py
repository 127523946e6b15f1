"""Consumes Submit. Produces Tokenized | Rejected, exactly one for each."""

from collections.abc import Callable
from typing import NoReturn

import trio

from triode.actors.channels import Inbox, Put
from triode.actors.messages import Rejected, Submit, Tokenized

LONG_PROMPT_BYTES = 16_000
"""Longer prompts are encoded in a worker thread: the loop must not stand still for more than a millisecond or two."""

Prepare = Callable[[Submit], Tokenized | Rejected]


async def run_tokenizer(prepare: Prepare, inbox: Inbox[Submit], scheduler: Put[Tokenized | Rejected]) -> NoReturn:
    """Encode prompts for ever. Long ones may be overtaken here; the scheduler queues by arrival."""
    # One at a time: a thread that encodes uses every core it can get.
    limiter = trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery:
        while True:
            for submit in await inbox.take():
                if _size_bytes(submit) <= LONG_PROMPT_BYTES:
                    scheduler(prepare(submit))
                else:
                    nursery.start_soon(_prepare_in_thread, prepare, submit, scheduler, limiter)
    raise AssertionError("the tokenizer never stops by itself")


@trio.lowlevel.enable_ki_protection
async def _prepare_in_thread(
    prepare: Prepare, submit: Submit, scheduler: Put[Tokenized | Rejected], limiter: trio.CapacityLimiter
) -> None:
    scheduler(await trio.to_thread.run_sync(prepare, submit, limiter=limiter, abandon_on_cancel=True))


def _size_bytes(submit: Submit) -> int:
    """About how much text there is to encode: a character takes a byte or a few."""
    if isinstance(submit.prompt, str):
        return len(submit.prompt)
    contents = (message.get("content") for message in submit.prompt if isinstance(message, dict))
    return sum(_content_size(content) for content in contents)


def _content_size(content: object) -> int:
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list) else ()
    return sum(len(text) for part in parts if isinstance(part, dict) and isinstance(text := part.get("text"), str))
