"""The engine on a GPU, through `Engine.submit` and `generate`: one run prints one table for all models.

    PYTHONPATH=src python benchmarks/gpu_engine.py [--executor thread|process] [--tests latency ...] [MODEL ...]

Workloads are those of `triode bench`, at full size. While it runs, every run is a line that also says what the device
was busy with, as its own events tell: the rest of a step is launching, or waiting for the host. The table behind each model is
Markdown; a figure is the median of the runs after the first one, which compiles and captures. `starts` come first: two
processes one after the other, the first with an empty kernel cache. `--small --device cpu` tries the script anywhere.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch
import trio

import triode
from triode.engine.cli.bench import latency, prefill, prefix, throughput
from triode.engine.cli.bench.measure import Figures, measure
from triode.engine.cli.bench.startup import measure_startup
from triode.engine.cli.bench.workload import Workload, equal_requests
from triode.engine.cli.opening import settle
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine
from triode.engine.statistics import EngineStatistics

MODELS = ("random:qwen2.5-7b", "random:llama-3.1-8b")
TESTS = ("starts", "latency", "ttft", "prefill", "prefix", "offline", "sampling")
_KERNEL_CACHES = ("TRITON_CACHE_DIR", "XDG_CACHE_HOME")
SETTINGS = {"max_running": 256, "max_step_tokens": 4096, "max_context_tokens": 8192}
SMALL_SETTINGS = {"max_running": 16, "max_step_tokens": 256, "max_context_tokens": 2048}


@dataclass(frozen=True)
class Sizes:
    """The workloads' sizes: those that are published, or some that only show that the script works."""

    latency: latency.LatencySizes
    prefill: prefill.PrefillSizes
    prefix: prefix.PrefixSizes
    throughput: throughput.ThroughputSizes


FULL = Sizes(latency.FULL, prefill.FULL, prefix.FULL, throughput.FULL)
SMALL = Sizes(latency.SMALL, prefill.SMALL, prefix.SMALL, throughput.SMALL)


class Results:
    """Figures by row and model, in the order in which they came."""

    def __init__(self) -> None:
        self._cells: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self._models: dict[str, None] = {}

    def add(self, row: str, model: str, value: str) -> None:
        self._models[model] = None
        self._cells[row][model] = value

    def show(self) -> None:
        names = [model.removeprefix("random:") for model in self._models]
        print("\n| | " + " | ".join(names) + " |", flush=True)
        print("|---" * (1 + len(names)) + "|")
        for row, cells in self._cells.items():
            print(f"| {row} | " + " | ".join(cells.get(model, "") for model in self._models) + " |")


@dataclass(frozen=True)
class Bench:
    """One model in one engine."""

    engine: Engine
    model: str
    sizes: Sizes
    results: Results

    def add(self, row: str, value: str) -> None:
        self.results.add(row, self.model, value)


@dataclass(frozen=True)
class Load:
    """What the runner did between two moments."""

    num_steps: int
    wall_s: float
    device_s: float
    sample_s: float
    prepare_s: float
    actors_s: float
    """Busy time of all actors but the executor's own; what else runs in the event loop is the callers'."""

    @property
    def busy(self) -> float:
        """The share of the time in which the device computed."""
        return self.device_s / self.wall_s

    def __str__(self) -> str:
        steps = max(self.num_steps, 1)
        return (
            f"{self.num_steps} steps, wall {self.wall_s / steps * 1e3:.3f} ms a step, device "
            f"{self.device_s / steps * 1e3:.3f} (sampling {self.sample_s / steps * 1e6:.0f} µs), host launch "
            f"{self.prepare_s / steps * 1e6:.0f} µs, actors {self.actors_s / steps * 1e3:.2f} ms, "
            f"device busy {self.busy:.1%}"
        )


