"""The scheduler's rules, each shown on the smallest case that needs it."""

import pytest

from scheduler_world import World
from triode.actors.messages import Cancel, FinishReason, Rejected, RequestStatus, SetPriority
from triode.actors.scheduler.config import SchedulerConfig
from triode.cache.messages import Match, Pin, Reserve
from triode.ids import RequestId
from triode.models.guide import Regex
from triode.models.sampling import SamplingParams
from triode.models.step import Output, Pooling


def world(*, max_running: int = 4, max_step_tokens: int = 16, num_blocks: int = 64, max_in_flight: int = 2) -> World:
    config = SchedulerConfig(max_running=max_running, max_step_tokens=max_step_tokens)
    return World(config, num_blocks=num_blocks, max_in_flight=max_in_flight)


def params(max_tokens: int = 4, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **others)  # type: ignore[arg-type]


def test_a_request_runs_to_its_last_token() -> None:
    w = world()
    request = w.submit(range(5), params(3))
    w.run_to_the_end()
    assert w.seen[request].reasons == {0: FinishReason.LENGTH}
    w.check_at_rest()


def test_two_steps_are_launched_before_the_first_is_read() -> None:
    w = world(max_in_flight=2)
    w.submit(range(5), params(9))
    assert len(w.in_flight) == 2
    assert [plan.start_positions for plan in w.plans] == [(0,), (5,)]


def test_a_prompt_is_cached_from_when_its_step_is_sent_and_its_output_from_when_it_ends() -> None:
    w = world(max_in_flight=2)
    w.submit(range(32), params(40))
    assert [plan.num_query_tokens for plan in w.plans] == [(16,), (16,)]
    assert w.cache.statistics().num_cached_blocks == 2, "each chunk of it"
    sharing = w.submit(range(32 + 1), params(1))
    w.run_to_the_end()
    assert w.seen[sharing].num_cached_tokens == 32
    assert w.cache.statistics().num_cached_blocks == (32 + 40 - 1) // 16
    w.check_at_rest()


def test_blocks_that_were_granted_but_never_computed_are_not_cached() -> None:
    w = world(max_in_flight=1)
    w.cancel_when_granted(w.submit(range(64), params()))
    w.run_to_the_end()
    assert [plan.num_query_tokens for plan in w.plans] == [(16,)], "the second chunk had blocks but no step"
    assert w.cache.statistics().num_cached_blocks == 1
    w.check_at_rest()


def test_forced_tokens_are_computed_together() -> None:
    w = world(max_in_flight=1)
    requests = [w.submit(range(index, index + 5), params(20, guide=Regex("a"))) for index in range(4)]
    w.run_to_the_end()
    assert max(max(plan.num_query_tokens) for plan in w.plans[4:]) > 2
    assert all(w.seen[request].reasons == {0: FinishReason.LENGTH} for request in requests)
    w.check_at_rest()


def test_forced_tokens_may_be_read_while_the_next_step_asks_for_blocks() -> None:
    num_forced = 0
    for first in range(12):
        w = world(max_in_flight=2)
        w.submit(range(first, first + 5), params(20, guide=Regex("a")))
        questions: list[Match | Reserve] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(w, "_ask", questions.append)
            w.retire()
            num_forced += len(w.in_flight[0].token_ids) > 1
            w.retire()
        for question in questions:
            w._ask(question)
        w.run_to_the_end()
        w.check_at_rest()
    assert num_forced > 0


def test_the_last_token_is_never_computed() -> None:
    w = world()
    w.submit(range(5), params(3))
    w.run_to_the_end()
    assert [plan.start_positions for plan in w.plans] == [(0,), (5,), (6,)]


def test_what_a_lost_slot_returns_is_dropped_even_if_the_sequence_has_another() -> None:
    w = world(num_blocks=5, max_in_flight=4)
    w.submit(range(16), params(30))
    w.submit(range(16), params(30))
    w.run_to_the_end()
    w.check_at_rest()


