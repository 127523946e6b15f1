"""Sends a workload to an engine and times what comes back, as its callers see it."""

from itertools import chain
from statistics import median
from time import perf_counter
from typing import NamedTuple

import msgspec
import trio

from triode.engine.cli.bench.workload import Request, Workload
from triode.engine.engine import Engine
from triode.models.sampling import SamplingParams


class Figures(msgspec.Struct, frozen=True):
    """What is measured in one run. None where the workload does not show it."""

    tpot_ms: float | None
    """Time per output token of one request while all of the workload's requests generate."""
    ttft_ms: float | None
    """From submit to the first token; the median of the requests."""
    out_tok_s: float | None
    """New tokens of all requests, a second of the whole run."""
    total_tok_s: float | None
    """The same with the prompts' tokens."""


class Arrival(NamedTuple):
    """Tokens that a reader got together."""

    at_s: float
    num_tokens: int


class Trace(msgspec.Struct):
    """The arrivals of one request."""

    submitted_at_s: float
    arrivals: list[Arrival] = []


async def measure(engine: Engine, workload: Workload, cache_salt: str) -> Figures:
    """Send the requests at once and read them all. Nothing is shared with runs of another salt."""
    if workload.primer:
        await _read(engine, Request(workload.primer, 1), workload.temperature, cache_salt, Trace(0.0))
    started_at_s = perf_counter()
    traces = [Trace(started_at_s) for _ in workload.requests]
    try:
        async with trio.open_nursery() as nursery:
            for request, trace in zip(workload.requests, traces, strict=True):
                nursery.start_soon(_read, engine, request, workload.temperature, cache_salt, trace)
    except ExceptionGroup as group:
        # The requests are alike: what is wrong with one is wrong with all.
        raise group.exceptions[0] from None
    num_prompt_tokens = sum(len(request.prompt) for request in workload.requests)
    return figures(traces, num_prompt_tokens, perf_counter() - started_at_s)


async def _read(engine: Engine, request: Request, temperature: float, cache_salt: str, trace: Trace) -> None:
    params = SamplingParams(max_tokens=request.new_tokens, ignore_eos=True, temperature=temperature)
    async with engine.submit(request.prompt, params, cache_salt=cache_salt) as stream:
        async for delta in stream:
            trace.arrivals.append(Arrival(perf_counter(), len(delta.token_ids)))


def figures(traces: list[Trace], num_prompt_tokens: int, wall_s: float) -> Figures:
    """What the arrivals of one run amount to."""
    num_new_tokens = sum(arrival.num_tokens for trace in traces for arrival in trace.arrivals)
    return Figures(
        tpot_ms=_tpot_ms(traces),
        ttft_ms=median((trace.arrivals[0].at_s - trace.submitted_at_s) * 1e3 for trace in traces),
        out_tok_s=num_new_tokens / wall_s,
        total_tok_s=(num_prompt_tokens + num_new_tokens) / wall_s,
    )


def _tpot_ms(traces: list[Trace]) -> float | None:
    """Between the last request's first token and the first request's last token, no step computes a prompt."""
    begin_s = max(trace.arrivals[0].at_s for trace in traces)
    end_s = min(trace.arrivals[-1].at_s for trace in traces)
    between = chain.from_iterable(trace.arrivals for trace in traces)
    num_tokens = sum(arrival.num_tokens for arrival in between if begin_s < arrival.at_s <= end_s)
    return (end_s - begin_s) * 1e3 * len(traces) / num_tokens if num_tokens else None
