"""The engine inside an asyncio program."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial, wraps
from typing import Any

import pytest

import triode
from crashes import CORES, Bomb, Boom, pausable_steps
from engines import LONG, LONG_TEXT, SMALL, TINY, drawn, greedy, threads_of_ours
from triode.engine import aio
from triode.engine.host import EngineThread
from triode.errors import EngineClosed, EngineFault, RequestFailed

PROMPT = "The quick brown fox jumps over the lazy dog, and then it rests."


def asyncio_test(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an asyncio loop."""

    @wraps(function)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(function(**fixtures), 30))

    return run


@asynccontextmanager
async def open_tiny(**overrides: Any) -> AsyncIterator[aio.Engine]:
    async with aio.open_engine(TINY, **{**SMALL, **overrides}) as engine:
        yield engine


async def check_nothing_is_left(engine: aio.Engine) -> None:
    while engine.statistics().scheduler.num_requests or engine.statistics().num_unfinished:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    assert engine.statistics().cache.num_used_blocks == 0


@asyncio_test
async def test_a_request_streams_as_under_trio() -> None:
    async with open_tiny() as engine:
        stream = await engine.submit(PROMPT, greedy(20))
        deltas = [delta async for delta in stream]
        assert "".join(delta.text for delta in deltas) == stream.completion.text
        async with engine.submit(PROMPT, greedy(20)) as stream:
            result = await stream.result()
        assert result.completion.token_ids == stream.completion.token_ids
        assert len(result.completion.token_ids) == 20
        assert engine.report.model == TINY


@asyncio_test
async def test_the_surface_is_that_of_trio() -> None:
    async with open_tiny() as engine:
        results = await engine.generate([PROMPT, [1, 2, 3]], greedy(3))
        assert [len(result.completion.token_ids) for result in results] == [3, 3]
        assert await engine.embed([PROMPT, PROMPT]) == 2 * await engine.embed([PROMPT])
        prompt = list(range(100, 150))
        await engine.generate([prompt], greedy(1))
        assert await engine.cache.pin(prompt) == 48
        assert await engine.cache.unpin(prompt) == 48
        assert await engine.cache.clear() > 0
        async with engine.submit(PROMPT, greedy(LONG), request_id="mine", priority=3) as stream:
            engine.set_priority("mine", 1)
            engine.cancel("mine")
            await stream.result()
        assert engine.status("mine") == "cancelled"
        with pytest.raises(KeyError, match="no request has the id 'other'"):
            engine.status("other")
        with pytest.raises(KeyError, match="no unfinished request"):
            engine.set_priority("other", 1)
        assert {name for name in dir(triode.Engine) if name[0] != "_"} <= set(dir(aio.Engine))


@asyncio_test
async def test_refusals_rise_from_submit() -> None:
    async with open_tiny(max_queued=1) as engine:
        with pytest.raises(ValueError, match="prompt must have at least one token"):
            await engine.submit("")
        with pytest.raises(ValueError, match="adapter must be None"):
            engine.submit(PROMPT, adapter="mine")
        async with engine.submit(PROMPT, greedy(LONG), request_id="mine"):
            with pytest.raises(triode.EngineBusy, match="max_queued = 1"):
                await engine.submit(PROMPT)
        await check_nothing_is_left(engine)


@asyncio_test
async def test_leaving_the_loop_and_the_block_frees_the_request() -> None:
    async with open_tiny() as engine:
        async with engine.submit(PROMPT, greedy(LONG)) as stream:
            async for _ in stream:
                break
        await check_nothing_is_left(engine)
        assert stream.status == "cancelled"


@asyncio_test
async def test_a_timeout_frees_the_request() -> None:
    async with open_tiny() as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async with engine.submit(PROMPT, greedy(LONG), request_id="mine") as stream:
                    while await stream.batch():
                        pass
                    await asyncio.sleep(10)
        await check_nothing_is_left(engine)


@asyncio_test
async def test_cancelling_the_task_frees_the_request() -> None:
    async with open_tiny() as engine:

        async def read() -> None:
            async with engine.submit(PROMPT, greedy(LONG), request_id="mine") as stream:
                has_begun.set()
                await stream.result()

        has_begun = asyncio.Event()
        task = asyncio.create_task(read())
        await has_begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await check_nothing_is_left(engine)
        assert engine.status("mine") == "cancelled"


