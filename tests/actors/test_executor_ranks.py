"""Several worker processes that compute one model: they begin, compute and end together, however one of them ends."""

import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from executor_inboxes import Inboxes
from triode.actors.executor import process
from triode.actors.executor.child import Child
from triode.actors.executor.process import ProcessExecutor
from triode.actors.executor.rank_orders import rank_orders
from triode.errors import EngineFault
from triode.kernels.native.numa import Place
from triode.models.parallel import RankOrder
from triode.models.progress import NullProgress
from worker_runners import BUILT, order, plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share a file in memory")


@asynccontextmanager
async def started(model: str = "none", num_ranks: int = 3) -> AsyncIterator[tuple[ProcessExecutor, Inboxes]]:
    """A running executor, all of whose workers have ended afterwards."""
    executor, inboxes = ProcessExecutor("worker_runners:open_linked", [None] * num_ranks), Inboxes()
    ends = [os.pidfd_open(pid) for pid in executor.pids]
    assert len(set(executor.pids)) == num_ranks
    with trio.fail_after(30):
        try:
            assert await executor.open(order(model), NullProgress()) == BUILT
            executor.start(inboxes.put, inboxes.fault)
            yield executor, inboxes
        finally:
            await executor.close()
    for end in ends:
        assert select.select([end], [], [], 0)[0], "a worker is still there"
        os.close(end)


async def test_ranks_compute_each_step_together_and_leave_together() -> None:
    async with started() as (executor, inboxes):
        for step_id in range(5):
            executor.launch(plan(step_id, step_id, 10))
        tokens = [await inboxes.token() for _ in range(5)]
    assert tokens == [10, 11, 12, 13, 14]
    assert inboxes.faults.statistics().current_buffer_used == 0


@pytest.mark.parametrize("rank", [0, 2])
async def test_when_a_rank_dies_the_engine_is_told_and_all_end(rank: int) -> None:
    async with started("sticks") as (executor, inboxes):
        executor.launch(plan(2, 1))
        os.kill(executor.pids[rank], signal.SIGKILL)
        # Nothing is polled for: a busy machine alone takes longer than a moment.
        with trio.fail_after(30):
            fault = await inboxes.faults.receive()
            await executor.close()
    assert isinstance(fault, EngineFault)
    assert f"{executor.pids[rank]} (rank {rank} of 3) was killed by SIGKILL" in str(fault)
    assert inboxes.faults.statistics().current_buffer_used == 0


async def test_what_fails_in_a_rank_that_follows_is_the_engines_fault() -> None:
    async with started("fails") as (executor, inboxes):
        executor.launch(plan(1, 1))
        fault = await inboxes.faults.receive()
    assert "ArithmeticError in the worker process: step 1 is too much" in str(fault)


async def test_a_rank_that_cannot_get_ready_is_told_at_once_with_the_class_of_its_error() -> None:
    # Rank 0 would wait for it.
    executor = ProcessExecutor("worker_runners:open_linked", [None, None])
    with trio.fail_after(30):
        with pytest.raises(ValueError, match="tensor_parallel must be 1"):
            await executor.open(order("unready"), NullProgress())
        await executor.kill()


async def test_a_worker_runs_where_it_is_told_to() -> None:
    cpu = max(os.sched_getaffinity(0))
    executor = ProcessExecutor("worker_runners:open_echo", [Place((cpu,))])
    with trio.fail_after(30):
        await executor.open(order(), NullProgress())
        assert os.sched_getaffinity(executor.pids[0]) == {cpu}
        await executor.close()


async def test_no_worker_is_left_when_not_all_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Child] = []

    def start(opener: str, ranks: RankOrder, place: Place | None) -> Child:
        if ranks.rank == 2:
            raise OSError("no more processes")
        started.append(Child(opener, ranks, place))
        return started[-1]

    monkeypatch.setattr(process, "Child", start)
    with pytest.raises(OSError, match="no more processes"):
        ProcessExecutor("worker_runners:open_linked", [None] * 3)
    assert len(started) == 2
    with trio.fail_after(30):
        for child in started:
            # Alive it would say nothing, and wait for a message.
            assert await child.receive() is None
            assert "was killed by SIGKILL" in str(await child.death())


def test_nobody_keeps_what_ties_ranks_together() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with rank_orders(3) as orders:
        assert [order.rank for order in orders] == [0, 1, 2]
        assert [len(order.links) for order in orders] == [2, 1, 1]
        assert len({link for order in orders for link in order.links}) == 4
    assert len(list(Path("/proc/self/fd").iterdir())) == before
