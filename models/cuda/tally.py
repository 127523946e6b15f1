"""Tally: how many steps a runner on a GPU has computed, how large they were, and where their time went."""

from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult


class Tally:
    """Whoever launches counts launches, whoever collects results, and anybody may ask: each part is replaced as a whole."""

    def __init__(self) -> None:
        self._launched = RunnerStatistics()
        self._collected = RunnerStatistics()

    def launched(self, plan: StepPlan, prepare_s: float) -> None:
        """A step is on its way; the host has taken so long to send it."""
        before = self._launched
        self._launched = RunnerStatistics(
            num_steps=before.num_steps + 1,
            num_rows=before.num_rows + len(plan.slots),
            num_query_tokens=before.num_query_tokens + sum(plan.num_query_tokens),
            prepare_s=before.prepare_s + prepare_s,
        )

    def collected(self, result: StepResult) -> None:
        """A step's result has been read."""
        before = self._collected
        self._collected = RunnerStatistics(
            num_sampled_tokens=before.num_sampled_tokens + len(result.token_ids),
            forward_s=before.forward_s + result.forward_s,
            sample_s=before.sample_s + result.sample_s,
        )

    def statistics(self) -> RunnerStatistics:
        """A snapshot."""
        launched, collected = self._launched, self._collected
        return RunnerStatistics(
            num_steps=launched.num_steps,
            num_rows=launched.num_rows,
            num_query_tokens=launched.num_query_tokens,
            num_sampled_tokens=collected.num_sampled_tokens,
            prepare_s=launched.prepare_s,
            forward_s=collected.forward_s,
            sample_s=collected.sample_s,
        )