def test_what_a_lost_slot_returns_is_dropped_even_if_the_next_one_has_the_same_epoch() -> None:
    w = world(max_running=5, max_step_tokens=14, num_blocks=6, max_in_flight=4)
    w.submit(range(34), params(8, guide=Regex("a")))
    w.retire()
    loser = w.submit(range(1000, 1027), params(9, guide=Regex("a")), stop_token_ids=(3, 7, 11))
    w.retire()
    w.retire()
    w.submit(range(2000, 2010), params(7, guide=Regex("a")), priority=-2)
    w.submit(range(3000, 3009), params(9, guide=Regex("a")))
    w.run_to_the_end()
    admissions = [admission for plan in w.plans for admission in plan.admissions if len(admission.token_ids) >= 27]
    assert [(a.slot, a.epoch) for a in admissions][1:] == [(1, 1), (2, 1)], "preempted, and admitted elsewhere"
    assert w.seen[loser].is_over
    w.check_at_rest()


def test_a_stop_token_ends_the_output_and_drops_what_was_launched_beyond() -> None:
    w = world()
    request = w.submit(range(5), params(50), stop_token_ids=tuple(range(0, 50, 3)))
    w.run_to_the_end()
    assert w.seen[request].reasons == {0: FinishReason.STOP}
    w.check_at_rest()


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    w = world(max_step_tokens=16)
    w.submit(range(3), params(30))
    w.submit(range(40), params(2))
    mixed = [plan for plan in w.plans if len(plan.slots) == 2]
    w.run_to_the_end()
    mixed = [plan for plan in w.plans if len(plan.slots) == 2]
    assert mixed[0].num_query_tokens == (1, 15)
    assert mixed[0].outputs == (Output.SAMPLE, Output.NONE)
    w.check_at_rest()


def test_requests_are_admitted_in_order_of_arrival() -> None:
    w = world(max_running=1)
    first, second, third = (w.submit([i], params(2)) for i in range(3))
    finished = []
    while w.retire():
        finished += [r for r in (first, second, third) if w.seen[r].is_over and r not in finished]
    assert finished == [first, second, third]


def test_a_lower_priority_value_goes_first() -> None:
    w = world(max_running=1)
    running = w.submit([1], params(8))
    later = w.submit([2], params(2), priority=1)
    sooner = w.submit([3], params(2), priority=-1)
    order = []
    while w.retire():
        order += [r for r in (running, later, sooner) if w.seen[r].is_over and r not in order]
    assert order == [running, sooner, later]


def test_a_changed_priority_takes_effect_at_the_next_plan() -> None:
    w = world(max_running=1)
    w.submit([1], params(8))
    first, second = w.submit([2], params(2)), w.submit([3], params(2))
    w.set_priority(second, -1)
    order = []
    while w.retire():
        order += [r for r in (first, second) if w.seen[r].is_over and r not in order]
    assert order == [second, first]


def test_a_priority_changed_while_the_prompt_is_tokenized_holds() -> None:
    w = world(max_running=1)
    w.submit([1], params(8))
    w.scheduler.set_priority(SetPriority(RequestId("r2"), 2, -1))
    first, second = w.submit([2], params(2)), w.submit([3], params(2))
    order = []
    while w.retire():
        order += [r for r in (first, second) if w.seen[r].is_over and r not in order]
    assert order == [second, first]


def test_no_priority_is_kept_for_a_request_that_ended_or_was_rejected() -> None:
    w = world(max_running=1)
    ended = w.submit([1], params(1))
    w.run_to_the_end()
    w.scheduler.set_priority(SetPriority(ended, 0, -1))
    w.scheduler.set_priority(SetPriority(RequestId("rejected"), 1, -1))
    w.scheduler.reject(Rejected(RequestId("rejected"), 1, "too long"))
    assert w.scheduler._early_priorities == {}


def test_a_large_request_at_the_head_is_not_passed_by_small_ones() -> None:
    w = world(num_blocks=9)  # room for 128 tokens
    w.submit(range(60), params(4))
    large = w.submit(range(1, 81), params(4))
    small = w.submit([7], params(2))
    while not w.seen[large].outputs:
        assert not w.seen[small].outputs
        assert w.retire()
    w.run_to_the_end()
    w.check_at_rest()


