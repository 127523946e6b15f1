"""Executors: results in launch order, faults in the loop, and a way to close whatever the runner does."""

import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from triode.actors.channels import Inbox
from triode.actors.executor import thread as thread_module
from triode.actors.executor.actor import Executor, run_executor
from triode.actors.executor.inline import InlineExecutor
from triode.actors.executor.thread import ThreadExecutor
from triode.actors.messages import ExecutorInbox
from triode.errors import EngineFault
from triode.ids import StepId
from triode.models.guide import Guide
from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult


def plan(number: int) -> StepPlan:
    return StepPlan(StepId(number), (), (), (), (), ())


class NumberingRunner:
    """Answers each plan with its number, when it may."""

    def __init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.fails_at: int | None = None
        self.fails_to_collect = False
        self.is_closed = False
        self.threads: set[str] = set()
        self._launched: deque[StepPlan] = deque()

    def launch(self, plan: StepPlan) -> None:
        self.may_run.wait(10)
        assert not self.is_closed
        self.threads.add(threading.current_thread().name)
        if plan.step_id == self.fails_at:
            raise ZeroDivisionError(f"step {plan.step_id}")
        self._launched.append(plan)

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise ValueError("guide must be None: there is no model")

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise AssertionError("no guide was checked")

    def is_ready(self) -> bool:
        return bool(self._launched)

    def collect(self) -> StepResult:
        if self.fails_to_collect:
            raise ZeroDivisionError("collect")
        return StepResult(self._launched.popleft().step_id, (), (), (), ())

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(num_steps=7)

    def close(self) -> None:
        self.is_closed = True


class Heard:
    """What comes back into the loop."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.faults: list[BaseException] = []

    def result(self, result: StepResult) -> None:
        trio.lowlevel.current_task()  # raises outside the loop
        self.steps.append(result.step_id)

    def fault(self, error: BaseException) -> None:
        self.faults.append(error)

    async def wait(self, num_messages: int) -> None:
        with trio.fail_after(10):
            while len(self.steps) + len(self.faults) < num_messages:
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def started(executor: Executor) -> AsyncIterator[Heard]:
    heard = Heard()
    executor.start(heard.result, heard.fault)
    try:
        yield heard
    finally:
        await executor.close()


@pytest.mark.parametrize("make", [InlineExecutor, ThreadExecutor])
async def test_results_come_in_launch_order(make: type[InlineExecutor] | type[ThreadExecutor]) -> None:
    runner = NumberingRunner()
    executor = make(runner)
    async with started(executor) as heard:
        for number in range(50):
            executor.launch(plan(number))
        await heard.wait(50)
        assert executor.statistics().num_steps == 7
    assert heard.steps == list(range(50))
    assert runner.is_closed


async def test_inline_steps_run_where_the_loop_runs() -> None:
    executor = InlineExecutor(runner := NumberingRunner())
    async with started(executor) as heard:
        executor.launch(plan(1))
        assert heard.steps == [1]
    assert runner.threads == {threading.current_thread().name}


async def test_the_loop_goes_on_while_a_thread_computes() -> None:
    executor = ThreadExecutor(runner := NumberingRunner())
    runner.may_run.clear()
    async with started(executor) as heard:
        executor.launch(plan(1))
        executor.launch(plan(2))
        await trio.sleep(0.01)
        assert heard.steps == []
        runner.may_run.set()
        await heard.wait(2)
    assert runner.threads == {"triode-executor"}


async def test_a_fault_of_the_runner_comes_into_the_loop() -> None:
    executor = ThreadExecutor(runner := NumberingRunner())
    runner.fails_at = 2
    async with started(executor) as heard:
        for number in range(1, 4):
            executor.launch(plan(number))
        await heard.wait(2)
    assert heard.steps == [1]
    assert [str(fault) for fault in heard.faults] == ["step 2"]
    assert runner.is_closed


async def test_a_fault_of_a_result_comes_into_the_loop() -> None:
    executor = ThreadExecutor(runner := NumberingRunner())
    runner.fails_to_collect = True
    async with started(executor) as heard:
        executor.launch(plan(1))
        await heard.wait(1)
    assert [str(fault) for fault in heard.faults] == ["collect"]
    assert runner.is_closed


async def test_closing_waits_for_the_running_step() -> None:
    executor = ThreadExecutor(runner := NumberingRunner())
    runner.may_run.clear()
    async with trio.open_nursery() as nursery, started(executor):
        executor.launch(plan(1))
        nursery.start_soon(trio.to_thread.run_sync, runner.may_run.set)
    assert runner.is_closed
    await executor.close()


async def test_closing_gives_up_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "CLOSE_DEADLINE_S", 0.02)
    executor = ThreadExecutor(runner := NumberingRunner())
    runner.may_run.clear()
    with pytest.raises(EngineFault, match=r"the running step has not ended within 0\.02 s: its thread and memory"):
        async with started(executor):
            executor.launch(plan(1))
    assert not runner.is_closed
    runner.may_run.set()


async def test_closing_is_not_cut_short_by_a_cancellation() -> None:
    executor = ThreadExecutor(runner := NumberingRunner())
    with trio.CancelScope() as scope:
        async with started(executor):
            scope.cancel()
    assert runner.is_closed


def test_a_loop_that_is_gone_is_no_fault_of_the_thread() -> None:
    """The whole Trio run was torn down: a late result has nobody to go to, and the thread ends."""
    runner = NumberingRunner()
    runner.may_run.clear()
    executor = ThreadExecutor(runner)

    async def abandon() -> None:
        heard = Heard()
        executor.start(heard.result, heard.fault)
        executor.launch(plan(1))

    trio.run(abandon)
    runner.may_run.set()
    executor._thread.join(10)
    assert not executor._thread.is_alive()
    assert runner.is_closed


async def test_the_actor_hands_on_plans_and_raises_faults() -> None:
    executor = InlineExecutor(NumberingRunner())
    heard = Heard()
    executor.start(heard.result, heard.fault)
    inbox: Inbox[ExecutorInbox | BaseException] = Inbox()
    for number in range(3):
        inbox.put(plan(number))
    inbox.put(ZeroDivisionError("from another thread"))
    with pytest.raises(ZeroDivisionError, match="from another thread"):
        await run_executor(executor, inbox, lambda: None)
    assert heard.steps == [0, 1, 2]
