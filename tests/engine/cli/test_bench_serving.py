"""`triode bench serve`: the load, the figures, and a run against a real server."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servers import Running, running
from triode.engine.cli.bench.serving.figures import Goal, Heard, Spread, percentile, row
from triode.engine.cli.bench.serving.load import Load, questions
from triode.engine.cli.main import main


def test_a_seed_is_a_load_whatever_the_rate() -> None:
    slow, fast = (list(questions(Load(num_requests=50, rate=rate, seed=7))) for rate in (1.0, 10.0))
    assert [(q.prompt, q.max_tokens) for q in slow] == [(q.prompt, q.max_tokens) for q in fast]
    assert [q.due_at_s for q in slow] == pytest.approx([10 * q.due_at_s for q in fast])
    assert list(questions(Load(num_requests=50, rate=1.0, seed=8))) != slow
    assert len({q.prompt for q in slow}) == 50


def test_lengths_are_as_in_conversations_and_moments_as_by_chance() -> None:
    load = Load(num_requests=4000, rate=5.0)
    asked = list(questions(load))
    prompts = [len(question.prompt.split()) for question in asked]
    outputs = [question.max_tokens for question in asked]
    assert median(prompts) == pytest.approx(80, rel=0.1)
    assert median(outputs) == pytest.approx(130, rel=0.1)
    assert min(prompts + outputs) >= 4
    assert max(prompts + outputs) <= 1024
    assert fmean(prompts) > 1.4 * median(prompts)
    pauses = [b.due_at_s - a.due_at_s for a, b in itertools.pairwise(asked)]
    assert fmean(pauses) == pytest.approx(0.2, rel=0.1)
    # Of exponential pauses, the share 1/e is longer than the mean.
    assert sum(pause > 0.2 for pause in pauses) / len(pauses) == pytest.approx(0.368, abs=0.03)
    assert {q.due_at_s for q in questions(Load(num_requests=5, concurrency=2))} == {0.0}


@pytest.mark.parametrize(
    "values",
    [{}, {"rate": 1.0, "concurrency": 1}, {"rate": 0.0}, {"concurrency": -1}, {"rate": 1.0, "num_requests": 0}],
)
def test_a_load_that_is_none_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        Load(**({"num_requests": 3} | values))  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_within_and_in_order(values: list[float]) -> None:
    ordered = sorted(values)
    found = [percentile(ordered, share) for share in (0, 0.5, 0.9, 0.99, 1)]
    assert found[0] == ordered[0]
    assert found[-1] == ordered[-1]
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(found))


def test_figures_are_what_they_are_called() -> None:
    # The second came late, the third failed.
    heard = [
        Heard(due_at_s=0.0, first_at_s=0.1, last_at_s=1.1, prompt_tokens=5, output_tokens=11),
        Heard(due_at_s=1.0, first_at_s=2.0, last_at_s=4.0, prompt_tokens=7, output_tokens=21),
        Heard(due_at_s=2.0, last_at_s=2.5, failure="429"),
    ]
    result = row("m", Load(num_requests=3, rate=1.0), heard, Goal(ttft_ms=500, tpot_ms=100))
    assert (result.requests, result.failed, result.prompt_tokens, result.output_tokens) == (3, 1, 12, 32)
    assert result.duration_s == 4.0
    assert (result.req_s, result.out_tok_s, result.total_tok_s, result.goodput_req_s) == (0.5, 8.0, 11.0, 0.25)
    assert result.ttft_ms is not None
    assert msgspec.structs.astuple(result.ttft_ms) == pytest.approx((550, 550, 910, 991))
    assert result.tpot_ms == Spread(pytest.approx(100), *[pytest.approx(100)] * 3)  # type: ignore[arg-type]
    assert result.e2e_ms is not None
    assert result.e2e_ms.p50 == pytest.approx(2050)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_keys=("secret",), max_concurrent_per_key=6) as server:
        yield server


SMALL = ["--requests", "6", "--max-tokens-each", "12"]


def test_a_server_is_measured_at_several_rates(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows_file, picture = tmp_path / "rows", tmp_path / "rows.png"
    words = ["--url", f"{server.url}/v1", "--rates", "50,200", "--goal-ttft-ms", "60000", *SMALL]
    assert main(["bench", "serve", *words, "--json", str(rows_file), "--plot", str(picture)]) == 0
    slow, fast = map(json.loads, rows_file.read_text().splitlines())
    assert (slow["rate"], fast["rate"], slow["model"]) == (50, 200, "random:tiny")
    assert slow["output_tokens"] == fast["output_tokens"] > 6 * 4
    assert slow["failed"] == fast["failed"] == 0
    for each in (slow, fast):
        assert 0 < each["ttft_ms"]["p50"] <= each["ttft_ms"]["p99"] <= each["e2e_ms"]["p99"]
        assert each["goodput_req_s"] == pytest.approx(each["req_s"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "times are p50 / p99" in capsys.readouterr().out


def test_so_many_are_kept_under_way_and_no_more(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    # The server refuses the seventh: none is.
    words = ["--url", f"{server.url}/v1", "--concurrency", "6", "--requests", "20", "--max-tokens-each", "8", "--chat"]
    assert main(["bench", "serve", *words]) == 0


def test_refused_requests_are_failures_with_their_reason(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    words = ["--url", f"{server.url}/v1", "--concurrency", "1", "--model", "another"]
    assert main(["bench", "serve", *words, *SMALL]) == 1
    assert "failed: 404:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--rates", "1", "--concurrency", "1"], 2, "rates must not be given with concurrency"),
        (["--rates", "0"], 2, "rate must be > 0, got 0"),
        (["--url", "http://127.0.0.1:9/v1"], 1, "cannot be reached"),
    ],
)
def test_what_cannot_be_measured_is_said(
    words: list[str], status: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == status
    assert reason in capsys.readouterr().err


def test_a_wrong_key_is_told(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert main(["bench", "serve", "--url", f"{server.url}/v1"]) == 1
    assert "answered 401" in capsys.readouterr().err
