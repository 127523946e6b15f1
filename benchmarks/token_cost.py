"""What a token costs the engine's process, from a step's result to its reader, around a model that costs nothing.

    python benchmarks/token_cost.py [--batch 256] [--tokens 400] [--executors process thread] [--step-ms 0 2.5] [--rounds 5]

*read* has a task for each request, which looks at every delta; *generate* is one call for all of them, which reads nothing
before they end. *µs a token* is CPU time of the engine's process, all its threads, the worker's left out. *Step* is the time
of the clock from one step to the next, where the device takes `--step-ms`: what is more is the engine's. Both are the least
of the rounds, because other processes only ever add to them, and have prompts and admissions in them.
"""

import argparse
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter, process_time, sleep

import trio
from executors import open_null
from null_model import TEXT, build_parts
from rich.console import Console
from rich.table import Table

from triode.actors.executor.actor import Executor
from triode.actors.executor.process import ProcessExecutor
from triode.actors.executor.protocol import Built, Open
from triode.actors.executor.thread import ThreadExecutor
from triode.cache.config import CacheConfig
from triode.engine.cli.opening import settle
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine, serve
from triode.ids import TokenId
from triode.models.config import ModelOptions
from triode.models.guide import Guide
from triode.models.loader import open_checkpoint
from triode.models.progress import NullProgress, Progress
from triode.models.runner import RunnerStatistics
from triode.models.sampling import SamplingParams
from triode.models.step import Output, StepPlan, StepResult
from triode.models.tokenizer import Tokenizer

PROMPT_TOKENS = 32
WARM_UP_TOKENS = 40


class TimedRunner:
    """Steps that take their time one after the other, however early they are launched, and then say what is a fixed text."""

    def __init__(self, step_s: float, token_ids: list[int]) -> None:
        self._step_s = step_s
        self._token_ids = token_ids
        self._num_steps = 0
        self._last_ends_at_s = 0.0
        self._flights: deque[tuple[StepPlan, float]] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Begin it when the one before ends."""
        self._last_ends_at_s = max(self._last_ends_at_s, perf_counter()) + self._step_s
        self._flights.append((plan, self._last_ends_at_s))

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise ValueError("guide must be None: there is no model")

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise AssertionError("no guide was checked")

    def is_ready(self) -> bool:
        """Whether the oldest step has ended."""
        return bool(self._flights) and perf_counter() >= self._flights[0][1]

    def collect(self) -> StepResult:
        """Its answer; waits for the end."""
        plan, ends_at_s = self._flights.popleft()
        sleep(max(0.0, ends_at_s - perf_counter()))
        accepted = tuple([int(output is Output.SAMPLE) for output in plan.outputs])
        token_id = TokenId(self._token_ids[self._num_steps % len(self._token_ids)])
        self._num_steps += 1
        return StepResult(plan.step_id, plan.slots, plan.epochs, accepted, (token_id,) * sum(accepted))

    def statistics(self) -> RunnerStatistics:
        """Only the steps are counted."""
        return RunnerStatistics(num_steps=self._num_steps)

    def close(self) -> None:
        """Nothing is held."""


def open_timed(order: Open, progress: Progress) -> tuple[TimedRunner, Built]:
    """Called in the worker process. The name of the model is the length of its steps and what they say."""
    step_s, *token_ids = order.options.model.split()
    return TimedRunner(float(step_s), list(map(int, token_ids))), open_null(order, progress)[1]


async def make_executor(mode: str, step_s: float, token_ids: list[int]) -> Executor:
    """A timed runner in a thread or a process."""
    if mode == "thread":
        return ThreadExecutor(TimedRunner(step_s, token_ids))
    executor = ProcessExecutor("token_cost:open_timed")
    options = ModelOptions(model=" ".join(map(str, [step_s, *token_ids])))
    order = Open(options=options, cache=CacheConfig(), max_running=1, max_step_tokens=64, num_threads=None)
    await executor.open(order, NullProgress())
    return executor


@asynccontextmanager
async def open_timed_engine(
    mode: str, step_s: float, batch: int, num_tokens: int, tokenizer: Tokenizer
) -> AsyncIterator[Engine]:
    """An engine that runs so many requests at a time."""
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    num_blocks = 2 + batch * ((PROMPT_TOKENS + num_tokens) // 16 + 2)
    settings = {"max_running": batch, "max_step_tokens": batch + 4096, "executor": mode}
    config = EngineConfig().override(settings)
    executor = await make_executor(mode, step_s, token_ids)
    async with serve(build_parts(executor, tokenizer, config, num_blocks)) as engine:
        # As `triode serve` and `triode bench` do.
        settle()
        yield engine


async def read_all(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> None:
    """A task for each request, which looks at every delta."""

    async def read(prompt: list[int]) -> None:
        num_tokens = 0
        async with engine.submit(prompt, params) as stream:
            async for delta in stream:
                num_tokens += len(delta.token_ids)
        assert num_tokens == params.max_tokens, f"{num_tokens} of {params.max_tokens} tokens arrived"

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(read, prompt)


async def generate_all(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> None:
    """One call for all."""
    for result in await engine.generate(prompts, params):
        assert len(result.completion.token_ids) == params.max_tokens


WORKLOADS = {"read": read_all, "generate": generate_all}


async def measure(
    mode: str, step_s: float, batch: int, num_tokens: int, rounds: int, tokenizer: Tokenizer
) -> dict[str, tuple[float, float]]:
    """µs of CPU a token and ms of the clock a step, by workload; they take turns."""
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in WORKLOADS}
    async with open_timed_engine(mode, step_s, batch, num_tokens, tokenizer) as engine:
        for round_number in range(rounds + 1):
            params = SamplingParams(max_tokens=num_tokens if round_number else WARM_UP_TOKENS, ignore_eos=True)
            for name, run in WORKLOADS.items():
                # Different first tokens: nobody shares a prefix.
                prompts = [[row, *range(PROMPT_TOKENS - 1)] for row in range(batch)]
                await engine.cache.clear()
                began_at_s, cpu_s = perf_counter(), process_time()
                await run(engine, prompts, params)
                cpu_s, seconds = process_time() - cpu_s, perf_counter() - began_at_s
                if round_number:
                    figures[name].append((cpu_s / (batch * num_tokens) * 1e6, seconds / num_tokens * 1e3))
    return {name: (min(cpu), min(step)) for name, (cpu, step) in _columns(figures).items()}


def _columns(figures: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: ([cpu for cpu, _ in rows], [step for _, step in rows]) for name, rows in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--executors", nargs="+", choices=("process", "thread"), default=("process", "thread"))
    parser.add_argument("--step-ms", type=float, nargs="+", default=(0.0, 2.5))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = open_checkpoint(ModelOptions(model="random:tiny")).tokenizer
    table = Table("executor", "device ms", "workload", "µs a token", "step ms", title=f"{options.batch} requests")
    for mode in options.executors:
        for step_ms in options.step_ms:
            arguments = (mode, step_ms / 1e3, options.batch, options.tokens, options.rounds, tokenizer)
            for name, (cpu_us, clock_ms) in trio.run(measure, *arguments).items():
                table.add_row(mode, f"{step_ms:g}", name, f"{cpu_us:.2f}", f"{clock_ms:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
