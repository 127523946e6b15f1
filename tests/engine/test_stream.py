"""Reading one request: what its stream brings, to whom, and what becomes of it when nobody reads on."""

import gc
import threading
from collections.abc import Sequence

import pytest
import trio
import trio.testing

import triode
from engines import LONG, LONG_TEXT, check_nothing_is_left, complete, drawn, greedy, open_gated, open_tiny
from triode.actors.mailbox import Mailbox, TrioWaker
from triode.errors import RequestFailed

PROMPT = "The quick brown fox jumps over the lazy dog, and then it rests."


def joined(deltas: Sequence[triode.Delta]) -> tuple[str, tuple[int, ...]]:
    return "".join(delta.text for delta in deltas), tuple(token for delta in deltas for token in delta.token_ids)


@pytest.mark.parametrize("executor", ["inline", "thread"])
async def test_the_deltas_of_a_stream_are_its_completion(executor: str) -> None:
    async with open_tiny(executor=executor) as engine:
        stream = await engine.submit(PROMPT, greedy(20, logprobs=1))
        deltas = [delta async for delta in stream]
        completion = stream.completion
        assert joined(deltas) == (completion.text, completion.token_ids)
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
        assert tuple(entry for delta in deltas for entry in delta.logprobs or ()) == completion.logprobs


async def test_batches_hold_everything_since_the_last_call() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, drawn(6, n=2, logprobs=0))
        await gate.step(5)
        batch = await stream.batch()
        assert sorted(delta.index for delta in batch) == [0, 1]
        assert all(len(delta.token_ids) == len(delta.logprobs or ()) > 1 for delta in batch)
        gate.open()
        batches = [batch]
        while batch := await stream.batch():
            batches.append(batch)
        for index, completion in enumerate(stream.completions):
            own = [delta for batch in batches for delta in batch if delta.index == index]
            assert joined(own) == (completion.text, completion.token_ids)
        assert await stream.batch() == []


async def test_iterating_batching_and_result_go_together() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(6))
        await gate.step(2)
        first = await anext(stream)
        await gate.step(2)
        rest = await stream.batch()
        gate.open()
        result = await stream.result()
        tail = [delta async for delta in stream]
        assert joined([first, *rest, *tail]) == (result.completion.text, result.completion.token_ids)
        assert await stream.result() == result


async def test_a_reader_who_lags_misses_nothing() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(30))
        gate.open()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.status == "finished"
        assert len(joined([delta async for delta in stream])[1]) == 30


@pytest.mark.parametrize("iterates", [True, False])
async def test_a_result_that_is_asked_for_late_has_all_that_came(iterates: bool) -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit([1, 2, 3, 4], greedy(3, prompt_logprobs=1))
        await gate.step(3)
        assert stream.status.is_final
        if iterates:
            assert joined([delta async for delta in stream])[1] != ()
        late = await stream.result()
        assert late.prompt_logprobs is not None
        assert len(late.prompt_logprobs) == 3


async def test_a_completion_grows_with_what_is_read() -> None:
    async with open_gated() as (engine, gate):
        async with engine.submit(PROMPT, greedy(LONG)) as stream:
            assert (stream.completion.text, stream.completion.finish_reason) == ("", None)
            await gate.step(3)
            await stream.batch()
            assert len(stream.completion.token_ids) == 3
        gate.open()


async def test_a_reader_wakes_at_most_once_a_step() -> None:
    async with open_gated() as (engine, gate), trio.open_nursery() as nursery:
        stream = await engine.submit(PROMPT, drawn(5, n=4))
        batches: list[int] = []

        async def read() -> None:
            while batch := await stream.batch():
                batches.append(len(batch))

        nursery.start_soon(read)
        while stream.status != "finished":
            before = len(batches)
            await gate.step()
            assert len(batches) <= before + 1
        assert max(batches) == 4


@pytest.mark.parametrize("num_tokens", [20, 150])
async def test_whoever_wants_the_whole_is_seldom_woken(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[Mailbox] = []
    notify = TrioWaker.notify

    def count(waker: TrioWaker, mailbox: Mailbox) -> None:
        woken.append(mailbox)
        notify(waker, mailbox)

    monkeypatch.setattr(TrioWaker, "notify", count)
    async with open_tiny(executor="inline") as engine:
        results = await engine.generate([PROMPT] * 3, greedy(num_tokens))
    assert [result.usage.completion_tokens for result in results] == [num_tokens] * 3
    # Queued, and the end.
    assert len(woken) <= 3 * 2


async def test_giving_up_on_the_whole_leaves_what_came_to_the_next_reader() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(6))
        with trio.move_on_after(1):
            await stream.result()
        await gate.step(3)
        with trio.move_on_after(1):
            await stream.result()
        first = await anext(stream)
        assert len(first.token_ids) == 3
        gate.open()
        assert len((await stream.result()).completion.token_ids) == 6


async def test_cancelling_a_stream_ends_it() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(LONG))
        await gate.step(3)
        stream.cancel()
        stream.cancel()
        read = [delta async for delta in stream]
        assert len(joined(read)[1]) == 3
        assert (stream.completion.finish_reason, stream.status) == ("cancelled", "cancelled")
        gate.open()
        await check_nothing_is_left(engine)


async def test_leaving_the_block_cancels_and_reading_on_tells_so() -> None:
    async with open_gated() as (engine, gate):
        async with engine.submit(PROMPT, greedy(LONG)) as stream:
            await gate.step(2)
        result = await stream.result()
        assert (result.completion.finish_reason, result.reason) == ("cancelled", "cancelled by the caller")
        async with await engine.submit(PROMPT, greedy(LONG)) as stream:
            pass
        assert (await stream.result()).completion.finish_reason == "cancelled"
        gate.open()
        await check_nothing_is_left(engine)


