"""From opening to closing: what leaves the block, and what stays behind."""

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import trio
import trio.testing

import triode
from engines import LONG, complete, drawn, greedy, open_gated, open_tiny, threads_of_ours
from triode.errors import EngineClosed

BODY_ERRORS = [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration(), StopAsyncIteration(), OSError()]


@pytest.mark.parametrize("error", BODY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("executor", ["inline", "thread"])
async def test_an_exception_of_the_block_leaves_it_bare(error: BaseException, executor: str) -> None:
    with pytest.raises(type(error)) as raised:
        async with open_tiny(executor=executor) as engine:
            stream = await engine.submit([1, 2, 3], greedy(LONG))
            raise error
    assert raised.value is error
    assert stream.status == "cancelled"


async def test_a_group_of_the_block_leaves_it_as_it_is() -> None:
    group = ExceptionGroup("mine", [ValueError("a"), KeyError("b")])
    with pytest.raises(ExceptionGroup) as raised:
        async with open_tiny(executor="inline"):
            raise group
    assert raised.value is group


@pytest.mark.parametrize("executor", ["inline", "thread"])
async def test_cancelling_the_block_from_outside_ends_it(executor: str) -> None:
    with trio.CancelScope() as scope:
        async with open_tiny(executor=executor) as engine, engine.submit([1, 2, 3], greedy(LONG)) as stream:
            scope.deadline = trio.current_time() + 0.02
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert stream.status == "cancelled"
    assert threads_of_ours() == []


async def test_cancelling_the_block_from_inside_ends_it() -> None:
    with trio.CancelScope() as scope:
        async with open_tiny(executor="thread"):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_scope_inside_the_block_is_the_callers_own() -> None:
    async with open_tiny(executor="inline") as engine:
        with trio.move_on_after(0):
            await complete(engine, [1, 2, 3], greedy(LONG))
        assert len((await complete(engine, [1, 2, 3], greedy(2))).completion.token_ids) == 2


async def test_leaving_ends_what_is_unfinished() -> None:
    async with open_gated() as (engine, gate):
        streams = [await engine.submit([1, 2, 3], greedy(LONG)) for _ in range(3)]
        await gate.step(2)
    for stream in streams:
        assert stream.status == "cancelled"
        assert (await stream.result()).reason == "the engine was closed"
    with pytest.raises(EngineClosed):
        await engine.submit([1])


async def test_opening_can_be_cancelled_between_two_stages_of_loading() -> None:
    stages: list[str] = []

    class Cancelling:
        def stage(self, name: str, total: int | None, unit: str) -> None:
            stages.append(name)
            if len(stages) == 2:
                trio.from_thread.run_sync(scope.cancel, trio_token=token)

        def advance(self, amount: int) -> None: ...

        def done(self) -> None: ...

    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        async with open_tiny(progress=Cancelling()):
            stages.append("open")
    assert scope.cancelled_caught
    assert len(stages) == 2


async def test_the_thread_that_loads_has_ended_when_an_engine_is_open() -> None:
    threads: set[threading.Thread] = set()

    class Noting:
        def stage(self, name: str, total: int | None, unit: str) -> None:
            threads.add(threading.current_thread())

        def advance(self, amount: int) -> None: ...

        def done(self) -> None: ...

    async with open_tiny(progress=Noting()):
        assert len(threads) == 1
        assert not any(thread.is_alive() for thread in threads)


async def test_an_error_of_the_progress_stops_the_loading() -> None:
    class Failing:
        def stage(self, name: str, total: int | None, unit: str) -> None:
            raise RuntimeError("the terminal is gone")

        def advance(self, amount: int) -> None: ...

        def done(self) -> None: ...

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        async with open_tiny(progress=Failing()):
            pass


async def test_two_engines_side_by_side_are_strangers() -> None:
    async with open_tiny(executor="thread") as one, open_tiny(executor="thread", weights_seed=1) as other:
        results = {}

        async def ask(name: str, engine: triode.Engine) -> None:
            results[name] = await complete(engine, list(range(50, 90)), drawn(8), request_id="mine")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "one", one)
            nursery.start_soon(ask, "other", other)
        assert results["one"].completion.token_ids != results["other"].completion.token_ids
        assert one.statistics().num_submitted == other.statistics().num_submitted == 1


TORCH_STATE: dict[str, Callable[[], object]] = {
    "threads": torch.get_num_threads,
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "matmul precision": torch.get_float32_matmul_precision,
    "mkldnn": lambda: torch.backends.mkldnn.enabled,
    "random state": lambda: torch.get_rng_state().tolist(),
}


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize("num_threads", [None, 1, 3])
async def test_torch_is_left_as_it_was(executor: str, num_threads: int | None) -> None:
    def state() -> dict[str, object]:
        return {name: look() for name, look in TORCH_STATE.items()}

    before = state()
    async with open_tiny(executor=executor, num_threads=num_threads) as engine:
        await complete(engine, [1, 2, 3], drawn(3))
        await trio.testing.wait_all_tasks_blocked()
        inside = state()
    assert inside == state() == before


async def test_no_thread_and_no_memory_of_ours_stays_behind() -> None:
    def num_tensors() -> int:
        gc.collect()
        # By type, because looking at an attribute of every object wakes lazy modules.
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    async with open_tiny(executor="thread") as engine:
        await complete(engine, [1, 2, 3], greedy(3))
    before = num_tensors()
    for _ in range(3):
        async with open_tiny(executor="thread") as engine:
            await complete(engine, [1, 2, 3], greedy(3))
    assert num_tensors() <= before
    assert threads_of_ours() == []


CYCLES = """
import gc, statistics, sys
import trio, triode

async def cycle():
    settings = dict(dtype="float32", kv_cache_bytes=2**27, max_context_tokens=512)
    async with (
        triode.open_engine(sys.argv[1], **settings) as one,
        triode.open_engine(sys.argv[1], executor="inline", **settings) as other,
    ):
        for engine in (one, other):
            await engine.generate([[index + 1] * 100 for index in range(16)], triode.SamplingParams(max_tokens=8))

def rss_pages():
    return int(open("/proc/self/statm").read().split()[1])

sizes = []
for _ in range(int(sys.argv[2])):
    trio.run(cycle)
    gc.collect()
    sizes.append(rss_pages())
# Single readings scatter by a percent.
print(statistics.median(sizes[-3:]) / statistics.median(sizes[2:5]))
"""


def growth(model: str, num_cycles: int) -> float:
    """Memory after the last cycles of opening, using and closing two engines, over that after the third."""
    command = [sys.executable, "-c", CYCLES, model, str(num_cycles)]
    # Otherwise each thread takes memory of one of several arenas, and it is chance of which.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def test_opening_and_closing_does_not_grow() -> None:
    assert growth("random:tiny", 7) <= 1.05


@pytest.mark.slow
def test_opening_and_closing_twenty_times_does_not_grow() -> None:
    assert growth("smollm2-135m", 20) <= 1.05


def test_a_closed_engine_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from triode.models import eager

    calls: list[bool] = []
    monkeypatch.setattr(eager, "return_freed_memory", lambda: calls.append(True))
    with triode.LLM("random:tiny", kv_cache_bytes=2**21):
        assert calls == []
    assert calls == [True]
