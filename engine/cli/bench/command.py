"""`triode bench`: measures one thing, prints a table, and writes JSON for whoever compares."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import msgspec
import trio

from triode.engine.cli.bench import latency, prefill, prefix, throughput
from triode.engine.cli.bench.measure import Figures, measure
from triode.engine.cli.bench.serving import command as serving
from triode.engine.cli.bench.startup import STARTUP, StartedEngine, measure_startup
from triode.engine.cli.bench.table import Row, print_table, summary, write_json
from triode.engine.cli.bench.workload import Sizes, Workload
from triode.engine.cli.flags import add_flags, with_flags, words
from triode.engine.cli.interrupt import on_interrupt
from triode.engine.cli.machine import device_name, read_versions
from triode.engine.cli.opening import add_engine_arguments, engine_settings, opened_engine, settle
from triode.engine.cli.progress import shown_progress
from triode.engine.cli.reading import measure_reading
from triode.engine.engine import Engine
from triode.engine.parts import Report
from triode.models.progress import Progress


class _Test(NamedTuple):
    summary: str
    small: Sizes
    full: Sizes
    workloads: Callable[..., Iterator[Workload]]


_TESTS = {
    "latency": _Test(
        "time per output token and time to the first one, by batch size",
        latency.SMALL,
        latency.FULL,
        latency.workloads,
    ),
    "throughput": _Test(
        "tokens a second of many requests of different lengths",
        throughput.SMALL,
        throughput.FULL,
        throughput.workloads,
    ),
    "prefill": _Test("how fast long prompts are read", prefill.SMALL, prefill.FULL, prefill.workloads),
    "prefix": _Test(
        "time to the first token when part of the prompt is cached", prefix.SMALL, prefix.FULL, prefix.workloads
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A subcommand for each test, with its sizes as flags."""
    tests = parser.add_subparsers(metavar="TEST", required=True)
    for name, test in _TESTS.items():
        subparser = tests.add_parser(
            name, help=test.summary, description=f"{test.summary[0].upper()}{test.summary[1:]}."
        )
        subparser.add_argument(
            "--full", action="store_true", help="the sizes of a large GPU instead of those of a laptop; flags override"
        )
        add_flags(subparser.add_argument_group("sizes"), type(test.small))
        _add_common_arguments(subparser)
        subparser.set_defaults(run=_run_workloads, test=name)
    startup = tests.add_parser("startup", help="time from the start of a process to its first token")
    _add_common_arguments(startup)
    startup.set_defaults(run=_run_startup)
    serve = tests.add_parser("serve", help=serving.SUMMARY, description=f"Measures {serving.SUMMARY}.")
    serving.add_arguments(serve)


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="measured runs, after one warm-up [3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a row")
    add_engine_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the chosen test."""
    if arguments.runs < 1:
        raise ValueError(f"runs must be >= 1, got {arguments.runs}")
    if arguments.json is not None:
        # Nobody shall wait for figures that cannot be written.
        arguments.json.touch()
    rows: list[Row] = arguments.run(arguments)
    if not rows:
        return 130
    print_table(rows)
    if arguments.json is not None:
        write_json(arguments.json, rows)
    return 0


def _run_workloads(arguments: argparse.Namespace) -> list[Row]:
    test = _TESTS[arguments.test]
    sizes = with_flags(arguments, test.full if arguments.full else test.small)
    return trio.run(_measure_all, arguments, list(test.workloads(sizes)))


async def _measure_all(arguments: argparse.Namespace, workloads: list[Workload]) -> list[Row]:
    """A row for each workload; no rows after Ctrl-C."""
    # What is sent together is to run together.
    max_running = max(len(workload.requests) for workload in workloads)
    with trio.CancelScope() as scope, on_interrupt(scope.cancel):
        async with opened_engine(arguments, max_running=max_running) as engine:
            settle()
            with shown_progress() as progress:
                return [await _measured_row(engine, workload, arguments.runs, progress) for workload in workloads]
    return []


async def _measured_row(engine: Engine, workload: Workload, num_runs: int, progress: Progress) -> Row:
    runs, readings = await _measure_runs(engine, workload, num_runs, progress)
    row, step_bytes = _row(workload, runs, engine.report), engine.report.step_bytes
    if step_bytes is None or not readings:
        return row
    parts = [step_bytes / (tpot_ms / 1e3) / reading for tpot_ms, reading in readings]
    return msgspec.structs.replace(
        row, read_gb_s=median(reading for _, reading in readings) / 1e9, of_reading=median(parts)
    )


async def _measure_runs(
    engine: Engine, workload: Workload, num_runs: int, progress: Progress
) -> tuple[list[Figures], list[tuple[float, float]]]:
    """Each run, and where steps read weights, its time per token and the bytes a second that were read right after it."""
    progress.stage(f"{workload.test}, batch {len(workload.requests)}", num_runs + 1, "runs")
    runs, readings = [], []
    for run in range(num_runs + 1):
        salt = f"{workload.test} {len(workload.requests)} {run}"
        figures = await measure(engine, workload, salt)
        progress.advance(1)
        # The first run warms up.
        if run == 0:
            continue
        runs.append(figures)
        if figures.tpot_ms is not None and engine.report.step_bytes is not None:
            reading = await trio.to_thread.run_sync(measure_reading, engine.report.num_threads)
            readings.append((figures.tpot_ms, reading))
    progress.done()
    return runs, readings


def _run_startup(arguments: argparse.Namespace) -> list[Row]:
    flags = words(engine_settings(arguments))
    runs = []
    with shown_progress() as progress:
        progress.stage("startup", arguments.runs + 1, "runs")
        for _ in range(arguments.runs + 1):
            figures, report = measure_startup(arguments.model, flags)
            runs.append(figures)
            progress.advance(1)
        progress.done()
    return [_row(STARTUP, runs[1:], report)]


def _row(workload: Workload, runs: list[Figures], report: Report | StartedEngine) -> Row:
    middle, lowest, highest = summary(runs)
    return Row(
        test=workload.test,
        model=report.model,
        device=device_name(report.device),
        dtype=report.dtype,
        batch=len(workload.requests),
        prompt_len=round(mean(len(request.prompt) for request in workload.requests)),
        new_tokens=round(mean(request.new_tokens for request in workload.requests)),
        **msgspec.structs.asdict(middle),
        runs=len(runs),
        lowest=lowest,
        highest=highest,
        versions={**read_versions(), "kernels": report.kernels},
    )
