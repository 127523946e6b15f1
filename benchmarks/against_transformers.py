"""Triode beside transformers' `generate` on one CPU: same weights, dtype and threads, in one process, taking turns.

    python benchmarks/against_transformers.py [--dtypes bfloat16 float32] [--rounds 3]

Both read the SmolLM2 GGUF. Each test is a batch of random prompts and a number of new tokens, timed from handing the
prompts over to having the last token; the two take turns (A B A B), so that whatever else the machine does meets both,
and only the ratio of the medians is to be quoted. transformers gets its prompts as one batch without padding, and no
streaming, which is its fastest way.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import trio
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import triode
from triode.engine.cli.bench.workload import Request, equal_requests
from triode.engine.engine import Engine
from triode.models.progress import NullProgress
from triode.models.source import locate

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
    """`generate` over the same weights."""

    def __init__(self, dtype: str) -> None:
        path = locate(MODEL, NullProgress())
        self._model = AutoModelForCausalLM.from_pretrained(
            Path(path).parent, gguf_file=Path(path).name, dtype=getattr(torch, dtype)
        ).eval()
        # No token ends a reply: both sides make exactly as many as they are asked for.
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def run(self, requests: tuple[Request, ...]) -> list[tuple[int, ...]]:
        """The new tokens of each request, greedy."""
        prompts = torch.tensor([request.prompt for request in requests])
        with torch.inference_mode():
            output = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=requests[0].new_tokens,
                do_sample=False,
            )
        return [tuple(row[prompts.shape[1] :]) for row in output.tolist()]


async def run_triode(engine: Engine, requests: tuple[Request, ...]) -> list[tuple[int, ...]]:
    """The same from Triode. The prefix cache is cleared first: every prompt is computed."""
    await engine.cache.clear()
    params = [
        triode.SamplingParams(max_tokens=request.new_tokens, temperature=0, ignore_eos=True) for request in requests
    ]
    results = await engine.generate([request.prompt for request in requests], params)
    return [result.completion.token_ids for result in results]


async def compare(dtype: str, rounds: int, table: Table) -> None:
    """A row for each test."""
    theirs = Transformers(dtype)
    async with triode.open_engine(MODEL, dtype=dtype) as engine:
        for test in tests():
            our_times_s, their_times_s = [], []
            # The first round warms both up.
            for _ in range(rounds + 1):
                started_at_s = perf_counter()
                ours_tokens = await run_triode(engine, test.requests)
                our_times_s.append(perf_counter() - started_at_s)
                started_at_s = perf_counter()
                their_tokens = theirs.run(test.requests)
                their_times_s.append(perf_counter() - started_at_s)
            our_s, their_s = median(our_times_s[1:]), median(their_times_s[1:])
            num_equal = sum(ours == other for ours, other in zip(ours_tokens, their_tokens, strict=True))
            table.add_row(
                dtype,
                test.name,
                f"{test.value(our_s):.1f} {test.unit}",
                f"{test.value(their_s):.1f} {test.unit}",
                f"{their_s / our_s:.2f}",
                f"{num_equal} of {len(test.requests)}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    table = Table(title=f"{MODEL}, {threads} threads, medians of {arguments.rounds} rounds taking turns")
    for column in ("dtype", "test", "triode", "transformers", "times as fast", "equal outputs"):
        table.add_column(column)
    for dtype in arguments.dtypes:
        trio.run(compare, dtype, arguments.rounds, table)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


if __name__ == "__main__":
    main()
