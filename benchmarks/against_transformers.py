"""Triode beside transformers' `generate` on one CPU: same weights, dtype and threads, taking turns.

    python benchmarks/against_transformers.py [--dtypes bfloat16 float32] [--rounds 3] [--only prefill]

Both have the weights of the SmolLM2 GGUF. Each test is a batch of random prompts and a number of new tokens, timed from
handing the prompts over to having the last token; the two take turns (A B A B), so that whatever else the machine does
meets both, and only ratios are to be quoted: the median of the rounds, beside the lowest and the highest. transformers
gets its prompts as one batch without padding, and no streaming, which is its fastest way.

transformers computes in a process of its own: OpenMP's threads sleep after every operation once a process has more of them
than cores, and each side would bring its own. How long they look for work before they sleep is torch's default there, and
what Triode sets when it imports torch here. Without a C++ compiler it decides what a busy machine does to the figures.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import NamedTuple

import trio
from rich.console import Console
from rich.table import Table

import triode
from triode.engine.cli.bench.workload import Request, equal_requests
from triode.engine.engine import Engine

MODEL = "smollm2-135m"


class Test(NamedTuple):
    """A figure: `value` makes it of the seconds that the test took."""

    name: str
    requests: tuple[Request, ...]
    unit: str
    value: Callable[[float], float]


def tests() -> list[Test]:
    """What is compared. Time per token is a long run less a short one, on both sides."""
    return [
        Test("time to first token, prompt 128", equal_requests(1, 128, 1), "ms", lambda s: s * 1e3),
        Test("batch 1, prompt 128, 64 new", equal_requests(1, 128, 64), "tok/s", lambda s: 64 / s),
        Test("16 at once, prompt 128, 128 new", equal_requests(16, 128, 128), "tok/s", lambda s: 16 * 128 / s),
        Test("prefill 1024", equal_requests(1, 1024, 1), "tok/s", lambda s: 1024 / s),
    ]


class Transformers:
    """`generate`, greedy, in a process of its own."""

    def __init__(self, dtype: str) -> None:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        self._dtype = dtype

    def run(self, requests: tuple[Request, ...]) -> tuple[float, list[tuple[int, ...]]]:
        """How many seconds it took, and the new tokens of each request."""
        return self._process.submit(_generate, self._dtype, requests).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


def _generate(dtype: str, requests: tuple[Request, ...]) -> tuple[float, list[tuple[int, ...]]]:
    # Imported in that process only: in this one it is for the engine to import torch, which then bounds how long it spins.
    from transformers_generate import generate

    return generate(MODEL, dtype, [request.prompt for request in requests], requests[0].new_tokens)


async def run_triode(engine: Engine, requests: tuple[Request, ...]) -> list[tuple[int, ...]]:
    """The same from Triode. The prefix cache is cleared first: every prompt is computed."""
    await engine.cache.clear()
    params = [
        triode.SamplingParams(max_tokens=request.new_tokens, temperature=0, ignore_eos=True) for request in requests
    ]
    results = await engine.generate([request.prompt for request in requests], params)
    return [result.completion.token_ids for result in results]


async def compare(dtype: str, rounds: int, chosen: list[Test], reference: Transformers, table: Table) -> None:
    """A row for each test."""
    async with triode.open_engine(MODEL, dtype=dtype) as engine:
        for test in chosen:
            our_times_s, their_times_s = [], []
            # The first round warms both up.
            for _ in range(rounds + 1):
                started_at_s = perf_counter()
                ours_tokens = await run_triode(engine, test.requests)
                our_times_s.append(perf_counter() - started_at_s)
                their_time_s, their_tokens = reference.run(test.requests)
                their_times_s.append(their_time_s)
            ratios = [theirs / ours for ours, theirs in zip(our_times_s[1:], their_times_s[1:], strict=True)]
            num_equal = sum(ours == other for ours, other in zip(ours_tokens, their_tokens, strict=True))
            table.add_row(
                dtype,
                test.name,
                f"{test.value(median(our_times_s[1:])):.1f} {test.unit}",
                f"{test.value(median(their_times_s[1:])):.1f} {test.unit}",
                f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{num_equal} of {len(test.requests)}",
                str(engine.report.num_threads),
                engine.report.kernels,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the tests whose name contains this")
    arguments = parser.parse_args()
    chosen = [test for test in tests() if arguments.only in test.name]
    table = Table(title=f"{MODEL}, medians of {arguments.rounds} rounds taking turns")
    for column in ("dtype", "test", "triode", "transformers", "times as fast", "equal outputs", "threads", "kernels"):
        table.add_column(column)
    for dtype in arguments.dtypes:
        with closing(Transformers(dtype)) as reference:
            trio.run(compare, dtype, arguments.rounds, chosen, reference, table)
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)


if __name__ == "__main__":
    main()
