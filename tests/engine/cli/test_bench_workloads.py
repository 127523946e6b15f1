"""What a benchmark sends and how its figures are made, without an engine."""

import json
from pathlib import Path

import msgspec
import pytest

from bench_rows import KEYS
from triode.engine.cli.bench import latency, prefill, prefix, throughput
from triode.engine.cli.bench.measure import Arrival, Figures, Trace, figures
from triode.engine.cli.bench.table import Row, print_table, summary, write_json


def make_row(*runs: Figures) -> Row:
    middle, lowest, highest = summary(list(runs))
    return Row(
        test="latency",
        model="random:tiny",
        device="cpu",
        dtype="float32",
        batch=4,
        prompt_len=128,
        new_tokens=64,
        **msgspec.structs.asdict(middle),
        runs=len(runs),
        lowest=lowest,
        highest=highest,
        versions={"triode": "1", "kernels": "reference"},
    )


def test_the_full_throughput_workload_is_the_draw_of_nano_vllm() -> None:
    (workload,) = throughput.workloads(throughput.FULL)
    assert len(workload.requests) == 256
    assert sum(len(request.prompt) for request in workload.requests) == 142_827
    assert sum(request.new_tokens for request in workload.requests) == 133_966
    assert workload.temperature == 0.6


def test_latency_has_a_row_for_each_batch_size() -> None:
    batches = [len(workload.requests) for workload in latency.workloads(latency.FULL)]
    assert batches == [1, 64, 256]


def test_the_prompts_of_a_batch_differ_and_are_the_same_each_time() -> None:
    first, second = (next(prefill.workloads(prefill.FULL)) for _ in range(2))
    assert len({request.prompt for request in first.requests}) == 8
    assert first == second


def test_a_prefix_primer_is_the_given_share_of_the_prompt() -> None:
    workloads = list(prefix.workloads(prefix.FULL))
    assert [len(workload.primer) for workload in workloads] == [0, 1000, 2000, 3000, 3960]
    for workload in workloads:
        assert workload.requests[0].prompt[: len(workload.primer)] == workload.primer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (1, 0)}, r"batches must be >= 1, got \(1, 0\)"),
        ({"batches": ()}, r"batches must be >= 1, got \(\)"),
        ({"new_tokens": 0}, "new-tokens must be >= 1, got 0"),
    ],
)
def test_a_size_below_its_least_value_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(latency.SMALL, **changes)


def test_bounds_that_are_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match="min-tokens-each must be <= max-tokens-each = 10, got 16"):
        throughput.ThroughputSizes(max_tokens_each=10)


def test_time_per_token_counts_only_while_all_requests_generate() -> None:
    early = Trace(0.0, [Arrival(1.0, 1), Arrival(3.0, 1), Arrival(4.0, 1), Arrival(5.0, 1)])
    late = Trace(0.0, [Arrival(3.0, 1), Arrival(4.0, 1), Arrival(5.0, 2), Arrival(6.0, 1)])
    found = figures([early, late], num_prompt_tokens=11, wall_s=2.0)
    # From 3 s, when the last request has its first token, to 5 s, when the first one ends: 5 tokens for two requests.
    assert found.tpot_ms == pytest.approx(2_000 * 2 / 5)
    assert found.ttft_ms == 2_000
    assert found.out_tok_s == 9 / 2
    assert found.total_tok_s == 20 / 2


def test_requests_that_never_generate_together_have_no_time_per_token() -> None:
    traces = [Trace(0.0, [Arrival(1.0, 1), Arrival(2.0, 1)]), Trace(0.0, [Arrival(3.0, 1)])]
    assert figures(traces, num_prompt_tokens=2, wall_s=3.0).tpot_ms is None


def test_requests_whose_tokens_come_all_together_have_no_time_per_token() -> None:
    traces = [Trace(0.0, [Arrival(1.0, 6)]), Trace(0.0, [Arrival(1.0, 6)])]
    found = figures(traces, num_prompt_tokens=2, wall_s=3.0)
    assert (found.tpot_ms, found.out_tok_s) == (None, 4)


def test_a_row_is_the_median_with_the_lowest_and_highest_of_its_runs() -> None:
    row = make_row(Figures(3.0, None, 1.0, 9.0), Figures(1.0, None, 5.0, 7.0), Figures(2.0, None, 3.0, 8.0))
    assert (row.tpot_ms, row.ttft_ms, row.out_tok_s, row.total_tok_s) == (2.0, None, 3.0, 8.0)
    assert row.lowest == Figures(1.0, None, 1.0, 7.0)
    assert row.highest == Figures(3.0, None, 5.0, 9.0)


def test_json_has_one_object_a_row_with_exactly_the_published_keys(tmp_path: Path) -> None:
    row = make_row(Figures(1.0, 2.0, 3.0, 4.0))
    write_json(tmp_path / "rows.jsonl", [row, row])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert list(json.loads(lines[0])) == KEYS


def test_the_table_shows_each_figure_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([make_row(Figures(1.234, None, 1000.4, 2.0), Figures(1.3, None, 1000.4, 2.0))])
    text = capsys.readouterr().out
    assert "1.27 (1.23 to 1.30)" in text
    assert "1000 (1000 to 1000)" in text
    assert "random:tiny, float32, cpu; kernels: reference" in text


def test_only_a_row_with_a_time_per_token_says_what_part_of_reading_it_reaches(
    capsys: pytest.CaptureFixture[str],
) -> None:
    without = make_row(Figures(None, 2.0, 3.0, 4.0))
    print_table([without, msgspec.structs.replace(without, read_gb_s=20.0, of_reading=0.25)])
    assert capsys.readouterr().out.count(" of 20.0 GB/s") == 1
    print_table([without])
    assert "reads weights at" not in capsys.readouterr().out
