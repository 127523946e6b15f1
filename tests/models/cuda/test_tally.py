"""What a runner on a GPU says that it has done."""

from triode.ids import SlotId, StepId, TokenId
from triode.models.cuda.tally import Tally
from triode.models.runner import RunnerStatistics
from triode.models.step import Output, StepPlan, StepResult


def plan(*nums_tokens: int) -> StepPlan:
    slots = tuple(map(SlotId, range(len(nums_tokens))))
    return StepPlan(StepId(0), slots, (1,) * len(slots), (0,) * len(slots), nums_tokens, (Output.SAMPLE,) * len(slots))


def result(num_tokens: int, forward_s: float, sample_s: float) -> StepResult:
    slots = tuple(map(SlotId, range(num_tokens)))
    tokens = (TokenId(1),) * num_tokens
    return StepResult(
        StepId(0), slots, (1,) * num_tokens, (1,) * num_tokens, tokens, forward_s=forward_s, sample_s=sample_s
    )


def test_launches_and_results_are_counted_each_when_it_comes() -> None:
    tally = Tally()
    assert tally.statistics() == RunnerStatistics()
    tally.launched(plan(5, 1), 0.25)
    tally.launched(plan(1, 1, 1), 0.5)
    launched = RunnerStatistics(num_steps=2, num_rows=5, num_query_tokens=9, prepare_s=0.75)
    assert tally.statistics() == launched
    tally.collected(result(2, 1.0, 0.125))
    tally.collected(result(3, 2.0, 0.25))
    assert tally.statistics() == RunnerStatistics(
        num_steps=2,
        num_rows=5,
        num_query_tokens=9,
        num_sampled_tokens=5,
        prepare_s=0.75,
        forward_s=3.0,
        sample_s=0.375,
    )
