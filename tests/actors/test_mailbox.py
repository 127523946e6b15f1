"""Mailboxes: every request's mail reaches its reader, who wakes once a step and never without cause."""

import pytest
import trio
import trio.testing

from triode.actors.mailbox import NUM_REMEMBERED, Mailbox, MailboxRegistry, TrioWaker
from triode.actors.messages import Delta, Embedded, Ended, FinishReason, Mail, PromptScored, Rejected, RequestStatus
from triode.actors.transcript import Transcript
from triode.errors import EngineFault
from triode.ids import RequestId, TokenId
from triode.models.step import TokenLogprobs


class CountingWaker:
    """Notes who would be woken."""

    def __init__(self) -> None:
        self.notified: list[RequestId] = []
        self.num_flushes = 0

    def notify(self, mailbox: Mailbox) -> None:
        self.notified.append(mailbox.request_id)

    def flush(self) -> None:
        self.num_flushes += 1

    async def wait(self, mailbox: Mailbox) -> None:
        raise AssertionError("nobody waits here")


def delta(name: str, index: int = 0, *, ends: bool = False) -> Delta:
    return Delta(RequestId(name), index, "x", (TokenId(1),), finish_reason=FinishReason.STOP if ends else None)


def opened(registry: MailboxRegistry, name: str, waker: CountingWaker, num_samples: int = 1) -> Mailbox:
    mailbox = Mailbox(RequestId(name), num_samples, waker)
    registry.add(mailbox)
    return mailbox


def num_tokens(mailbox: Mailbox, index: int = 0) -> int:
    return len(mailbox.transcripts[index].token_ids)


def test_mail_is_taken_once_and_in_order() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    assert mailbox.take() == []
    entry = TokenLogprobs(TokenId(1), -0.5, 1)
    items: list[Mail] = [
        PromptScored(RequestId("a"), (entry,)),
        Ended(RequestId("a"), RequestStatus.CANCELLED, "enough"),
    ]
    for item in items:
        registry.deliver(item)
    assert mailbox.has_news
    assert mailbox.take() == items
    assert mailbox.take() == []
    assert not mailbox.has_news


def test_what_is_said_is_news_until_the_next_look() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker, num_samples=2)
    assert registry.transcripts(RequestId("a")) == mailbox.transcripts
    assert registry.transcripts(RequestId("nobody")) == ()
    mailbox.transcripts[1].add("x", TokenId(1), None)
    registry.note([RequestId("a"), RequestId("nobody"), RequestId("a")])
    assert mailbox.has_news
    registry.flush()
    assert waker.notified == ["a"]
    assert mailbox.take() == []
    registry.flush()
    assert (waker.notified, mailbox.has_news) == (["a"], False)
    registry.deliver(delta("a", 1))
    assert (num_tokens(mailbox), num_tokens(mailbox, 1)) == (0, 2)


def test_the_status_tells_an_end_before_the_transcript_does() -> None:
    mailbox = Mailbox(RequestId("a"), 1, CountingWaker())
    statuses = []

    class Watched(Transcript):
        def add_delta(self, delta: Delta) -> None:
            statuses.append(mailbox.status)

    mailbox.transcripts = (Watched(),)
    mailbox.put(delta("a", ends=True))
    assert statuses == [RequestStatus.FINISHED]


def test_a_flush_wakes_each_reader_once_whatever_came() -> None:
    registry, waker, other = MailboxRegistry(), CountingWaker(), CountingWaker()
    for name in "abc":
        opened(registry, name, waker)
    opened(registry, "elsewhere", other)
    for name in ("a", "b", "a", "a", "elsewhere"):
        registry.deliver(delta(name))
    assert waker.notified == []
    registry.flush()
    assert (waker.notified, waker.num_flushes) == (["a", "b"], 1)
    assert (other.notified, other.num_flushes) == (["elsewhere"], 1)
    registry.flush()
    assert (waker.num_flushes, other.num_flushes) == (1, 1)


