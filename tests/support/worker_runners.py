"""Runners without a model, for worker processes of tests: they start in a moment, and fail on command."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from triode import errors
from triode.actors.executor.protocol import Built, Open
from triode.cache.config import CacheConfig
from triode.ids import SlotId, StepId, TokenId, pack_tokens
from triode.models.config import ModelConfig, ModelOptions, RopeConfig
from triode.models.guide import Guide
from triode.models.parallel import RankOrder
from triode.models.progress import Progress
from triode.models.runner import RunnerStatistics
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, StepPlan, StepResult

BUILT = Built(
    model=ModelConfig(
        architecture="none",
        vocab_size=100,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        max_context_tokens=100,
        context_limit_tokens=100,
        eos_token_ids=(2,),
    ),
    device="none",
    dtype="none",
    num_threads=1,
    num_blocks=100,
    weights_bytes=0,
    kv_cache_bytes=0,
    kernels="none",
)


def order(model: str = "none") -> Open:
    """An Open; `model` tells openers here what to do."""
    return Open(
        options=ModelOptions(model=model), cache=CacheConfig(), max_running=1, max_step_tokens=64, num_threads=None
    )


def plan(step_id: int, *token_ids: int) -> StepPlan:
    """A step of one row; with tokens, it admits them."""
    admission = Admission(
        slot=SlotId(0),
        epoch=1,
        packed_ids=pack_tokens(token_ids),
        num_prompt_tokens=len(token_ids),
        params=SamplingParams(),
        seed=0,
        sample_index=0,
        stop_token_ids=(),
    )
    return StepPlan(
        step_id=StepId(step_id),
        slots=(SlotId(0),),
        epochs=(1,),
        start_positions=(0,),
        num_query_tokens=(1,),
        outputs=(Output.SAMPLE,),
        admissions=(admission,) if token_ids else (),
    )


class EchoRunner:
    """Answers each plan with the sum of the tokens that it admits."""

    def __init__(self) -> None:
        self.results: deque[StepResult] = deque()
        self.num_steps = 0

    def launch(self, plan: StepPlan) -> None:
        self.num_steps += 1
        total = sum(sum(admission.token_ids) for admission in plan.admissions)
        self.results.append(StepResult(plan.step_id, plan.slots, plan.epochs, (1,), (TokenId(total),)))

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise ValueError("guide must be None: there is no model")

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise AssertionError("no guide was checked")

    def is_ready(self) -> bool:
        return bool(self.results)

    def collect(self) -> StepResult:
        return self.results.popleft()

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(num_steps=self.num_steps)

    def close(self) -> None:
        sys.stderr.write("closed\n")


class WakingRunner(EchoRunner):
    """Its figures say how often it was woken."""

    def __init__(self) -> None:
        super().__init__()
        self.num_woken = 0

    def wake(self, has_come: Callable[[], bool]) -> None:
        """Until the plan has come, as long as that may take."""
        assert not self.results, "a runner is woken while nothing runs"
        while not has_come():
            pass
        self.num_woken += 1

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(num_steps=self.num_steps, num_rows=self.num_woken)


class KeepingRunner(EchoRunner):
    """Its figures say for how many requests it keeps a guide."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kept = 0

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        self.num_kept += num_requests

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        self.num_kept -= num_requests

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics(num_steps=self.num_steps, num_rows=self.num_kept)


class PairingRunner(EchoRunner):
    """Ends a step only when the next one has been launched."""

    def is_ready(self) -> bool:
        return len(self.results) > 1

    def collect(self) -> StepResult:
        assert self.is_ready(), "this would wait for a plan that nobody can launch"
        return super().collect()


