"""The worker process: what crosses to it and back, and that neither end outlives the other."""

import ctypes
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from executor_inboxes import Inboxes
from triode import errors
from triode.actors.executor import process as process_module
from triode.actors.executor.process import ProcessExecutor
from triode.actors.executor.protocol import Failed, Frames, Stepped, encode, from_engine, from_worker
from triode.actors.executor.worker import POLL_S, sleep_exactly
from triode.cache.messages import BlockCopy
from triode.ids import BlockId, SlotId, StepId, TokenId, pack_tokens
from triode.models.guide import Refusal, Regex
from triode.models.progress import NullProgress
from triode.models.runner import RunnerStatistics
from triode.models.sampling import MAX_SEED, SamplingParams
from triode.models.step import (
    Admission,
    Output,
    RowError,
    StepPlan,
    StepResult,
    TableChange,
    TokenLogprobs,
)
from worker_runners import BUILT, order, plan

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def has_child(pid: int) -> bool:
    """Whether the process is a child of this one, running or not yet waited for."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def wait_for_end(pidfd: int, within_s: float) -> bool:
    """Whether the process ends in time. It need not be a child."""
    ended, _, _ = select.select([pidfd], [], [], within_s)
    return bool(ended)


@asynccontextmanager
async def started(opener: str, model: str = "none") -> AsyncIterator[tuple[ProcessExecutor, Inboxes]]:
    """A running executor."""
    executor, inboxes = ProcessExecutor(f"worker_runners:{opener}"), Inboxes()
    with trio.fail_after(60):
        assert await executor.open(order(model), NullProgress()) == BUILT
        executor.start(inboxes.put, inboxes.fault)
        try:
            yield executor, inboxes
        finally:
            await executor.close()
    assert not has_child(executor.pids[0])


FULL_PLAN = StepPlan(
    step_id=StepId(2**40),
    slots=(SlotId(0), SlotId(3)),
    epochs=(1, 70_000),
    start_positions=(0, 5),
    num_query_tokens=(16, 1),
    outputs=(Output.PROMPT_LOGPROBS_AND_SAMPLE, Output.HIDDEN),
    admissions=(
        Admission(
            slot=SlotId(0),
            epoch=1,
            packed_ids=pack_tokens((1, 2)),
            num_prompt_tokens=2,
            params=SamplingParams(
                temperature=0.3,
                seed=MAX_SEED,
                logit_bias={7: float("-inf"), 8: 1.1},
                bad_words=("a", "ü"),
                stop=("\n",),
                stop_token_ids=(4,),
                logprobs=0,
                prompt_logprobs=3,
            ),
            seed=MAX_SEED,
            sample_index=0,
            stop_token_ids=(TokenId(4), TokenId(2)),
            bad_word_ids=((TokenId(5),), (TokenId(6), TokenId(7))),
        ),
    ),
    table_changes=(TableChange(SlotId(0), 0, (BlockId(9), BlockId(8))),),
    copies=(BlockCopy(BlockId(1), BlockId(2)),),
)
FULL_RESULT = StepResult(
    step_id=StepId(2**40),
    slots=(SlotId(0), SlotId(3)),
    epochs=(1, 70_000),
    num_accepted=(1, 0),
    token_ids=(TokenId(11),),
    logprobs=(TokenLogprobs(TokenId(11), -0.1, 1, (TokenId(11), TokenId(3)), (-0.1, float("-inf"))),),
    errors=(None, RowError("no token has a finite logit", is_unsatisfiable=False)),
    prompt_logprobs=((TokenLogprobs(TokenId(2), -1e-30, 2),), ()),
    embeddings=((), (0.1, -1 / 3)),
    forward_s=0.1,
    sample_s=1e-9,
)


def test_a_plan_arrives_as_it_was_sent() -> None:
    assert from_engine.decode(encode(FULL_PLAN)[4:]) == FULL_PLAN


def test_a_result_arrives_as_it_was_sent() -> None:
    message = Stepped(FULL_RESULT, RunnerStatistics(num_steps=3, forward_s=1 / 3))
    assert from_worker.decode(encode(message)[4:]) == message


@given(st.lists(st.integers(0, 300), max_size=5), st.lists(st.integers(1, 700), min_size=1))
def test_messages_are_the_same_however_the_stream_is_cut(sizes: list[int], cuts: list[int]) -> None:
    stream = b"".join(encode(plan(size, *range(size))) for size in sizes)
    frames, found = Frames(), []
    while stream:
        cut = cuts[len(stream) % len(cuts)]
        frames.feed(stream[:cut])
        stream = stream[cut:]
        while (body := frames.take()) is not None:
            found.append(from_engine.decode(body))
    assert found == [plan(size, *range(size)) for size in sizes]


TRIODE_ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", [ValueError, *TRIODE_ERRORS])
def test_an_error_that_a_caller_may_expect_keeps_its_class(kind: type[Exception]) -> None:
    error = Failed(kind.__name__, "told", "File somewhere").error()
    assert (type(error), str(error)) == (kind, "told")
    assert "File somewhere" in error.__notes__[0]


async def test_guides_are_checked_beside_the_runner_while_it_runs() -> None:
    async with started("open_echo") as (executor, inboxes):
        refusals: list[Refusal | None] = []

        async def check(number: int) -> None:
            refusals.append(await executor.check_guide(Regex("a" * number)))

        async with trio.open_nursery() as nursery:
            for number in range(1, 6):
                nursery.start_soon(check, number)
            executor.launch(plan(0, 3, 4))
            assert await inboxes.token() == 7
        assert refusals == [Refusal("guide must be None: there is no model")] * 5
        with trio.move_on_after(0):
            await executor.check_guide(Regex("given up"))
        assert await executor.check_guide(Regex("b")) == Refusal("guide must be None: there is no model")


async def test_a_worker_keeps_a_guide_for_all_requests_that_have_it_and_lets_go_of_it() -> None:
    async with started("open_keeping") as (executor, inboxes):
        step_ids = itertools.count()

        async def num_kept() -> int:
            executor.launch(plan(next(step_ids), 1))
            await inboxes.token()
            return executor.statistics().num_rows

        for num_requests in range(1, 34):
            assert await executor.check_guide(Regex("a")) is None
            assert num_requests <= await num_kept() < num_requests + 16
        for num_requests in reversed(range(1, 33)):
            executor.release_guide(Regex("a"))
            assert num_requests <= await num_kept() < num_requests + 32
        executor.release_guide(Regex("a"))
        assert await num_kept() == 0


async def test_results_come_back_in_order_with_the_runners_figures() -> None:
    async with started("open_echo") as (executor, inboxes):
        for step_id in range(20):
            executor.launch(plan(step_id, step_id))
        assert [await inboxes.token() for _ in range(20)] == list(range(20))
        assert executor.statistics() == RunnerStatistics(num_steps=20)


async def test_a_plan_larger_than_the_sockets_buffer_is_sent_without_waiting() -> None:
    prompt = [100_000 - i for i in range(100_000)]
    async with started("open_echo") as (executor, inboxes):
        os.kill(executor.pids[0], signal.SIGSTOP)
        for step_id in range(4):
            executor.launch(plan(step_id, *prompt, step_id))
        assert executor._child._unsent
        os.kill(executor.pids[0], signal.SIGCONT)
        assert [await inboxes.token() for _ in range(4)] == [sum(prompt) + step_id for step_id in range(4)]
        assert not executor._child._unsent


async def test_a_runner_that_can_be_woken_is_so_ahead_of_its_plan() -> None:
    executor, inboxes = ProcessExecutor("worker_runners:open_waking"), Inboxes()
    with trio.fail_after(60):
        assert await executor.open(order(), NullProgress()) == replace(BUILT, wakes=True)
        executor.start(inboxes.put, inboxes.fault)
        for step_id in range(3):
            executor.wake()
            executor.launch(plan(step_id, step_id))
            assert await inboxes.token() == step_id
        assert executor.statistics() == RunnerStatistics(num_steps=3, num_rows=3)
        await executor.close()


async def test_a_runner_that_cannot_be_woken_is_sent_nothing() -> None:
    async with started("open_echo") as (executor, inboxes):
        os.kill(executor.pids[0], signal.SIGSTOP)
        for _ in range(2_000):
            executor.wake()
        assert not executor._child._unsent
        os.kill(executor.pids[0], signal.SIGCONT)
        executor.launch(plan(0, 5))
        assert await inboxes.token() == 5


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody oversleeps")
def test_a_thread_that_sleeps_exactly_oversleeps_by_little_and_leaves_others_alone() -> None:
    libc, get_timer_slack, slacks_ns = ctypes.CDLL(None), 30, []

    def measure() -> None:
        slacks_ns.append(libc.prctl(get_timer_slack, 0, 0, 0, 0))
        sleep_exactly()
        slacks_ns.append(libc.prctl(get_timer_slack, 0, 0, 0, 0))

    before_ns = libc.prctl(get_timer_slack, 0, 0, 0, 0)
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    assert slacks_ns[0] == before_ns
    assert slacks_ns[1] * 1e-9 < POLL_S / 10
    assert libc.prctl(get_timer_slack, 0, 0, 0, 0) == before_ns


async def test_a_plan_is_launched_while_the_step_before_it_runs() -> None:
    async with started("open_pairing") as (executor, inboxes):
        executor.launch(plan(0, 10))
        executor.launch(plan(1, 11))
        assert await inboxes.token() == 10
        executor.launch(plan(2, 12))
        assert await inboxes.token() == 11


async def test_a_step_that_ends_while_no_plan_waits_is_answered() -> None:
    async with started("open_late") as (executor, inboxes):
        for step_id in range(3):
            executor.launch(plan(step_id, step_id))
            assert await inboxes.token() == step_id


async def test_two_workers_run_beside_each_other() -> None:
    async with started("open_echo") as (first, from_first), started("open_echo") as (second, from_second):
        assert first.pids[0] != second.pids[0]
        first.launch(plan(0, 1))
        second.launch(plan(0, 2))
        assert (await from_second.token(), await from_first.token()) == (2, 1)


class Stages:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def stage(self, name: str, total: int | None, unit: str) -> None:
        self.seen.append((name, total, unit))

    def advance(self, amount: int) -> None:
        self.seen.append((amount,))

    def done(self) -> None:
        self.seen.append(())


async def test_progress_is_shown_where_the_engine_is() -> None:
    stages, executor = Stages(), ProcessExecutor("worker_runners:open_echo")
    await executor.open(order(), stages)
    await executor.close()
    assert stages.seen == [("Starting the worker", None, ""), (), ("Echoing", 2, "B"), (2,), ()]


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("UnsupportedModel", errors.UnsupportedModel, "^it has what nobody has\nIn the worker process:"),
        ("missing", errors.EngineFault, "^KeyError in the worker process: 'missing'\n(?s:.*) in open_nothing"),
        ("SIGSEGV", errors.EngineFault, "(?s)^the worker process .* was killed by SIGSEGV.*Segmentation fault"),
    ],
)
async def test_a_load_that_fails_says_why(model: str, kind: type[Exception], message: str) -> None:
    executor = ProcessExecutor("worker_runners:open_nothing")
    with pytest.raises(kind, match=message):
        await executor.open(order(model), NullProgress())
    await executor.kill()
    assert not has_child(executor.pids[0])


class Impatient(NullProgress):
    """A progress that cancels."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope

    def stage(self, name: str, total: int | None, unit: str) -> None:
        if name == "Loading for ever":
            self._scope.cancel()