def test_a_mailbox_closes_with_its_last_sample() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker, num_samples=2)
    registry.deliver(delta("a", 1, ends=True))
    assert (mailbox.status.is_final, len(registry)) == (False, 1)
    registry.deliver(delta("a", 0, ends=True))
    assert (mailbox.status, len(registry)) == (RequestStatus.FINISHED, 0)
    registry.flush()
    assert waker.notified == ["a"]


def test_mail_for_a_request_that_has_ended_is_dropped() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    registry.deliver(Ended(RequestId("a"), RequestStatus.CANCELLED, "enough"))
    registry.deliver(delta("a"))
    registry.deliver(delta("nobody"))
    assert (len(mailbox.take()), num_tokens(mailbox)) == (1, 0)
    assert registry.status(RequestId("a")) is RequestStatus.CANCELLED


def test_a_refused_request_has_failed() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    registry.deliver(Rejected(RequestId("a"), 0, "too long"))
    assert mailbox.status is RequestStatus.FAILED


def test_an_id_is_free_again_once_its_request_has_ended() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    opened(registry, "a", waker)
    with pytest.raises(ValueError, match="request_id must be unique among unfinished requests, got 'a'"):
        opened(registry, "a", waker)
    registry.deliver(delta("a", ends=True))
    second = opened(registry, "a", waker)
    assert registry.get(RequestId("a")) is second
    assert registry.status(RequestId("a")) is RequestStatus.QUEUED


def test_so_many_ended_requests_are_remembered() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    for number in range(NUM_REMEMBERED + 2):
        opened(registry, str(number), waker)
        registry.deliver(delta(str(number), ends=True))
    assert registry.status(RequestId("2")) is RequestStatus.FINISHED
    for forgotten in ("0", "1", "never"):
        with pytest.raises(KeyError, match=f"no request has the id '{forgotten}'"):
            registry.status(RequestId(forgotten))


def test_status_changes_without_mail_wake_nobody() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    registry.set_status(RequestId("a"), RequestStatus.PREFILL, 48)
    registry.set_status(RequestId("gone"), RequestStatus.PREFILL, 0)
    registry.flush()
    assert (mailbox.status, mailbox.num_cached_tokens, waker.notified) == (RequestStatus.PREFILL, 48, [])


def test_closing_ends_whatever_is_unfinished() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailboxes = [opened(registry, name, waker) for name in "ab"]
    registry.deliver(delta("a", ends=True))
    registry.end_all("the engine was closed")
    assert [mailbox.status for mailbox in mailboxes] == [RequestStatus.FINISHED, RequestStatus.CANCELLED]
    assert mailboxes[1].take() == [Ended(RequestId("b"), RequestStatus.CANCELLED, "the engine was closed")]
    assert sorted(waker.notified) == ["a", "b"]


def test_a_fault_reaches_every_open_mailbox_behind_its_mail() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    registry.deliver(delta("a"))
    fault = EngineFault("it broke")
    registry.fail_all(fault)
    assert (num_tokens(mailbox), mailbox.error, mailbox.status) == (1, fault, RequestStatus.FAILED)
    assert mailbox.take() == []
    assert mailbox.has_news
    assert waker.notified == ["a"]


def test_a_patient_reader_is_woken_at_the_end() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    mailbox.is_patient = True
    for _ in range(1000):
        registry.deliver(delta("a"))
        registry.note([RequestId("a")])
        assert not mailbox.has_news
        registry.flush()
    assert waker.notified == []
    registry.deliver(delta("a", ends=True))
    registry.flush()
    assert waker.notified == ["a"]
    assert num_tokens(mailbox) == 1001


def test_what_came_while_a_reader_was_patient_is_news_when_it_no_longer_is() -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    mailbox.is_patient = True
    registry.deliver(delta("a"))
    mailbox.is_patient = False
    assert mailbox.has_news


