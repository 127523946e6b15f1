"""Steps run in threads of their own, so that the event loop goes on meanwhile.

One thread launches what is planned, the other waits for results: a device has its next step before anyone has read the
tokens of the last one. Plans come through a queue and results return by `TrioToken.run_sync_soon`: about 100 µs a step
there and back, a fraction of what starting a worker thread per step costs.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

import trio

from triode.actors.channels import MAX_COMPILING, Put
from triode.actors.executor.guides import refusal
from triode.errors import EngineFault
from triode.models.guide import Guide, Refusal
from triode.models.runner import Runner, RunnerStatistics
from triode.models.step import StepPlan, StepResult

CLOSE_DEADLINE_S = 10.0
"""How long closing waits for the step that is running."""


class ThreadExecutor:
    """A thread that owns the runner, and one that waits for its results."""

    max_in_flight = 2

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._launched: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._launch_plans, name="triode-executor", daemon=True)
        self._compiling = trio.CapacityLimiter(MAX_COMPILING)
        self._collector = threading.Thread(target=self._collect_results, name="triode-results", daemon=True)

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        """Start the thread. `results` and `fault` are called in the event loop that is current now."""
        self._token = trio.lowlevel.current_trio_token()
        self._results = results
        self._fault = fault
        self._thread.start()
        self._collector.start()

    async def check_guide(self, guide: Guide) -> Refusal | None:
        """Compile it in a thread of its own."""
        return await trio.to_thread.run_sync(
            refusal, self._runner, guide, limiter=self._compiling, abandon_on_cancel=True
        )

    def release_guide(self, guide: Guide) -> None:
        """Let go of a guide."""
        self._runner.release_guide(guide)

    def wake(self) -> None:
        """What a thread would do meanwhile, the loop would wait for: both need the interpreter's lock."""

    def launch(self, plan: StepPlan) -> None:
        """Queue a step."""
        self._plans.put(plan)

    def statistics(self) -> RunnerStatistics:
        """Steps and where their time went."""
        return self._runner.statistics()

    async def close(self) -> None:
        """Let the running step end, and the runner give back its memory.

        Raises:
            EngineFault: if the step does not end by the deadline; its memory is abandoned.
        """
        if not self._thread.is_alive():
            return
        self._plans.put(None)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join, CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            raise EngineFault(
                f"the running step has not ended within {CLOSE_DEADLINE_S} s: its thread and memory are abandoned"
            )

    def _launch_plans(self) -> None:
        try:
            while (plan := self._plans.get()) is not None:
                self._runner.launch(plan)
                self._launched.put(True)
        except BaseException as error:  # whatever it is, the engine must learn it
            self._send(self._fault, error)
        finally:
            self._launched.put(False)
            self._collector.join()
            self._runner.close()

    def _collect_results(self) -> None:
        try:
            while self._launched.get():
                self._send(self._results, self._runner.collect())
        except BaseException as error:  # whatever it is, the engine must learn it
            self._send(self._fault, error)

    def _send(self, put: Callable[..., None], value: StepResult | BaseException) -> None:
        try:
            self._token.run_sync_soon(put, value)
        except trio.RunFinishedError:
            # The loop was torn down around the engine; nobody is left to be told.
            self._plans.put(None)
