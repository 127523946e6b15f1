"""Inboxes: nothing is lost, nothing overtakes, and each counts its own load."""

import pytest
import trio
import trio.testing

from triode.actors.channels import Inbox


async def test_everything_that_waits_is_taken_at_once_in_order() -> None:
    inbox: Inbox[int] = Inbox()
    for number in range(5):
        inbox.put(number)
    assert await inbox.take() == [0, 1, 2, 3, 4]


async def test_an_empty_inbox_waits_for_the_first_message() -> None:
    inbox: Inbox[str] = Inbox()
    taken: list[list[str]] = []

    async def take() -> None:
        while True:
            taken.append(await inbox.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert taken == []
        inbox.put("a")
        inbox.put("b")
        await trio.testing.wait_all_tasks_blocked()
        inbox.put("c")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert taken == [["a", "b"], ["c"]]


async def test_a_cancelled_take_loses_nothing() -> None:
    inbox: Inbox[int] = Inbox()
    with trio.move_on_after(0):
        await inbox.take()
    inbox.put(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await inbox.take()
    assert await inbox.take() == [1]


async def test_taking_lets_others_run() -> None:
    """An inbox that is never empty must not starve the loop."""
    inbox: Inbox[int] = Inbox()
    turns: list[str] = []

    async def actor() -> None:
        for _ in range(3):
            inbox.put(0)
            await inbox.take()
            turns.append("actor")

    async def other() -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
            turns.append("other")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor)
        nursery.start_soon(other)
    assert set(turns[:3]) == {"actor", "other"}


async def test_an_inbox_takes_any_number_without_waiting() -> None:
    inbox: Inbox[int] = Inbox()
    for number in range(10_000):
        inbox.put(number)
    assert inbox.statistics().queue_depth == 10_000
    assert len(await inbox.take()) == 10_000


async def test_statistics_count_messages_wakeups_and_the_peak() -> None:
    inbox: Inbox[int] = Inbox()
    for batch in (3, 1, 2):
        for number in range(batch):
            inbox.put(number)
        await inbox.take()
    inbox.put(1)
    now = inbox.statistics()
    assert (now.num_messages, now.num_wakeups, now.peak_queue_depth, now.queue_depth) == (6, 3, 3, 1)


async def test_busy_time_is_between_taking_and_asking_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0])
    monkeypatch.setattr("triode.actors.channels.perf_counter", lambda: next(clock))
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    await inbox.take()
    assert inbox.statistics().busy_s == 0
    inbox.put(2)
    await inbox.take()
    assert inbox.statistics().busy_s == 2.5
