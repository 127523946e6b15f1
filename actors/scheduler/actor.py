"""Consumes Tokenized, Rejected, Cancel, SetPriority, Matched, Reserved, StepResult, Stopped.

Produces Match, Reserve, Launched, Release for the cache, StepPlan and ReleaseGuide for the executor, and what the
detokenizer must know.

What callers are told, a step's tokens above all, is passed on when the next step is on its way: text is made, and its
readers run, while the device computes, not before it may begin.
"""

import math
from collections.abc import Callable
from typing import NoReturn, assert_never

import trio

from triode.actors.channels import Inbox, Put
from triode.actors.messages import (
    CacheInbox,
    Cancel,
    DetokenizerInbox,
    ExecutorInbox,
    Matched,
    Rejected,
    ReleaseGuide,
    Reserved,
    SchedulerInbox,
    SetPriority,
    StepResult,
    Stopped,
    Tokenized,
)
from triode.actors.scheduler.policy import Scheduler


async def run_scheduler(
    core: Scheduler,
    inbox: Inbox[SchedulerInbox],
    cache: Put[CacheInbox],
    executor: Put[ExecutorInbox],
    detokenizer: Put[DetokenizerInbox],
    clock: Callable[[], float] = trio.current_time,
) -> NoReturn:
    """Plan steps for ever. Sleeps while there is nothing to do, at most until the next deadline."""
    while True:
        messages: list[SchedulerInbox] = []
        if core.next_deadline_s == math.inf:
            # A scope would be a tenth of what the engine itself does for a request of one token.
            messages = await inbox.take()
        else:
            with trio.move_on_at(core.next_deadline_s):
                messages = await inbox.take()
        now_s = clock()
        core.expire(now_s)
        has_planned = False
        for message in messages:
            has_planned |= _handle(message, core, cache, executor, now_s)
        if launched := core.outbox.take_launched():
            # The executor hands on its plan before the cache wakes.
            await trio.lowlevel.checkpoint()
            cache(launched)
        _release(core, cache, now_s)
        for guide in core.outbox.take_guides():
            executor(ReleaseGuide(guide))
        if question := core.wants(now_s):
            cache(question)
        if core.outbox.holds_news:
            if has_planned:
                # The executor hands on its plan before the detokenizer wakes.
                await trio.lowlevel.checkpoint()
            elif core.is_asking:
                # The next plan is at hand, and news waits for one only: a fast device never leaves planning a rest.
                continue
        for said in core.outbox.take_for_detokenizer():
            detokenizer(said)


def _handle(
    message: SchedulerInbox, core: Scheduler, cache: Put[CacheInbox], executor: Put[ExecutorInbox], now_s: float
) -> bool:
    """Returns whether a step is on its way to the executor."""
    match message:
        case StepResult():
            core.commit(message)
        case Reserved():
            if plan := core.plan(message):
                executor(plan)
                return True
        case Matched():
            if question := core.matched(message, now_s):
                # What this turn has freed so far counts in the answer: a refusal of it is taken for the last word.
                _release(core, cache, now_s)
                cache(question)
        case Tokenized():
            core.add(message)
        case Cancel():
            core.abort(message)
        case Stopped():
            core.stop(message)
        case Rejected():
            core.reject(message)
        case SetPriority():
            core.set_priority(message)
        case _:
            assert_never(message)
    return False


def _release(core: Scheduler, cache: Put[CacheInbox], now_s: float) -> None:
    if released := core.outbox.take_releases(now_s):
        cache(released)
