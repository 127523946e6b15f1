"""What the engine adds to the compiled CPU step: how much of a decode step is not spent in the library's thread.

    python benchmarks/step_overhead.py [--model smollm2-135m] [--quantization a8gguf] [--batch 1 16] [--rounds 5]

Requests of equal length decode together through `triode.LLM`. A round takes the time of the clock for all their tokens, less that
for the first ones, and from the runner's statistics how much of it the library computed (`RunnerStatistics.forward_s`). What is left
is the engine's: planning, packing, results, and the ways between actors and threads, as far as steps wait for them.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

import triode

PROMPT_TOKENS, NEW_TOKENS = 64, 192


def generate_s(llm: triode.LLM, batch: int, new_tokens: int) -> tuple[float, float, int]:
    """Seconds, of these those in the library, and steps."""
    params = triode.SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    before, start_s = llm.statistics().runner, perf_counter()
    llm.generate([[5 + row] * PROMPT_TOKENS for row in range(batch)], params)
    seconds, after = perf_counter() - start_s, llm.statistics().runner
    return seconds, after.forward_s - before.forward_s, after.num_steps - before.num_steps


def measure(llm: triode.LLM, batch: int) -> tuple[float, float]:
    """Seconds of a decode step, and of these those in the library."""
    first, whole = generate_s(llm, batch, 1), generate_s(llm, batch, NEW_TOKENS)
    num_steps = whole[2] - first[2]
    return (whole[0] - first[0]) / num_steps, (whole[1] - first[1]) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="a8gguf")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    table = Table(title=f"{arguments.model}, {arguments.quantization}")
    for column in ("batch", "step ms", "in the library ms", "overhead / library"):
        table.add_column(column, justify="right")
    settings: dict[str, Any] = {"quantization": arguments.quantization, "num_threads": arguments.threads}
    with triode.LLM(arguments.model, dtype="bfloat16", prefix_cache=False, max_context_tokens=2048, **settings) as llm:
        for batch in arguments.batch:
            measure(llm, batch)
            rounds = [measure(llm, batch) for _ in range(arguments.rounds)]
            shares = sorted(step_s / inside_s - 1 for step_s, inside_s in rounds)
            step_ms, inside_ms = (1e3 * median(values) for values in zip(*rounds, strict=True))
            spread = f"{median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%})"
            table.add_row(str(batch), f"{step_ms:.2f}", f"{inside_ms:.2f}", spread)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
