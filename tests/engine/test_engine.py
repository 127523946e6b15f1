"""What a caller may ask of an engine in its own Trio program, and what it gets."""

import math
from collections.abc import Sequence

import pytest
import trio
import trio.testing

import triode
from engines import LONG, complete, drawn, greedy, open_gated, open_tiny
from triode.actors.mailbox import NUM_REMEMBERED
from triode.engine.completion import Result
from triode.models.step import TokenLogprobs

PROMPT = "The quick brown fox jumps over the lazy dog, and then it rests."
CHAT = [{"role": "user", "content": "Say hello."}]


def ids(result: Result) -> tuple[int, ...]:
    return result.completion.token_ids


async def test_a_submission_can_be_awaited_and_entered() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, greedy(5))
        awaited = await stream.result()
        async with engine.submit(PROMPT, greedy(5)) as stream:
            entered = await stream.result()
        assert ids(awaited) == ids(entered)
        assert len(ids(awaited)) == 5


@pytest.mark.parametrize("executor", ["inline", "thread"])
async def test_text_token_ids_and_messages_are_prompts(executor: str) -> None:
    async with open_tiny(executor=executor) as engine:
        tokenizer = engine._hub.parts.tokenizer
        from_text = await complete(engine, PROMPT, greedy(6))
        from_ids = await complete(engine, tokenizer.encode(PROMPT), greedy(6))
        assert ids(from_text) == ids(from_ids)
        from_chat = await complete(engine, CHAT, greedy(6))
        from_template = await complete(engine, tokenizer.apply_chat_template(CHAT), greedy(6))
        assert ids(from_chat) == ids(from_template)
        assert engine.report.executor == executor


async def test_the_text_is_that_of_the_tokens() -> None:
    async with open_tiny(executor="inline") as engine:
        completion = (await complete(engine, PROMPT, greedy(40))).completion
        assert completion.text == engine._hub.parts.tokenizer.decode(completion.token_ids)


async def test_several_samples_differ_and_each_is_complete() -> None:
    async with open_tiny(executor="inline") as engine:
        result = await complete(engine, PROMPT, drawn(8, n=3))
        assert [completion.index for completion in result.completions] == [0, 1, 2]
        assert len({completion.token_ids for completion in result.completions}) == 3
        assert all(completion.finish_reason == "length" for completion in result.completions)
        assert result.usage.completion_tokens == 24
        with pytest.raises(ValueError, match="completion needs n = 1, got n = 3: use completions"):
            _ = result.completion


async def test_logprobs_are_parallel_to_tokens_and_in_order() -> None:
    async with open_tiny(executor="inline") as engine:
        completion = (await complete(engine, PROMPT, greedy(6, logprobs=4))).completion
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        for entry in completion.logprobs:
            assert (entry.rank, entry.top_ids[0]) == (1, entry.token_id)
            assert entry.top_logprobs == tuple(sorted(entry.top_logprobs, reverse=True))
            assert len(entry.top_ids) == 4
        plain = (await complete(engine, PROMPT, greedy(6))).completion
        assert (plain.token_ids, plain.logprobs) == (completion.token_ids, None)


async def test_prompt_logprobs_score_what_was_generated_alike() -> None:
    """A model that wrote the text and one that reads it agree on every token."""
    async with open_tiny(executor="inline") as engine:
        prompt = engine._hub.parts.tokenizer.encode(PROMPT)
        written = (await complete(engine, prompt, greedy(9, logprobs=2))).completion
        read = await complete(engine, [*prompt, *written.token_ids], greedy(1, prompt_logprobs=2))
        assert read.prompt_logprobs is not None
        assert written.logprobs is not None
        assert len(read.prompt_logprobs) == len(prompt) + 9 - 1
        assert read.prompt_logprobs[-9:] == written.logprobs


