"""The `triode` command: finds the subcommand, runs it, turns errors into one line and an exit status.

    0    done
    1    Triode could not do it (TriodeError)
    2    the command line or a value is wrong (ValueError)
    130  interrupted by Ctrl-C
    141  whoever read the output has gone (`triode run ... | head`)

Only the chosen command's module is imported, and commands import torch when they run, not when they are asked for help.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import triode
from triode.engine.cli.flags import Parser
from triode.errors import TriodeError
from triode.kernels.openmp import bound_spinning


class _Command(NamedTuple):
    module: str
    """Has `add_arguments(parser)` and `main(arguments) -> exit status`."""
    summary: str


_COMMANDS = {
    "run": _Command("triode.engine.cli.run", "stream the reply to one prompt"),
    "chat": _Command("triode.engine.cli.chat", "talk with a model"),
    "serve": _Command("triode.engine.cli.serve", "serve a model over HTTP, as OpenAI's clients expect it"),
    "bench": _Command("triode.engine.cli.bench.command", "measure latency, throughput, prefill, prefix hits, start-up"),
    "doctor": _Command("triode.engine.cli.doctor", "show what this machine offers and what would be used"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    bound_spinning(os.environ)
    try:
        arguments = _parser(words).parse_args(words)
        status: int = arguments.main(arguments)
        sys.stdout.flush()
    except (ValueError, TriodeError) as error:
        print(f"triode: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more as it exits; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"triode: error: {error}", file=sys.stderr)
        return 1
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser("triode", description="An LLM inference engine for async Python.")
    parser.add_argument("--version", action="version", version=f"triode {triode.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.summary, description=f"{command.summary[0].upper()}{command.summary[1:]}."
        )
        if name in words[:1]:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    return parser


if __name__ == "__main__":
    sys.exit(main())
