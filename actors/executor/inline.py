"""Steps run in the event loop itself: the only executor under which a test's clock can jump."""

from collections.abc import Callable

from triode.actors.channels import Put
from triode.actors.executor.guides import refusal
from triode.models.guide import Guide, Refusal
from triode.models.runner import Runner, RunnerStatistics
from triode.models.step import StepPlan, StepResult


class InlineExecutor:
    """Runs each step at once. The loop stands still meanwhile."""

    max_in_flight = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def start(self, results: Put[StepResult], _: Callable[[BaseException], None]) -> None:
        """Where results go. A fault needs no way of its own: it leaves `launch`."""
        self._results = results

    async def check_guide(self, guide: Guide) -> Refusal | None:
        """Compile it at once."""
        return refusal(self._runner, guide)

    def release_guide(self, guide: Guide) -> None:
        """Let go of a guide."""
        self._runner.release_guide(guide)

    def wake(self) -> None:
        """Nothing can be done beside the loop."""

    def launch(self, plan: StepPlan) -> None:
        """Run the step and send its result."""
        self._runner.launch(plan)
        self._results(self._runner.collect())

    def statistics(self) -> RunnerStatistics:
        """Steps and where their time went."""
        return self._runner.statistics()

    async def close(self) -> None:
        """Nothing runs between calls; the runner gives back its memory."""
        self._runner.close()
