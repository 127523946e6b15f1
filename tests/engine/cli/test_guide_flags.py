"""`triode run` with a guide: files are read, outputs hold, what is wrong is told in one line."""

import json
from pathlib import Path

import pytest

import triode
from triode.engine.cli.flags import Parser
from triode.engine.cli.guides import add_guide_flags, read_guide
from triode.engine.cli.main import main
from triode.models.guide import Guide

TINY = ["random:tiny", "--dtype", "float32", "--kv-cache-bytes", "4000000", "--raw", "-p", "Once"]


def parse(*words: str) -> Guide | None:
    parser = Parser("triode")
    add_guide_flags(parser)
    return read_guide(parser.parse_args(words))


def test_each_flag_gives_its_guide(tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "lark"
    schema.write_text('{"title": "é"}', encoding="utf-8")
    grammar.write_text('start: "a"', encoding="utf-8")
    assert parse() is None
    assert parse("--json-schema", str(schema)) == triode.JsonSchema('{"title": "é"}')
    assert parse("--regex", "a+") == triode.Regex("a+")
    assert parse("--choice", "a,b", "--choice", "c") == triode.Choices(("a,b", "c"))
    assert parse("--grammar", str(grammar)) == triode.Grammar('start: "a"')


def test_the_output_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *TINY, "--choice", "left", "--choice", "right"]) == 0
    assert capsys.readouterr().out.strip() in ("left", "right")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--json-schema", "no-such-file"],
            2,
            "error: --json-schema must name a file that can be read, got 'no-such-file': No such file or directory",
        ),
        (["--grammar", "/"], 2, "error: --grammar must name a file that can be read, got '/': Is a directory"),
        (["--regex", "a", "--ignore-eos"], 2, "ignore_eos must be False with guide"),
        (["--regex", "a("], 2, "guide cannot be compiled"),
    ],
)
def test_what_is_wrong_is_told(words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *TINY, *words]) == status
    assert message in capsys.readouterr().err


def test_two_kinds_of_guide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--regex", "a", "--choice", "b")
    assert "argument --choice: not allowed with argument --regex" in capsys.readouterr().err


def test_a_file_that_is_no_text_or_no_schema_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="--json-schema must name a file of UTF-8 text"):
        parse("--json-schema", str(path))
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="schema must be a JSON object"):
        parse("--json-schema", str(path))
