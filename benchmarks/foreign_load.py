"""What another program costs: decoding alone on the machine, and beside a process that keeps one core busy, by turns.

    python benchmarks/foreign_load.py [--model smollm2-135m] [--rounds 3] [--batches 1 16]

Threads that spin at barriers lose ten times their speed where one of them has to share its core. Quoted is how many times
as long a batch takes beside the busy process; with 2 cores, of which it wants one, 2 would be a fair share.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

import triode

NEW_TOKENS = 64


BUSY = """
import os, sys, threading
def leave():
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=leave).start()
while True: pass
"""


@contextmanager
def busy_core() -> Iterator[None]:
    """One, by a process in a session of its own, which the system's scheduler treats as somebody else's."""
    # Its input ends with this process, however that ends.
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(llm: triode.LLM, batch: int) -> float:
    rng = Random(0)
    prompts = [[rng.randrange(100, 10_000) for _ in range(16)] for _ in range(batch)]
    start_s = perf_counter()
    llm.generate(prompts, triode.SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True))
    return perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    table = Table("batch", "alone tok/s", "beside tok/s", "times as long")
    with triode.LLM(arguments.model, dtype="bfloat16", max_context_tokens=512, prefix_cache=False) as llm:
        for batch in arguments.batches:
            seconds(llm, batch)
            alone_s, beside_s = [], []
            for _ in range(arguments.rounds):
                alone_s.append(seconds(llm, batch))
                with busy_core():
                    beside_s.append(seconds(llm, batch))
            ratios = [slow / quick for slow, quick in zip(beside_s, alone_s, strict=True)]
            rates = (f"{batch * NEW_TOKENS / median(times):.0f}" for times in (alone_s, beside_s))
            table.add_row(str(batch), *rates, f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    Console().print(table)


if __name__ == "__main__":
    main()