@pytest.mark.parametrize("ending", ["fault", "close", "embedding"])
def test_a_patient_reader_is_woken_by_every_kind_of_end(ending: str) -> None:
    registry, waker = MailboxRegistry(), CountingWaker()
    mailbox = opened(registry, "a", waker)
    mailbox.is_patient = True
    match ending:
        case "fault":
            registry.fail_all(EngineFault("it broke"))
        case "close":
            registry.end_all("the engine was closed")
        case "embedding":
            registry.deliver(Embedded(RequestId("a"), (1.0,)))
            registry.finish(RequestId("a"))
            registry.flush()
    assert waker.notified == ["a"]
    assert mailbox.has_news


def test_a_refusal_wakes_its_reader_at_once() -> None:
    waker = CountingWaker()
    mailbox = Mailbox(RequestId("a"), 1, waker)
    mailbox.refuse(ValueError("no"))
    assert mailbox.has_news
    assert (waker.notified, waker.num_flushes) == (["a"], 1)


async def test_each_closing_makes_room_for_one_who_waits_in_order() -> None:
    registry, entered = MailboxRegistry(), list[str]()
    given_up = trio.CancelScope()

    async def enter(name: str, scope: trio.CancelScope) -> None:
        with scope:
            await registry.wait_for_fewer(2)
            entered.append(name)
            opened(registry, name, CountingWaker())

    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "c", "given up", "d"):
            nursery.start_soon(enter, name, given_up if name == "given up" else trio.CancelScope())
            await trio.testing.wait_all_tasks_blocked()
        given_up.cancel()
        assert entered == ["a", "b"]
        registry.deliver(delta("b", ends=True))
        # Whoever comes now comes after those who wait, though there is room.
        nursery.start_soon(enter, "e", trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        assert entered == ["a", "b", "c"]
        registry.deliver(delta("a", ends=True))
        registry.deliver(delta("c", ends=True))
        await trio.testing.wait_all_tasks_blocked()
        assert entered == ["a", "b", "c", "d", "e"]
    assert len(registry) == 2


@pytest.mark.parametrize("how", ["end_all", "fail_all"])
async def test_the_engines_end_lets_everybody_in_who_waits(how: str) -> None:
    registry = MailboxRegistry()
    opened(registry, "a", CountingWaker())
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(registry.wait_for_fewer, 1)
        await trio.testing.wait_all_tasks_blocked()
        if how == "end_all":
            registry.end_all("the engine was closed")
        else:
            registry.fail_all(EngineFault("broken"))


async def test_a_trio_reader_sleeps_until_mail_comes() -> None:
    registry, waker = MailboxRegistry(), TrioWaker()
    mailbox = Mailbox(RequestId("a"), 1, waker)
    registry.add(mailbox)
    num_wakes = 0

    async def read() -> None:
        nonlocal num_wakes
        while mailbox.status is not RequestStatus.FINISHED or mailbox.has_news:
            await waker.wait(mailbox)
            num_wakes += 1
            assert mailbox.take() == []

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        for ends in (False, False, True):
            registry.deliver(delta("a"))
            registry.deliver(delta("a", ends=ends))
            registry.flush()
            await trio.testing.wait_all_tasks_blocked()
    assert num_wakes == 3


async def test_a_trio_reader_with_mail_does_not_sleep_but_lets_others_run() -> None:
    mailbox = Mailbox(RequestId("a"), 1, waker := TrioWaker())
    mailbox.put(delta("a"))
    with trio.testing.assert_checkpoints():
        await waker.wait(mailbox)


async def test_a_cancelled_trio_reader_is_not_woken() -> None:
    registry, waker = MailboxRegistry(), TrioWaker()
    mailbox = Mailbox(RequestId("a"), 1, waker)
    registry.add(mailbox)
    with trio.move_on_after(0):
        await waker.wait(mailbox)
    registry.deliver(delta("a"))
    registry.flush()
    await waker.wait(mailbox)
    assert num_tokens(mailbox) == 1


async def test_a_second_trio_reader_is_refused() -> None:
    mailbox = Mailbox(RequestId("a"), 1, waker := TrioWaker())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waker.wait, mailbox)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="another task is already reading this stream"):
            await waker.wait(mailbox)
        nursery.cancel_scope.cancel()