async def test_a_stream_that_is_dropped_unfinished_is_cancelled_with_a_warning() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, greedy(LONG), request_id="dropped")
        with pytest.warns(ResourceWarning, match="request dropped was dropped unfinished"):
            del stream
        await check_nothing_is_left(engine)
        assert engine.status("dropped") == "cancelled"


async def test_a_stream_that_is_dropped_after_its_end_is_silent() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, greedy(2))
        while stream.status != "finished":
            await trio.testing.wait_all_tasks_blocked()
        del stream
        gc.collect()


async def test_a_dropped_stream_of_a_closed_engine_is_silent() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, greedy(LONG))
    del stream
    gc.collect()


async def test_two_tasks_on_one_stream_are_refused() -> None:
    async with open_gated() as (engine, gate), trio.open_nursery() as nursery:
        stream = await engine.submit(PROMPT, greedy(2))
        nursery.start_soon(stream.result)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match="another task is already reading this stream"):
            await anext(stream)
        gate.open()


async def test_a_reader_that_gives_up_leaves_the_stream_to_the_next() -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(3))
        with trio.move_on_after(0):
            await anext(stream)
        gate.open()
        assert len((await stream.result()).completion.token_ids) == 3


async def test_cancelling_the_scope_of_a_reader_cancels_the_request() -> None:
    async with open_gated() as (engine, gate):
        with trio.move_on_after(0):
            async with engine.submit(PROMPT, greedy(LONG)):
                await trio.sleep_forever()
        with trio.CancelScope() as scope:
            async with engine.submit(PROMPT, greedy(LONG)) as stream:
                await gate.step(2)
                scope.cancel()
                await stream.result()
        gate.open()
        await check_nothing_is_left(engine)


async def test_a_stream_ends_with_its_engine() -> None:
    async with open_gated() as (engine, gate), trio.open_nursery() as nursery:
        stream = await engine.submit(PROMPT, greedy(LONG))
        await gate.step(2)
        engine._hub.close()
        nursery.start_soon(stream.result)
    result = await stream.result()
    assert (result.completion.finish_reason, result.reason) == ("cancelled", "the engine was closed")
    assert len(result.completion.token_ids) == 2


async def test_a_reader_outside_the_block_is_woken_when_the_engine_closes() -> None:
    results = []
    async with trio.open_nursery() as nursery, open_gated() as (engine, _):
        stream = await engine.submit(PROMPT, greedy(LONG))

        async def read() -> None:
            results.append(await stream.result())

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
    assert results[0].completion.finish_reason == "cancelled"


async def test_a_submit_outside_the_block_is_told_when_the_engine_closes(encoding: threading.Event) -> None:
    async def submit(engine: triode.Engine) -> None:
        with pytest.raises(RequestFailed, match="ended before it was queued: the engine was closed"):
            await engine.submit(LONG_TEXT)

    async with trio.open_nursery() as nursery, open_tiny(executor="inline") as engine:
        nursery.start_soon(submit, engine)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_request_cancelled_by_id_before_it_is_queued_says_so(encoding: threading.Event) -> None:
    async def submit(engine: triode.Engine) -> None:
        with pytest.raises(RequestFailed, match="mine ended before it was queued: cancelled by the caller"):
            await engine.submit(LONG_TEXT, request_id="mine")

    async with open_tiny(executor="inline") as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(submit, engine)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.status("mine") == "queued"
            engine.cancel("mine")
        encoding.set()
        await check_nothing_is_left(engine)


async def test_an_embedding_ends_with_its_engine() -> None:
    async with trio.open_nursery() as nursery, open_gated() as (engine, _):

        async def embed() -> None:
            with pytest.raises(RequestFailed, match="the engine was closed"):
                await engine.embed([PROMPT])

        nursery.start_soon(embed)
        await trio.testing.wait_all_tasks_blocked()


async def test_an_embedding_that_is_given_up_is_cancelled() -> None:
    async with open_gated() as (engine, gate):
        with trio.move_on_after(0.01):
            await engine.embed([PROMPT])
        gc.collect()
        gate.open()
        await check_nothing_is_left(engine)


async def test_what_no_token_can_satisfy_fails_alone() -> None:
    async with open_tiny(executor="thread") as engine:
        everything = {token: float("-inf") for token in range(49_152)}
        async with engine.submit(PROMPT, greedy(20)) as neighbour:
            stream = await engine.submit(PROMPT, greedy(3, logit_bias=everything))
            for _ in range(2):
                with pytest.raises(RequestFailed, match="no token is possible"):
                    await stream.result()
            with pytest.raises(RequestFailed, match="no token is possible"):
                await stream.batch()
            assert (stream.status, stream.completion.finish_reason) == ("failed", "error")
            assert (await neighbour.result()).completion.finish_reason == "length"
        await check_nothing_is_left(engine)


async def test_text_never_holds_half_a_character() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, drawn(100))
        deltas = [delta async for delta in stream]
        decoded = engine._hub.parts.tokenizer.decode(stream.completion.token_ids)
        assert joined(deltas)[0] == decoded


async def test_identical_requests_give_identical_streams() -> None:
    async with open_tiny(executor="thread") as engine:
        results = [await complete(engine, PROMPT, drawn(20, n=2)) for _ in range(3)]
        assert len({tuple(c.token_ids for c in result.completions) for result in results}) == 1