def test_running_out_of_blocks_preempts_the_last_and_recomputes_the_same_tokens() -> None:
    w = world(num_blocks=5)  # room for 64 tokens
    w.submit(range(16), params(30))
    w.submit(range(16), params(30))
    w.run_to_the_end()
    assert w.scheduler.statistics().num_preemptions > 0
    w.check_at_rest()


def test_a_more_urgent_request_takes_blocks_from_a_less_urgent_one() -> None:
    w = world(num_blocks=5)
    slow = w.submit(range(40), params(20), priority=1)
    w.retire()
    w.retire()
    urgent = w.submit(range(50, 90), params(4))
    w.run_to_the_end()
    assert w.scheduler.statistics().num_preemptions == 1
    assert w.seen[urgent].is_over
    assert w.seen[slow].is_over
    w.check_at_rest()


def test_a_waiting_request_never_preempts_an_equal_one() -> None:
    w = world(num_blocks=5)
    w.submit(range(40), params(10))
    w.submit(range(50, 90), params(10))
    w.run_to_the_end()
    assert w.scheduler.statistics().num_preemptions == 0
    w.check_at_rest()


def test_samples_share_the_prompt_and_differ() -> None:
    w = world(num_blocks=16)
    request = w.submit(range(40), params(5, n=3))
    w.run_to_the_end()
    outputs = list(w.seen[request].outputs.values())
    assert len({tuple(output) for output in outputs}) == 3
    # 40 prompt tokens once, then the last one again for each of the other samples.
    assert sum(plan.num_query_tokens[0] for plan in w.plans if plan.admissions) < 2 * 40
    assert w.cache.statistics().num_copied_blocks >= 2
    w.check_at_rest()


def test_a_cached_prefix_is_not_computed_again() -> None:
    w = world()
    w.submit(range(40), params(2))
    w.run_to_the_end()
    again = w.submit(range(40), params(2))
    w.run_to_the_end()
    assert w.seen[again].num_cached_tokens == 32
    w.check_at_rest()


def test_generated_tokens_are_cached_too() -> None:
    w = world()
    first = w.submit(range(10), params(30))
    w.run_to_the_end()
    follow_up = w.submit([*range(10), *w.seen[first].outputs[0], 1, 2], params(2))
    w.run_to_the_end()
    assert w.seen[follow_up].num_cached_tokens == 32


def test_another_salt_shares_nothing() -> None:
    w = world()
    w.submit(range(40), params(2), salt="one")
    w.run_to_the_end()
    other = w.submit(range(40), params(2), salt="two")
    w.run_to_the_end()
    assert w.seen[other].num_cached_tokens == 0


def test_tokens_beyond_a_stop_string_are_not_cached() -> None:
    w = world()
    first = w.submit(range(10), params(40, stop=("x",)), stop_after=7)
    # The detokenizer is slow: the scheduler reads far beyond the stop before it hears of it.
    for _ in range(30):
        w.retire()
    assert len(w.seen[first].outputs[0]) == 7
    w.run_to_the_end()
    w.check_at_rest()
    assert w.seen[first].reasons == {0: FinishReason.STOP}
    # 10 + 7 tokens are valid: one full block of 16.
    assert w.cache.statistics().num_cached_blocks == 1


def test_prompt_logprobs_compute_every_position_and_cache_it() -> None:
    w = world()
    w.submit(range(40), params(2))
    w.run_to_the_end()
    scored = w.submit(range(40), params(2, prompt_logprobs=0))
    w.run_to_the_end()
    assert w.seen[scored].num_cached_tokens == 0
    w.check_at_rest()


def test_prompt_logprobs_survive_a_preemption_without_repeats() -> None:
    w = world(num_blocks=5, max_step_tokens=8)
    low = w.submit(range(50), params(4, prompt_logprobs=0), priority=1)
    for _ in range(3):
        w.retire()
    w.submit(range(40), params(4))
    w.run_to_the_end()
    assert w.scheduler.statistics().num_preemptions == 1
    assert w.seen[low].scored == list(range(1, 50))
    w.check_at_rest()


def test_an_embedding_request_samples_nothing() -> None:
    w = world()
    request = w.submit(range(40), params(1), pooling=Pooling.MEAN)
    w.run_to_the_end()
    assert w.seen[request].is_embedded
    assert w.seen[request].outputs == {}
    w.check_at_rest()


