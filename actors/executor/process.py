"""Steps run in a worker process of their own, beside the weights and the KV cache.

The interpreter lock that the engine's loop holds while it plans, detokenizes and serves is then not the one under which
the next step is launched. Plans and results cross a socket (`protocol.py`) in 100 to 200 µs there and back, hidden by
planning one step ahead. A plan is sent within `launch`, without a task of its own; one task reads the results.
"""

import itertools
from collections.abc import Callable

import trio

from triode.actors.channels import Put
from triode.actors.executor.child import Child
from triode.actors.executor.protocol import (
    OPEN_RUNNER,
    Built,
    CheckGuide,
    Close,
    Failed,
    GuideChecked,
    Open,
    StageAdvanced,
    StageBegan,
    StageDone,
    Stepped,
)
from triode.actors.messages import ReleaseGuide
from triode.errors import EngineFault
from triode.models.guide import Guide, Refusal
from triode.models.progress import Progress
from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult

CLOSE_DEADLINE_S = 10.0
"""How long closing waits for the step that is running."""


class ProcessExecutor:
    """A worker process that owns the runner. Starts it at once; `open` has it load a model."""

    max_in_flight = 2

    def __init__(self, opener: str = OPEN_RUNNER) -> None:
        self._child = Child(opener)
        self._statistics = RunnerStatistics()
        self._is_closing = False
        self._guide_numbers = itertools.count()
        self._answers: dict[int, Callable[[Refusal | None], None]] = {}

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._child.pid

    async def open(self, order: Open, progress: Progress) -> Built:
        """Have the worker build its runner.

        Raises:
            ModelError, InsufficientMemory, ValueError: as they would rise in this process.
            EngineFault: if the worker died, or failed in any other way.
        """
        progress.stage("Starting the worker", None, "")
        self._child.post(order)
        while (message := await self._child.receive()) is not None:
            match message:
                case StageBegan(name, total, unit):
                    progress.stage(name, total, unit)
                case StageAdvanced(amount):
                    progress.advance(amount)
                case StageDone():
                    progress.done()
                case Built():
                    return message
                case Failed():
                    raise message.error()
                case Stepped() | GuideChecked():
                    raise AssertionError("a worker that has no runner yet has no answers")
        raise await self._child.death()

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        """Begin to read results, in the event loop that is current now."""
        # No task of the engine: closing waits for the running step, whose result must find a reader.
        trio.lowlevel.spawn_system_task(self._read, results, fault, name="triode worker's results")

    async def check_guide(self, guide: Guide) -> Refusal | None:
        """Have the worker compile it. If the worker dies, the engine does, and this is cancelled."""
        number = next(self._guide_numbers)
        answered = trio.Event()
        refusal: Refusal | None = None

        def answer(said: Refusal | None) -> None:
            nonlocal refusal
            refusal = said
            answered.set()

        self._answers[number] = answer
        self._child.post(CheckGuide(number, guide))
        try:
            await answered.wait()
        finally:
            self._answers.pop(number, None)
        return refusal

    def release_guide(self, guide: Guide) -> None:
        """Have the worker let go of a guide."""
        self._child.post(ReleaseGuide(guide))

    def launch(self, plan: StepPlan) -> None:
        """Send a step."""
        self._child.post(plan)

    def statistics(self) -> RunnerStatistics:
        """Steps and where their time went, as of the last result."""
        return self._statistics

    async def close(self) -> None:
        """Let the running step end, and the worker leave.

        Raises:
            EngineFault: if the step does not end by the deadline; the worker has been killed.
        """
        self._is_closing = True
        self._child.post(Close())
        if not await self._child.end(CLOSE_DEADLINE_S):
            raise EngineFault(f"the running step has not ended within {CLOSE_DEADLINE_S} s: its process was killed")

    async def kill(self) -> None:
        """End the worker at once, whatever it does: nobody wants what it is loading."""
        self._is_closing = True
        await self._child.end(deadline_s=0)

    async def _read(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        try:
            while (message := await self._child.receive()) is not None:
                match message:
                    case Stepped():
                        self._statistics = message.statistics
                        results(message.result)
                    case GuideChecked(number, refusal):
                        if number in self._answers:
                            self._answers[number](refusal)
                    case Failed():
                        fault(message.error())
                        return
                    case _:
                        raise AssertionError(f"a running worker sends results, got {message}")
            if not self._is_closing:
                fault(await self._child.death())
        except Exception as error:  # in a system task it would end the whole Trio run; so it ends the engine
            fault(error)