def load_between(before: EngineStatistics, after: EngineStatistics, wall_s: float) -> Load:
    def grown(name: str) -> float:
        return float(getattr(after.runner, name) - getattr(before.runner, name))

    def busy_s(statistics: EngineStatistics) -> float:
        actors = statistics.actors
        return sum(each.busy_s for each in (actors.tokenizer, actors.scheduler, actors.cache, actors.detokenizer))

    return Load(
        num_steps=int(grown("num_steps")),
        wall_s=wall_s,
        device_s=grown("forward_s") + grown("sample_s"),
        sample_s=grown("sample_s"),
        prepare_s=grown("prepare_s"),
        actors_s=busy_s(after) - busy_s(before),
    )


async def run(engine: Engine, workload: Workload, salt: str) -> tuple[Figures, Load]:
    before, start_s = engine.statistics(), time.perf_counter()
    figures = await measure(engine, workload, salt)
    load = load_between(before, engine.statistics(), time.perf_counter() - start_s)
    cells = [workload.test, f"{len(workload.requests)}"]
    for value, form in (
        (figures.tpot_ms, "TPOT {:.3f} ms"),
        (figures.ttft_ms, "TTFT {:.2f} ms"),
        (figures.out_tok_s, "out {:,.0f} tok/s"),
        (figures.total_tok_s, "total {:,.0f} tok/s"),
    ):
        cells.append("" if value is None else form.format(value))
    print(" | ".join(cells), "|", load, flush=True)
    return figures, load


async def runs(engine: Engine, workload: Workload, num_runs: int) -> tuple[list[Figures], list[Load]]:
    """Once more than `num_runs`, and without the first."""
    pairs = [await run(engine, workload, f"{workload} {number}") for number in range(num_runs + 1)][1:]
    return [figures for figures, _ in pairs], [load for _, load in pairs]


