"""What the engine itself costs a step: planning, cache, commit, detokenizing, delivery, around a model that costs nothing.

    python benchmarks/actors.py [--batches 1 64 256] [--steps 1000] [--executor thread|inline]

The runner here answers every plan at once with tokens of a fixed text; everything else is the engine as it is. A step's
cost is the CPU time of the whole process, all threads, from one launch to the next: what is left of a step on a machine
whose model is infinitely fast. Steps are launched two at a time or one, as the executor has room, so each is given the
mean of the ten launches that begin with it. The 10th percentile of the steps is reported, because other processes'
interference only ever adds. Where it goes is each actor's busy time a step, as `engine.statistics()` has it: time of the
clock, in which other threads may have held the interpreter.
"""

import argparse
from collections import deque
from statistics import mean, quantiles
from time import perf_counter, process_time

import trio
from rich.console import Console
from rich.table import Table

from triode.actors.executor.inline import InlineExecutor
from triode.actors.executor.thread import ThreadExecutor
from triode.actors.tokenizer.prepare import Limits
from triode.cache.manager import CacheManager
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine, serve
from triode.engine.parts import EngineParts, Report
from triode.ids import TokenId
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.runner import RunnerStatistics
from triode.models.sampling import SamplingParams
from triode.models.step import Output, StepPlan, StepResult
from triode.models.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every single day of the year. "
PROMPT_TOKENS = 32
WARM_UP_STEPS = 50
SPAN_STEPS = 10
ACTORS = ("tokenizer", "scheduler", "cache", "executor", "detokenizer")


class NullRunner:
    """Answers at once. Keeps the process's CPU time at each launch of a full decode step."""

    def __init__(self, batch: int, token_ids: list[int]) -> None:
        self.launched_at_s: list[float] = []
        self.answering_s = 0.0
        self._batch = batch
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

    def is_ready(self) -> bool:
        """Whether an answer waits."""
        return bool(self._results)

    def collect(self) -> StepResult:
        """The oldest answer."""
        return self._results.popleft()

    def statistics(self) -> RunnerStatistics:
        """Only the steps are counted."""
        return RunnerStatistics(num_steps=self._num_steps)

    def close(self) -> None:
        """Nothing is held."""


def build_parts(runner: NullRunner, tokenizer: Tokenizer, config: EngineConfig, num_blocks: int) -> EngineParts:
    """An engine around the null runner."""
    size = config.cache.block_size_tokens
    max_context_tokens = (num_blocks - 1) * size
    return EngineParts(
        config=config,
        tokenizer=tokenizer,
        cache=CacheManager(num_blocks, config.cache),
        executor=InlineExecutor(runner) if config.executor == "inline" else ThreadExecutor(runner),
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


async def read(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    """A caller that looks at every delta."""
    async with engine.submit(prompt, params) as stream:
        async for _ in stream:
            pass


async def measure(batch: int, num_steps: int, executor: str, tokenizer: Tokenizer) -> dict[str, float]:
    """Milliseconds of CPU a step, and where they go."""
    text_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    runner = NullRunner(batch, text_ids)
    new_tokens = num_steps + 2 * WARM_UP_STEPS
    num_blocks = 2 + batch * ((PROMPT_TOKENS + new_tokens) // 16 + 2)
    config = EngineConfig().override({"max_running": batch, "max_step_tokens": batch + 512, "executor": executor})
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    async with serve(build_parts(runner, tokenizer, config, num_blocks)) as engine:
        async with trio.open_nursery() as nursery:
            for index in range(batch):
                # Different first tokens: nobody shares a prefix.
                nursery.start_soon(read, engine, [index, *text_ids, *text_ids][:PROMPT_TOKENS], params)
        statistics = engine.statistics()
    marks = runner.launched_at_s[WARM_UP_STEPS:]
    steps_ms = [(end - begin) * 1e3 / SPAN_STEPS for begin, end in zip(marks, marks[SPAN_STEPS:], strict=False)]
    total_steps = statistics.scheduler.num_steps
    busy_ms = {name: getattr(statistics.actors, name).busy_s * 1e3 / total_steps for name in ACTORS}
    return {
        "p10": quantiles(steps_ms, n=10)[0],
        "mean": mean(steps_ms),
        **busy_ms,
        "null model": runner.answering_s * 1e3 / total_steps,
        "steps": len(steps_ms),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--executor", choices=("thread", "inline"), default="thread")
    arguments = parser.parse_args()
    tokenizer = open_checkpoint(ModelOptions(model="smollm2-135m")).tokenizer
    table = Table(title=f"CPU ms a step, {arguments.steps} steps, executor {arguments.executor}")
    columns = ("batch", "p10", "mean", *ACTORS, "null model", "steps")
    for column in columns:
        table.add_column(column, justify="right")
    for batch in arguments.batches:
        figures = trio.run(measure, batch, arguments.steps, arguments.executor, tokenizer)
        table.add_row(str(batch), *(f"{figures[column]:.3f}" for column in columns[1:-1]), f"{figures['steps']:.0f}")
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    main()
