"""`triode bench` end to end, in small."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench_rows import KEYS
from triode.engine.cli.main import main

TINY = ["random:tiny", "--dtype", "float32", "--kv-cache-bytes", "20000000", "--runs", "2"]


def bench(path: Path, test: str, *sizes: str) -> list[dict[str, Any]]:
    assert main(["bench", test, *TINY, *sizes, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert list(row) == KEYS
        assert list(row["min"]) == list(row["max"]) == ["tpot_ms", "ttft_ms", "out_tok_s", "total_tok_s"]
        assert row["model"] == "random:tiny"
        assert row["dtype"] == "float32"
        assert row["runs"] == 2
        assert row["min"]["ttft_ms"] <= row["ttft_ms"] <= row["max"]["ttft_ms"]
    return rows


def test_latency_has_a_row_for_each_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(tmp_path / "rows", "latency", "--batches", "1,3", "--prompt-tokens", "20", "--new-tokens", "6")
    assert [(row["batch"], row["prompt_len"], row["new_tokens"]) for row in rows] == [(1, 20, 6), (3, 20, 6)]
    # No time per token where no token came between others, as a busy machine may have it.
    assert all(row["tpot_ms"] is None or row["tpot_ms"] > 0 for row in rows)
    assert all(row["out_tok_s"] > 0 for row in rows)
    captured = capsys.readouterr()
    assert "median of 2 runs" in captured.out
    assert all((row["read_gb_s"] is None) == (row["of_reading"] is None) for row in rows)
    assert ("reads weights at" in captured.out) == any(row["of_reading"] for row in rows)
    assert "latency, batch 3 ..." in captured.err


def test_throughput_sends_requests_of_different_lengths(tmp_path: Path) -> None:
    (row,) = bench(
        tmp_path / "rows", "throughput", "--requests", "4", "--min-tokens-each", "2", "--max-tokens-each", "8"
    )
    assert row["batch"] == 4
    assert row["total_tok_s"] > row["out_tok_s"] > 0


def test_prefill_generates_one_token(tmp_path: Path) -> None:
    (row,) = bench(tmp_path / "rows", "prefill", "--prompt-tokens", "64")
    assert (row["prompt_len"], row["new_tokens"], row["tpot_ms"]) == (64, 1, None)


def test_prefix_has_a_row_for_each_share(tmp_path: Path) -> None:
    rows = bench(tmp_path / "rows", "prefix", "--percents", "0,50", "--prompt-tokens", "64")
    assert [row["test"] for row in rows] == ["prefix 0 %", "prefix 50 %"]


def test_figures_that_cannot_be_written_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nowhere" / "rows"
    assert main(["bench", "latency", *TINY, "--json", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"triode: error: [Errno 2] No such file or directory: '{path}'\n"


def test_startup_runs_in_processes_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert main(["bench", "startup", *TINY[:-1], "1", "--json", str(path)]) == 0
    row = json.loads(path.read_text())
    assert list(row) == KEYS
    assert row["ttft_ms"] > 100
    assert row["out_tok_s"] is None


def test_the_words_of_a_start_that_fails_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "no-such-model"]) == 1
    assert "triode: error: there is no folder or .gguf file 'no-such-model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["latency", "--runs", "0"], "runs must be >= 1, got 0"),
        (["latency", "--batches", "0"], "batches must be >= 1, got (0,)"),
        (["prefill", "--prompt-tokens", "100000"], "prompt must have fewer than"),
    ],
)
def test_a_wrong_size_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test, *flags = words
    assert main(["bench", test, *TINY, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("triode: error: ")
    assert message in error