@pytest.mark.parametrize("num_turns", range(6))
@asyncio_test
async def test_cancelling_a_submit_at_any_moment_frees_the_request(num_turns: int) -> None:
    async with open_tiny() as engine:
        task = asyncio.create_task(engine.submit(PROMPT, greedy(LONG))._opening)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        for done in await asyncio.gather(task, return_exceptions=True):
            if isinstance(done, triode.RequestStream):
                done.cancel()
        await check_nothing_is_left(engine)


@asyncio_test
async def test_cancelling_generate_frees_its_requests() -> None:
    async with open_tiny() as engine:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.generate([PROMPT] * 40, greedy(LONG)), 0.05)
        await check_nothing_is_left(engine)


@asyncio_test
async def test_a_dropped_stream_is_cancelled_with_a_warning() -> None:
    async with open_tiny() as engine:
        stream = await engine.submit(PROMPT, greedy(LONG), request_id="mine")
        with pytest.warns(ResourceWarning, match="request mine was dropped unfinished"):
            del stream
        await check_nothing_is_left(engine)


@asyncio_test
async def test_two_tasks_on_one_stream_are_refused() -> None:
    async with (
        open_tiny(max_running=1) as engine,
        engine.submit(PROMPT, greedy(LONG)),
        engine.submit(PROMPT, greedy(1)) as waiting,
    ):
        first = asyncio.create_task(waiting.result())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task is already reading this stream"):
            await waiting.result()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


@asyncio_test
async def test_streams_end_with_their_engine(encoding: threading.Event) -> None:
    async with open_tiny(max_running=1) as engine:
        running = await engine.submit(PROMPT, greedy(LONG))
        waiting = await engine.submit(PROMPT, greedy(LONG))
        tasks = [asyncio.create_task(stream.result()) for stream in (running, waiting)]
        submit = asyncio.create_task(engine.submit(LONG_TEXT)._opening)
        await asyncio.sleep(0.01)
    for result in await asyncio.gather(*tasks):
        assert (result.completion.finish_reason, result.reason) == ("cancelled", "the engine was closed")
    with pytest.raises(RequestFailed, match="ended before it was queued: the engine was closed"):
        await submit


@asyncio_test
async def test_a_closed_engine_takes_nothing() -> None:
    async with open_tiny() as engine:
        stream = await engine.submit(PROMPT, greedy(2), request_id="mine")
        await stream.result()
    with pytest.raises(EngineClosed, match="the engine has been closed; open another"):
        await engine.submit(PROMPT)
    with pytest.raises(EngineClosed, match="has been closed"):
        await engine.generate([PROMPT])
    with pytest.raises(EngineClosed, match="has been closed"):
        await engine.cache.clear()
    with pytest.raises(EngineClosed, match="has been closed"):
        engine.set_priority("mine", 1)
    engine.cancel("mine")


@asyncio_test
async def test_a_closed_engine_still_says_what_was() -> None:
    async with open_tiny() as engine:
        stream = await engine.submit(PROMPT, greedy(2), request_id="mine")
        await stream.result()
    assert engine.status("mine") == "finished"
    assert (engine.statistics().num_submitted, engine.statistics().num_unfinished) == (1, 0)


@asyncio_test
async def test_a_second_cancellation_does_not_leave_the_thread_behind() -> None:
    async def serve() -> None:
        async with open_tiny():
            is_open.set()
            await asyncio.sleep(LONG)

    is_open = asyncio.Event()
    task = asyncio.create_task(serve())
    await is_open.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert threads_of_ours() == []


@asyncio_test
async def test_an_error_of_the_block_leaves_it_bare() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with open_tiny() as engine, engine.submit(PROMPT, greedy(LONG)):
            raise KeyError("mine")


@asyncio_test
async def test_opening_can_be_cancelled_at_once() -> None:
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                async with open_tiny():
                    pass
    assert threads_of_ours() == []


