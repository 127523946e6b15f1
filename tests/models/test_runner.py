"""The eager runner on a tiny random model: a sequence's output depends on nothing but the sequence."""

import gc
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import msgspec
import numpy as np
import pytest
import torch

from native_steps import native_decoder, native_library
from runner_world import RunnerWorld, tiny_config, tiny_decoder, tiny_weights
from triode.cache.config import CacheConfig
from triode.cache.messages import BlockCopy
from triode.errors import InsufficientMemory
from triode.kernels.threads import cpu_threads
from triode.models import eager
from triode.models.batch import StepBatch
from triode.models.build import build_runner
from triode.models.decoder import Decoder
from triode.models.native import NativeDecoder
from triode.models.quantization import plan_weights
from triode.models.sampler import ALL_FORBIDDEN, SampledRows
from triode.models.sampling import SamplingParams
from triode.models.slots import SlotState
from triode.models.step import Output, Pooling, StepResult, TableChange

DRAWN = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2, logprobs=3)


def prompt(length: int, seed: int = 0) -> list[int]:
    return Random(seed).choices(range(499), k=length)


def completed(world: RunnerWorld, params: SamplingParams, *, chunk: int, num_tokens: int = 12) -> tuple[object, object]:
    """A prompt of 50 tokens, alone, in chunks, then decoded."""
    running = world.admit(3, prompt(50), params, seed=7)
    world.prefill(running, chunk)
    world.decode(running, num_tokens=num_tokens - 1)
    return running.output, running.logprobs


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0, logprobs=2), DRAWN])
def test_chunked_prefill_gives_the_tokens_and_logprobs_of_one_shot(params: SamplingParams, chunk: int) -> None:
    whole = completed(RunnerWorld(seed=1), params, chunk=50)
    assert completed(RunnerWorld(seed=2), params, chunk=chunk) == whole


def test_a_sequence_among_busy_neighbours_says_what_it_says_alone() -> None:
    alone = completed(RunnerWorld(seed=1), DRAWN, chunk=50)
    world = RunnerWorld(seed=3)
    running = world.admit(5, prompt(50), DRAWN, seed=7)
    decoding = world.admit(0, prompt(20, 1), SamplingParams(temperature=0, frequency_penalty=0.5))
    drawing = world.admit(1, prompt(9, 2), SamplingParams(seed=1), seed=1)
    world.step((decoding, 20, Output.SAMPLE), (running, 30, Output.NONE), (drawing, 9, Output.SAMPLE))
    world.step((running, 20, Output.SAMPLE), (drawing, 1, Output.SAMPLE))
    for number in range(11):
        late = world.admit(2, prompt(40 + number, number), SamplingParams(min_p=0.1))
        world.step((late, 30, Output.NONE), (decoding, 1, Output.SAMPLE), (running, 1, Output.SAMPLE))
    assert (running.output, running.logprobs) == alone


def test_greedy_tokens_are_those_of_the_decoder_fed_with_the_whole_sequence() -> None:
    world = RunnerWorld()
    running = world.admit(0, prompt(21))
    world.prefill(running)
    world.decode(running, num_tokens=8)
    for length in range(21, 29):
        check = RunnerWorld()
        again = check.admit(0, running.tokens[:length])
        check.prefill(again)
        assert again.output == [running.tokens[length]]


@pytest.mark.parametrize("preempted_after", [1, 5, 11])
def test_a_readmitted_sequence_goes_on_with_the_same_tokens(preempted_after: int) -> None:
    output, logprobs = completed(RunnerWorld(), DRAWN, chunk=50)
    assert isinstance(output, list)
    assert isinstance(logprobs, list)
    world = RunnerWorld(seed=5)
    resumed = world.admit(2, [*prompt(50), *output[:preempted_after]], DRAWN, num_prompt_tokens=50, seed=7)
    world.prefill(resumed, chunk=13)
    if preempted_after < 11:
        world.decode(resumed, num_tokens=11 - preempted_after)
    assert resumed.output == output
    assert resumed.logprobs == logprobs[preempted_after:]


def test_samples_of_one_request_differ_and_repeat() -> None:
    params = SamplingParams()

    def outputs() -> list[list[int]]:
        world = RunnerWorld()
        samples = [world.admit(index, prompt(10), params, seed=3, sample_index=index) for index in range(4)]
        world.step(*[(running, 10, Output.SAMPLE) for running in samples])
        world.decode(*samples, num_tokens=5)
        return [running.output for running in samples]

    first = outputs()
    assert first == outputs()
    assert len({tuple(output) for output in first}) == 4


