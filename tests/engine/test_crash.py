"""A bug in any actor: whoever waits learns the cause at once, and the engine ends."""

import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

import triode
from crashes import CORES, Bomb, Boom
from engines import LONG, LONG_TEXT, complete, greedy, open_gated, open_tiny, threads_of_ours
from triode.cache.manager import CacheManager
from triode.engine.engine import Engine
from triode.errors import EngineFault

DEADLINE_S = 1.0
"""A caller that learns later has been left hanging."""


class Callers:
    """Tasks outside the engine's block, and what each of them has heard."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.heard: dict[str, BaseException] = {}
        self._nursery = nursery

    def call(self, name: str, function: Callable[[], Awaitable[object]]) -> None:
        async def run() -> None:
            try:
                await function()
            except Exception as error:
                self.heard[name] = error

        self._nursery.start_soon(run)

    def check(self, names: set[str], cause: type[BaseException]) -> None:
        assert set(self.heard) == names
        for error in self.heard.values():
            assert isinstance(error, EngineFault)
            assert isinstance(error.__cause__, cause)
        assert len(set(map(id, self.heard.values()))) == len(names)


async def use_everything(engine: Engine, callers: Callers) -> None:
    """Every kind of call that waits for the engine, each under way."""
    read, iterated = [await engine.submit([1, 2, 3], greedy(LONG)) for _ in range(2)]

    async def iterate() -> None:
        async for _ in iterated:
            pass

    callers.call("result", read.result)
    callers.call("iteration", iterate)
    callers.call("generate", lambda: engine.generate([[1, 2, 3]] * 8, greedy(LONG)))
    callers.call("submit", lambda: complete(engine, LONG_TEXT, greedy(1)))
    while engine.statistics().scheduler.num_running < 10:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("actor", CORES)
@pytest.mark.parametrize("executor", ["inline", "thread"])
async def test_whoever_waits_learns_the_cause_within_a_second(
    actor: str, executor: str, monkeypatch: pytest.MonkeyPatch, encoding: threading.Event
) -> None:
    bomb = Bomb(monkeypatch, actor)
    async with trio.open_nursery() as nursery:
        callers = Callers(nursery)
        with pytest.raises(EngineFault, match=f"^the {actor} failed: Boom: it broke$") as raised:
            async with open_tiny(executor=executor) as engine:
                await use_everything(engine, callers)
                names = {"result", "iteration", "generate", "submit"}
                start_s = trio.current_time()
                bomb.is_armed = True
                if actor == "tokenizer":
                    callers.call("another", lambda: complete(engine, [1], greedy(1)))
                    names.add("another")
                await trio.sleep_forever()
        assert isinstance(raised.value.__cause__, Boom)
    assert trio.current_time() - start_s < DEADLINE_S
    callers.check(names, Boom)


@pytest.mark.parametrize("actor", CORES)
async def test_a_reader_in_the_block_gets_the_cause_and_so_does_the_block(
    actor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = Bomb(monkeypatch, actor)
    bomb.is_armed = True
    with pytest.raises(EngineFault, match=f"the {actor} failed: Boom: it broke") as left:
        async with open_tiny(executor="thread") as engine:
            with pytest.raises(EngineFault, match=f"the {actor} failed: Boom: it broke") as read:
                await complete(engine, [1, 2, 3], greedy(3))
            assert isinstance(read.value.__cause__, Boom)
            raise read.value
    assert isinstance(left.value.__cause__, Boom)


async def test_after_a_fault_every_call_raises_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "scheduler")
    with pytest.raises(EngineFault, match="the scheduler failed"):
        async with open_tiny(executor="inline") as engine:
            stream = await engine.submit([1, 2, 3], greedy(LONG), request_id="mine")
            bomb.is_armed = True
            with pytest.raises(EngineFault):
                await stream.result()
            for call in (lambda: engine.submit([1]), engine.cache.clear):
                with pytest.raises(EngineFault, match="the scheduler failed: Boom: it broke"):
                    await call()
            with pytest.raises(EngineFault, match="the scheduler failed"):
                engine.set_priority("mine", 1)
            assert engine.status("mine") == "failed"
            stream.cancel()
            engine.cancel("mine")
            assert engine.statistics().num_unfinished == 0
    with pytest.raises(EngineFault, match="the scheduler failed: Boom: it broke"):
        await engine.submit([1])


async def test_who_asks_the_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin(self: CacheManager, _: object) -> None:
        raise Boom("it broke")

    monkeypatch.setattr(CacheManager, "pin", pin)
    async with trio.open_nursery() as nursery:
        callers = Callers(nursery)
        with pytest.raises(EngineFault, match="the cache failed"):
            async with open_tiny(executor="inline") as engine:
                callers.call("pin", lambda: engine.cache.pin([1, 2, 3]))
                await trio.sleep_forever()
    callers.check({"pin"}, Boom)


async def test_an_embedding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "executor")
    bomb.is_armed = True
    with pytest.raises(EngineFault, match="the executor failed"):
        async with open_tiny(executor="thread") as engine:
            with pytest.raises(EngineFault, match="the executor failed"):
                await engine.embed([[1, 2, 3]])


async def test_a_body_that_does_not_wait_for_the_engine_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "scheduler")
    is_cancelled = False
    with pytest.raises(EngineFault, match="the scheduler failed"):
        async with open_tiny(executor="thread") as engine:
            stream = await engine.submit([1, 2, 3], greedy(LONG))
            bomb.is_armed = True
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                is_cancelled = True
                raise
    assert is_cancelled
    with pytest.raises(EngineFault, match="the scheduler failed"):
        await stream.result()


async def test_a_fault_wins_over_the_error_that_it_led_to(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "detokenizer")
    bomb.is_armed = True
    with pytest.raises(EngineFault, match="the detokenizer failed") as raised:
        async with open_tiny(executor="inline") as engine:
            try:
                await complete(engine, [1], greedy(1))
            except EngineFault as fault:
                raise KeyError("a poor handler") from fault
    assert isinstance(raised.value.__cause__, Boom)


async def test_an_exit_in_an_actor_leaves_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bomb(monkeypatch, "scheduler", partial(sys.exit, 3))
    with pytest.raises(SystemExit):
        async with open_tiny(executor="inline") as engine:
            stream = await engine.submit([1, 2, 3], greedy(LONG))
            bomb.is_armed = True
            await trio.sleep_forever()
    with pytest.raises(EngineFault, match="the scheduler failed: SystemExit"):
        await stream.result()


def test_ctrl_c_falls_before_a_request_is_sent_or_after_not_between(monkeypatch: pytest.MonkeyPatch) -> None:
    reschedule = trio.lowlevel.reschedule
    is_pressed = False
    presser: trio.lowlevel.Task | None = None

    def press(task: trio.lowlevel.Task) -> None:
        nonlocal is_pressed
        if not is_pressed and trio.lowlevel.current_task() is presser:
            is_pressed = True
            signal.raise_signal(signal.SIGINT)
        reschedule(task)

    async def press_ctrl_c() -> None:
        nonlocal presser
        presser = trio.lowlevel.current_task()
        async with open_tiny(executor="inline") as engine:
            # Afterwards the tokenizer waits for its next message.
            await complete(engine, [1, 2, 3], greedy(2))
            with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
                patch.setattr(trio.lowlevel, "reschedule", press)
                await complete(engine, [1, 2, 3], greedy(2))
            assert is_pressed
            with trio.fail_after(DEADLINE_S * 10):
                result = await complete(engine, [1, 2, 3], greedy(2))
            assert len(result.completion.token_ids) == 2

    trio.run(press_ctrl_c)


@pytest.mark.parametrize("actor", CORES)
def test_ctrl_c_while_an_actor_works_is_raised_in_the_callers_code(actor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def press_ctrl_c() -> None:
        finger = Bomb(monkeypatch, actor, partial(signal.raise_signal, signal.SIGINT))
        async with open_tiny(executor="inline") as engine:
            finger.is_armed = True
            with pytest.raises(KeyboardInterrupt):
                await complete(engine, [1, 2, 3], greedy(LONG))
            assert finger.went_off
            # The engine has not even noticed.
            assert len((await complete(engine, [1, 2, 3], greedy(2))).completions[0].token_ids) == 2

    trio.run(press_ctrl_c)


async def test_the_thread_of_a_failed_engine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for actor in CORES:
        with monkeypatch.context() as patch:
            bomb = Bomb(patch, actor)
            bomb.is_armed = True
            with pytest.raises(EngineFault):
                async with open_tiny(executor="thread") as engine:
                    await complete(engine, [1, 2, 3], greedy(5))
    assert threads_of_ours() == []


async def test_a_step_that_never_ends_is_abandoned_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from triode.actors.executor import thread
    from triode.models.eager import EagerRunner

    may_end = threading.Event()
    launch = EagerRunner.launch

    def hang(self: EagerRunner, plan: object) -> None:
        may_end.wait(20)
        launch(self, plan)  # type: ignore[arg-type]

    monkeypatch.setattr(EagerRunner, "launch", hang)
    monkeypatch.setattr(thread, "CLOSE_DEADLINE_S", 0.05)
    with pytest.raises(EngineFault, match=r"has not ended within 0\.05 s: its thread and memory are abandoned"):
        async with open_tiny(executor="thread") as engine, engine.submit([1, 2, 3], greedy(1)):
            await trio.testing.wait_all_tasks_blocked()
    may_end.set()


async def test_neighbours_of_a_closing_engine_are_untouched() -> None:
    async with open_gated() as (outer, gate):
        stream = await outer.submit([1, 2, 3], greedy(4))
        async with open_tiny(executor="inline") as inner:
            await complete(inner, [1, 2, 3], greedy(4))
        gate.open()
        assert len((await stream.result()).completion.token_ids) == 4


def test_faults_are_triode_errors() -> None:
    assert issubclass(EngineFault, triode.TriodeError)