async def test_a_load_that_is_cancelled_leaves_no_worker() -> None:
    executor = ProcessExecutor("worker_runners:open_nothing")
    with trio.fail_after(60):
        with trio.CancelScope() as scope:
            await executor.open(order("endless"), Impatient(scope))
        assert scope.cancelled_caught
        await executor.kill()
    assert not has_child(executor.pids[0])


async def test_a_step_that_fails_is_a_fault_with_the_workers_traceback() -> None:
    async with started("open_failing") as (executor, inboxes):
        executor.launch(plan(0, 5))
        executor.launch(plan(1))
        error = await inboxes.faults.receive()
        assert await inboxes.token() == 5
    assert type(error) is errors.EngineFault
    assert str(error) == "ArithmeticError in the worker process: step 1 is too much"
    assert "in launch" in error.__notes__[0]


async def test_a_worker_that_dies_is_a_fault_with_its_last_words() -> None:
    async with started("open_dying") as (executor, inboxes):
        executor.launch(plan(1))
        error = await inboxes.faults.receive()
    assert str(error) == (
        f"the worker process {executor.pids[0]} ended with exit status 3; its last words were:\n"
        "something is wrong with the device"
    )


async def test_a_worker_that_is_killed_is_a_fault_within_a_second(tmp_path: Path) -> None:
    async with started("open_stuck", str(tmp_path / "began")) as (executor, inboxes):
        executor.launch(plan(0))
        os.kill(executor.pids[0], signal.SIGKILL)
        with trio.fail_after(1):
            error = await inboxes.faults.receive()
        assert not has_child(executor.pids[0])
        # Whoever has not heard of it yet may still send.
        executor.launch(plan(1))
    assert f"the worker process {executor.pids[0]} was killed by SIGKILL" in str(error)


