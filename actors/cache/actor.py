"""Consumes Match, Reserve, Release, Pin, Unpin, Clear. Produces Matched, Reserved, and Pinned for the caller.

Nobody waits for a Release alone. Taking in the blocks of a long prompt takes half a millisecond, so the tokens that came with it
go first: one turn of the loop for the detokenizer, and one for their reader.
"""

from typing import NoReturn, assert_never

import trio

from triode.actors.channels import Inbox, Put
from triode.actors.messages import CacheInbox, Clear, Match, Matched, Pin, Pinned, Release, Reserve, Reserved, Unpin
from triode.cache.manager import CacheManager


async def run_cache(
    core: CacheManager, inbox: Inbox[CacheInbox], scheduler: Put[Matched | Reserved], answer: Put[Pinned]
) -> NoReturn:
    """Answer questions about KV memory for ever."""
    while True:
        messages = await inbox.take()
        if all(isinstance(message, Release) for message in messages):
            # Shielded: a message that is taken is answered.
            await trio.lowlevel.cancel_shielded_checkpoint()
            await trio.lowlevel.cancel_shielded_checkpoint()
        for message in messages:
            match message:
                case Reserve():
                    scheduler(core.reserve(message))
                case Match():
                    scheduler(core.match(message))
                case Release():
                    core.release(message)
                case Pin():
                    answer(core.pin(message))
                case Unpin():
                    answer(core.unpin(message))
                case Clear():
                    answer(core.clear(message))
                case _:
                    assert_never(message)