async def test_logprobs_sum_to_one() -> None:
    def mass(entries: Sequence[TokenLogprobs]) -> float:
        return sum(math.exp(value) for value in entries[0].top_logprobs)

    async with open_tiny(executor="inline") as engine:
        completion = (await complete(engine, PROMPT, greedy(1, logprobs=64))).completion
        assert completion.logprobs is not None
        assert 0 < mass(completion.logprobs) < 1


async def test_usage_counts_what_the_prefix_cache_saved() -> None:
    async with open_tiny(executor="inline") as engine:
        prompt = list(range(100, 150))
        first = await complete(engine, prompt, greedy(4))
        again = await complete(engine, prompt, greedy(4))
        assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.cached_tokens) == (50, 4, 0)
        assert (again.usage.cached_tokens, ids(again)) == (48, ids(first))


async def test_a_prompt_is_shared_from_when_its_step_is_launched() -> None:
    async with open_gated() as (engine, gate):
        prompt = list(range(100, 140))
        async with engine.submit(prompt, greedy(3)), engine.submit(prompt, greedy(1)) as second:
            await trio.testing.wait_all_tasks_blocked()
            gate.open()
            assert (await second.result()).usage.cached_tokens == 32


async def test_generated_tokens_are_cached_too() -> None:
    async with open_tiny(executor="inline") as engine:
        prompt = list(range(100, 130))
        first = await complete(engine, prompt, greedy(40))
        turn = await complete(engine, [*prompt, *ids(first), 5, 6, 7], greedy(1))
        # The last token was sampled but never computed: 69 of 70 tokens fill 4 blocks.
        assert turn.usage.cached_tokens == 64


async def test_a_cache_salt_keeps_prefixes_to_those_who_know_it() -> None:
    async with open_tiny(executor="inline") as engine:
        prompt = list(range(100, 150))
        cached = [
            (await complete(engine, prompt, greedy(1), cache_salt=salt)).usage.cached_tokens
            for salt in ("ann", "bob", None, "ann", "bob", None)
        ]
        assert cached == [0, 0, 0, 48, 48, 48]


async def test_pinned_prefixes_survive_clear() -> None:
    async with open_tiny(executor="inline") as engine:
        prompt = list(range(100, 150))
        assert await engine.cache.pin(prompt) == 0
        await complete(engine, prompt, greedy(1))
        assert await engine.cache.pin(prompt, cache_salt="other") == 0
        assert await engine.cache.pin(prompt) == 48
        assert engine.statistics().cache.num_pinned_blocks == 3
        assert await engine.cache.clear() == 0
        assert (await complete(engine, prompt, greedy(1))).usage.cached_tokens == 48
        assert await engine.cache.unpin(prompt) == 48
        assert await engine.cache.unpin(prompt) == 0
        assert await engine.cache.clear() == 48
        assert (await complete(engine, prompt, greedy(1))).usage.cached_tokens == 0


async def test_statistics_count_no_prefix_that_has_expired(autojump_clock: trio.testing.MockClock) -> None:
    async with open_tiny(executor="inline", prefix_cache_ttl_s=60) as engine:
        await complete(engine, list(range(64)), greedy(1))
        await trio.sleep(30)
        assert engine.statistics().cache.num_cached_blocks == 4
        await trio.sleep(31)
        assert (engine.statistics().cache.num_cached_blocks, engine.statistics().cache.num_expired_blocks) == (0, 4)


async def test_a_stop_token_ends_the_output_where_it_is_sampled() -> None:
    async with open_tiny(executor="inline") as engine:
        plain = await complete(engine, PROMPT, greedy(12))
        stop = ids(plain)[5]
        length = ids(plain).index(stop) + 1
        stopped = (await complete(engine, PROMPT, greedy(12, stop_token_ids=(stop,)))).completion
        assert stopped.token_ids == ids(plain)[:length]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
        decode = engine._hub.parts.tokenizer.decode
        assert stopped.text == decode(stopped.token_ids[:-1])
        kept = (await complete(engine, PROMPT, greedy(12, stop_token_ids=(stop,), include_stop=True))).completion
        assert (kept.text, kept.token_ids) == (decode(stopped.token_ids), stopped.token_ids)


