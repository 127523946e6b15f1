"""Flags that say what an output may look like."""

import argparse
from pathlib import Path

from triode.models.guide import Choices, Grammar, Guide, JsonSchema, Regex


def add_guide_flags(parser: argparse.ArgumentParser) -> None:
    """At most one kind of guide; a choice is a flag of its own, because it may hold any separator."""
    group = parser.add_argument_group("what the output may look like").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="JSON that validates against this schema")
    group.add_argument("--regex", metavar="PATTERN", help="text that matches this expression from end to end")
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; give it several times")
    group.add_argument("--grammar", metavar="FILE", help="text that this Lark grammar derives")


def read_guide(arguments: argparse.Namespace) -> Guide | None:
    """The guide that the flags give.

    Raises:
        ValueError: if it is no guide, or its file cannot be read.
    """
    if arguments.json_schema is not None:
        return JsonSchema(_read("--json-schema", arguments.json_schema))
    if arguments.regex is not None:
        return Regex(arguments.regex)
    if arguments.choice is not None:
        return Choices(tuple(arguments.choice))
    if arguments.grammar is not None:
        return Grammar(_read("--grammar", arguments.grammar))
    return None


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag} must name a file that can be read, got {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} must name a file of UTF-8 text, got {path!r}: {error}") from error
