"""Flags say and accept what the structs say and accept."""

import argparse
from collections.abc import Mapping
from typing import Literal

import msgspec
import pytest

from triode.engine.cli.flags import Parser, add_flags, given, with_flags, words
from triode.engine.config import EngineConfig
from triode.engine.field_docs import field_docs
from triode.models.sampling import SamplingParams


class Part(msgspec.Struct, frozen=True):
    size: Literal[16, 32] = 16
    """How
    large."""


class Everything(msgspec.Struct, frozen=True):
    part: Part = Part()
    count: int | None = None
    """How many; 50 % is a lot."""
    share: float = 0.5
    is_on: bool = True
    texts: tuple[str, ...] = ()
    """What ends it."""
    ids: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (1, 16)
    """Of each."""
    bias: Mapping[int, float] | None = None
    choices: dict[str, str] = {}
    """Which is which."""


def parse(*line: str) -> argparse.Namespace:
    parser = Parser("triode")
    add_flags(parser, Everything)
    return parser.parse_args(line)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        (["--size", "32"], "size", 32),
        (["--count", "7"], "count", 7),
        (["--share", "1"], "share", 1.0),
        (["--is-on"], "is_on", True),
        (["--no-is-on"], "is_on", False),
        (["--texts", "a,b", "--texts", "c"], "texts", ["a,b", "c"]),
        (["--ids", "1,22"], "ids", (1, 22)),
        (["--bias", "5=-1.5,7=-inf"], "bias", {5: -1.5, 7: float("-inf")}),
        (["--choices", r"layers\.0\..*=none,head=a8w8"], "choices", {r"layers\.0\..*": "none", "head": "a8w8"}),
    ],
)
def test_a_flag_becomes_the_value_of_its_field(line: list[str], name: str, value: object) -> None:
    assert given(parse(*line), Everything) == {name: value}


def test_flags_that_are_not_given_leave_the_defaults() -> None:
    assert given(parse(), Everything) == {}
    assert with_flags(parse(), Everything()) == Everything()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--size", "17"], "argument --size: must be one of 16, 32, got '17'"),
        (["--count", "x"], "argument --count: must be an integer, got 'x'"),
        (["--count", "1.5"], "argument --count: must be an integer, got '1.5'"),
        (["--share", ""], "argument --share: must be a number, got ''"),
        (["--ids", "1,,2"], "argument --ids: must be integers with commas between, got '1,,2'"),
        (["--bias", "5"], "argument --bias: must be token ids and numbers, as in 12=-5,7=2.5, got '5'"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(*line)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"triode: error: {message} (see triode --help)\n"


def test_the_struct_checks_the_values_it_is_given() -> None:
    parser = Parser("triode")
    add_flags(parser, SamplingParams, omit={"guide"})
    with pytest.raises(ValueError, match="top_p must be a number > 0 and <= 1, got 2"):
        with_flags(parser.parse_args(["--top-p", "2"]), SamplingParams())


def test_help_shows_the_docstring_and_the_default_of_each_field() -> None:
    parser = Parser("triode", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_flags(parser, Everything)
    help_text = parser.format_help()
    assert "How large. [16]" in help_text
    assert "How many; 50 % is a lot." in help_text
    assert "--choices TEXT=TEXT,..." in help_text
    assert "Which is which.\n" in help_text
    assert "Of each. [1,16]\n" in help_text
    assert "What ends it. The flag may come several times.\n" in help_text


def test_words_are_parsed_back_to_the_same_values() -> None:
    values = {"max_running": 3, "dtype": "float32", "prefix_cache": False, "prefix_cache_ttl_s": 1.5}
    values |= {"quantization_overrides": {r"layers\.0\.qkv": "none", "head": "a8w8"}}
    parser = Parser("triode")
    add_flags(parser, EngineConfig, omit={"model"})
    assert given(parser.parse_args(words(values)), EngineConfig) == values


def test_every_parameter_of_a_request_is_described() -> None:
    undescribed = set(SamplingParams.__struct_fields__) - set(field_docs(SamplingParams))
    assert undescribed == set()