def starts(model: str, flags: list[str], results: Results) -> None:
    """From the start of `triode run` to its first byte, kernels compiled anew and found compiled."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, dict.fromkeys(_KERNEL_CACHES, folder)):
        for name in ("cold", "warm"):
            figures, _ = measure_startup(model, flags)
            assert figures.ttft_ms is not None
            print(f"start, {name}: {figures.ttft_ms / 1e3:.1f} s", flush=True)
            results.add(f"start to first token, kernels {name}, s", model, f"{figures.ttft_ms / 1e3:.1f}")


async def latencies(bench: Bench, batches: Iterable[int]) -> None:
    sizes = latency.LatencySizes(
        batches=tuple(batches),
        prompt_tokens=bench.sizes.latency.prompt_tokens,
        new_tokens=bench.sizes.latency.new_tokens,
    )
    for workload in latency.workloads(sizes):
        figures, loads = await runs(bench.engine, workload, 2)
        batch = len(workload.requests)
        bench.add(f"TPOT, batch {batch}, ms", f"{median(each.tpot_ms or 0 for each in figures):.2f}")
        bench.add(f"device a step of those runs, batch {batch}, ms", f"{median(device_ms(load) for load in loads):.2f}")
        if batch == 1:
            idle = 1 - median(load.busy for load in loads)
            bench.add("share of the time not in kernels, batch 1", f"{idle:.1%}")


def device_ms(load: Load) -> float:
    return load.device_s / max(load.num_steps, 1) * 1e3


async def first_tokens(bench: Bench, num_runs: int = 12) -> None:
    """TTFT of one prompt, alone: the median of many."""
    engine, prompt_tokens = bench.engine, bench.sizes.latency.prompt_tokens
    times_ms = []
    before, begin_s = engine.statistics(), time.perf_counter()
    for index in range(num_runs):
        params = triode.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        prompt = equal_requests(index + 1, prompt_tokens, 1)[-1].prompt
        start_s = time.perf_counter()
        async with engine.submit(prompt, params, cache_salt=f"ttft {index}") as stream:
            await stream.result()
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    load = load_between(before, engine.statistics(), time.perf_counter() - begin_s)
    print(f"TTFT({prompt_tokens}) alone: median {median(times_ms[2:]):.2f} ms, least {min(times_ms):.2f} |", load)
    bench.add(f"TTFT, one prompt of {prompt_tokens} tokens, ms", f"{median(times_ms[2:]):.1f}")


async def prefills(bench: Bench) -> None:
    (workload,) = prefill.workloads(bench.sizes.prefill)
    figures, _ = await runs(bench.engine, workload, 3)
    name = f"prefill {len(workload.requests)} × {len(workload.requests[0].prompt)}, tok/s"
    bench.add(name, f"{median(each.total_tok_s or 0 for each in figures):,.0f}")


async def prefixes(bench: Bench) -> None:
    times = []
    for workload in prefix.workloads(bench.sizes.prefix):
        figures, _ = await runs(bench.engine, workload, 4)
        times.append(f"{median(each.ttft_ms or 0 for each in figures):.1f}")
    percents = "/".join(map(str, bench.sizes.prefix.percents))
    bench.add(f"TTFT with {percents} % of {bench.sizes.prefix.prompt_tokens} tokens cached, ms", " / ".join(times))


async def offline(bench: Bench) -> None:
    (workload,) = throughput.workloads(bench.sizes.throughput)
    prompts = [request.prompt for request in workload.requests]
    params = [
        triode.SamplingParams(max_tokens=request.new_tokens, ignore_eos=True, temperature=workload.temperature)
        for request in workload.requests
    ]
    num_tokens = sum(request.new_tokens for request in workload.requests)
    for attempt in range(2):
        await bench.engine.cache.clear()
        before, start_s = bench.engine.statistics(), time.perf_counter()
        await bench.engine.generate(prompts, params)
        wall_s = time.perf_counter() - start_s
        load = load_between(before, bench.engine.statistics(), wall_s)
        print(f"offline {attempt}: {num_tokens} tokens in {wall_s:.2f} s, {num_tokens / wall_s:,.0f} tok/s |", load)
    bench.add(f"offline, {len(prompts)} requests, out tok/s", f"{num_tokens / wall_s:,.0f}")


async def kinds_of_sampling(bench: Bench, batch: int) -> None:
    """What the sampling parameters cost a step, the second time."""
    engine = bench.engine
    for name, params in {
        "temperature": {"temperature": 0.7},
        "top_p": {"temperature": 0.7, "top_p": 0.9},
        "top_k": {"temperature": 0.7, "top_k": 50},
        "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
        "logprobs": {"temperature": 0.7, "logprobs": 5},
    }.items():
        each = triode.SamplingParams(max_tokens=64, ignore_eos=True, **params)  # type: ignore[arg-type]
        prompts = [request.prompt for request in equal_requests(batch, 16, 64)]
        for _ in range(2):
            before, start_s = engine.statistics(), time.perf_counter()
            await engine.generate(prompts, each)
            load = load_between(before, engine.statistics(), time.perf_counter() - start_s)
            print(f"{name}, batch {batch}:", load, flush=True)
        bench.add(f"sampling with {name}, batch {batch}, µs a step", f"{load.sample_s / load.num_steps * 1e6:.0f}")


async def measure_model(model: str, options: argparse.Namespace, results: Results) -> None:
    start_s = time.perf_counter()
    settings = SMALL_SETTINGS if options.small else SETTINGS
    config = EngineConfig().override({"executor": options.executor, "device": options.device, **settings})
    async with triode.open_engine(model, config) as engine:
        print(f"\n## {model}, executor {options.executor}: open after {time.perf_counter() - start_s:.1f} s")
        print(engine.report, flush=True)
        settle()
        bench = Bench(engine, model, SMALL if options.small else FULL, results)
        if "latency" in options.tests:
            await latencies(bench, options.batches)
        if "ttft" in options.tests:
            await first_tokens(bench)
        if "prefill" in options.tests:
            await prefills(bench)
        if "prefix" in options.tests:
            await prefixes(bench)
        if "offline" in options.tests:
            await offline(bench)
        if "sampling" in options.tests:
            await kinds_of_sampling(bench, 4 if options.small else 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--executor", default="process", choices=("process", "thread"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that only show that the script works")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    options = parser.parse_args()
    if options.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    results = Results()
    for model in options.models:
        if "starts" in options.tests:
            starts(model, ["--executor", options.executor, "--device", options.device], results)
        trio.run(measure_model, model, options, results)
        num_bytes = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        print(f"allocated after close: {num_bytes} bytes", flush=True)
        results.show()


if __name__ == "__main__":
    main()