@asyncio_test
async def test_opening_can_be_cancelled_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Loading goes on only when the opening has been cancelled."""

        def stage(self, name: str, total: int | None, unit: str) -> None:
            stages.append(name)
            loop.call_soon_threadsafe(task.cancel)
            is_cancelled.wait(20)

        def advance(self, amount: int) -> None: ...

        def done(self) -> None: ...

    def stop_and_tell(thread: EngineThread) -> None:
        stop(thread)
        tell(thread, num_turns=3)

    def tell(thread: EngineThread, num_turns: int) -> None:
        # The cancellation takes one turn of the loop to get there, and whoever waits for the loading is woken in the next.
        thread._post(partial(tell, thread, num_turns - 1) if num_turns else is_cancelled.set)

    async def open_and_close() -> None:
        async with open_tiny(progress=Slow()):
            stages.append("open")

    stages: list[str] = []
    is_cancelled = threading.Event()
    loop = asyncio.get_running_loop()
    stop = EngineThread.stop
    monkeypatch.setattr(EngineThread, "stop", stop_and_tell)
    task = asyncio.create_task(open_and_close())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stages == ["Starting torch"]


@asyncio_test
async def test_an_engine_that_cannot_open_says_why() -> None:
    with pytest.raises(triode.ModelNotFound, match="there is no random model 'nothing'"):
        async with aio.open_engine("random:nothing"):
            pass


@asyncio_test
async def test_a_step_crosses_once_however_many_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    may_run = pausable_steps(monkeypatch)
    async with open_tiny() as engine:
        may_run.clear()
        streams = [await engine.submit(PROMPT, greedy(30)) for _ in range(8)]
        num_crossings = 0
        cross = loop.call_soon_threadsafe

        def counted(*args: Any, **options: Any) -> asyncio.Handle:
            nonlocal num_crossings
            num_crossings += 1
            return cross(*args, **options)

        before = engine.statistics().runner.num_steps
        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        loop.call_soon(may_run.set)
        await asyncio.gather(*(stream.result() for stream in streams))
        num_steps = engine.statistics().runner.num_steps - before
        assert 0 < num_crossings <= num_steps + 2
        assert num_crossings < 8 * 30 / 2


@pytest.mark.parametrize("actor", CORES)
@asyncio_test
async def test_whoever_waits_learns_the_cause(
    actor: str, monkeypatch: pytest.MonkeyPatch, encoding: threading.Event
) -> None:
    bomb = Bomb(monkeypatch, actor)
    may_run = pausable_steps(monkeypatch, pause_after=5)
    with pytest.raises(EngineFault, match=f"^the {actor} failed: Boom: it broke$") as raised:
        async with open_tiny() as engine:
            stream = await engine.submit(PROMPT, greedy(LONG))
            calls = [
                engine.generate([PROMPT] * 3, greedy(LONG)),
                engine.submit(LONG_TEXT)._opening,
            ]
            tasks = [asyncio.ensure_future(call) for call in calls]
            await anext(stream)
            tasks.append(asyncio.ensure_future(stream.result()))
            bomb.is_armed = True
            if actor == "tokenizer":
                tasks.append(asyncio.ensure_future(engine.submit(PROMPT)._opening))
            else:
                may_run.set()
            async with asyncio.timeout(1):
                errors = await asyncio.gather(*tasks, return_exceptions=True)
            may_run.set()
            with pytest.raises(EngineFault, match=f"the {actor} failed"):
                await engine.submit(PROMPT)
            with pytest.raises(EngineFault, match=f"the {actor} failed"):
                await engine.cache.clear()
    for error in (*errors, raised.value):
        assert isinstance(error, EngineFault)
        assert isinstance(error.__cause__, Boom)


@asyncio_test
async def test_an_answer_that_nobody_waits_for_any_more_harms_nobody() -> None:
    """The call ends between the caller's cancellation and the engine's hearing of it."""
    async with open_tiny() as engine:
        thread: EngineThread = engine._thread
        may_answer = threading.Event()

        async def answer(_: object) -> int:
            may_answer.wait(10)
            return 1

        future, begin, _ = thread.call(answer)
        begin()
        future.cancel()
        may_answer.set()
        assert len(await engine.generate([PROMPT], greedy(1))) == 1


@asyncio_test
async def test_many_tasks_get_what_each_asked_for() -> None:
    async with open_tiny() as engine:
        alone = [(await engine.generate([[index + 1, 7]], drawn(5)))[0].completion.text for index in range(12)]

        async def ask(index: int) -> str:
            async with engine.submit([index + 1, 7], drawn(5)) as stream:
                return "".join([delta.text async for delta in stream])

        assert await asyncio.gather(*(ask(index) for index in range(12))) == alone
    gc.collect()
