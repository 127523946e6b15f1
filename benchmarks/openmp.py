"""What the settings of OpenMP's threads do to steps that torch computes, each in a process of its own, by turns.

    python benchmarks/openmp.py [--model smollm2-135m] [--rounds 3] [--spin-counts 10000 5000]

Without a compiled step a step is some thousand operations of torch, and OpenMP's threads wait between them. Compared are
how long they spin before they sleep (GCC's own choice, ours, and a tenth of ours), and a second pool of them in the
process, as a thread makes it that has used torch and lives on; or, with `--spin-counts`, ours and these. Each test is run
alone and beside a process that keeps one core busy. Quoted is how many times as long it takes as with our setting, alone:
the median of the rounds.

torch is imported here, with what each process was started with: an engine that imports it sets our own bound.
"""

import argparse
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from foreign_load import busy_core
from rich.console import Console
from rich.table import Table

import triode
from triode.engine.cli.bench.workload import Request, equal_requests
from triode.kernels.openmp import SPIN_COUNT

TESTS = {
    "batch 1, 32 new": equal_requests(1, 16, 32),
    "16 at once, 32 new": equal_requests(16, 16, 32),
    "prefill 1024": equal_requests(1, 1024, 1),
}


OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


class Setting(NamedTuple):
    """What a process is started with."""

    spin_count: int | None
    """None leaves the choice to GCC's OpenMP."""
    num_pools: int = 1


OURS = f"spins {SPIN_COUNT:,} rounds"
SETTINGS = {
    OURS: Setting(SPIN_COUNT),
    "spins as GCC has it": Setting(None),
    f"spins {SPIN_COUNT // 10:,} rounds": Setting(SPIN_COUNT // 10),
    "two pools": Setting(SPIN_COUNT, num_pools=2),
}


def bounds(spin_counts: list[int]) -> dict[str, Setting]:
    """Ours, and each of these."""
    return {f"spins {count:,} rounds": Setting(count) for count in (SPIN_COUNT, *spin_counts)}


class Engine:
    """An engine in a process of its own that runs a test when it is told to."""

    def __init__(self, model: str, setting: Setting) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in OPENMP}
        if setting.spin_count is not None:
            environment["GOMP_SPINCOUNT"] = str(setting.spin_count)
        command = [sys.executable, __file__, "--model", model, "--pools", str(setting.num_pools)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def seconds(self, test: str) -> float:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(test, file=stdin, flush=True)
        return float(stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def serve(model: str, num_pools: int) -> None:
    """Be that process: a test's name a line, its seconds a line."""
    with (
        triode.LLM(model, kernels="reference", max_context_tokens=2048, prefix_cache=False) as llm,
        ExitStack() as stack,
    ):
        if num_pools == 2:
            stack.enter_context(a_second_pool())
        for line in sys.stdin:
            print(seconds(llm, TESTS[line.strip()]), flush=True)


@contextmanager
def a_second_pool() -> Iterator[None]:
    """A thread that has used torch and lives on, with its pool of OpenMP's threads."""
    has_used_torch, may_end = threading.Event(), threading.Event()

    def run() -> None:
        torch.ones(2000, 2000).sum()
        has_used_torch.set()
        may_end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    has_used_torch.wait()
    try:
        yield
    finally:
        may_end.set()
        thread.join()


def seconds(llm: triode.LLM, requests: tuple[Request, ...]) -> float:
    params = [triode.SamplingParams(max_tokens=r.new_tokens, temperature=0, ignore_eos=True) for r in requests]
    start_s = perf_counter()
    llm.generate([list(r.prompt) for r in requests], params)
    return perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spin-counts", type=int, nargs="+", help="bounds to compare with ours")
    parser.add_argument("--pools", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pools:
        serve(arguments.model, arguments.pools)
    else:
        settings = bounds(arguments.spin_counts) if arguments.spin_counts else SETTINGS
        compare(arguments.model, arguments.rounds, settings)


def compare(model: str, rounds: int, settings: dict[str, Setting]) -> None:
    rows: dict[tuple[str, str], list[str]] = {(name, where): [] for name in settings for where in ("alone", "beside")}
    with ExitStack() as stack:
        engines = {name: Engine(model, setting) for name, setting in settings.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        for test in TESTS:
            times = by_turns(engines, test, rounds)
            ours_s = median(times[OURS, "alone"])
            for row, cells in rows.items():
                cells.append(f"{median(times[row]) / ours_s:.2f}")
    table = Table("OpenMP's threads", "", *TESTS)
    for row, cells in rows.items():
        table.add_row(*row, *cells)
    Console().print(table)


def by_turns(engines: dict[str, Engine], test: str, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each round, alone and beside the busy process."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for engine in engines.values():
        engine.seconds(test)
    for _ in range(rounds):
        for name, engine in engines.items():
            times[name, "alone"].append(engine.seconds(test))
            with busy_core():
                times[name, "beside"].append(engine.seconds(test))
    return times


if __name__ == "__main__":
    main()