def test_a_step_touches_no_block_and_no_slot_of_a_sequence_that_is_not_in_it() -> None:
    world = RunnerWorld()
    resting = world.admit(0, prompt(40))
    busy = world.admit(1, prompt(23, 1))
    world.prefill(resting)
    untouched = resting.blocks
    before = [tensor[untouched].clone() for tensor in (*world.pool.keys, *world.pool.values)]
    world.prefill(busy)
    world.decode(busy, num_tokens=20)
    after = [tensor[untouched] for tensor in (*world.pool.keys, *world.pool.values)]
    # The last block's end is unwritten, hence NaN on both sides.
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, after, strict=True))
    world.decode(resting, num_tokens=1)
    alone = RunnerWorld(seed=9)
    again = alone.admit(0, prompt(40))
    alone.prefill(again)
    alone.decode(again, num_tokens=1)
    assert resting.output == again.output


def test_a_slot_forgets_its_former_sequence() -> None:
    world = RunnerWorld()
    world.prefill(world.admit(3, prompt(100, 4), DRAWN, seed=1))
    assert completed(world, DRAWN, chunk=50) == completed(RunnerWorld(), DRAWN, chunk=50)


def test_a_copied_block_lets_two_samples_go_on_from_one_prompt() -> None:
    world = RunnerWorld()
    first = world.admit(0, prompt(20), DRAWN, seed=7)
    world.prefill(first)
    second = world.admit(1, prompt(20), DRAWN, seed=7, sample_index=1)
    # The full block is shared; the partial one is copied, before the last token of the prompt is computed again.
    copy = world.free.pop()
    world.copies.append(BlockCopy(first.blocks[1], copy))
    second.blocks = [first.blocks[0], copy]
    world.changes.append(TableChange(second.slot, 0, tuple(second.blocks)))
    second.num_computed = 19
    world.step((second, 1, Output.SAMPLE), (first, 1, Output.SAMPLE))
    world.decode(first, second, num_tokens=6)
    for index, running in enumerate((first, second)):
        alone = RunnerWorld(seed=8)
        again = alone.admit(4, prompt(20), DRAWN, seed=7, sample_index=index)
        alone.prefill(again)
        alone.decode(again, num_tokens=len(running.output) - 1)
        assert running.output == again.output


@pytest.mark.parametrize("chunk", [3, 16, 40])
def test_prompt_logprobs_are_those_of_the_raw_logits_whatever_the_chunks(chunk: int) -> None:
    tokens = prompt(75)
    world = RunnerWorld()
    running = world.admit(0, tokens, SamplingParams(temperature=0, prompt_logprobs=2, logit_bias={5: 100.0}))
    for start in range(0, 75, chunk):
        num_tokens = min(chunk, 75 - start)
        ends = start + num_tokens == 75
        output = Output.PROMPT_LOGPROBS_AND_SAMPLE if ends else Output.PROMPT_LOGPROBS
        result = world.step((running, num_tokens, output))
        assert result.num_accepted == (int(ends),)
    assert running.output == [5]
    assert [entry.token_id for entry in running.prompt_logprobs] == tokens[1:]
    for position in (0, 20, 73):
        check = RunnerWorld()
        alone = check.admit(
            0, tokens[: position + 1], SamplingParams(logprobs=2, logit_bias={tokens[position + 1]: 100.0})
        )
        check.prefill(alone)
        assert alone.logprobs == [running.prompt_logprobs[position]]


def test_only_rows_that_ask_get_prompt_logprobs() -> None:
    world = RunnerWorld()
    scored = world.admit(0, prompt(10), SamplingParams(prompt_logprobs=0))
    plain = world.admit(1, prompt(10, 1))
    result = world.step((plain, 10, Output.SAMPLE), (scored, 10, Output.PROMPT_LOGPROBS_AND_SAMPLE))
    assert result.prompt_logprobs is not None
    assert [len(entries) for entries in result.prompt_logprobs] == [0, 9]
    assert world.step((plain, 1, Output.SAMPLE), (scored, 1, Output.SAMPLE)).prompt_logprobs is None


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_an_embedding_does_not_depend_on_chunks_or_neighbours(pooling: Pooling, chunk: int) -> None:
    world = RunnerWorld()
    running, neighbour = world.admit(0, prompt(60), pooling=pooling), world.admit(1, prompt(1, 1))
    while running.num_computed < 60:
        assert running.embedding == ()
        num_tokens = min(chunk, 60 - running.num_computed)
        world.step((neighbour, 1, Output.SAMPLE), (running, num_tokens, Output.HIDDEN))
    alone = RunnerWorld(seed=4)
    again = alone.admit(0, prompt(60), pooling=pooling)
    alone.step((again, 60, Output.HIDDEN))
    assert running.embedding == again.embedding
    assert len(running.embedding) == tiny_config().hidden_size


