"""Steps run in a worker process of their own, beside the weights and the KV cache.

The interpreter lock that the engine's loop holds while it plans, detokenizes and serves is then not the one under which
the next step is launched. Plans and results cross a socket (`protocol.py`) in 100 to 200 µs there and back, hidden by
planning one step ahead. A plan is sent within `launch`, without a task of its own; one task reads the results.
"""

import itertools
from collections.abc import Callable, Sequence

import trio
from msgspec.structs import replace

from triode.actors.channels import Put
from triode.actors.executor.child import Child
from triode.actors.executor.guides import KeptGuides
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
    Wake,
)
from triode.actors.executor.rank_orders import rank_orders
from triode.actors.messages import ReleaseGuide
from triode.errors import EngineFault
from triode.kernels.native.numa import Place
from triode.models.guide import Guide, Refusal
from triode.models.progress import NullProgress, Progress
from triode.models.runner import RunnerStatistics
from triode.models.step import StepPlan, StepResult

CLOSE_DEADLINE_S = 10.0
"""How long closing waits for the step that is running."""
_FOLLOWER_DEADLINE_S = 2.0
"""How long the other ranks may take to leave once rank 0 has left."""


class ProcessExecutor:
    """A worker process that owns the runner, or several, the ranks of one model, of which the first has the runner.

    Starts them at once; `open` has them load a model. When one ends, all do: the others would wait for it for ever.
    """

    max_in_flight = 2

    def __init__(self, opener: str = OPEN_RUNNER, places: Sequence[Place | None] = (None,)) -> None:
        """Start a worker at each of the places."""
        self._children = _start_ranks(opener, places) if len(places) > 1 else [Child(opener, place=places[0])]
        self._child, *self._followers = self._children
        self._statistics = RunnerStatistics()
        self._is_closing = False
        self._wakes = False
        self._guide_numbers = itertools.count()
        self._guides = KeptGuides()
        self._answers: dict[int, Callable[[Refusal | None], None]] = {}

    @property
    def pids(self) -> list[int]:
        """The process ids of all ranks, in their order: the first one has the runner."""
        return [child.pid for child in self._children]

    async def open(self, order: Open, progress: Progress) -> Built:
        """Have the worker build its runner.

        Raises:
            ModelError, InsufficientMemory, ValueError: as they would rise in this process.
            EngineFault: if the worker died, or failed in any other way.
        """
        progress.stage("Starting the worker", None, "")
        built: dict[Child, Built] = {}
        errors: list[Exception] = []

        async def wait(child: Child, progress: Progress) -> None:
            try:
                built[child] = await _opened(child, progress)
            except Exception as error:  # raised below, by itself; the other ranks may be waiting for this one
                errors.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for child in self._children:
                child.post(replace(order, ranks=child.ranks))
                nursery.start_soon(wait, child, progress if child is self._child else NullProgress())
        if errors:
            raise errors[0]
        self._wakes = built[self._child].wakes
        return built[self._child]

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        """Begin to read results, in the event loop that is current now."""
        # No task of the engine: closing waits for the running step, whose result must find a reader.
        for child in self._children:
            trio.lowlevel.spawn_system_task(self._read, child, results, fault, name="triode worker's results")

    async def check_guide(self, guide: Guide) -> Refusal | None:
        """Have the worker compile it, unless it keeps it. If the worker dies, the engine does, and this is cancelled."""
        if self._guides.share(guide):
            return None
        refusal = await self._ask(guide)
        if refusal is None:
            self._guides.keep(guide)
        return refusal

    async def _ask(self, guide: Guide) -> Refusal | None:
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
        """Have the worker let go of a guide, as far as nobody has it any more."""
        for _ in range(self._guides.release(guide)):
            self._child.post(ReleaseGuide(guide))

    def wake(self) -> None:
        """Have the worker get ready while the engine plans."""
        if self._wakes:
            self._child.post(Wake())

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
        # Rank 0 first: its running step needs the others.
        self._child.post(Close())
        in_time = await self._child.end(CLOSE_DEADLINE_S)
        for follower in self._followers:
            follower.post(Close())
            await follower.end(_FOLLOWER_DEADLINE_S if in_time else 0)
        if not in_time:
            raise EngineFault(f"the running step has not ended within {CLOSE_DEADLINE_S} s: its process was killed")

    async def kill(self) -> None:
        """End the worker at once, whatever it does: nobody wants what it is loading."""
        self._is_closing = True
        for child in self._children:
            await child.end(deadline_s=0)

    async def _read(self, child: Child, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        try:
            while (message := await child.receive()) is not None:
                match message:
                    case Stepped():
                        self._statistics = message.statistics
                        results(message.result)
                    case GuideChecked(number, refusal):
                        if number in self._answers:
                            self._answers[number](refusal)
                    case Failed():
                        self._fail(message.error(), fault)
                        return
                    case _:
                        raise AssertionError(f"a running worker sends results, got {message}")
            if not self._is_closing:
                self._fail(await child.death(), fault)
        except Exception as error:  # in a system task it would end the whole Trio run; so it ends the engine
            self._fail(error, fault)

    def _fail(self, error: Exception, fault: Callable[[BaseException], None]) -> None:
        """Tell the engine why a rank is gone. The others wait for it, and are ended."""
        self._is_closing = True
        fault(error)
        if self._followers:
            for child in self._children:
                child.kill()


def _start_ranks(opener: str, places: Sequence[Place | None]) -> list[Child]:
    children: list[Child] = []
    with rank_orders(len(places)) as orders:
        try:
            for order, place in zip(orders, places, strict=True):
                children.append(Child(opener, order, place))
        except BaseException:
            for child in children:
                child.kill()
            raise
    return children


async def _opened(child: Child, progress: Progress) -> Built:
    """What the worker has built."""
    while (message := await child.receive()) is not None:
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
    raise await child.death()
