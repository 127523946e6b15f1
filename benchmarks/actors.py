"""What the engine itself costs a step: planning, cache, commit, detokenizing, delivery, around a model that costs nothing.

    python benchmarks/actors.py [--batches 1 64 256] [--steps 1000] [--executor thread|inline] [--step-ms 20]

The runner here answers every plan at once with tokens of a fixed text; everything else is the engine as it is. A step's
cost is the CPU time of the whole process, all threads, from one launch to the next: what is left of a step on a machine
whose model is infinitely fast. Steps are launched two at a time or one, as the executor has room, so each is given the
mean of the ten launches that begin with it. The 10th percentile of the steps is reported, because other processes'
interference only ever adds. *To launch* is the part that a device may have to wait for: the event loop's CPU time from a
result to the launch that follows, the median; `--step-ms` has the model take its time, as a device does. Where it goes
is each actor's busy time a step, as `engine.statistics()` has it: time of the clock, in which other threads may have
held the interpreter, and for the scheduler other tasks too.
"""

import argparse
from statistics import mean, median, quantiles

import trio
from null_model import TEXT, NullRunner, TimedExecutor, build_parts
from rich.console import Console
from rich.table import Table

from triode.actors.executor.inline import InlineExecutor
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine, serve
from triode.models.config import ModelOptions
from triode.models.loader import open_checkpoint
from triode.models.sampling import SamplingParams
from triode.models.tokenizer import Tokenizer

PROMPT_TOKENS = 32
WARM_UP_STEPS = 50
SPAN_STEPS = 10
ACTORS = ("tokenizer", "scheduler", "cache", "executor", "detokenizer")


async def read(engine: Engine, prompt: list[int], params: SamplingParams) -> None:
    """A caller that looks at every delta."""
    async with engine.submit(prompt, params) as stream:
        async for _ in stream:
            pass


async def measure(
    batch: int, num_steps: int, executor: str, tokenizer: Tokenizer, step_s: float = 0.0
) -> dict[str, float]:
    """Milliseconds of CPU a step, and where they go."""
    text_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    runner = NullRunner(batch, text_ids, step_s)
    new_tokens = num_steps + 2 * WARM_UP_STEPS
    num_blocks = 2 + batch * ((PROMPT_TOKENS + new_tokens) // 16 + 2)
    config = EngineConfig().override({"max_running": batch, "max_step_tokens": batch + 512, "executor": executor})
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    made = InlineExecutor(runner) if executor == "inline" else TimedExecutor(runner)
    parts = build_parts(made, tokenizer, config, num_blocks)
    async with serve(parts) as engine:
        async with trio.open_nursery() as nursery:
            for index in range(batch):
                # Different first tokens: nobody shares a prefix.
                nursery.start_soon(read, engine, [index, *text_ids, *text_ids][:PROMPT_TOKENS], params)
        statistics = engine.statistics()
    marks = runner.launched_at_s[WARM_UP_STEPS:]
    steps_ms = [(end - begin) * 1e3 / SPAN_STEPS for begin, end in zip(marks, marks[SPAN_STEPS:], strict=False)]
    total_steps = statistics.scheduler.num_steps
    busy_ms = {name: getattr(statistics.actors, name).busy_s * 1e3 / total_steps for name in ACTORS}
    turnarounds_s = made.turnarounds_s if isinstance(made, TimedExecutor) else []
    return {
        "p10": quantiles(steps_ms, n=10)[0],
        "to launch": median(turnarounds_s) * 1e3 if turnarounds_s else 0.0,
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
    parser.add_argument("--step-ms", type=float, default=0.0, help="how long each step takes the device")
    arguments = parser.parse_args()
    tokenizer = open_checkpoint(ModelOptions(model="smollm2-135m")).tokenizer
    table = Table(title=f"CPU ms a step, {arguments.steps} steps, executor {arguments.executor}")
    columns = ("batch", "p10", "to launch", "mean", *ACTORS, "null model", "steps")
    for column in columns:
        table.add_column(column, justify="right")
    for batch in arguments.batches:
        figures = trio.run(measure, batch, arguments.steps, arguments.executor, tokenizer, arguments.step_ms / 1e3)
        table.add_row(str(batch), *(f"{figures[column]:.3f}" for column in columns[1:-1]), f"{figures['steps']:.0f}")
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    main()
