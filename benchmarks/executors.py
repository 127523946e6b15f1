"""What it costs a step to cross to the runner and back: inline, in a thread, in a process, with a runner that costs nothing.

    python benchmarks/executors.py [--rows 1 256] [--steps 2000]

The wall time from launching a plan to its result arriving in the event loop's inbox, one step at a time, as a decode step
of so many rows with a table change in every sixteenth; then how long encoding and decoding takes of it in process mode.
"""

import argparse
from collections import deque
from collections.abc import Callable
from statistics import quantiles
from time import perf_counter

import trio
from rich.console import Console
from rich.table import Table

from triode.actors.channels import Inbox
from triode.actors.executor.actor import Executor
from triode.actors.executor.inline import InlineExecutor
from triode.actors.executor.process import ProcessExecutor
from triode.actors.executor.protocol import Built, Frames, Open, Stepped, encode, from_engine, from_worker
from triode.actors.executor.thread import ThreadExecutor
from triode.cache.config import CacheConfig
from triode.ids import BlockId, SlotId, StepId, TokenId, pack_tokens
from triode.models.config import ModelConfig, ModelOptions, RopeConfig
from triode.models.guide import Guide
from triode.models.progress import NullProgress, Progress
from triode.models.runner import RunnerStatistics
from triode.models.sampling import SamplingParams
from triode.models.step import Admission, Output, StepPlan, StepResult, TableChange

WARM_UP_STEPS = 100
LONG_PROMPT_TOKENS = 100_000
BLOCK_SIZE_TOKENS = 16


class NullRunner:
    """Answers at once."""

    def __init__(self) -> None:
        self._results: deque[StepResult] = deque()

    def launch(self, plan: StepPlan) -> None:
        self._results.append(answer(plan))

    def check_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise ValueError("guide must be None: there is no model")

    def release_guide(self, guide: Guide, num_requests: int = 1) -> None:
        raise AssertionError("no guide was checked")

    def is_ready(self) -> bool:
        return bool(self._results)

    def collect(self) -> StepResult:
        return self._results.popleft()

    def statistics(self) -> RunnerStatistics:
        return RunnerStatistics()

    def close(self) -> None:
        """Nothing is held."""


def open_null(order: Open, progress: Progress) -> tuple[NullRunner, Built]:
    """Called in the worker process."""
    config = ModelConfig(
        architecture="null",
        vocab_size=1,
        hidden_size=1,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        max_context_tokens=1,
        context_limit_tokens=1,
    )
    return NullRunner(), Built(
        model=config,
        device="none",
        dtype="none",
        num_threads=1,
        num_blocks=1,
        weights_bytes=0,
        kv_cache_bytes=0,
        kernels="none",
    )


def decode_plan(num_rows: int) -> StepPlan:
    """A decode step in the middle of long outputs."""
    slots = tuple(map(SlotId, range(num_rows)))
    return StepPlan(
        step_id=StepId(100_000),
        slots=slots,
        epochs=tuple(range(1000, 1000 + num_rows)),
        start_positions=tuple(range(900, 900 + num_rows)),
        num_query_tokens=(1,) * num_rows,
        outputs=(Output.SAMPLE,) * num_rows,
        table_changes=tuple(TableChange(slot, 56, (BlockId(20_000 + slot),)) for slot in slots[::BLOCK_SIZE_TOKENS]),
    )


