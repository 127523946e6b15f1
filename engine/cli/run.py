"""`triode run`: streams the reply to one prompt to stdout, and says on stderr how fast it came."""

import argparse
import sys
from time import perf_counter

import msgspec
import trio

from triode.engine.cli.flags import add_flags, with_flags
from triode.engine.cli.guides import add_guide_flags, read_guide
from triode.engine.cli.interrupt import on_interrupt
from triode.engine.cli.opening import add_engine_arguments, opened_engine
from triode.engine.cli.reply import Speed, read_reply
from triode.engine.completion import Result
from triode.engine.parts import Report
from triode.models.sampling import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, how it is sent and printed, and a flag for each sampling parameter."""
    add_engine_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="what to reply to; - reads stdin")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object when the reply is complete")
    add_flags(parser.add_argument_group("how tokens are chosen"), SamplingParams, omit={"guide"})
    add_guide_flags(parser)


def main(arguments: argparse.Namespace) -> int:
    """Check all that needs no model, then run."""
    arguments.guide = read_guide(arguments)
    params = with_flags(arguments, SamplingParams())
    if arguments.raw and arguments.system is not None:
        raise ValueError("--system must not be given with --raw, which sends no chat messages")
    if not arguments.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs must be given with --json, the output that shows them")
    if arguments.prompt == "-":
        arguments.prompt = sys.stdin.read()
    if not arguments.prompt:
        raise ValueError("--prompt must have at least one character, got ''")
    return trio.run(_main, arguments)


async def _main(arguments: argparse.Namespace) -> int:
    params = with_flags(arguments, SamplingParams())
    with trio.CancelScope() as scope, on_interrupt(scope.cancel):
        async with opened_engine(arguments) as engine:
            submitted_at_s = perf_counter()
            async with engine.submit(_prompt(arguments), params) as stream:
                speed = await read_reply(stream, submitted_at_s, show=not arguments.json)
                result = await stream.result()
            if arguments.json:
                _print_json(result, speed, engine.report)
            else:
                _print_rest(result, speed, engine.report)
    return 130 if scope.cancelled_caught else 0


def _prompt(arguments: argparse.Namespace) -> str | list[dict[str, object]]:
    if arguments.raw:
        return str(arguments.prompt)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [*system, {"role": "user", "content": arguments.prompt}]


def _print_rest(result: Result, speed: Speed, report: Report) -> None:
    """The samples after the streamed one, and the line of figures."""
    first, *others = result.completions
    if not first.text.endswith("\n"):
        print()
    for completion in others:
        print(f"--- sample {completion.index + 1} of {len(result.completions)}\n{completion.text}")
    # Before the figures, which a terminal shows below the text.
    sys.stdout.flush()
    usage = result.usage
    print(
        f"{speed}; {usage.prompt_tokens} tokens in, {usage.completion_tokens} out ({first.finish_reason}); "
        f"{report.dtype} on {report.device}, kernels: {report.kernels}",
        file=sys.stderr,
    )


def _print_json(result: Result, speed: Speed, report: Report) -> None:
    fields = {**msgspec.to_builtins(result), "speed": speed, "engine": report}
    # At once: the engine takes a moment to close.
    print(msgspec.json.encode(fields).decode(), flush=True)