async def test_a_stop_string_ends_the_output_across_token_borders() -> None:
    async with open_tiny(executor="inline") as engine:
        plain = (await complete(engine, PROMPT, greedy(12))).completion
        decode = engine._hub.parts.tokenizer.decode
        head = len(decode(plain.token_ids[:6]))
        stop = plain.text[head - 2 : head + 2]
        at = plain.text.index(stop)
        stopped = (await complete(engine, PROMPT, greedy(12, stop=("never", stop)))).completion
        assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (plain.text[:at], "stop", stop)
        assert len(decode(stopped.token_ids)) >= at + len(stop)
        assert stopped.usage.completion_tokens == len(stopped.token_ids) < 12
        kept = (await complete(engine, PROMPT, greedy(12, stop=(stop,), include_stop=True))).completion
        assert kept.text == plain.text[: at + len(stop)]


async def test_no_stop_is_honoured_before_min_tokens() -> None:
    async with open_tiny(executor="inline") as engine:
        plain = await complete(engine, PROMPT, greedy(12))
        first = ids(plain)[0]
        late = (await complete(engine, PROMPT, greedy(12, stop_token_ids=(first,), min_tokens=4))).completion
        assert first not in late.token_ids[:4]
        assert len(late.token_ids) >= 4
        text = plain.completion.text[:1]
        string = (await complete(engine, PROMPT, greedy(12, stop=(text,), min_tokens=4))).completion
        assert len(string.token_ids) > 4


async def test_without_max_tokens_the_output_takes_the_room_that_is_left() -> None:
    async with open_tiny(executor="inline", max_context_tokens=64) as engine:
        params = triode.SamplingParams(temperature=0, ignore_eos=True)
        result = await complete(engine, list(range(100, 150)), params)
        assert (result.max_tokens, len(ids(result)), result.completion.finish_reason) == (14, 14, "length")


async def test_a_drawn_seed_is_reported_and_repeats_the_output() -> None:
    async with open_tiny(executor="inline") as engine:
        params = triode.SamplingParams(max_tokens=12, ignore_eos=True)
        first, second = [await complete(engine, PROMPT, params) for _ in range(2)]
        assert first.seed != second.seed
        assert ids(first) != ids(second)
        again = await complete(engine, PROMPT, drawn(12, seed=first.seed))
        assert (again.seed, again.completion.seed, ids(again)) == (first.seed, first.seed, ids(first))


async def test_status_follows_a_request_through_its_life() -> None:
    async with open_gated(max_step_tokens=32, max_running=1) as (engine, gate):
        seen = []
        async with (
            engine.submit(PROMPT, greedy(1)) as first,
            engine.submit(list(range(100, 150)), greedy(3), request_id="mine") as stream,
        ):
            seen.append(engine.status("mine"))
            await gate.step()
            await first.result()
            for _ in range(4):
                seen.append(engine.status("mine"))
                await gate.step()
            seen.append(engine.status("mine"))
            assert stream.status is engine.status("mine")
        assert [status.value for status in seen] == ["queued", "prefill", "prefill", "decode", "decode", "finished"]
        with pytest.raises(KeyError, match="no request has the id 'other'"):
            engine.status("other")


async def test_the_executor_is_woken_for_a_request_that_comes_to_an_engine_at_rest() -> None:
    async with open_gated() as (engine, gate):
        first = await engine.submit(PROMPT, greedy(3))
        second = await engine.submit(PROMPT, greedy(3))
        assert gate.num_woken == 1
        gate.open()
        await first.result()
        await second.result()
        third = await engine.submit(PROMPT, greedy(3))
        assert gate.num_woken == 2
        await third.result()


