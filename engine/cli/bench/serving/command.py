"""`triode bench serve`: how a server that speaks as OpenAI's does answers under load, ours or any other."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

import msgspec
import trio
from rich.console import Console
from rich.table import Table

from triode.engine.cli.bench.serving.figures import Goal, ServingRow, Spread, row
from triode.engine.cli.bench.serving.load import Load
from triode.engine.cli.flags import add_flags, with_flags
from triode.engine.cli.interrupt import on_interrupt
from triode.engine.cli.progress import shown_progress
from triode.errors import MissingExtra

SUMMARY = "how a running server answers: waits and throughput at given rates, or with so many requests at a time"
_EXAMPLES = """examples:
  triode bench serve --rates 1,2,4,8 --requests 200 --plot rates.png
  triode bench serve --concurrency 1,16,64 --json rows.jsonl
  triode bench serve --url https://example.com/v1 --model name --rates 2 --goal-ttft-ms 500 --goal-tpot-ms 50

The API key is read from OPENAI_API_KEY."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The flags."""

    url: str = "http://localhost:8000/v1"
    """Where the server's API begins."""
    model: str | None = None
    """What to ask for; by default the first model that the server lists."""
    rates: tuple[float, ...] = ()
    """Requests a second, at random moments: a run for each rate."""
    concurrency: tuple[int, ...] = ()
    """Requests that are kept under way: a run for each number. [8, without rates]"""
    requests: int = 64
    """Requests of each run."""
    max_tokens_each: int = 1024
    """The longest prompt and output; most are much shorter."""
    seed: int = 0
    """Of lengths, words and moments: the same seed is the same load, for every server."""
    chat: bool = False
    """Ask /chat/completions instead of /completions."""
    ignore_eos: bool = True
    """Let outputs have the drawn lengths; off for servers that do not know the field."""
    goal_ttft_ms: float | None = None
    """Counts as goodput only what begins in so many ms."""
    goal_tpot_ms: float | None = None
    """Counts as goodput only what goes on at so many ms a token."""

    def loads(self) -> list[Load]:
        """A run for each.

        Raises:
            ValueError: for a value outside its limits.
        """
        if self.rates and self.concurrency:
            raise ValueError("rates must not be given with concurrency: each is a load of its own")
        common = {"num_requests": self.requests, "max_tokens_each": self.max_tokens_each, "seed": self.seed}
        if self.rates:
            return [Load(rate=rate, **common) for rate in self.rates]
        return [Load(concurrency=number, **common) for number in self.concurrency or (8,)]

    @property
    def goal(self) -> Goal | None:
        """None if none was given."""
        if self.goal_ttft_ms is None and self.goal_tpot_ms is None:
            return None
        return Goal(self.goal_ttft_ms, self.goal_tpot_ms)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, and where results go."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_flags(parser, Options)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object a run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG of all runs; needs triode[bench]")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    """Run every load, one after the other."""
    _require("httpx")
    if arguments.plot is not None:
        _require("matplotlib")
    for path in filter(None, (arguments.json, arguments.plot)):
        # Nobody shall wait for figures that cannot be written.
        path.touch()
    rows = trio.run(_measure, with_flags(arguments, Options()))
    if not rows:
        return 130
    print_table(rows)
    if arguments.json is not None:
        arguments.json.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    if arguments.plot is not None:
        from triode.engine.cli.bench.serving.plots import plot

        plot(arguments.plot, rows)
    return 1 if any(row.failed for row in rows) else 0


async def _measure(options: Options) -> list[ServingRow]:
    """A row for each load; no rows after Ctrl-C."""
    import httpx

    from triode.engine.cli.bench.serving.client import Target, first_model, run_load

    loads, rows = options.loads(), []
    key = os.environ.get("OPENAI_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with trio.CancelScope() as scope, on_interrupt(scope.cancel):
        async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=None, limits=limits) as client:
            model = options.model or await first_model(client)
            target = Target(client, model, is_chat=options.chat, ignore_eos=options.ignore_eos)
            with shown_progress() as progress:
                for load in loads:
                    all_heard = await run_load(target, load, progress)
                    rows.append(row(model, load, all_heard, options.goal))
                    for reason in sorted({heard.failure for heard in all_heard if heard.failure is not None})[:3]:
                        Console(stderr=True).print(f"failed: {reason}", markup=False, highlight=False)
        return rows
    return []


def print_table(rows: list[ServingRow]) -> None:
    """Medians, with the 99th percentiles beside them."""
    console = Console()
    if not console.is_terminal:
        console.width = 150
    table = Table(title=f"{rows[0].model}: times are p50 / p99")
    for heading in (
        "load",
        "requests",
        "failed",
        "TTFT ms",
        "TPOT ms",
        "end to end ms",
        "out tok/s",
        "req/s",
        "good/s",
    ):
        table.add_column(heading, justify="right")
    for each in rows:
        table.add_row(
            f"{each.rate:g}/s" if each.concurrency is None else f"{each.concurrency} at a time",
            str(each.requests),
            str(each.failed),
            *(_spread(spread) for spread in (each.ttft_ms, each.tpot_ms, each.e2e_ms)),
            f"{each.out_tok_s:.1f}",
            f"{each.req_s:.2f}",
            "" if each.goodput_req_s is None else f"{each.goodput_req_s:.2f}",
        )
    console.print(table)


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.p50:.1f} / {spread.p99:.1f}"


def _require(module: str) -> None:
    if find_spec(module) is None:
        raise MissingExtra(f"bench serve needs {module}: pip install 'triode[bench]'")
