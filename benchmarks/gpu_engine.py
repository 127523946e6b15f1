"""The engine on a GPU, through `Engine.submit` and `generate`: one run prints a table for each model.

    PYTHONPATH=src python benchmarks/gpu_engine.py [--executor thread|process] [--tests latency ...] [MODEL ...]

Workloads are those of `triode bench`, at full size. Next to each figure stands what the device itself was busy with, as
its own events tell: the rest of a step is launching, or waiting for the host.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
import trio

import triode
from triode.engine.cli.bench import latency, prefill, prefix, throughput
from triode.engine.cli.bench.measure import measure
from triode.engine.cli.bench.workload import Workload, equal_requests
from triode.engine.config import EngineConfig
from triode.engine.engine import Engine
from triode.engine.statistics import EngineStatistics

MODELS = ("random:qwen2.5-7b", "random:llama-3.1-8b")
TESTS = ("latency", "ttft", "prefill", "prefix", "offline", "sampling")
SETTINGS = {"max_running": 256, "max_step_tokens": 4096, "max_context_tokens": 8192}


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

    def __str__(self) -> str:
        steps = max(self.num_steps, 1)
        return (
            f"{self.num_steps} steps, wall {self.wall_s / steps * 1e3:.3f} ms a step, device "
            f"{self.device_s / steps * 1e3:.3f} (sampling {self.sample_s / steps * 1e6:.0f} µs), host launch "
            f"{self.prepare_s / steps * 1e6:.0f} µs, actors {self.actors_s / steps * 1e3:.2f} ms, "
            f"device busy {self.device_s / self.wall_s:.1%}"
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


async def run(engine: Engine, workload: Workload, salt: str) -> None:
    before, start_s = engine.statistics(), time.perf_counter()
    figures = await measure(engine, workload, salt)
    wall_s = time.perf_counter() - start_s
    cells = [workload.test, f"{len(workload.requests)}"]
    for value, form in (
        (figures.tpot_ms, "TPOT {:.3f} ms"),
        (figures.ttft_ms, "TTFT {:.2f} ms"),
        (figures.out_tok_s, "out {:,.0f} tok/s"),
        (figures.total_tok_s, "total {:,.0f} tok/s"),
    ):
        cells.append("" if value is None else form.format(value))
    print(" | ".join(cells), "|", load_between(before, engine.statistics(), wall_s), flush=True)


async def latencies(engine: Engine, batches: Iterable[int]) -> None:
    """Twice each: the first run compiles and captures."""
    sizes = latency.LatencySizes(batches=tuple(batches), new_tokens=256)
    for number, workload in enumerate(latency.workloads(sizes)):
        for attempt in ("first", "again"):
            await run(engine, workload, f"latency {number} {attempt}")


async def first_tokens(engine: Engine, num_runs: int = 12) -> None:
    """TTFT of one prompt of 128 tokens, alone: the median of many."""
    times_ms = []
    before, begin_s = engine.statistics(), time.perf_counter()
    for index in range(num_runs):
        params = triode.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        prompt = equal_requests(index + 1, 128, 1)[-1].prompt
        start_s = time.perf_counter()
        async with engine.submit(prompt, params, cache_salt=f"ttft {index}") as stream:
            await stream.result()
        times_ms.append((time.perf_counter() - start_s) * 1e3)
    load = load_between(before, engine.statistics(), time.perf_counter() - begin_s)
    print(f"TTFT(128) alone: median {median(times_ms[2:]):.2f} ms, least {min(times_ms):.2f} |", load, flush=True)


async def kinds_of_sampling(engine: Engine, batch: int) -> None:
    """What the sampling parameters cost a step."""
    for name, params in {
        "temperature": {"temperature": 0.7},
        "top_p": {"temperature": 0.7, "top_p": 0.9},
        "top_k": {"temperature": 0.7, "top_k": 50},
        "penalties": {"temperature": 0.7, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
        "logprobs": {"temperature": 0.7, "logprobs": 5},
    }.items():
        each = triode.SamplingParams(max_tokens=64, ignore_eos=True, **params)  # type: ignore[arg-type]
        prompts = [request.prompt for request in equal_requests(batch, 16, 64)]
        before, start_s = engine.statistics(), time.perf_counter()
        await engine.generate(prompts, each)
        wall_s = time.perf_counter() - start_s
        print(f"{name}, batch {batch}:", load_between(before, engine.statistics(), wall_s), flush=True)


async def offline(engine: Engine) -> None:
    (workload,) = throughput.workloads(throughput.FULL)
    prompts = [request.prompt for request in workload.requests]
    params = [
        triode.SamplingParams(max_tokens=request.new_tokens, ignore_eos=True, temperature=workload.temperature)
        for request in workload.requests
    ]
    num_tokens = sum(request.new_tokens for request in workload.requests)
    for attempt in range(2):
        await engine.cache.clear()
        before, start_s = engine.statistics(), time.perf_counter()
        await engine.generate(prompts, params)
        wall_s = time.perf_counter() - start_s
        load = load_between(before, engine.statistics(), wall_s)
        print(f"offline {attempt}: {num_tokens} tokens in {wall_s:.2f} s, {num_tokens / wall_s:,.0f} tok/s |", load)


async def prefills(engine: Engine) -> None:
    for attempt in ("first", "again"):
        for workload in prefill.workloads(prefill.FULL):
            await run(engine, workload, f"prefill {attempt}")


async def prefixes(engine: Engine) -> None:
    for workload in prefix.workloads(prefix.FULL):
        for number in range(4):
            await run(engine, workload, f"{workload.test} {number}")


async def bench(model: str, executor: str, tests: list[str], batches: list[int]) -> None:
    start_s = time.perf_counter()
    config = EngineConfig().override({"executor": executor, **SETTINGS})
    async with triode.open_engine(model, config) as engine:
        print(f"\n## {model}, executor {executor}: open after {time.perf_counter() - start_s:.1f} s")
        print(engine.report, flush=True)
        if "latency" in tests:
            await latencies(engine, batches)
        if "ttft" in tests:
            await first_tokens(engine)
        if "prefill" in tests:
            await prefills(engine)
        if "prefix" in tests:
            await prefixes(engine)
        if "offline" in tests:
            await offline(engine)
        if "sampling" in tests:
            await kinds_of_sampling(engine, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--executor", default="thread")
    parser.add_argument("--tests", nargs="+", choices=TESTS, default=TESTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256])
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for model in options.models:
        trio.run(bench, model, options.executor, options.tests, options.batches)
        num_bytes = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        print(f"allocated after close: {num_bytes} bytes", flush=True)


if __name__ == "__main__":
    main()
