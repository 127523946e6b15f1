"""Consumes Match, Reserve, Launched, Release, Pin, Unpin, Clear. Produces Matched, Reserved, and Pinned for the caller.

Nobody waits for a Launched or a Release alone. What they leave to do takes half a millisecond for a long prompt, so
the plan or the tokens that came with them go first.
"""

from typing import NoReturn, assert_never

import trio

from triode.actors.channels import Inbox, Put
from triode.actors.messages import (
    CacheInbox,
    Clear,
    Launched,
    Match,
    Matched,
    Pin,
    Pinned,
    Release,
    Reserve,
    Reserved,
    Unpin,
)
from triode.cache.manager import CacheManager

_TURNS_OF_OTHERS = 2
"""Of the loop: the executor's or the detokenizer's, and that of the token's reader."""


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
                case Launched():
                    core.launched(message)
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
        if core.is_unsettled:
            for _ in range(_TURNS_OF_OTHERS):
                await trio.lowlevel.checkpoint()
            core.settle()
