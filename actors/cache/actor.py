"""Consumes Match, Reserve, Release, Pin, Unpin, Clear. Produces Matched, Reserved, and Pinned for the caller."""

from typing import NoReturn, assert_never

from triode.actors.channels import Inbox, Put
from triode.actors.messages import CacheInbox, Clear, Match, Matched, Pin, Pinned, Release, Reserve, Reserved, Unpin
from triode.cache.manager import CacheManager


async def run_cache(
    core: CacheManager, inbox: Inbox[CacheInbox], scheduler: Put[Matched | Reserved], answer: Put[Pinned]
) -> NoReturn:
    """Answer questions about KV memory for ever."""
    while True:
        for message in await inbox.take():
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