async def test_a_result_goes_out_while_the_next_step_is_still_being_launched(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with started("open_waiting", str(pipe)) as (executor, inboxes):
        executor.launch(plan(0, 3))
        executor.launch(plan(1, 4))
        with trio.fail_after(60):
            assert await inboxes.token() == 3
        await trio.to_thread.run_sync(pipe.write_text, "")
        assert await inboxes.token() == 4


async def test_closing_lets_the_running_step_end_and_the_runner_close(caplog: pytest.LogCaptureFixture) -> None:
    async with started("open_echo") as (executor, inboxes):
        executor.launch(plan(0, 8))
        await executor.close()
    assert executor._child._process.returncode == 0
    assert "closed" in [record.message for record in caplog.records]
    with pytest.raises(trio.WouldBlock):
        inboxes.faults.receive_nowait()


async def test_closing_kills_a_step_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "CLOSE_DEADLINE_S", 0.1)
    with pytest.raises(errors.EngineFault, match=r"has not ended within 0\.1 s: its process was killed"):
        async with started("open_stuck", str(tmp_path / "began")) as (executor, _):
            executor.launch(plan(0))
    assert not has_child(executor.pids[0])


@linux_only
@pytest.mark.parametrize("num_cycles", [3, pytest.param(20, marks=pytest.mark.slow)])
async def test_opening_and_closing_leaves_no_file_and_no_process(num_cycles: int) -> None:
    before = None
    for _ in range(num_cycles):
        async with started("open_echo") as (executor, inboxes):
            executor.launch(plan(0, 1))
            await inboxes.token()
        # The first cycle opens what Trio keeps.
        before = before or num_open_files()
        assert num_open_files() == before