async def test_the_executor_is_woken_before_anything_else_and_once_until_a_request_is_there() -> None:
    async with open_gated() as (engine, gate):
        with pytest.raises(ValueError, match="prompt"):
            engine.submit(b"")
        assert gate.num_woken == 1
        submissions = [engine.submit(PROMPT, greedy(3)) for _ in range(3)]
        assert gate.num_woken == 1
        gate.open()
        for submission in submissions:
            await (await submission).result()
        # A rest lay before the second and the third one, too.
        assert gate.num_woken == 3
    with pytest.raises(triode.EngineClosed):
        await engine.submit(PROMPT, greedy(3))
    assert gate.num_woken == 3


async def test_a_waiting_request_is_queued() -> None:
    async with open_gated(max_running=1) as (engine, gate):
        first = await engine.submit(PROMPT, greedy(3))
        second = await engine.submit(PROMPT, greedy(3))
        assert (first.status, second.status) == ("prefill", "queued")
        gate.open()
        await second.result()
        assert (first.status, second.status) == ("finished", "finished")


async def test_the_last_requests_to_end_are_remembered() -> None:
    async with open_gated(max_queued=NUM_REMEMBERED + 1) as (engine, _):
        for index in range(NUM_REMEMBERED + 1):
            async with engine.submit([1, 2, 3], greedy(1), request_id=str(index)):
                pass
        await trio.testing.wait_all_tasks_blocked()
        assert engine.status("1") == engine.status(str(NUM_REMEMBERED)) == "cancelled"
        with pytest.raises(KeyError, match="ended more than 4096 requests ago"):
            engine.status("0")


async def test_requests_can_be_cancelled_by_id() -> None:
    async with open_tiny(executor="inline") as engine:
        stream = await engine.submit(PROMPT, greedy(LONG), request_id="mine")
        engine.cancel("mine")
        engine.cancel("mine")
        engine.cancel("nobody's")
        result = await stream.result()
        assert (result.completion.finish_reason, result.reason) == ("cancelled", "cancelled by the caller")
        assert engine.status("mine") == "cancelled"
        engine.cancel("mine")


async def order_of_service(set_priority: bool) -> list[str]:
    """Which of three requests ends when, two of them waiting for the first one's place."""
    order: list[str] = []
    async with open_gated(max_running=1) as (engine, gate), trio.open_nursery() as nursery:

        async def read(stream: triode.RequestStream) -> None:
            await stream.result()
            order.append(stream.request_id)

        for name in ("running", "first", "second"):
            nursery.start_soon(read, await engine.submit(PROMPT, greedy(3), request_id=name))
        if set_priority:
            engine.set_priority("second", -1)
        gate.open()
    return order


async def test_equals_are_served_in_order_of_arrival() -> None:
    assert await order_of_service(set_priority=False) == ["running", "first", "second"]


async def test_a_lower_priority_number_is_served_first() -> None:
    # It even takes the place of the running one.
    order = await order_of_service(set_priority=True)
    assert order.index("second") < order.index("first")


async def test_priority_is_given_at_submit_too() -> None:
    async with open_gated(max_running=1) as (engine, gate), trio.open_nursery() as nursery:
        order: list[str] = []

        async def read(stream: triode.RequestStream) -> None:
            await stream.result()
            order.append(stream.request_id)

        for name, priority in (("running", 0), ("late", 5), ("early", 1)):
            nursery.start_soon(read, await engine.submit(PROMPT, greedy(3), request_id=name, priority=priority))
        gate.open()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["running", "early", "late"]


async def test_priority_of_an_unknown_request_is_a_key_error() -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(KeyError, match="no unfinished request has the id 'nobody'"):
            engine.set_priority("nobody", 1)


async def test_a_request_ends_at_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with open_gated() as (engine, gate):
        stream = await engine.submit(PROMPT, greedy(LONG), deadline_s=30)
        await gate.step(3)
        start = trio.current_time()
        result = await stream.result()
        assert trio.current_time() - start == pytest.approx(30)
        assert (result.completion.finish_reason, result.reason) == ("cancelled", "its deadline has passed")
        assert 0 < len(ids(result)) <= 3
        gate.open()