class LateRunner(EchoRunner):
    """Ends a step when it has been asked three times whether it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def is_ready(self) -> bool:
        self.num_asked += 1
        return self.num_asked % 3 == 0


class WaitingRunner(EchoRunner):
    """Ends a step while the next one is launched, which then goes on when somebody has written to a pipe."""

    def __init__(self, pipe: Path) -> None:
        super().__init__()
        self.pipe = pipe
        self.hand_over: Callable[[], object] = dict
        self.num_launched = 0

    def is_ready(self) -> bool:
        return len(self.results) > 0 and self.num_launched > 1

    def launch(self, plan: StepPlan) -> None:
        self.num_launched += 1
        if self.results:
            self.hand_over()
            self.pipe.read_text()
        super().launch(plan)


class FailingRunner(EchoRunner):
    """Fails at step 1."""

    def launch(self, plan: StepPlan) -> None:
        if plan.step_id == 1:
            raise ArithmeticError("step 1 is too much")
        super().launch(plan)


class DyingRunner(EchoRunner):
    """Ends its process at step 1, as `os.abort()` in a library would."""

    def launch(self, plan: StepPlan) -> None:
        if plan.step_id == 1:
            sys.stderr.write("something is wrong with the device\n")
            os._exit(3)
        super().launch(plan)


class StuckRunner(EchoRunner):
    """Never ends a step; touches `started` when one begins."""

    def __init__(self, started: Path, *, holds_interpreter: bool) -> None:
        super().__init__()
        self.started = started
        self.holds_interpreter = holds_interpreter

    def launch(self, plan: StepPlan) -> None:
        self.started.touch()
        if self.holds_interpreter:
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)


def open_echo(order: Open, progress: Progress) -> tuple[EchoRunner, Built]:
    progress.stage("Echoing", 2, "B")
    progress.advance(2)
    progress.done()
    return EchoRunner(), BUILT


def open_waking(order: Open, progress: Progress) -> tuple[WakingRunner, Built]:
    return WakingRunner(), BUILT


def open_keeping(order: Open, progress: Progress) -> tuple[KeepingRunner, Built]:
    return KeepingRunner(), BUILT


def open_pairing(order: Open, progress: Progress) -> tuple[PairingRunner, Built]:
    return PairingRunner(), BUILT


def open_late(order: Open, progress: Progress) -> tuple[LateRunner, Built]:
    return LateRunner(), BUILT


def open_waiting(order: Open, progress: Progress) -> tuple[WaitingRunner, Built]:
    """The model is the pipe."""
    return WaitingRunner(Path(order.options.model)), BUILT


def open_failing(order: Open, progress: Progress) -> tuple[FailingRunner, Built]:
    return FailingRunner(), BUILT


def open_dying(order: Open, progress: Progress) -> tuple[DyingRunner, Built]:
    return DyingRunner(), BUILT


def open_stuck(order: Open, progress: Progress) -> tuple[StuckRunner, Built]:
    """The model is the path to touch."""
    return StuckRunner(Path(order.options.model), holds_interpreter=False), BUILT


def open_stuck_holding(order: Open, progress: Progress) -> tuple[StuckRunner, Built]:
    """The same, and no other Python thread of the worker can run."""
    return StuckRunner(Path(order.options.model), holds_interpreter=True), BUILT


def open_nothing(order: Open, progress: Progress) -> tuple[EchoRunner, Built]:
    """Raises what the model is called, or ends as it says."""
    model = order.options.model
    if model == "endless":
        progress.stage("Loading for ever", None, "")
        time.sleep(600)
    if model == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)
    if model == "UnsupportedModel":
        raise errors.UnsupportedModel("it has what nobody has")
    raise KeyError(model)


class LinkedRunner(EchoRunner):
    """Rank 0: ends a step when every other rank has."""

    def __init__(self, ranks: RankOrder) -> None:
        super().__init__()
        self.links = [socket.socket(fileno=link) for link in ranks.links]

    def launch(self, plan: StepPlan) -> None:
        try:
            for link in self.links:
                link.sendall(bytes([plan.step_id]))
            answers = [link.recv(1) for link in self.links]
        except ConnectionError:
            answers = [b""]
        if not all(answers):
            threading.Event().wait()
        super().launch(plan)


class LinkedFollower:
    """Another rank: fails at step 1 and is stuck in step 2, if the model is called so."""

    def __init__(self, ranks: RankOrder, name: str) -> None:
        (link,) = ranks.links
        self.link = socket.socket(fileno=link)
        self.name = name

    def fileno(self) -> int:
        return self.link.fileno()

    def obey(self) -> bool:
        try:
            step = self.link.recv(1)
        except ConnectionError:
            step = b""
        if step == b"\1" and self.name == "fails":
            raise ArithmeticError("step 1 is too much")
        if step == b"\2" and self.name == "sticks":
            threading.Event().wait()
        if step:
            self.link.sendall(step)
        return bool(step)


def open_linked(order: Open, progress: Progress) -> tuple[LinkedRunner | LinkedFollower, Built]:
    """The model says what the rank that follows does."""
    assert order.ranks is not None, "there are ranks"
    if order.ranks.rank:
        if order.options.model == "unready":
            raise ValueError("tensor_parallel must be 1")
        return LinkedFollower(order.ranks, order.options.model), BUILT
    lead = LinkedRunner(order.ranks)
    if order.options.model == "unready" and not lead.links[0].recv(1):
        threading.Event().wait()
    return lead, BUILT
