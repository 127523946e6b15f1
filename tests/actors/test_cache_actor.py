"""The cache's actor: what is urgent, and what lets others go first."""

import trio
import trio.testing

from triode.actors.cache.actor import run_cache
from triode.actors.channels import Inbox
from triode.actors.messages import CacheInbox, Match, Matched, Pinned, Release, Reserved
from triode.cache.config import CacheConfig
from triode.cache.manager import CacheManager
from triode.cache.messages import MatchRow, ReleaseRow
from triode.ids import SequenceId, TokenId

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
            self.said.append("release")
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


MATCH = Match((MatchRow(SequenceId(0), TOKENS, len(TOKENS), b""),), now_s=0.0)
RELEASE = Release((ReleaseRow(SequenceId(0), TOKENS),), now_s=0.0)


async def test_a_token_reaches_its_reader_before_what_has_ended_is_taken_in() -> None:
    for _ in range(20):
        assert await order_of(RELEASE) == ["token", "release"]


async def test_a_release_comes_before_the_question_behind_it_which_waits_for_nobody() -> None:
    for _ in range(20):
        said = await order_of(RELEASE, MATCH)
        assert said == ["release", "match", "token"]