def test_a_cancelled_request_returns_its_blocks_when_its_last_step_retires() -> None:
    w = world()
    request = w.submit(range(40), params(20))
    assert len(w.in_flight) == 2
    w.cancel(request)
    assert w.returned_blocks < 63
    w.retire()
    w.retire()
    assert w.returned_blocks == 63
    assert not w.retire()
    w.check_at_rest()


def test_who_was_refused_while_another_was_cancelled_asks_again() -> None:
    w = world(max_step_tokens=64, num_blocks=6, max_in_flight=1)
    first, second = w.submit(range(40), params(20)), w.submit(range(100, 150), params(20))
    w.cancel_when_granted(first)
    w.retire()
    assert w.seen[first].ended is not None
    assert not w.seen[second].is_over
    w.run_to_the_end()
    w.check_at_rest()


def test_cancelling_twice_or_after_the_end_changes_nothing() -> None:
    w = world()
    request = w.submit([1], params(2))
    w.run_to_the_end()
    w.scheduler.abort(Cancel(request, 0))
    w.scheduler.abort(Cancel(request, 0))
    assert w.scheduler.outbox.take_for_detokenizer() == []


def test_a_cancel_that_overtakes_the_tokenizer_ends_the_request_at_once() -> None:
    w = world()
    request = RequestId("r0")
    w.scheduler.abort(Cancel(request, 0))
    (ended,) = w.scheduler.outbox.take_for_detokenizer()
    assert ended.status is RequestStatus.CANCELLED  # type: ignore[union-attr]
    w.submit([1], params(2))
    assert w.plans == []
    assert len(w.scheduler._arrivals) == 0, "the answer removes the tombstone"


def test_a_rejected_request_is_passed_on_unless_it_was_cancelled() -> None:
    w = world()
    w.scheduler.reject(Rejected(RequestId("a"), 0, "too long"))
    assert w.scheduler.outbox.take_for_detokenizer() == [Rejected(RequestId("a"), 0, "too long")]
    w.scheduler.abort(Cancel(RequestId("b"), 1))
    w.scheduler.outbox.take_for_detokenizer()
    w.scheduler.reject(Rejected(RequestId("b"), 1, "too long"))
    assert w.scheduler.outbox.take_for_detokenizer() == []


def test_a_deadline_cancels_the_request() -> None:
    w = world()
    request = w.submit(range(5), params(500), deadline_at_s=0.05)
    w.run_to_the_end()
    ended = w.seen[request].ended
    assert ended is not None
    assert (ended.status, ended.reason) == (RequestStatus.CANCELLED, "its deadline has passed")
    w.check_at_rest()


def test_a_request_that_pins_leave_no_room_for_fails_alone() -> None:
    w = world(num_blocks=5)
    w.submit(range(47), params(2))
    w.run_to_the_end()

    assert w.cache.pin(Pin(RequestId("pin"), w.seen[RequestId("r0")].tokenized.token_ids, b"", 1.0)).num_tokens == 32
    too_large = w.submit(range(60, 110), params(2))
    ended = w.seen[too_large].ended
    assert ended is not None
    assert ended.status is RequestStatus.FAILED
    assert "unpin cached prefixes" in ended.reason
    fits = w.submit(range(20), params(2))
    w.run_to_the_end()
    assert w.seen[fits].ended is None
    w.check_at_rest()


def test_a_row_without_a_possible_token_fails_alone() -> None:
    w = world()
    w.runner.impossible_step = 2
    failing = w.submit(range(5), params(9, n=2))
    w.run_to_the_end()
    ended = w.seen[failing].ended
    assert ended is not None
    assert (ended.status, ended.reason) == (RequestStatus.FAILED, "nothing is possible")
    fine = w.submit(range(5), params(9))
    w.run_to_the_end()
    assert w.seen[fine].ended is None
    w.check_at_rest()


@pytest.mark.parametrize("name", ["max_running", "max_queued", "max_step_tokens"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        SchedulerConfig(**{name: 0})


def test_a_budget_that_leaves_no_room_for_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_step_tokens must be > max_running = 8.*got 8"):
        SchedulerConfig(max_running=8, max_step_tokens=8)