async def test_a_deadline_that_is_kept_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with open_tiny(executor="inline") as engine:
        result = await complete(engine, PROMPT, greedy(3), deadline_s=30)
        await trio.sleep(60)
        assert result.completion.finish_reason == "length"
        assert engine.statistics().num_unfinished == 0


async def test_a_full_queue_is_busy_until_a_request_ends() -> None:
    async with open_gated(max_queued=2) as (engine, gate):
        streams = [await engine.submit(PROMPT, greedy(2)) for _ in range(2)]
        with pytest.raises(triode.EngineBusy, match="unfinished requests must be <= max_queued = 2; try again later"):
            await engine.submit(PROMPT, greedy(2))
        gate.open()
        await streams[0].result()
        await complete(engine, PROMPT, greedy(2))
        await streams[1].result()


async def test_a_closed_engine_takes_nothing() -> None:
    async with open_tiny(executor="inline") as engine:
        await complete(engine, PROMPT, greedy(1), request_id="mine")
    with pytest.raises(triode.EngineClosed, match="the engine has been closed; open another"):
        await engine.submit(PROMPT)
    with pytest.raises(triode.EngineClosed, match="has been closed"):
        await engine.cache.clear()
    with pytest.raises(triode.EngineClosed, match="has been closed"):
        engine.set_priority("mine", 0)
    assert engine.status("mine") == "finished"
    engine.cancel("mine")
    assert engine.statistics().num_unfinished == 0


async def test_an_id_is_unique_among_unfinished_requests_only() -> None:
    async with open_tiny(executor="inline") as engine:
        async with engine.submit(PROMPT, greedy(LONG), request_id="mine") as stream:
            with pytest.raises(ValueError, match="request_id must be unique among unfinished requests, got 'mine'"):
                await engine.submit(PROMPT, greedy(1), request_id="mine")
            stream.cancel()
            await stream.result()
        result = await complete(engine, PROMPT, greedy(1), request_id="mine")
        assert result.request_id == "mine"
        assert engine.status("mine") == "finished"


async def test_embeddings_are_of_the_prompt_alone() -> None:
    async with open_tiny(executor="inline") as engine:
        first, other, again = await engine.embed([PROMPT, CHAT, PROMPT])
        assert first == again != other
        assert len(first) == 64
        # Of one token there is only one hidden state.
        assert await engine.embed([[7]], pooling="last") == await engine.embed([[7]], pooling="mean")
        assert await engine.embed([PROMPT], pooling="last") != [first]
        assert engine.statistics().num_unfinished == 0


async def test_statistics_count_what_happened() -> None:
    async with open_tiny(executor="thread") as engine:
        await complete(engine, list(range(100, 150)), greedy(5))
        now = engine.statistics()
        assert (now.num_submitted, now.num_unfinished) == (1, 0)
        assert (now.runner.num_query_tokens, now.runner.num_sampled_tokens) == (54, 5)
        assert now.runner.num_steps == now.scheduler.num_steps == 5
        assert now.actors.executor.num_messages == 5
        assert now.actors.tokenizer.num_messages == 1
        assert now.cache.num_query_tokens == 50
        assert now.runner.forward_s > 0


async def test_generate_keeps_the_order_of_the_prompts() -> None:
    async with open_tiny(executor="thread") as engine:
        prompts = [list(range(100, 101 + length)) for length in (40, 3, 17, 1, 30)]
        results = await engine.generate(prompts, [greedy(1 + index) for index in range(5)])
        assert [result.usage.prompt_tokens for result in results] == [41, 4, 18, 2, 31]
        assert [len(ids(result)) for result in results] == [1, 2, 3, 4, 5]


async def test_generate_takes_one_params_for_all_and_no_prompts() -> None:
    async with open_tiny(executor="inline") as engine:
        assert await engine.generate([]) == []
        results = await engine.generate([PROMPT, CHAT], greedy(2))
        assert [len(ids(result)) for result in results] == [2, 2]


