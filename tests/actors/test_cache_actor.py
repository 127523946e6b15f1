"""The cache's actor: what is urgent, and what lets others go first."""

import pytest
import trio
import trio.testing

from triode.actors.cache.actor import run_cache
from triode.actors.channels import Inbox
from triode.actors.messages import CacheInbox, Launched, Match, Matched, Pinned, Release, Reserved
from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.cache.messages import MatchRow, ReleaseRow
from triode.ids import SequenceId, TokenId, pack_tokens

TOKENS = tuple(map(TokenId, range(40)))


class RecordingManager(CacheManager):
    """Says what it does, and when."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(16, CacheConfig(block_size_tokens=16))
        self.said = said

    def match(self, match: Match) -> Matched:
        matched = super().match(match)
        self.said.append("match")
        return matched

    def settle(self) -> None:
        if self.is_unsettled:
            self.said.append("settle")
        super().settle()


async def order_of(*messages: CacheInbox) -> list[str]:
    """What the manager does with messages that come together, and when a message passes two actors meanwhile."""
    said: list[str] = []
    inbox: Inbox[CacheInbox] = Inbox()
    first: Inbox[str] = Inbox()
    second: Inbox[str] = Inbox()

    async def pass_on() -> None:
        for token in await first.take():
            second.put(token)

    async def read() -> None:
        said.extend(await second.take())

    def ignore(_: Matched | Reserved | Pinned) -> None:
        return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_cache, RecordingManager(said), inbox, ignore, ignore)
        nursery.start_soon(pass_on)
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        for message in messages:
            inbox.put(message)
        first.put("token")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return said


MATCH = Match((MatchRow(SequenceId(0), pack_tokens(TOKENS), len(TOKENS), b""),), now_s=0.0)
LAUNCHED = Launched((SequenceId(0),), (len(TOKENS),))
RELEASE = Release((ReleaseRow(SequenceId(0), pack_tokens(TOKENS)),), now_s=0.0)


@pytest.mark.parametrize("message", [LAUNCHED, RELEASE])
async def test_a_plan_or_a_token_goes_first_where_nobody_waits_for_the_cache(message: CacheInbox) -> None:
    for _ in range(20):
        assert await order_of(message) == ["token", "settle"]


@pytest.mark.parametrize("message", [LAUNCHED, RELEASE])
async def test_what_nobody_waits_for_comes_before_the_question_behind_it(message: CacheInbox) -> None:
    for _ in range(20):
        said = await order_of(message, MATCH)
        assert said == ["settle", "match", "token"]