@pytest.mark.parametrize("program", ["torch", "compiled"])
def test_a_last_token_that_is_computed_alone_has_the_bits_that_it_has_among_all(program: str) -> None:
    native = None if program == "torch" else native_decoder(tiny_config(), tiny_weights())
    decoder: Decoder | NativeDecoder = native or tiny_decoder()
    compute, seen = decoder.forward, []

    def spied(batch: StepBatch, *pool: Sequence[torch.Tensor]) -> torch.Tensor:
        seen.append(compute(replace(batch, wanted_start_R1=batch.rows.query_start_R1), *pool)[: batch.num_tokens])
        return compute(batch, *pool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "forward", spied)
        world = RunnerWorld(native=native)
        running = world.admit(0, prompt(33), pooling=Pooling.LAST)
        world.step((running, 20, Output.HIDDEN))
        world.step((running, 13, Output.HIDDEN))
    assert [len(hidden_TD) for hidden_TD in seen] == [20, 13]
    assert running.embedding == tuple(seen[-1][-1].double().tolist())


@pytest.mark.parametrize("program", ["torch", "compiled", "ahead"])
def test_rows_that_read_one_hidden_state_or_all_or_none_share_a_step(program: str) -> None:
    native = None if program == "torch" else native_decoder(tiny_config(), tiny_weights())
    scoring = SamplingParams(temperature=0, prompt_logprobs=2)

    def world(seed: int) -> RunnerWorld:
        return RunnerWorld(seed=seed, native=native, ahead=program == "ahead")

    together = world(0)
    decoding = together.admit(0, prompt(20))
    together.prefill(decoding)
    scored = together.admit(1, prompt(40, 1), scoring)
    embedded = together.admit(2, prompt(33, 2), pooling=Pooling.MEAN)
    chunked = together.admit(3, prompt(50, 3))
    together.step(
        (chunked, 30, Output.NONE),
        (scored, 25, Output.PROMPT_LOGPROBS),
        (decoding, 1, Output.SAMPLE),
        (embedded, 33, Output.HIDDEN),
    )
    together.step(
        (decoding, 1, Output.SAMPLE), (chunked, 20, Output.SAMPLE), (scored, 15, Output.PROMPT_LOGPROBS_AND_SAMPLE)
    )
    together.step((chunked, 1, Output.SAMPLE), (decoding, 1, Output.SAMPLE))

    alone = world(1)
    scored_alone = alone.admit(1, prompt(40, 1), scoring)
    alone.step((scored_alone, 40, Output.PROMPT_LOGPROBS_AND_SAMPLE))
    assert (scored.output, scored.prompt_logprobs) == (scored_alone.output, scored_alone.prompt_logprobs)
    embedded_alone = alone.admit(2, prompt(33, 2), pooling=Pooling.MEAN)
    alone.step((embedded_alone, 33, Output.HIDDEN))
    assert embedded.embedding == embedded_alone.embedding
    for got, tokens in ((decoding, prompt(20)), (chunked, prompt(50, 3))):
        running = alone.admit(0, tokens)
        alone.prefill(running)
        alone.decode(running, num_tokens=len(got.output) - 1)
        assert got.output == running.output


