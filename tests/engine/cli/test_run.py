"""`triode run` on small models: what it prints where, and how it ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from triode.engine.cli.main import main

TINY = ["random:tiny", "--dtype", "float32", "--kv-cache-bytes", "4000000"]
RAW = [*TINY, "--raw", "-p", "Once upon a time", "--temperature", "0"]

# Until the context is full, which takes longer than any of these tests.
ENDLESS = [*TINY[:-1], "100000000", "--raw", "-p", "Once upon a time", "--ignore-eos"]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "triode.engine.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["run", "--json", *words]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["no-such-model", "-p", "Hello"], 1, "there is no folder or .gguf file 'no-such-model'"),
        ([*TINY, "-p", ""], 2, "--prompt must have at least one character, got ''"),
    ],
)
def test_a_wrong_word_is_told_before_torch_is_imported(words: list[str], status: int, error: str) -> None:
    code = "import sys; from triode.engine.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(status), "False"]
    assert error in done.stderr


def test_text_goes_to_stdout_and_stages_and_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *RAW, "--max-tokens", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.out.endswith("\n")
    *stages, figures = captured.err.splitlines()
    assert any(stage.startswith("Loading weights ...") for stage in stages)
    # Without a rate where the tokens are read together, as on a fast machine or a busy one (`test_reply.py`).
    speed, usage, rest = figures.split("; ")
    assert re.fullmatch(r"TTFT \d+ ms(, \d+\.\d tokens/s)?", speed)
    assert usage == "4 tokens in, 5 out (length)"
    assert rest.startswith("float32 on cpu, kernels: ")


def test_json_is_one_object_with_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *RAW, "--max-tokens", "5"]) == 0
    text = capsys.readouterr().out
    answer = run_json(capsys, *RAW, "--max-tokens", "5", "--logprobs", "2", "--prompt-logprobs", "0")
    (completion,) = answer["completions"]
    assert completion["text"] + "\n" == text
    assert completion["finish_reason"] == "length"
    assert len(completion["logprobs"]) == len(completion["token_ids"]) == 5
    assert len(answer["prompt_logprobs"]) == 3
    assert answer["engine"]["model"] == "random:tiny"
    assert answer["speed"]["ttft_ms"] > 0


def test_flags_reach_the_request_and_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seed", "7", "--temperature", "0.5", "--n", "2", "--block-size-tokens", "32", "--max-tokens", "3"]
    answer = run_json(capsys, *TINY, "--raw", "-p", "Hi", *words)
    assert answer["seed"] == 7
    assert answer["max_tokens"] == 3
    assert [completion["index"] for completion in answer["completions"]] == [0, 1]
    assert answer["engine"]["block_size_tokens"] == 32


def test_a_forced_token_and_a_stop_string_show_in_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    forced = [*TINY, "--raw", "-p", "Hi", "--temperature", "0", "--logit-bias", "504=100", "--max-tokens", "4"]
    assert main(["run", *forced]) == 0
    text = capsys.readouterr().out
    word = text.strip()[: len(text.strip()) // 4]
    assert text.strip() == word * 4
    assert main(["run", *forced, "--stop", word]) == 0
    assert capsys.readouterr().out.strip() == ""


def test_several_samples_are_printed_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, "--raw", "-p", "Hi", "--n", "3", "--seed", "1", "--max-tokens", "3"]
    assert main(["run", *words]) == 0
    printed = capsys.readouterr().out
    texts = [completion["text"] for completion in run_json(capsys, *words)["completions"]]
    assert printed == f"{texts[0]}\n--- sample 2 of 3\n{texts[1]}\n--- sample 3 of 3\n{texts[2]}\n"


def test_a_dash_reads_the_prompt_from_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    from_stdin = run_json(capsys, *TINY, "--raw", "-p", "-", "--temperature", "0", "--max-tokens", "4")
    given = run_json(capsys, *RAW, "--max-tokens", "4")
    texts = [answer["completions"][0]["text"] for answer in (from_stdin, given)]
    assert texts[0] == texts[1]


def test_a_system_message_comes_before_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    short = run_json(capsys, *TINY, "-p", "Hi", "--system", "A", "--max-tokens", "1")
    long = run_json(capsys, *TINY, "-p", "Hi", "--system", "A A A A A A", "--max-tokens", "1")
    added = long["usage"]["prompt_tokens"] - short["usage"]["prompt_tokens"]
    assert added == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RAW, "--temperature", "-1"], "temperature must be 0, or a number >= 1e-06 and <= 100, got -1.0"),
        ([*RAW, "--system", "x"], "--system must not be given with --raw, which sends no chat messages"),
        ([*RAW, "--logprobs", "1"], "--logprobs and --prompt-logprobs must be given with --json"),
        ([*RAW, "--max-tokens", "1000000"], "max_tokens must be <= "),
        ([*RAW, "--kv-cache-fraction", "2"], "kv_cache_fraction must be in (0, 1], got 2.0"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["run", *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("triode: error: ")
    assert message in error
    assert status == 2


def test_a_model_that_is_not_there_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no-such-model", "-p", "x"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("triode: error: there is no folder or .gguf file 'no-such-model'")


def test_ctrl_c_cancels_the_reply_and_ends_with_status_130() -> None:
    with start("run", *ENDLESS) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "TTFT" not in errors


def test_a_reader_that_goes_away_ends_the_run_quietly() -> None:
    with start("run", *ENDLESS) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors


def test_a_real_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["smollm2-135m", "-p", "What is the capital of France?", "--system", "Answer in English."]
    assert main(["run", *question, "--temperature", "0", "--max-tokens", "16", "--kv-cache-bytes", "100000000"]) == 0
    assert "Paris" in capsys.readouterr().out