def admission_plan(num_tokens: int) -> StepPlan:
    """The first chunk of a long prompt."""
    admission = Admission(
        slot=SlotId(0),
        epoch=1,
        packed_ids=pack_tokens(index % 50_000 for index in range(num_tokens)),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(),
        seed=1,
        sample_index=0,
        stop_token_ids=(TokenId(2),),
    )
    blocks = tuple(map(BlockId, range(1, num_tokens // BLOCK_SIZE_TOKENS + 2)))
    return StepPlan(
        step_id=StepId(0),
        slots=(SlotId(0),),
        epochs=(1,),
        start_positions=(0,),
        num_query_tokens=(2048,),
        outputs=(Output.NONE,),
        admissions=(admission,),
        table_changes=(TableChange(SlotId(0), 0, blocks),),
    )


def answer(plan: StepPlan) -> StepResult:
    """A token a row."""
    num_rows = len(plan.slots)
    return StepResult(plan.step_id, plan.slots, plan.epochs, (1,) * num_rows, (TokenId(30_000),) * num_rows)


async def make_executor(mode: str) -> Executor:
    """An executor around a null runner."""
    if mode == "inline":
        return InlineExecutor(NullRunner())
    if mode == "thread":
        return ThreadExecutor(NullRunner())
    executor = ProcessExecutor("executors:open_null")
    order = Open(
        options=ModelOptions(model="null"), cache=CacheConfig(), max_running=1, max_step_tokens=64, num_threads=None
    )
    await executor.open(order, NullProgress())
    return executor


async def measure_round_trips(mode: str, plan: StepPlan, num_steps: int) -> list[float]:
    """Microseconds, in tenths of the steps."""
    executor = await make_executor(mode)
    inbox: Inbox[StepResult | BaseException] = Inbox()
    executor.start(inbox.put, inbox.put)
    times_us = []
    for _ in range(WARM_UP_STEPS + num_steps):
        started_at_s = perf_counter()
        executor.launch(plan)
        (result,) = await inbox.take()
        times_us.append((perf_counter() - started_at_s) * 1e6)
        if isinstance(result, BaseException):
            raise result
    await executor.close()
    return quantiles(times_us[WARM_UP_STEPS:], n=10)


def fastest_us(call: Callable[[], object], num_calls: int = 300) -> float:
    """Of many calls: interference only ever adds."""

    def once() -> float:
        started_at_s = perf_counter()
        call()
        return (perf_counter() - started_at_s) * 1e6

    return min(once() for _ in range(num_calls))


def show_round_trips(console: Console, row_counts: list[int], num_steps: int) -> None:
    table = Table("executor", "rows", "p10", "p50", "p90", title=f"Round trip of a step, µs, {num_steps} steps")
    for mode in ("inline", "thread", "process"):
        for num_rows in row_counts:
            p10, *_, p90 = times_us = trio.run(measure_round_trips, mode, decode_plan(num_rows), num_steps)
            table.add_row(mode, f"{num_rows}", f"{p10:.0f}", f"{times_us[4]:.0f}", f"{p90:.0f}")
    console.print(table)


def show_encoding(console: Console, row_counts: list[int]) -> None:
    table = Table("message", "encode µs", "decode µs", "bytes", title="Encoding, fastest of 300")
    plans = {f"{num_rows} rows": decode_plan(num_rows) for num_rows in row_counts}
    plans[f"a prompt of {LONG_PROMPT_TOKENS} tokens"] = admission_plan(LONG_PROMPT_TOKENS)
    for name, plan in plans.items():
        table.add_row(f"plan, {name}", *encoding_figures(plan, from_engine.decode))
    for num_rows in row_counts:
        result = Stepped(answer(decode_plan(num_rows)), RunnerStatistics())
        table.add_row(f"result, {num_rows} rows", *encoding_figures(result, from_worker.decode))
    console.print(table)


def encoding_figures(message: StepPlan | Stepped, decode: Callable[[bytes], object]) -> tuple[str, str, str]:
    frames = Frames()
    frames.feed(encode(message))
    body = frames.take()
    assert body is not None
    encode_us, decode_us = fastest_us(lambda: encode(message)), fastest_us(lambda: decode(body))
    return f"{encode_us:.1f}", f"{decode_us:.1f}", f"{len(body)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    console = Console()
    show_round_trips(console, arguments.rows, arguments.steps)
    show_encoding(console, arguments.rows)


if __name__ == "__main__":
    main()