@pytest.mark.parametrize("program", ["torch", "compiled", "ahead"])
def test_a_row_wants_the_token_that_it_samples_behind_or_all_that_are_read_or_none(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = None if program == "torch" else native_decoder(tiny_config(), tiny_weights())
    decoder: Decoder | NativeDecoder = native or tiny_decoder()
    seen: list[tuple[str, list[int]]] = []

    def spy_on(name: str) -> None:
        compute = getattr(decoder, name)

        def spied(batch: StepBatch, *others: object) -> object:
            seen.append((name, np.diff(batch.wanted_start_R1).tolist()))
            return compute(batch, *others)

        monkeypatch.setattr(decoder, name, spied)

    spy_on("forward")
    if native is not None:
        spy_on("order")
    world = RunnerWorld(native=native, ahead=program == "ahead")
    chunked, decoding = world.admit(0, prompt(50)), world.admit(1, prompt(20, 1))
    world.step((chunked, 10, Output.NONE), (decoding, 20, Output.SAMPLE))
    world.step((chunked, 10, Output.NONE))
    scored = world.admit(2, prompt(40, 2), SamplingParams(temperature=0, prompt_logprobs=2))
    embedded = world.admit(3, prompt(33, 3), pooling=Pooling.MEAN)
    world.step(
        (chunked, 20, Output.NONE),
        (scored, 25, Output.PROMPT_LOGPROBS),
        (decoding, 1, Output.SAMPLE),
        (embedded, 33, Output.HIDDEN),
    )
    last = world.admit(4, prompt(12, 4), pooling=Pooling.LAST)
    world.step((scored, 15, Output.PROMPT_LOGPROBS_AND_SAMPLE), (last, 8, Output.HIDDEN), (chunked, 10, Output.SAMPLE))
    world.step((last, 4, Output.HIDDEN))
    # What is read by Python is computed at once.
    plain = "order" if program == "ahead" else "forward"
    assert seen == [
        (plain, [0, 1]),
        (plain, [0]),
        ("forward", [0, 25, 1, 33]),
        ("forward", [15, 1, 1]),
        ("forward", [1]),
    ]


def test_mean_pooling_is_the_mean_of_the_last_tokens_of_all_prefixes() -> None:
    def embedding(pooling: Pooling, length: int) -> torch.Tensor:
        world = RunnerWorld()
        running = world.admit(0, prompt(9)[:length], pooling=pooling)
        world.step((running, length, Output.HIDDEN))
        return torch.tensor(running.embedding, dtype=torch.float64)

    mean = torch.stack([embedding(Pooling.LAST, length) for length in range(1, 10)]).mean(0)
    torch.testing.assert_close(embedding(Pooling.MEAN, 9), mean)


def test_an_embedding_that_starts_again_forgets_its_first_attempt() -> None:
    world = RunnerWorld()
    world.step((world.admit(0, prompt(60), pooling=Pooling.MEAN), 30, Output.HIDDEN))
    again = world.admit(0, prompt(60), pooling=Pooling.MEAN)
    world.step((again, 60, Output.HIDDEN))
    other = RunnerWorld()
    alone = other.admit(0, prompt(60), pooling=Pooling.MEAN)
    other.step((alone, 60, Output.HIDDEN))
    assert again.embedding == alone.embedding


def test_a_row_without_a_possible_token_fails_alone_and_its_next_step_does_no_harm() -> None:
    world = RunnerWorld()
    forbidden = SamplingParams(logit_bias=dict.fromkeys(range(499), -math.inf), logprobs=0)
    failing, well = world.admit(0, prompt(10), forbidden), world.admit(1, prompt(50), DRAWN, seed=7)
    result = world.step((failing, 10, Output.SAMPLE), (well, 50, Output.SAMPLE))
    assert (result.num_accepted, result.errors) == ((0, 1), (ALL_FORBIDDEN, None))
    assert result.token_ids == tuple(well.output)
    assert result.logprobs == tuple(well.logprobs)
    # Planned before the scheduler knew of the failure.
    world.decode(failing, well, num_tokens=11)
    assert (well.output, well.logprobs) == completed(RunnerWorld(), DRAWN, chunk=50)
    assert failing.output == []


def test_results_come_in_launch_order_and_survive_encoding() -> None:
    world = RunnerWorld()
    first = world.admit(0, prompt(10), SamplingParams(logprobs=2, prompt_logprobs=1))
    world.runner.launch(world.plan((first, 4, Output.PROMPT_LOGPROBS)))
    first.num_computed = 4
    world.runner.launch(world.plan((first, 6, Output.PROMPT_LOGPROBS_AND_SAMPLE)))
    results = [world.runner.collect(), world.runner.collect()]
    assert [result.step_id for result in results] == [0, 1]
    assert [result.num_accepted for result in results] == [(0,), (1,)]
    for result in results:
        assert result.forward_s > 0
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result


def test_rows_that_stay_together_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[int] = []

    def counting(states: list[SlotState], device: torch.device) -> SampledRows:
        prepared.append(len(states))
        return SampledRows(states, device)

    monkeypatch.setattr(eager, "SampledRows", counting)
    world = RunnerWorld()
    first, second = world.admit(0, prompt(5), DRAWN), world.admit(1, prompt(5), DRAWN)
    world.step((first, 5, Output.SAMPLE), (second, 5, Output.SAMPLE))
    world.decode(first, second, num_tokens=5)
    assert prepared == [2]
    world.decode(first, num_tokens=2)
    assert prepared == [2, 1]


def test_statistics_add_up() -> None:
    world = RunnerWorld()
    running = world.admit(0, prompt(20))
    world.prefill(running, chunk=8)
    world.decode(running, num_tokens=2)
    statistics = world.runner.statistics()
    assert (statistics.num_steps, statistics.num_rows) == (5, 5)
    assert (statistics.num_query_tokens, statistics.num_sampled_tokens) == (22, 3)
    assert min(statistics.prepare_s, statistics.forward_s, statistics.sample_s) > 0


def test_a_plan_for_another_epoch_is_a_bug() -> None:
    world = RunnerWorld()
    old = world.admit(0, prompt(5))
    world.prefill(old)
    world.prefill(world.admit(0, prompt(5, 1)))
    with pytest.raises(AssertionError, match="slot 0 is at epoch 2, the plan says 1"):
        world.step((old, 1, Output.SAMPLE))


def test_a_plan_for_a_slot_that_nobody_took_is_a_bug() -> None:
    world = RunnerWorld()
    never = world.admit(1, prompt(5))
    world.admissions.clear()
    with pytest.raises(AssertionError, match="slot 1 is used before its first admission"):
        world.step((never, 5, Output.SAMPLE))


def test_a_plan_past_the_known_tokens_is_a_bug() -> None:
    world = RunnerWorld()
    with pytest.raises(AssertionError, match="step 0 computes tokens that its slots do not have"):
        world.step((world.admit(0, prompt(5)), 6, Output.SAMPLE))


def test_a_plan_that_samples_in_the_middle_is_a_bug() -> None:
    world = RunnerWorld()
    with pytest.raises(AssertionError, match="step 0 samples before the end of a sequence"):
        world.step((world.admit(0, prompt(5)), 4, Output.SAMPLE))


def test_a_plan_without_a_block_for_its_tokens_is_a_bug() -> None:
    world = RunnerWorld()
    running = world.admit(0, prompt(20))
    plan = msgspec.structs.replace(world.plan((running, 20, Output.SAMPLE)), table_changes=())
    with pytest.raises(AssertionError, match="step 0 lacks a block"):
        world.runner.launch(plan)


def test_closing_twice_gives_the_pool_back_once() -> None:
    world = RunnerWorld()
    world.prefill(world.admit(0, prompt(5)))
    pool = weakref.ref(world.pool)
    del world.pool
    world.runner.close()
    world.runner.close()
    gc.collect()
    assert pool() is None


def test_a_built_runner_reports_what_it_takes() -> None:
    config = tiny_config()
    cache_config = CacheConfig(kv_cache_bytes=10 * 8192)
    built = build_runner(config, tiny_weights(), cache_config=cache_config, max_running=4, kernels="reference")
    # 2 layers of keys and values, 16 tokens of 2 heads of 16 float32 numbers.
    assert (built.num_blocks, built.kv_cache_bytes, built.kv_dtype) == (10, 10 * 8192, torch.float32)
    layer = (2 + 1 + 1) * 32 * 64 + 64 * 64 + 3 * 128 * 64 + 2 * 64
    assert built.weights_bytes == 4 * (499 * 64 + 2 * layer + 64)
    assert built.num_threads == torch.get_num_threads()
    assert "paged_attention" in built.kernels


def test_quantised_weights_count_as_what_they_take() -> None:
    native_library()
    built = [
        build_runner(
            tiny_config(), tiny_weights(), cache_config=CacheConfig(), max_running=1, plan=plan_weights(quantization)
        )
        for quantization in ("none", "a8w8")
    ]
    matrices = [runner.step_bytes or 0 for runner in built]
    assert matrices[1] < matrices[0] / 3
    beside = [runner.weights_bytes - num_bytes for runner, num_bytes in zip(built, matrices, strict=True)]
    # A tied embedding is the head's matrix, unless that is rounded: rows of 64 floats for 499 tokens, in panels of 64.
    assert beside[1] - beside[0] == 4 * 512 * 64


def test_a_pool_is_no_larger_than_its_sequences_can_fill() -> None:
    built = build_runner(tiny_config(), tiny_weights(), cache_config=CacheConfig(), max_running=4)
    assert built.num_blocks == 4 * 256 // 16 + 1


def test_a_cache_that_holds_no_block_is_refused() -> None:
    with pytest.raises(InsufficientMemory, match="raise kv_cache_bytes"):
        build_runner(tiny_config(), tiny_weights(), cache_config=CacheConfig(kv_cache_bytes=100), max_running=4)


def test_the_number_of_threads_holds_inside_a_step_only() -> None:
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before