ENGINE = """
import os, sys, trio
from worker_runners import order, plan
from triode.actors.executor.process import ProcessExecutor
from triode.models.progress import NullProgress

async def main():
    executor = ProcessExecutor("worker_runners:" + sys.argv[1])
    await executor.open(order(sys.argv[2]), NullProgress())
    executor.start(print, print)
    executor.launch(plan(0))
    while not os.path.exists(sys.argv[2]):
        await trio.sleep(0.01)
    print(executor.pids[0], flush=True)
    try:
        await trio.sleep_forever()
    finally:
        await executor.kill()

trio.run(main)
"""


class EngineProcess:
    """A process of its own, and process group, whose worker is in the middle of a step."""

    def __init__(self, opener: str, began: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, opener, str(began)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.worker_pidfd = os.pidfd_open(json.loads(self.process.stdout.readline()))

    def close(self) -> str:
        """What it wrote to stderr."""
        os.close(self.worker_pidfd)
        return self.process.communicate()[1].decode()


async def test_a_worker_in_the_middle_of_a_step_leaves_when_the_engine_hangs_up(tmp_path: Path) -> None:
    began = tmp_path / "began"
    executor = ProcessExecutor("worker_runners:open_stuck")
    with trio.fail_after(60):
        await executor.open(order(str(began)), NullProgress())
        executor.launch(plan(0))
        # The worker tells nobody but the file system.
        while not began.exists():  # noqa: ASYNC110
            await trio.sleep(0.01)
        executor._child._socket.close()
        assert await executor._child.end(deadline_s=20)


@linux_only
@pytest.mark.parametrize("opener", ["open_stuck", "open_stuck_holding"])
def test_a_worker_does_not_outlive_an_engine_that_is_killed(opener: str, tmp_path: Path) -> None:
    engine = EngineProcess(opener, tmp_path / "began")
    os.kill(engine.process.pid, signal.SIGKILL)
    assert wait_for_end(engine.worker_pidfd, within_s=20)
    engine.close()


async def test_a_worker_ignores_ctrl_c() -> None:
    async with started("open_echo") as (executor, inboxes):
        os.kill(executor.pids[0], signal.SIGINT)
        executor.launch(plan(0, 6))
        assert await inboxes.token() == 6


@linux_only
def test_ctrl_c_is_for_the_engine_to_handle_and_leaves_no_worker(tmp_path: Path) -> None:
    engine = EngineProcess("open_stuck", tmp_path / "began")
    os.killpg(engine.process.pid, signal.SIGINT)
    assert wait_for_end(engine.worker_pidfd, within_s=20)
    written = engine.close()
    assert engine.process.returncode == -signal.SIGINT
    assert written.count("Traceback") == 1
