"""Consumes StepPlan and ReleaseGuide. Produces StepResult, sent to the scheduler by the executor itself."""

from collections.abc import Callable
from typing import NoReturn, Protocol

from triode.actors.channels import Inbox, Put
from triode.actors.messages import ExecutorInbox, ReleaseGuide, StepPlan, StepResult
from triode.models.guide import Guide, Refusal
from triode.models.runner import RunnerStatistics


class Executor(Protocol):
    """Where steps run: `inline` in the event loop, in a `thread` or in a `process`."""

    @property
    def max_in_flight(self) -> int:
        """How many steps may be planned before the first one's result is read."""

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        """Get ready. Results and faults are handed over in the event loop."""

    async def check_guide(self, guide: Guide) -> Refusal | None:
        """Have a guide compiled beside the runner, before any plan has it, and kept. The reason why it cannot be, or
        None. Called at most MAX_CHECKING times at once."""

    def release_guide(self, guide: Guide) -> None:
        """A request whose guide was checked has ended."""

    def wake(self) -> None:
        """A request has come to an engine that had none: a plan may follow. Called by the hub, ahead of all messages."""

    def launch(self, plan: StepPlan) -> None:
        """Take a step; its result follows through `results`, in launch order."""

    def statistics(self) -> RunnerStatistics:
        """Steps and where their time went."""

    async def close(self) -> None:
        """End the running step and free the runner's memory."""


async def run_executor(
    executor: Executor, inbox: Inbox[ExecutorInbox | BaseException], guide_released: Callable[[], None]
) -> NoReturn:
    """Hand on plans for ever. `guide_released` hears when there may be room for another guide.

    Raises:
        BaseException: what the runner raised; an executor in another thread sends it to this inbox.
    """
    while True:
        for message in await inbox.take():
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, ReleaseGuide):
                executor.release_guide(message.guide)
                guide_released()
            else:
                executor.launch(message)