async def test_generate_never_has_more_under_way_than_the_engine_takes() -> None:
    async with open_tiny(executor="inline", max_running=2, max_queued=3) as engine:
        results = await engine.generate([[index + 1] for index in range(20)], greedy(2))
        assert len(results) == 20


async def test_generate_raises_for_the_prompt_that_is_refused_and_cancels_the_others() -> None:
    async with open_tiny(executor="inline") as engine:
        with pytest.raises(ValueError, match="prompt must have at least one token, got none"):
            await engine.generate([PROMPT, PROMPT, "", PROMPT], greedy(LONG))
        await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().num_unfinished == 0


async def test_generate_tells_how_many_are_done() -> None:
    told: list[object] = []

    class Told:
        def stage(self, name: str, total: int | None, unit: str) -> None:
            told.append((name, total, unit))

        def advance(self, amount: int) -> None:
            told.append(amount)

        def done(self) -> None:
            told.append("done")

    async with open_tiny(executor="inline") as engine:
        await engine.generate([PROMPT] * 3, greedy(1), progress=Told())
    assert told == [("Generating", 3, "prompts"), 1, 1, 1, "done"]


async def test_batches_that_fill_the_queue_together_wait_for_each_other() -> None:
    async with open_tiny(max_queued=3, max_running=2) as engine:
        lengths: list[int] = []

        async def generate(first: int) -> None:
            results = await engine.generate([[first, index] for index in range(8)], greedy(4, ignore_eos=True))
            lengths.extend(len(result.completion.token_ids) for result in results)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, 1)
            nursery.start_soon(generate, 2)
        assert lengths == [4] * 16


async def test_embeddings_of_a_list_are_those_of_each() -> None:
    async with open_tiny(max_running=2) as engine:
        prompts = [[1, 2, 3], [4, 5], [6]]
        assert await engine.embed(prompts) == [(await engine.embed([prompt]))[0] for prompt in prompts]


async def test_a_batch_waits_while_others_fill_the_queue() -> None:
    async with open_gated(max_queued=2) as (engine, gate):
        others = [await engine.submit(PROMPT, greedy(2)) for _ in range(2)]
        lengths: list[int] = []
        vectors: list[tuple[float, ...]] = []

        async def generate() -> None:
            results = await engine.generate([[1], [2], [3]], greedy(4))
            lengths.extend(len(ids(result)) for result in results)

        async def embed() -> None:
            vectors.extend(await engine.embed([[4], [5]]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate)
            nursery.start_soon(embed)
            await trio.testing.wait_all_tasks_blocked()
            assert engine.is_full
            assert engine.statistics().num_submitted == 2
            gate.open()
        assert (lengths, len(vectors)) == ([4, 4, 4], 2)
        assert [len(ids(await other.result())) for other in others] == [2, 2]
        assert not engine.is_full


async def test_a_batch_that_waits_for_a_place_takes_none_when_it_is_cancelled() -> None:
    async with open_gated(max_queued=1) as (engine, gate):
        other = await engine.submit(PROMPT, greedy(2))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.generate, [PROMPT], greedy(2))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        gate.open()
        await other.result()
        assert engine.statistics().num_submitted == 1
        await complete(engine, PROMPT, greedy(2))


async def test_closing_the_engine_ends_the_wait_of_every_batch() -> None:
    refused: list[str] = []

    async def generate(engine: triode.Engine) -> None:
        with pytest.raises(triode.EngineClosed) as caught:
            await engine.generate([PROMPT], greedy(2))
        refused.append(str(caught.value))

    async with (
        trio.open_nursery() as nursery,
        open_gated(max_queued=1) as (engine, _),
        engine.submit(PROMPT, greedy(2)),
    ):
        for _ in range(3):
            nursery.start_soon(generate, engine)
        await trio.testing.wait_all_tasks_blocked()
    assert refused == ["the engine has been closed; open another"] * 3
