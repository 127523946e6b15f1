"""A model that costs nothing, for what is left of a step without one."""

from collections import deque
from collections.abc import Callable
from time import perf_counter, process_time, sleep, thread_time

from triode.actors.channels import Put
from triode.actors.executor.actor import Executor
from triode.actors.executor.thread import ThreadExecutor
from triode.actors.tokenizer.prepare import Limits
from triode.cache.manager import CacheManager
from triode.engine.config import EngineConfig
from triode.engine.parts import EngineParts, Report
from triode.ids import TokenId
from triode.models.guide import Guide
from triode.models.runner import RunnerStatistics
from triode.models.step import Output, StepPlan, StepResult
from triode.models.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every single day of the year. "


class NullRunner:
    """Answers at once. Keeps the process's CPU time at each launch of a full decode step."""

    def __init__(self, batch: int, token_ids: list[int], step_s: float = 0.0) -> None:
        self.launched_at_s: list[float] = []
        self.answering_s = 0.0
        self._batch = batch
        self._step_s = step_s
        self._token_ids = token_ids
        self._num_steps = 0
        self._results: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Answer a plan."""
        if len(plan.slots) == self._batch and not plan.admissions:
            self.launched_at_s.append(process_time())
        started_at_s = perf_counter()
        accepted = tuple(int(output is Output.SAMPLE) for output in plan.outputs)
        token_id = TokenId(self._token_ids[self._num_steps % len(self._token_ids)])
        self._num_steps += 1
        self._results.append(
            StepResult(plan.step_id, plan.slots, plan.epochs, accepted, token_ids=(token_id,) * sum(accepted))
        )
        self.answering_s += perf_counter() - started_at_s

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise ValueError("guide must be None: there is no model")

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise AssertionError("no guide was checked")

    def is_ready(self) -> bool:
        """Whether an answer waits."""
        return bool(self._results)

    def collect(self) -> StepResult:
        """The oldest answer, after a while if there is to be one."""
        if self._step_s:
            sleep(self._step_s)
        return self._results.popleft()

    def statistics(self) -> RunnerStatistics:
        """Only the steps are counted."""
        return RunnerStatistics(num_steps=self._num_steps)

    def close(self) -> None:
        """Nothing is held."""


class TimedExecutor(ThreadExecutor):
    """Keeps the CPU time that the event loop spends between a result and the launch that follows it."""

    def __init__(self, runner: NullRunner) -> None:
        super().__init__(runner)
        self.turnarounds_s: list[float] = []
        self._result_at_s: float | None = None

    def start(self, results: Put[StepResult], fault: Callable[[BaseException], None]) -> None:
        """As it is, but for a look at the clock."""

        def take(result: StepResult) -> None:
            self._result_at_s = thread_time()
            results(result)

        super().start(take, fault)

    def launch(self, plan: StepPlan) -> None:
        """As it is, but for a look at the clock."""
        if self._result_at_s is not None:
            self.turnarounds_s.append(thread_time() - self._result_at_s)
            self._result_at_s = None
        super().launch(plan)


def build_parts(executor: Executor, tokenizer: Tokenizer, config: EngineConfig, num_blocks: int) -> EngineParts:
    """An engine around what costs nothing."""
    size = config.cache.block_size_tokens
    max_context_tokens = (num_blocks - 1) * size
    return EngineParts(
        config=config,
        tokenizer=tokenizer,
        cache=CacheManager(num_blocks, config.cache),
        executor=executor,
        limits=Limits(max_context_tokens, (num_blocks - 1) * size, size, tokenizer.vocab_size, eos_token_ids=()),
        report=Report(
            model="null",
            architecture="null",
            device="none",
            dtype="none",
            num_threads=1,
            max_context_tokens=max_context_tokens,
            weights_bytes=0,
            kv_cache_bytes=0,
            num_blocks=num_blocks,
            block_size_tokens=size,
            kernels="none",
            executor=config.executor,
            load_s=0.0,
        ),
    )
